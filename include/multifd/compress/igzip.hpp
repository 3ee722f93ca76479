// SPDX-License-Identifier: MIT
//
// Igzip: zlib's wire format, written and read by ISA-L, several times as fast (format/packets.md section 4.2). One
// deflate stream per channel for the whole migration, sync-flushed at the end of each packet and never finished. A peer
// that uses zlib, QEMU among them, cannot tell the difference. The only header that includes ISA-L's, which defines
// macros with short names (SYNC_FLUSH, COMP_OK).
//
//   payload of packet 0:  78 01 | deflate blocks | 00 00 ff ff      (zlib header once per channel)
//   payload of packet n:          deflate blocks | 00 00 ff ff      (empty stored block of the sync flush)
#pragma once

#include <isa-l/igzip_lib.h>

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
#include "multifd/compress/policy.hpp"
#include "multifd/error.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// Compresses pages with ISA-L's igzip into zlib's format; either end may be Zlib instead. A model of Compressor.
///
/// Levels, against zlib 1 called page by page, one core, 128-page packets (bench_codec):
///   1  4 to 5 times as fast, 8 times where random pages are among the others; 1 % fewer to 2 % more bytes
///   2  as fast as 1 and up to 6 % smaller, with 48 KiB more of tables
///   3  2 to 3 times as fast, up to 8 % fewer bytes
/// igzip's level 0 is not offered: it makes random pages larger.
///
/// The level is fixed for the life of a stream: igzip's tables differ from level to level, so there is no set_level().
///
/// Cost: a channel's encoder holds 82 KiB of igzip's state, 148 to 212 KiB of tables, a packet and a payload buffer;
///   its decoder about 85 KiB. All of it is allocated in open().
struct Igzip {
  static constexpr std::string_view name = "igzip";
  static constexpr std::uint32_t method = wire::flag_zlib;
  static constexpr PayloadForm payload_form = PayloadForm::encoded;

  int level = 1;  ///< 1 (fastest) to 3 (smallest); for senders, a decoder takes any level

  class Encoder;
  class Decoder;
};

class Igzip::Encoder {
 public:
  /// Allocates everything that encode() will need.
  ///
  /// Errors: bad_option (level; limits beyond 32 bits), ENOMEM.
  [[nodiscard]] static Result<Encoder> open(const Igzip& parameters, const CodecLimits& limits) noexcept {
    // Blocks of at most 32 Ki symbols: with more, pages of different kinds share one code too often.
    constexpr std::array<std::uint32_t, 4> table_bytes = {0, ISAL_DEF_LVL1_MEDIUM, ISAL_DEF_LVL2_MEDIUM,
                                                          ISAL_DEF_LVL3_MEDIUM};
    if (parameters.level < 1 || parameters.level > ISAL_DEF_MAX_LEVEL)
      return fail(Errc::bad_option, Stage::setup, "igzip level", static_cast<std::uint64_t>(parameters.level));
    constexpr std::size_t most = std::numeric_limits<std::uint32_t>::max();
    if (limits.payload_bytes > most || limits.packet_bytes > most || limits.packet_bytes == 0)
      return fail(Errc::bad_option, Stage::setup, "codec limits", limits.payload_bytes);

    Encoder encoder;
    encoder.limits_ = limits;
    encoder.packet_.reset(new (std::nothrow) std::uint8_t[limits.packet_bytes]);
    encoder.payload_.reset(new (std::nothrow) std::uint8_t[limits.payload_bytes]);
    encoder.tables_.reset(new (std::nothrow) std::uint8_t[table_bytes[static_cast<std::size_t>(parameters.level)]]);
    encoder.stream_.reset(new (std::nothrow) isal_zstream{});
    if (!encoder.packet_ || !encoder.payload_ || !encoder.tables_ || !encoder.stream_)
      return fail_errno(Stage::setup, "igzip buffers", ENOMEM);
    isal_zstream& stream = *encoder.stream_;
    isal_deflate_init(&stream);
    stream.level = static_cast<std::uint32_t>(parameters.level);
    stream.level_buf = encoder.tables_.get();
    stream.level_buf_size = table_bytes[static_cast<std::size_t>(parameters.level)];
    // Raw deflate behind a header of ours: igzip then computes no checksum, which only a finished stream would have.
    stream.gzip_flag = IGZIP_DEFLATE;
    return encoder;
  }

