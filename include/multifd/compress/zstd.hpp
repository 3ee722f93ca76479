// SPDX-License-Identifier: MIT
//
// Zstd: one frame per channel for the whole migration, flushed at the end of each packet and never ended
// (format/packets.md section 4.3). The only header that includes <zstd.h>.
//
//   payload of packet 0:  28 b5 2f fd .. | blocks   (frame header once per channel, no size, no checksum)
//   payload of packet n:                   blocks   (whole blocks, none of them marked as the last)
#pragma once

// For ZSTD_initStaticDStream: the only way to allocate all decoder memory before the peer's first byte.
#if !defined(ZSTD_STATIC_LINKING_ONLY)
#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>
#undef ZSTD_STATIC_LINKING_ONLY
#else
#include <zstd.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <string_view>

#include "multifd/buffers.hpp"
#include "multifd/compress/detail/looks_random.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/error.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// Compresses pages with zstd. A model of Compressor.
///
/// The level is fixed for the life of a stream: single-threaded zstd takes a new one only at the next frame, and a
/// channel has just one frame. There is no set_level() for that reason.
///
/// Cost: all memory is allocated in open(). A decoder reserves ZSTD_estimateDStreamSize(2^max_window_log), 128.6 MiB at
///   the default, but touches only what the peer's window needs (about 1 MiB at level 1), so the rest is address space
///   unless memory is locked (mlockall) or overcommit is off: lower max_window_log there.
struct Zstd {
  static constexpr std::string_view name = "zstd";
  static constexpr std::uint32_t method = wire::flag_zstd;
  static constexpr PayloadForm payload_form = PayloadForm::encoded;

  /// Highest window that peers accept (zstd's default limit, and QEMU's).
  static constexpr int largest_window_log = 27;
  /// Lowest window that the format has.
  static constexpr int smallest_window_log = 10;

  /// ZSTD_minCLevel() to ZSTD_maxCLevel(), 0 meaning zstd's default (3). QEMU's own setting stops at 0 and
  /// 20, but the level is not on the wire: every decoder takes every level. Senders only.
  ///
  /// Level 1 and the levels below it use smaller windows and tables than zstd's own, which do not fit a core's L1 and
  /// L2 caches. One core, against zstd 1 with its defaults and pages put in one by one, 128-page packets, Linux x86-64:
  ///
  ///   level                     1    -1    -2    -3    -5    -8   -10   -20   -50
  ///   mixed      compress     1.1   1.5   1.6   1.7   2.0   2.5   2.8   3.9   4.8
  ///              decompress   1.0   1.7   1.7   1.7   1.9   2.5   2.7   3.8   4.8
  ///              bytes       0.99  1.06  1.08  1.11  1.20  1.25  1.30  1.37  1.44
  ///   libraries  compress     1.1   1.3   1.5   1.6   2.1   2.7   2.9   3.3   5.9
  ///              decompress   1.0   1.6   1.7   2.1   2.2   2.5   3.1   3.2   4.5
  ///              bytes       1.04  1.30  1.36  1.45  1.62  1.73  1.78  1.96  2.25
  ///
  /// bench_codec measures these anew. Data that compresses very well with zstd 1 loses most: 6:1 becomes
  /// 4:1 at -2.
  int level = 1;
  /// Window of 2^window_log bytes, 10 to 27. 0, the default, leaves the window to the level. A larger one compresses
  /// better and needs more memory at both ends. Senders only; most callers leave it alone.
  int window_log = 0;
  /// The largest window that a decoder accepts, 10 to 27, as power of two; it bounds the decoder's memory. Lower it
  /// where memory is locked; a stream with a larger window is refused then. Senders' levels need 17 (level 1 and below;
  /// 19 as zstd and QEMU have them), up to 23 (level 19), 25, 26, 27 (levels 20, 21, 22). Receivers only.
  int max_window_log = largest_window_log;

  class Encoder;
  class Decoder;
};

