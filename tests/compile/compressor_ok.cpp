// SPDX-License-Identifier: MIT
#include "multifd/compress/policy.hpp"

struct Shrink {
  static constexpr std::string_view name = "shrink";
  static constexpr std::uint32_t method = 0;
  static constexpr multifd::PayloadForm payload_form = multifd::PayloadForm::encoded;
  struct Encoder {
    static multifd::Result<Encoder> open(const Shrink&, const multifd::CodecLimits&) noexcept { return Encoder{}; }
    multifd::Result<multifd::ConstBuffers> encode(multifd::ConstBuffers pages) noexcept { return pages; }
  };
  struct Decoder {
    static multifd::Result<Decoder> open(const Shrink&, const multifd::CodecLimits&) noexcept { return Decoder{}; }
    multifd::Result<void> decode(std::span<const std::byte>, multifd::MutableBuffers) noexcept { return {}; }
  };
};
static_assert(multifd::check_compressor<Shrink>());
