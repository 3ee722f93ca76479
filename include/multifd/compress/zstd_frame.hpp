// SPDX-License-Identifier: MIT
//
// Zstd frames that stand for themselves, one per call: pieces of compressed images (format/seekable_zstd.md section 20).
// Channels have frames without an end instead: compress/zstd.hpp.
#pragma once

#include <zstd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>

#include "multifd/error.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// Makes frames with content size and checksum in them, which every zstd decompresses.
///
/// Threads: one at a time.
class ZstdFrameEncoder {
 public:
  /// Allocates everything that encode() will need.
  ///
  /// Params: `level`: as Zstd::level has it; `most_content_bytes`: of one frame.
  /// Errors: Errc::bad_option (level); ENOMEM.
  /// Cost: allocates zstd's workspace, about 0.5 MiB at level 1 and 256 KiB, 3 MiB at level 19.
  [[nodiscard]] static Result<ZstdFrameEncoder> create(int level, std::size_t most_content_bytes) noexcept {
    if (level < ZSTD_minCLevel() || level > ZSTD_maxCLevel())
      return fail(Errc::bad_option, Stage::setup, "zstd level", static_cast<std::uint64_t>(level));
    ZstdFrameEncoder encoder;
    encoder.context_.reset(ZSTD_createCCtx());
    ZSTD_CCtx* const context = encoder.context_.get();
    // A frame of the largest size is begun and dropped: zstd allocates its workspace with the first byte.
    const bool ready =
        context != nullptr && !ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1)) && encoder.reserve(most_content_bytes);
    if (!ready) return fail_errno(Stage::setup, "ZSTD_createCCtx", ENOMEM);
    return encoder;
  }

  /// The most bytes that a frame takes.
  static std::size_t bound(std::size_t content_bytes) noexcept { return ZSTD_compressBound(content_bytes); }

  /// Compresses `content`, which must not change meanwhile, to one frame at the front of `to`. Returns its size.
  ///
  /// Errors: Errc::payload_too_large: `to` is too small, which bound() never is; ENOMEM.
  /// Cost: no allocation up to the size that create() was told.
  [[nodiscard]] Result<std::size_t> encode(std::span<const std::byte> content, std::span<std::byte> to) noexcept {
    const std::size_t bytes = ZSTD_compress2(context_.get(), to.data(), to.size(), content.data(), content.size());
    if (!ZSTD_isError(bytes)) return bytes;
    if (to.size() >= bound(content.size())) return fail_errno(Stage::encode, ZSTD_getErrorName(bytes), ENOMEM);
    return fail(Errc::payload_too_large, Stage::encode, ZSTD_getErrorName(bytes), content.size(), to.size());
  }

 private:
  struct Free {
    void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
  };

  ZstdFrameEncoder() = default;

  bool reserve(std::size_t most_content_bytes) noexcept {
    ZSTD_CCtx* const context = context_.get();
    const std::unique_ptr<std::byte[]> content(new (std::nothrow) std::byte[most_content_bytes]());
    const std::size_t room = bound(most_content_bytes);
    const std::unique_ptr<std::byte[]> frame(new (std::nothrow) std::byte[room]);
    return content && frame &&
           !ZSTD_isError(ZSTD_compress2(context, frame.get(), room, content.get(), most_content_bytes));
  }

  std::unique_ptr<ZSTD_CCtx, Free> context_;
};

/// Whether a frame has to say how long its content is.
enum class ZstdContentSize : std::uint8_t { required, may_be_absent };

/// Takes such frames apart, and others' if they hold no more than they are said to.
///
/// Threads: one at a time.
class ZstdFrameDecoder {
 public:
  /// Errors: ENOMEM. Cost: allocates about 160 KiB; decode() nothing, whatever a frame says: the content goes straight to
  ///   its place, so there is no window.
  [[nodiscard]] static Result<ZstdFrameDecoder> create() noexcept {
    ZstdFrameDecoder decoder;
    decoder.context_.reset(ZSTD_createDCtx());
    if (!decoder.context_) return fail_errno(Stage::setup, "ZSTD_createDCtx", ENOMEM);
    return decoder;
  }

  /// Decompresses one frame, which has to be all of `frame` and to fill all of `to`.
  ///
  /// Returns: the checksum of the content, where the frame has one; it has been compared then.
  /// Errors: Errc::corrupt_frame: anything else, also a dictionary and zstd's formats of before 1.0; `to` may have been
  ///   written to.
  [[nodiscard]] Result<std::optional<std::uint32_t>> decode(std::span<const std::byte> frame, std::span<std::byte> to,
                                                            ZstdContentSize size) noexcept {
    constexpr std::size_t least = 9;  // magic, descriptor, size, one block's header
    if (frame.size() < least || wire::load_le<std::uint32_t>(frame.data()) != ZSTD_MAGICNUMBER)
      return fail(Errc::corrupt_frame, Stage::decode, "zstd: no frame");
    const unsigned long long said = ZSTD_getFrameContentSize(frame.data(), frame.size());
    const bool absent = said == ZSTD_CONTENTSIZE_UNKNOWN;
    if (said != to.size() && !(absent && size == ZstdContentSize::may_be_absent))
      return fail(Errc::corrupt_frame, Stage::decode, "zstd: content size");
    // ZSTD_decompressDCtx() takes several frames in a row.
    if (ZSTD_findFrameCompressedSize(frame.data(), frame.size()) != frame.size())
      return fail(Errc::corrupt_frame, Stage::decode, "zstd: frame size");
    const std::size_t got = ZSTD_decompressDCtx(context_.get(), to.data(), to.size(), frame.data(), frame.size());
    if (ZSTD_isError(got)) return fail(Errc::corrupt_frame, Stage::decode, ZSTD_getErrorName(got));
    if (got != to.size()) return fail(Errc::corrupt_frame, Stage::decode, "zstd: content size");
    const bool has_checksum = (frame[4] & std::byte{4}) != std::byte{0};
    if (!has_checksum) return std::nullopt;
    return wire::load_le<std::uint32_t>(&frame[frame.size() - 4]);
  }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
  };

  ZstdFrameDecoder() = default;

  std::unique_ptr<ZSTD_DCtx, Free> context_;
};

}  // namespace multifd