class Zstd::Encoder {
 public:
  /// Allocates everything that encode() will need.
  ///
  /// Errors: bad_option (level, window_log), ENOMEM.
  [[nodiscard]] static Result<Encoder> open(const Zstd& parameters, const CodecLimits& limits) noexcept {
    if (parameters.level < ZSTD_minCLevel() || parameters.level > ZSTD_maxCLevel())
      return fail(Errc::bad_option, Stage::setup, "zstd level", static_cast<std::uint64_t>(parameters.level));
    if (parameters.window_log != 0 &&
        (parameters.window_log < smallest_window_log || parameters.window_log > largest_window_log))
      return fail(Errc::bad_option, Stage::setup, "zstd window_log", static_cast<std::uint64_t>(parameters.window_log));
    if (limits.page_bytes == 0) return fail(Errc::bad_option, Stage::setup, "codec limits", limits.page_bytes);

    Encoder encoder;
    encoder.limits_ = limits;
    encoder.stream_.reset(ZSTD_createCCtx());
    encoder.payload_.reset(new (std::nothrow) std::byte[limits.payload_bytes]);
    if (!encoder.stream_ || !encoder.payload_) return fail_errno(Stage::setup, "ZSTD_createCCtx", ENOMEM);
    if (!encoder.configure(parameters)) return fail_errno(Stage::setup, "zstd workspace", ENOMEM);
    return encoder;
  }

