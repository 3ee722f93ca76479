// SPDX-License-Identifier: MIT
//
// Zlib: one deflate stream per channel for the whole migration, sync-flushed at the end of each packet and
// never finished (format/packets.md section 4.2). The only header that includes <zlib.h>.
//
//   payload of packet 0:  78 xx | deflate blocks | 00 00 ff ff      (zlib header once per channel)
//   payload of packet n:          deflate blocks | 00 00 ff ff      (empty stored block of the sync flush)
#pragma once

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/compress/detail/looks_random.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/error.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// Compresses pages with zlib. A model of Compressor. Pages that look random are stored, which is 30 times as fast as
/// zlib that finds nothing to compress.
///
/// Cost: a channel's encoder holds about 270 KiB of zlib state, one page and one payload buffer; its decoder about 40
///   KiB. All of it is allocated in open().
struct Zlib {
  static constexpr std::string_view name = "zlib";
  static constexpr std::uint32_t method = wire::flag_zlib;
  static constexpr PayloadForm payload_form = PayloadForm::encoded;

  int level = 1;  ///< 0 (stored), 1 (fastest) to 9 (smallest); for senders, a decoder takes any level

  class Encoder;
  class Decoder;
};

class Zlib::Encoder {
 public:
  /// Allocates everything that encode() will need.
  ///
  /// Errors: bad_option (level; limits beyond 32 bits), ENOMEM.
  [[nodiscard]] static Result<Encoder> open(const Zlib& parameters, const CodecLimits& limits) noexcept {
    if (!level_valid(parameters.level))
      return fail(Errc::bad_option, Stage::setup, "zlib level", static_cast<std::uint64_t>(parameters.level));
    if (limits.payload_bytes > std::numeric_limits<uInt>::max() - flush_slack || limits.page_bytes == 0 ||
        limits.page_bytes > std::numeric_limits<uInt>::max())
      return fail(Errc::bad_option, Stage::setup, "codec limits", limits.payload_bytes);

    Encoder encoder;
    encoder.limits_ = limits;
    encoder.level_ = encoder.deflate_level_ = parameters.level;
    encoder.page_.reset(new (std::nothrow) Bytef[limits.page_bytes]);
    encoder.payload_.reset(new (std::nothrow) Bytef[limits.payload_bytes + flush_slack]);
    auto* const stream = new (std::nothrow) z_stream{};
    if (stream == nullptr) return fail_errno(Stage::setup, "deflateInit", ENOMEM);
    if (deflateInit(stream, parameters.level) != Z_OK) {
      delete stream;
      return fail_errno(Stage::setup, "deflateInit", ENOMEM);
    }
    encoder.stream_.reset(stream);
    if (!encoder.page_ || !encoder.payload_) return fail_errno(Stage::setup, "zlib buffers", ENOMEM);
    return encoder;
  }