  /// Compresses the pages of one packet. Without pages the stream is not touched and the payload is empty.
  ///
  /// igzip reads its input more than once, and guest memory changes meanwhile, so the pages are copied first. All pages
  /// of a packet are copied together, because igzip is much faster when it gets a packet in one call.
  ///
  /// Params: `pages`: whole pages, which may change meanwhile. Returns: one buffer, valid until the next call.
  /// Errors: payload_too_large; the stream is then out of step with its peer and every later call fails too.
  /// Threads: the channel's. Cost: no allocation; a packet is copied before it is compressed. Wire: format/packets.md
  ///   section 4.2.
  [[nodiscard]] Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
    std::size_t left = total_bytes(pages);
    if (left == 0) return ConstBuffers{};
    if (broken_ || limits_.payload_bytes < zlib_header.size()) return too_large();
    const std::size_t header_bytes = std::exchange(started_, true) ? 0 : zlib_header.size();
    std::copy_n(zlib_header.begin(), header_bytes, payload_.get());
    stream_->next_out = payload_.get() + header_bytes;
    stream_->avail_out = static_cast<std::uint32_t>(limits_.payload_bytes - header_bytes);

    std::size_t gathered = 0;
    for (const iovec& run : pages) {
      const auto* source = static_cast<const std::uint8_t*>(run.iov_base);
      for (std::size_t in_run = run.iov_len; in_run != 0;) {
        const std::size_t size = std::min(in_run, limits_.packet_bytes - gathered);
        std::memcpy(packet_.get() + gathered, source, size);
        source += size;
        in_run -= size;
        left -= size;
        gathered += size;
        if (gathered != limits_.packet_bytes && left != 0) continue;
        if (!deflate_gathered(std::exchange(gathered, 0), left == 0 ? SYNC_FLUSH : NO_FLUSH)) return too_large();
      }
    }
    result_ = const_buffer(payload_.get(), limits_.payload_bytes - stream_->avail_out);
    return ConstBuffers(&result_, 1);
  }

 private:
  // RFC 1950: deflate, a window of 32 KiB, no dictionary, "fastest".
  static constexpr std::array<std::uint8_t, 2> zlib_header = {0x78, 0x01};

  Encoder() = default;

  bool deflate_gathered(std::size_t size, int flush) noexcept {
    stream_->next_in = packet_.get();
    stream_->avail_in = static_cast<std::uint32_t>(size);
    stream_->flush = static_cast<std::uint16_t>(flush);
    // Output space left means that everything requested is written (igzip_lib.h, isal_deflate()).
    return isal_deflate(stream_.get()) == COMP_OK && stream_->avail_in == 0 && stream_->avail_out != 0;
  }

  std::unexpected<Error> too_large() noexcept {
    broken_ = true;
    return fail(Errc::payload_too_large, Stage::encode, "isal_deflate", limits_.payload_bytes);
  }

  CodecLimits limits_;
  std::unique_ptr<isal_zstream> stream_;
  std::unique_ptr<std::uint8_t[]> tables_;
  std::unique_ptr<std::uint8_t[]> packet_;
  std::unique_ptr<std::uint8_t[]> payload_;
  iovec result_{};
  bool started_ = false;
  bool broken_ = false;
};

class Igzip::Decoder {
 public:
  /// Allocates everything that decode() will need. The level plays no part.
  ///
  /// Errors: bad_option (limits beyond 32 bits), ENOMEM.
  [[nodiscard]] static Result<Decoder> open(const Igzip&, const CodecLimits& limits) noexcept {
    constexpr std::size_t most = std::numeric_limits<std::uint32_t>::max();
    if (limits.payload_bytes > most || limits.packet_bytes > most)
      return fail(Errc::bad_option, Stage::setup, "codec limits", limits.payload_bytes);
    Decoder decoder;
    decoder.limits_ = limits;
    decoder.state_.reset(new (std::nothrow) inflate_state{});
    if (!decoder.state_) return fail_errno(Stage::setup, "isal_inflate_init", ENOMEM);
    isal_inflate_init(decoder.state_.get());
    decoder.state_->crc_flag = ISAL_DEFLATE;  // raw: there is no checksum, and the header is parsed here
    return decoder;
  }