  /// Compresses the pages of one packet. Without pages the stream is not touched and the payload is empty.
  ///
  /// zstd in streaming mode copies its input into its own window buffer before it reads it, so pages may change
  /// meanwhile. (Only ZSTD_e_end, which is not used here, reads input in place.)
  ///
  /// Params: `pages`: whole pages, which may change meanwhile. Returns: one buffer, valid until the next call.
  /// Errors: payload_too_large; the stream is then out of step with its peer and every later call fails too.
  /// Threads: the channel's. Cost: no allocation; zstd copies every page into its window. Wire: format/packets.md
  ///   section 4.3.
  [[nodiscard]] Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
    std::size_t left = total_bytes(pages);
    if (left == 0) return ConstBuffers{};
    if (broken_) return too_large();
    ZSTD_outBuffer out{payload_.get(), limits_.payload_bytes, 0};
    bool block_open = false;  // zstd holds pages of a block that is not written yet
    for (const iovec& run : pages) {
      std::span<const std::byte> bytes(static_cast<const std::byte*>(run.iov_base), run.iov_len);
      std::size_t random_bytes = 0;  // at the front, as the stretch before has found
      while (!bytes.empty()) {
        const Stretch stretch = first_stretch(bytes, random_bytes);
        random_bytes = stretch.random_behind;
        left -= stretch.size;
        const bool flush = stretch.random || left == 0;
        if (stretch.random && block_open && !compress({}, out, ZSTD_e_flush)) return too_large();
        if (!compress(bytes.first(stretch.size), out, flush ? ZSTD_e_flush : ZSTD_e_continue)) return too_large();
        block_open = !flush;
        bytes = bytes.subspan(stretch.size);
      }
    }
    result_ = const_buffer(payload_.get(), out.pos);
    return ConstBuffers(&result_, 1);
  }

 private:
  struct Free {
    void operator()(ZSTD_CCtx* stream) const noexcept { ZSTD_freeCCtx(stream); }
  };

  struct Stretch {
    std::size_t size = 0;
    bool random = false;
    std::size_t random_behind = 0;  // bytes behind it that are known to be random
  };

  // Random pages get blocks of their own: zstd then stores them as they are, and the code that it makes for the bytes
  // around them is not spoiled. Blocks have a price, so a few random pages do not get one.
  static constexpr std::size_t least_random_bytes = 16 * 1024;

  Encoder() = default;

  // The pages at the front that are all random, or all not. `random_bytes` at the front are known to be random.
  Stretch first_stretch(std::span<const std::byte> bytes, std::size_t random_bytes) const noexcept {
    std::size_t end = random_bytes;  // random_bytes: of the pages in a row before it
    while (end < bytes.size()) {
      const std::size_t size = std::min(limits_.page_bytes, bytes.size() - end);
      const bool random = detail::looks_random(bytes.data() + end, size);
      if (!random && random_bytes == end && random_bytes >= least_random_bytes) return {end, true, 0};
      end += size;
      random_bytes = random ? random_bytes + size : 0;
      if (random_bytes >= least_random_bytes && random_bytes != end) return {end - random_bytes, false, random_bytes};
    }
    return {end, random_bytes >= least_random_bytes, 0};
  }

  // Gives levels 1 and below smaller windows and tables than zstd's own, which fit a core's caches. The negative levels
  // differ from each other as in zstd: by the step of the search.
  static bool tune(ZSTD_CCtx* stream, int level) noexcept {
    if (level > 1 || level == 0) return true;
    const int hash_log = level == 1 ? 12 : level > -5 ? 11 : 10;
    const int min_match = level == 1 ? 6 : 7;
    return !ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_windowLog, 17)) &&
           !ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_hashLog, hash_log)) &&
           !ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_minMatch, min_match));
  }

  // Sets the parameters, then starts a frame and drops it: zstd allocates its workspace at the first byte of
  // a frame and keeps it over a reset.
  bool configure(const Zstd& parameters) noexcept {
    ZSTD_CCtx* const stream = stream_.get();
    if (ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_compressionLevel, parameters.level))) return false;
    if (!tune(stream, parameters.level)) return false;
    if (parameters.window_log != 0 &&
        ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_windowLog, parameters.window_log)))
      return false;
    if (ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_checksumFlag, 0))) return false;
    if (ZSTD_isError(ZSTD_CCtx_setParameter(stream, ZSTD_c_contentSizeFlag, 0))) return false;
    const std::byte byte{};
    ZSTD_inBuffer in{&byte, 1, 0};
    ZSTD_outBuffer out{payload_.get(), limits_.payload_bytes, 0};
    if (ZSTD_isError(ZSTD_compressStream2(stream, &out, &in, ZSTD_e_flush))) return false;
    return !ZSTD_isError(ZSTD_CCtx_reset(stream, ZSTD_reset_session_only));
  }

  bool compress(std::span<const std::byte> bytes, ZSTD_outBuffer& out, ZSTD_EndDirective directive) noexcept {
    ZSTD_inBuffer in{bytes.data(), bytes.size(), 0};
    while (true) {
      const std::size_t pending = ZSTD_compressStream2(stream_.get(), &out, &in, directive);
      if (ZSTD_isError(pending)) return false;
      if (directive == ZSTD_e_flush ? pending == 0 : in.pos == in.size) return true;
      if (out.pos == out.size) return false;
    }
  }

  std::unexpected<Error> too_large() noexcept {
    broken_ = true;
    return fail(Errc::payload_too_large, Stage::encode, "ZSTD_compressStream2", limits_.payload_bytes);
  }

  CodecLimits limits_;
  std::unique_ptr<ZSTD_CCtx, Free> stream_;
  std::unique_ptr<std::byte[]> payload_;
  iovec result_{};
  bool broken_ = false;
};

class Zstd::Decoder {
 public:
  /// Allocates everything that decode() will need. Level and window_log play no part.
  ///
  /// Errors: bad_option (max_window_log), ENOMEM.
  [[nodiscard]] static Result<Decoder> open(const Zstd& parameters, const CodecLimits& limits) noexcept {
    const int window_log = parameters.max_window_log;
    if (window_log < smallest_window_log || window_log > largest_window_log)
      return fail(Errc::bad_option, Stage::setup, "zstd max_window_log", static_cast<std::uint64_t>(window_log));
    // A static stream takes its buffers for the peer's window, whose size comes with the first packet, from this memory
    // and never allocates. It also refuses zstd's pre-1.0 formats, whose decoders are not safe on a network's input.
    const std::size_t size = ZSTD_estimateDStreamSize(std::size_t{1} << window_log);
    void* const memory = std::malloc(size);
    if (memory == nullptr) return fail_errno(Stage::setup, "zstd window", ENOMEM);
    Decoder decoder;
    decoder.limits_ = limits;
    decoder.stream_.reset(ZSTD_initStaticDStream(memory, size));
    if (!decoder.stream_) {
      std::free(memory);
      return fail_errno(Stage::setup, "ZSTD_initStaticDStream", ENOMEM);
    }
    if (ZSTD_isError(ZSTD_DCtx_setParameter(decoder.stream_.get(), ZSTD_d_windowLogMax, window_log)))
      return fail(Errc::bad_option, Stage::setup, "zstd max_window_log", static_cast<std::uint64_t>(window_log));
    return decoder;
  }

