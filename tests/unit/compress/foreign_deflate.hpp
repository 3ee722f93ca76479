// SPDX-License-Identifier: MIT
//
// zlib's format from the other side: what plain zlib makes and reads, for the tests of our readers and writers of it.
#pragma once

#include <doctest/doctest.h>
#include <zlib.h>

#include "unit/compress/packets.hpp"

namespace codec_payloads {

/// A sender that is not ours: plain zlib.
class ForeignDeflate {
 public:
  explicit ForeignDeflate(int level = 6, int window_bits = 15) {
    REQUIRE(deflateInit2(&stream_, level, Z_DEFLATED, window_bits, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  }
  ~ForeignDeflate() { deflateEnd(&stream_); }
  ForeignDeflate(const ForeignDeflate&) = delete;
  ForeignDeflate& operator=(const ForeignDeflate&) = delete;

  Bytes packet(const Bytes& content, int flush = Z_SYNC_FLUSH) {
    Bytes out(content.size() + content.size() / 8 + 256 * 1024);
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(content.data()));
    stream_.avail_in = static_cast<uInt>(content.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    REQUIRE(deflate(&stream_, flush) == (flush == Z_FINISH ? Z_STREAM_END : Z_OK));
    REQUIRE(stream_.avail_in == 0);
    REQUIRE(stream_.avail_out != 0);
    out.resize(out.size() - stream_.avail_out);
    return out;
  }

  z_stream* get() { return &stream_; }

 private:
  z_stream stream_{};
};

/// What plain zlib makes of payloads in a row.
inline Bytes plain_inflate(const Bytes& payloads, std::size_t size) {
  Bytes out(size + 1);
  z_stream stream{};
  REQUIRE(inflateInit(&stream) == Z_OK);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(payloads.data()));
  stream.avail_in = static_cast<uInt>(payloads.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  CHECK(inflate(&stream, Z_SYNC_FLUSH) == Z_OK);
  CHECK(stream.avail_in == 0);
  out.resize(out.size() - stream.avail_out);
  inflateEnd(&stream);
  return out;
}

/// How a sync flush ends.
inline const Bytes sync_marker = bytes_of({0x00, 0x00, 0xff, 0xff});

inline bool ends_with_marker(const Bytes& payload) {
  return payload.size() > 4 && Bytes(payload.end() - 4, payload.end()) == sync_marker;
}

}  // namespace codec_payloads