  /// Decompresses the payload of one packet into its pages. Without pages and payload the stream is not touched.
  ///
  /// Errors: as Zlib's: payload_too_large (over CodecLimits::payload_bytes), bad_payload_size (pages not filled, or
  ///   bytes left over), corrupt_payload (anything else that is not a sync-flushed piece of one endless zlib stream).
  ///   After an error every later call fails too.
  /// Threads: the channel's. Cost: no allocation; never writes outside `pages`. Wire: format/packets.md section 4.2.
  [[nodiscard]] Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    if (broken_) return fail(Errc::corrupt_payload, Stage::decode, "isal_inflate after an error");
    Result<void> result = decode_packet(payload, pages);
    broken_ = !result.has_value();
    return result;
  }

 private:
  // The length words of the empty stored block, with which every sync flush ends.
  static constexpr std::array<unsigned char, 4> flush_marker = {0x00, 0x00, 0xff, 0xff};

  Decoder() = default;

  [[nodiscard]] Result<void> decode_packet(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    const std::size_t size = payload.size();
    if (size > limits_.payload_bytes) return fail(Errc::payload_too_large, Stage::decode, "isal_inflate", size);
    const std::size_t page_bytes = total_bytes(pages);
    if (page_bytes > limits_.packet_bytes) return fail(Errc::bad_payload_size, Stage::decode, "pages", page_bytes);
    if (page_bytes == 0 && size == 0) return {};
    if (page_bytes == 0 || size == 0) return fail(Errc::bad_payload_size, Stage::decode, "isal_inflate", size);

    // The marker is held back: igzip must have written all pages without it, and must write nothing for it.
    const auto marker = payload.last(std::min(size, flush_marker.size()));
    if (!std::ranges::equal(std::as_bytes(std::span(flush_marker)), marker)) return not_flushed();
    payload = payload.first(size - marker.size());
    if (!std::exchange(started_, true)) {
      if (!is_zlib_header(payload)) return fail(Errc::corrupt_payload, Stage::decode, "igzip: no zlib header", size);
      payload = payload.subspan(2);
    }
    give(payload);
    for (const iovec& run : pages) {
      state_->next_out = static_cast<std::uint8_t*>(run.iov_base);
      state_->avail_out = static_cast<std::uint32_t>(run.iov_len);
      while (state_->avail_out != 0) {
        const std::size_t before = std::size_t{state_->avail_in} + state_->avail_out;
        if (auto stepped = step(); !stepped) return stepped;
        if (std::size_t{state_->avail_in} + state_->avail_out == before)
          return fail(Errc::bad_payload_size, Stage::decode, "isal_inflate: too short", size);
      }
    }
    if (auto ended = expect_no_output(); !ended) return ended;
    give(marker);
    if (auto ended = expect_no_output(); !ended) return ended;
    // igzip is between two blocks and has no bit of the next header. As no output came, the marker was a flush's block.
    const bool between_blocks = state_->block_state == ISAL_BLOCK_NEW_HDR || state_->block_state == ISAL_BLOCK_HDR;
    if (!between_blocks || state_->read_in_length != 0 || state_->tmp_in_size != 0) return not_flushed();
    return {};
  }

  // RFC 1950: method deflate, a window of up to 32 KiB, no dictionary.
  static bool is_zlib_header(std::span<const std::byte> payload) noexcept {
    if (payload.size() < 2) return false;
    const unsigned method_and_window = std::to_integer<unsigned>(payload[0]);
    const unsigned flags = std::to_integer<unsigned>(payload[1]);
    return (method_and_window & 0x0f) == 8 && method_and_window >> 4 <= 7 && (flags & 0x20) == 0 &&
           (method_and_window * 256 + flags) % 31 == 0;
  }

  static std::unexpected<Error> not_flushed() noexcept {
    return fail(Errc::corrupt_payload, Stage::decode, "igzip: payload does not end with a sync flush");
  }

  void give(std::span<const std::byte> bytes) noexcept {
    // igzip's interface is not const-correct.
    state_->next_in = const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(bytes.data()));
    state_->avail_in = static_cast<std::uint32_t>(bytes.size());
  }

  // Feeds the rest of the input, with room for one byte of output, which must not come.
  [[nodiscard]] Result<void> expect_no_output() noexcept {
    std::uint8_t beyond = 0;
    state_->next_out = &beyond;
    state_->avail_out = 1;
    if (auto stepped = step(); !stepped) return stepped;
    if (state_->avail_out != 1 || state_->avail_in != 0)
      return fail(Errc::bad_payload_size, Stage::decode, "isal_inflate: too long");
    return {};
  }

  [[nodiscard]] Result<void> step() noexcept {
    const char* what = "isal_inflate";
    switch (isal_inflate(state_.get())) {
      case ISAL_DECOMP_OK:
        if (state_->block_state != ISAL_BLOCK_INPUT_DONE && state_->block_state != ISAL_BLOCK_FINISH) return {};
        what = "isal_inflate: end of stream";
        break;
      case ISAL_INVALID_BLOCK: what = "isal_inflate: invalid block"; break;
      case ISAL_INVALID_SYMBOL: what = "isal_inflate: invalid symbol"; break;
      case ISAL_INVALID_LOOKBACK: what = "isal_inflate: match from before the first byte"; break;
      default: break;
    }
    return fail(Errc::corrupt_payload, Stage::decode, what);
  }

  CodecLimits limits_;
  std::unique_ptr<inflate_state> state_;
  bool started_ = false;
  bool broken_ = false;
};

static_assert(check_compressor<Igzip>());

}  // namespace multifd
