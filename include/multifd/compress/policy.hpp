// SPDX-License-Identifier: MIT
//
// The Compressor policy: how the normal pages of a packet become the payload that follows its header, and back.
// A policy is a copyable struct of parameters with a nested Encoder and Decoder; one of each lives on each channel
// for the whole migration (format/packets.md section 4: the compression state is per channel and never reset).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "multifd/buffers.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/limits.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// How a payload relates to guest memory.
enum class PayloadForm : std::uint8_t {
  pages,    ///< The payload is the pages themselves: written from, and read into, guest memory directly.
  encoded,  ///< The payload is the Encoder's output; the Decoder gets it whole.
};

/// What an Encoder or Decoder may rely on for every packet.
struct CodecLimits {
  std::size_t page_bytes = 4096;                        ///< size of one page
  std::size_t packet_bytes = batch_bytes;               ///< the most page bytes in one packet; a multiple of page_bytes
  std::size_t payload_bytes = wire::max_payload_bytes;  ///< the most payload bytes of one packet: the receiver's buffer
};

template <class C>
concept HasCompressorName = requires {
  { C::name } -> std::convertible_to<std::string_view>;
};

template <class C>
concept HasMethod = requires {
  { C::method } -> std::convertible_to<std::uint32_t>;
};

template <class C>
concept HasPayloadForm = requires {
  { C::payload_form } -> std::convertible_to<PayloadForm>;
};

template <class C>
concept HasEncoder =
    requires(const C& parameters, const CodecLimits& limits, typename C::Encoder& encoder, ConstBuffers pages) {
      { C::Encoder::open(parameters, limits) } noexcept -> std::same_as<Result<typename C::Encoder>>;
      { encoder.encode(pages) } noexcept -> std::same_as<Result<ConstBuffers>>;
    };

template <class C>
concept HasDecoder = requires(const C& parameters, const CodecLimits& limits, typename C::Decoder& decoder,
                              std::span<const std::byte> payload, MutableBuffers pages) {
  { C::Decoder::open(parameters, limits) } noexcept -> std::same_as<Result<typename C::Decoder>>;
  { decoder.decode(payload, pages) } noexcept -> std::same_as<Result<void>>;
};

/// Optional: a compressor whose level can change between two packets of a running stream.
template <class C>
concept HasLiveLevel = requires(typename C::Encoder& encoder, int level) {
  { encoder.set_level(level) } noexcept -> std::same_as<Result<void>>;
};

/// Turns pages into payloads and back.
///
/// Semantics:
///   `name` is what users type: "none", "zlib". `method` is the packet header's compression bits, inside
///     wire::flag_compression_mask, 0x3e. No bit and each single bit are QEMU's (format/packets.md section 3.2): a
///     compressor with one of these must speak QEMU's format. Values of two bits or more, 0x06 to 0x3e, are free for
///     compressors of your own: no QEMU sends or accepts them. Give each format its own value, so that two ends with
///     different formats refuse each other.
///   `encode(pages)` gets the normal pages of one packet as runs (each a whole number of pages, at least one page in
///   all)
///     and returns the payload, 1 to CodecLimits::payload_bytes bytes in at most as many parts as a packet has pages;
///     it stays valid until the next call. All of it must be decodable when the packet has arrived (flush). The pages
///     may change while they are read (live guest): an encoder must stay memory-safe, and its output for a torn page
///     must be decodable. The decoded content does not matter, because that page is sent again.
///   `decode(payload, pages)` gets as many pages, at least one, in runs that may be cut elsewhere, and a payload of 1
///   to
///     payload_bytes bytes. It must fill every byte of `pages` and consume every byte of `payload`, and refuse anything
///     else, whatever the payload holds; after a refusal it is not called again. Not called when payload_form is
///     `pages`.
///   Encoder and Decoder get the same packets in the same order, so each may keep a history.
/// Errors: Errc::payload_too_large, corrupt_payload, bad_payload_size, bad_option; stage `encode` or `decode`.
/// Threads: an Encoder or Decoder is used by one thread at a time, its channel's. open() is called on another thread.
/// Cost: nothing may be allocated after open().
/// Models: NoComp, Zlib, Igzip, Zstd. Exemplar: examples/custom_policy.cpp (WordRuns).
///   Contract: multifd/testing/compressor_contract.hpp.
template <class C>
concept Compressor = std::copyable<C> && std::default_initializable<C> && HasCompressorName<C> && HasMethod<C> &&
                     HasPayloadForm<C> && HasEncoder<C> && HasDecoder<C>;

/// Fails to compile with a message that says which member to write.
template <class C>
consteval bool check_compressor() {
  static_assert(std::copyable<C>, "Compressor: needs to be copyable (it is a struct of parameters)");
  static_assert(std::default_initializable<C>, "Compressor: needs default parameters");
  static_assert(HasCompressorName<C>, "Compressor: needs  static constexpr std::string_view name");
  static_assert(HasMethod<C>, "Compressor: needs  static constexpr std::uint32_t method");
  static_assert(HasPayloadForm<C>, "Compressor: needs  static constexpr PayloadForm payload_form");
  static_assert(HasEncoder<C>,
                "Compressor: needs  struct Encoder { static Result<Encoder> open(const C&, const CodecLimits&) "
                "noexcept; Result<ConstBuffers> encode(ConstBuffers pages) noexcept; }");
  static_assert(HasDecoder<C>,
                "Compressor: needs  struct Decoder { static Result<Decoder> open(const C&, const CodecLimits&) "
                "noexcept; Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept; }");
  return Compressor<C>;
}

}  // namespace multifd
