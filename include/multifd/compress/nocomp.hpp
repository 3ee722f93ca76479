// SPDX-License-Identifier: MIT
//
// NoComp: the payload is the pages themselves (format/packets.md section 4.1). Nothing is copied: the encoder returns
// the buffers that it got, and a receiver reads straight into guest memory, because payload_form is `pages`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "multifd/buffers.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/error.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// Sends pages uncompressed. A model of Compressor.
struct NoComp {
  static constexpr std::string_view name = "none";
  static constexpr std::uint32_t method = wire::flag_none;
  static constexpr PayloadForm payload_form = PayloadForm::pages;

  class Encoder;
  class Decoder;
};

class NoComp::Encoder {
 public:
  [[nodiscard]] static Result<Encoder> open(const NoComp&, const CodecLimits&) noexcept { return Encoder{}; }

  /// Returns the buffers that it got. Reads nothing, so pages may change.
  [[nodiscard]] Result<ConstBuffers> encode(ConstBuffers pages) noexcept { return pages; }
};

class NoComp::Decoder {
 public:
  [[nodiscard]] static Result<Decoder> open(const NoComp&, const CodecLimits&) noexcept { return Decoder{}; }

  /// Copies a payload into pages. Receivers do not call it (payload_form is `pages`); it serves generic code.
  ///
  /// Errors: bad_payload_size, when the payload is not exactly as long as the pages; the pages are untouched
  /// then.
  [[nodiscard]] Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
    if (payload.size() != total_bytes(pages))
      return fail(Errc::bad_payload_size, Stage::decode, "copy", payload.size());
    for (const iovec& run : pages) {
      if (run.iov_len == 0) continue;
      std::memcpy(run.iov_base, payload.data(), run.iov_len);
      payload = payload.subspan(run.iov_len);
    }
    return {};
  }
};

static_assert(check_compressor<NoComp>());

}  // namespace multifd
