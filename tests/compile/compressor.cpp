// SPDX-License-Identifier: MIT
// WITHOUT_NAME: Compressor: needs  static constexpr std::string_view name
// WITHOUT_METHOD: Compressor: needs  static constexpr std::uint32_t method
// WITHOUT_PAYLOAD_FORM: Compressor: needs  static constexpr PayloadForm payload_form
// WITHOUT_ENCODER: Compressor: needs  struct Encoder
// WITHOUT_DECODE: Compressor: needs  struct Decoder
#include "multifd/compress/policy.hpp"

struct Shrink {
#ifndef WITHOUT_NAME
  static constexpr std::string_view name = "shrink";
#endif
#ifndef WITHOUT_METHOD
  static constexpr std::uint32_t method = 0;
#endif
#ifndef WITHOUT_PAYLOAD_FORM
  static constexpr multifd::PayloadForm payload_form = multifd::PayloadForm::encoded;
#endif
#ifndef WITHOUT_ENCODER
  struct Encoder {
    static multifd::Result<Encoder> open(const Shrink&, const multifd::CodecLimits&) noexcept { return Encoder{}; }
    multifd::Result<multifd::ConstBuffers> encode(multifd::ConstBuffers pages) noexcept { return pages; }
  };
#endif
  struct Decoder {
    static multifd::Result<Decoder> open(const Shrink&, const multifd::CodecLimits&) noexcept { return Decoder{}; }
#ifndef WITHOUT_DECODE
    multifd::Result<void> decode(std::span<const std::byte>, multifd::MutableBuffers) noexcept { return {}; }
#endif
  };
};
static_assert(multifd::check_compressor<Shrink>());