  /// Decompresses the payload of one packet into its pages. Without pages and payload the stream is not touched.
  ///
  /// Errors: payload_too_large (over CodecLimits::payload_bytes), bad_payload_size (pages not filled, or bytes left
  ///   over), corrupt_payload (anything else that is not whole blocks of one endless zstd frame: damage, an end of
  ///   frame, a dictionary, a window over max_window_log). After an error every later call fails too.
  /// Threads: the channel's. Cost: no allocation; never writes outside `pages`. Wire: format/packets.md section 4.3.
  [[nodiscard]] Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    if (broken_) return fail(Errc::corrupt_payload, Stage::decode, "zstd after an error");
    Result<void> result = decode_packet(payload, pages);
    broken_ = !result.has_value();
    return result;
  }

 private:
  // The stream is at the start of the memory that ZSTD_initStaticDStream got, so freeing that memory is enough.
  struct Free {
    void operator()(ZSTD_DStream* stream) const noexcept { std::free(stream); }
  };

  // How many bytes zstd asks for between two blocks: the next block's header. Inside a block, or inside a header, it
  // asks for another number.
  static constexpr std::size_t block_header_bytes = 3;

  Decoder() = default;

  [[nodiscard]] Result<void> decode_packet(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    const std::size_t size = payload.size();
    if (size > limits_.payload_bytes) return fail(Errc::payload_too_large, Stage::decode, "zstd", size);
    const std::size_t page_bytes = total_bytes(pages);
    if (page_bytes > limits_.packet_bytes) return fail(Errc::bad_payload_size, Stage::decode, "pages", page_bytes);
    if (page_bytes == 0 && size == 0) return {};
    if (page_bytes == 0 || size == 0) return fail(Errc::bad_payload_size, Stage::decode, "zstd", size);

    ZSTD_inBuffer in{payload.data(), size, 0};
    for (const iovec& run : pages) {
      ZSTD_outBuffer out{run.iov_base, run.iov_len, 0};
      while (out.pos != out.size) {
        const std::size_t before = in.pos + out.pos;
        if (auto wanted = step(in, out); !wanted) return std::unexpected(wanted.error());
        if (in.pos + out.pos == before) return fail(Errc::bad_payload_size, Stage::decode, "zstd: too short", size);
      }
    }
    // Room for one byte of output, which must not come.
    std::byte beyond{};
    ZSTD_outBuffer out{&beyond, 1, 0};
    const auto wanted = step(in, out);
    if (!wanted) return std::unexpected(wanted.error());
    if (out.pos != 0 || in.pos != in.size) return fail(Errc::bad_payload_size, Stage::decode, "zstd: too long", size);
    if (*wanted != block_header_bytes)
      return fail(Errc::corrupt_payload, Stage::decode, "zstd: ends inside a block", size);
    return {};
  }

  // Returns how many bytes zstd asks for next.
  [[nodiscard]] Result<std::size_t> step(ZSTD_inBuffer& in, ZSTD_outBuffer& out) noexcept {
    const std::size_t wanted = ZSTD_decompressStream(stream_.get(), &out, &in);
    if (ZSTD_isError(wanted)) return fail(Errc::corrupt_payload, Stage::decode, ZSTD_getErrorName(wanted), in.size);
    if (wanted == 0) return fail(Errc::corrupt_payload, Stage::decode, "zstd: end of frame", in.size);
    return wanted;
  }

  CodecLimits limits_;
  std::unique_ptr<ZSTD_DStream, Free> stream_;
  bool broken_ = false;
};

static_assert(check_compressor<Zstd>());

}  // namespace multifd