  /// Compresses the pages of one packet. Without pages the stream is not touched and the payload is empty.
  ///
  /// zlib does not promise to be memory-safe when its input changes meanwhile, and some builds read the input more than
  /// once. So each page is copied into a private buffer first.
  ///
  /// Params: `pages`: whole pages, which may change meanwhile. Returns: one buffer, valid until the next call.
  /// Errors: payload_too_large; the stream is then out of step with its peer and every later call fails too.
  /// Threads: the channel's. Cost: no allocation; a page is copied before it is compressed. Wire: format/packets.md
  ///   section 4.2.
  [[nodiscard]] Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
    std::size_t left = total_bytes(pages);
    if (left == 0) return ConstBuffers{};
    if (broken_) return too_large();
    stream_->next_out = payload_.get() + std::exchange(held_bytes_, 0);
    stream_->avail_out = static_cast<uInt>(payload_.get() + limits_.payload_bytes + flush_slack - stream_->next_out);
    for (const iovec& run : pages) {
      const auto* source = static_cast<const Bytef*>(run.iov_base);
      for (std::size_t in_run = run.iov_len; in_run != 0;) {
        const std::size_t size = std::min(in_run, limits_.page_bytes);
        std::memcpy(page_.get(), source, size);
        source += size;
        in_run -= size;
        left -= size;
        if (!use_level(level_ != 0 && detail::looks_random(page_.get(), size) ? 0 : level_)) return too_large();
        if (!deflate_page(size, left == 0 ? Z_SYNC_FLUSH : Z_NO_FLUSH)) return too_large();
      }
    }
    const auto produced = static_cast<std::size_t>(stream_->next_out - payload_.get());
    if (produced > limits_.payload_bytes) return too_large();
    result_ = const_buffer(payload_.get(), produced);
    return ConstBuffers(&result_, 1);
  }

  /// Changes the level from the next packet on. The peer need not know.
  ///
  /// Errors: bad_option (level not 0 to 9): the old level stays. Threads: the channel's.
  [[nodiscard]] Result<void> set_level(int new_level) noexcept {
    if (!level_valid(new_level))
      return fail(Errc::bad_option, Stage::encode, "zlib level", static_cast<std::uint64_t>(new_level));
    if (broken_) return too_large();
    // After a sync flush zlib writes nothing here (tested), but its documentation allows it to. Such output belongs to
    // the stream and goes in front of the next packet.
    stream_->next_out = payload_.get() + held_bytes_;
    stream_->avail_out = static_cast<uInt>(limits_.payload_bytes - held_bytes_);
    const bool changed = use_level(new_level);
    held_bytes_ = static_cast<std::size_t>(stream_->next_out - payload_.get());
    if (!changed) return fail(Errc::bad_option, Stage::encode, "deflateParams", static_cast<std::uint64_t>(new_level));
    level_ = new_level;
    return {};
  }

 private:
  struct End {
    void operator()(z_stream* stream) const noexcept {
      deflateEnd(stream);
      delete stream;
    }
  };

  // A sync flush that fills its output to the last byte is not known to be complete; with this much behind
  // the bound a payload of exactly payload_bytes still ends with room to spare.
  static constexpr std::size_t flush_slack = 16;

  Encoder() = default;

  static bool level_valid(int level) noexcept { return level >= 0 && level <= 9; }

  // Ends the current deflate block and begins one of another level; 0 stores. The peer's inflate sees only blocks.
  bool use_level(int wanted) noexcept {
    if (deflate_level_ == wanted) return true;
    stream_->avail_in = 0;
    if (deflateParams(stream_.get(), wanted, Z_DEFAULT_STRATEGY) != Z_OK) return false;
    deflate_level_ = wanted;
    return true;
  }

  bool deflate_page(std::size_t size, int flush) noexcept {
    stream_->next_in = page_.get();
    stream_->avail_in = static_cast<uInt>(size);
    // Z_OK with output space left means that all input is consumed and all output written (zlib.h, deflate()).
    return deflate(stream_.get(), flush) == Z_OK && stream_->avail_out != 0;
  }

  std::unexpected<Error> too_large() noexcept {
    broken_ = true;
    return fail(Errc::payload_too_large, Stage::encode, "deflate", limits_.payload_bytes);
  }

  CodecLimits limits_;
  std::unique_ptr<z_stream, End> stream_;  // on the heap because zlib's state points back at it
  std::unique_ptr<Bytef[]> page_;
  std::unique_ptr<Bytef[]> payload_;
  int level_ = 1;               // as requested
  int deflate_level_ = 1;       // zlib's current level: level_, or 0 after a page that was stored
  std::size_t held_bytes_ = 0;  // bytes that set_level() left at the front of payload_
  iovec result_{};
  bool broken_ = false;
};

class Zlib::Decoder {
 public:
  /// Allocates everything that decode() will need. The level plays no part.
  ///
  /// Errors: bad_option (limits beyond 32 bits), ENOMEM.
  [[nodiscard]] static Result<Decoder> open(const Zlib&, const CodecLimits& limits) noexcept {
    if (limits.payload_bytes > std::numeric_limits<uInt>::max() ||
        limits.packet_bytes > std::numeric_limits<uInt>::max())
      return fail(Errc::bad_option, Stage::setup, "codec limits", limits.payload_bytes);
    auto* const stream = new (std::nothrow) z_stream{};
    if (stream == nullptr) return fail_errno(Stage::setup, "inflateInit", ENOMEM);
    if (inflateInit(stream) != Z_OK) {
      delete stream;
      return fail_errno(Stage::setup, "inflateInit", ENOMEM);
    }
    Decoder decoder;
    decoder.limits_ = limits;
    decoder.stream_.reset(stream);
    if (!decoder.allocate_window()) return fail_errno(Stage::setup, "inflate window", ENOMEM);
    return decoder;
  }

