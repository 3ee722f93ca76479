// SPDX-License-Identifier: MIT
//
// A compressor of which one call fails, on one side of a migration: opening an encoder or decoder, or working with it.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "multifd/compress/policy.hpp"
#include "support/links.hpp"

namespace test {

/// Shared by all channels of one side.
struct CodecFault {
  std::uint64_t fail_at = ~std::uint64_t{0};
  multifd::Error error{};
  std::atomic<std::uint64_t> operations{0};
  std::atomic<std::uint32_t> opened{0};  ///< channels: they are made in the order of their links
  // Of the call that failed.
  std::atomic<std::uint32_t> channel{multifd::no_channel};  ///< none: it was an open()
  std::atomic<std::uint64_t> packets{0};                    ///< that this encoder or decoder had worked on before

  bool is_hit() noexcept { return operations.fetch_add(1, std::memory_order_relaxed) == fail_at; }
};

/// `Next`, with `fault`. Without one, just `Next`.
template <multifd::Compressor Next>
struct Faulty : Next {
  CodecFault* fault = nullptr;

  /// The part that an encoder and a decoder share.
  template <class Codec>
  class Half {
   public:
    static Result<Half> open_half(const Faulty& parameters, const multifd::CodecLimits& limits, Stage stage) noexcept {
      CodecFault* const fault = parameters.fault;
      if (fault != nullptr && fault->is_hit()) return std::unexpected(error_of(*fault, stage));
      auto codec = Codec::open(parameters, limits);
      if (!codec) return std::unexpected(codec.error());
      return Half(fault, std::move(*codec));
    }
    /// Whether this call is to fail.
    bool is_hit() noexcept {
      if (fault_ == nullptr || !fault_->is_hit()) {
        ++packets_;
        return false;
      }
      fault_->channel = channel_;
      fault_->packets = packets_;
      return true;
    }
    multifd::Error error(Stage stage) const noexcept { return error_of(*fault_, stage); }
    Codec codec;

   private:
    Half(CodecFault* fault, Codec next) noexcept
        : codec(std::move(next)), fault_(fault), channel_(fault == nullptr ? 0 : fault->opened++) {}
    static multifd::Error error_of(const CodecFault& fault, Stage stage) noexcept {
      multifd::Error error = fault.error;
      error.stage = stage;
      return error;
    }

    CodecFault* fault_;
    std::uint32_t channel_;
    std::uint64_t packets_ = 0;
  };

  class Encoder {
   public:
    static Result<Encoder> open(const Faulty& parameters, const multifd::CodecLimits& limits) noexcept {
      auto half = Half<typename Next::Encoder>::open_half(parameters, limits, Stage::setup);
      if (!half) return std::unexpected(half.error());
      return Encoder(std::move(*half));
    }
    Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
      if (half_.is_hit()) return std::unexpected(half_.error(Stage::encode));
      return half_.codec.encode(pages);
    }

   private:
    explicit Encoder(Half<typename Next::Encoder> half) noexcept : half_(std::move(half)) {}
    Half<typename Next::Encoder> half_;
  };

  class Decoder {
   public:
    static Result<Decoder> open(const Faulty& parameters, const multifd::CodecLimits& limits) noexcept {
      auto half = Half<typename Next::Decoder>::open_half(parameters, limits, Stage::setup);
      if (!half) return std::unexpected(half.error());
      return Decoder(std::move(*half));
    }
    Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
      if (half_.is_hit()) return std::unexpected(half_.error(Stage::decode));
      return half_.codec.decode(payload, pages);
    }

   private:
    explicit Decoder(Half<typename Next::Decoder> half) noexcept : half_(std::move(half)) {}
    Half<typename Next::Decoder> half_;
  };
};

}  // namespace test