  /// Decompresses the payload of one packet into its pages. Without pages and payload the stream is not touched.
  ///
  /// Errors: payload_too_large (over CodecLimits::payload_bytes), bad_payload_size (pages not filled, or bytes left
  ///   over), corrupt_payload (anything else that is not a sync-flushed piece of one endless zlib stream: damage, a
  ///   missing flush, an end of stream, a preset dictionary). After an error every later call fails too.
  /// Threads: the channel's. Cost: no allocation; never writes outside `pages`. Wire: format/packets.md section 4.2.
  [[nodiscard]] Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    if (broken_) return fail(Errc::corrupt_payload, Stage::decode, "inflate after an error");
    Result<void> result = decode_packet(payload, pages);
    broken_ = !result.has_value();
    return result;
  }

 private:
  struct End {
    void operator()(z_stream* stream) const noexcept {
      inflateEnd(stream);
      delete stream;
    }
  };

  // The length words of the empty stored block, with which every sync flush ends.
  static constexpr std::array<unsigned char, 4> flush_marker = {0x00, 0x00, 0xff, 0xff};

  Decoder() = default;

  // inflate allocates its 32 KiB window at the first use and keeps it over a reset. This is the first use.
  bool allocate_window() noexcept {
    std::array<Bytef, 8> one_byte = {0x78, 0x01, 0x00, 0x01, 0x00, 0xfe, 0xff, 0x00};  // header, stored block
    Bytef out = 0;
    give(one_byte.data(), one_byte.size());
    stream_->next_out = &out;
    stream_->avail_out = 1;
    return inflate(stream_.get(), Z_SYNC_FLUSH) == Z_OK && inflateReset(stream_.get()) == Z_OK;
  }

  void give(const void* bytes, std::size_t size) noexcept {
    stream_->next_in = static_cast<Bytef*>(const_cast<void*>(bytes));  // zlib's interface is not const-correct
    stream_->avail_in = static_cast<uInt>(size);
  }

  [[nodiscard]] Result<void> decode_packet(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    const std::size_t size = payload.size();
    if (size > limits_.payload_bytes) return fail(Errc::payload_too_large, Stage::decode, "inflate", size);
    const std::size_t page_bytes = total_bytes(pages);
    if (page_bytes > limits_.packet_bytes) return fail(Errc::bad_payload_size, Stage::decode, "pages", page_bytes);
    if (page_bytes == 0 && size == 0) return {};
    if (page_bytes == 0 || size == 0) return fail(Errc::bad_payload_size, Stage::decode, "inflate", size);

    // The marker is held back: inflate must have written all pages without it and wait for these bytes only.
    const auto marker = payload.last(std::min(size, flush_marker.size()));
    if (!std::ranges::equal(std::as_bytes(std::span(flush_marker)), marker)) return not_flushed();
    give(payload.data(), size - marker.size());
    for (const iovec& run : pages) {
      stream_->next_out = static_cast<Bytef*>(run.iov_base);
      stream_->avail_out = static_cast<uInt>(run.iov_len);
      while (stream_->avail_out != 0) {
        const auto status = step();
        if (!status) return std::unexpected(status.error());
        // No progress. An empty input alone does not mean that: inflate may still have to write the rest of a match.
        if (*status == Z_BUF_ERROR) return fail(Errc::bad_payload_size, Stage::decode, "inflate: too short", size);
      }
    }
    if (auto ended = expect_no_output(); !ended) return ended;
    if (inflateSyncPoint(stream_.get()) != 1) return not_flushed();
    give(marker.data(), marker.size());
    return expect_no_output();
  }

  static std::unexpected<Error> not_flushed() noexcept {
    return fail(Errc::corrupt_payload, Stage::decode, "inflate: payload does not end with a sync flush");
  }

  // Feeds the rest of the input, with room for one byte of output, which must not come.
  [[nodiscard]] Result<void> expect_no_output() noexcept {
    Bytef beyond = 0;
    stream_->next_out = &beyond;
    stream_->avail_out = 1;
    if (const auto status = step(); !status) return std::unexpected(status.error());
    if (stream_->avail_out != 1 || stream_->avail_in != 0)
      return fail(Errc::bad_payload_size, Stage::decode, "inflate: too long");
    return {};
  }

  // Returns Z_OK, or Z_BUF_ERROR when neither input nor output moved.
  [[nodiscard]] Result<int> step() noexcept {
    const int status = inflate(stream_.get(), Z_SYNC_FLUSH);
    if (status == Z_OK || status == Z_BUF_ERROR) return status;
    const char* what = stream_->msg;  // static text inside zlib
    if (status == Z_STREAM_END) what = "inflate: end of stream";
    if (status == Z_NEED_DICT) what = "inflate: preset dictionary";
    return fail(Errc::corrupt_payload, Stage::decode, what != nullptr ? what : "inflate");
  }

  CodecLimits limits_;
  std::unique_ptr<z_stream, End> stream_;  // on the heap because zlib's state points back at it
  bool broken_ = false;
};

static_assert(check_compressor<Zlib>());
static_assert(HasLiveLevel<Zlib>);

}  // namespace multifd
