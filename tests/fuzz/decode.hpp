// SPDX-License-Identifier: MIT
//
// One channel's decoder, packet after packet. Input: per packet u8 pages (up to 128), u8 layout (bit 0: each page apart
// in memory), be16 size of the payload, the payload.
#pragma once

#include <array>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "fuzz/fuzz.hpp"
#include "fuzz/guarded.hpp"
#include "multifd/compress/policy.hpp"

namespace fuzz {

inline constexpr std::size_t decode_page_bytes = 4096;
inline constexpr std::size_t decode_most_pages = 128;

/// Where pages are decoded to: one behind the other, or each at the end of memory of its own.
class DecodeMemory {
 public:
  enum class Layout { together, apart };

  DecodeMemory() : together_(decode_most_pages * decode_page_bytes) {
    for (std::size_t i = 0; i < decode_most_pages; ++i) apart_.emplace_back(decode_page_bytes);
  }

  std::span<const iovec> runs(std::size_t pages, Layout layout) {
    if (pages == 0) return {};
    if (layout == Layout::together) {
      // To the end, where the forbidden page is.
      const auto bytes = together_.bytes().last(pages * decode_page_bytes);
      runs_[0] = multifd::mutable_buffer(bytes);
      return std::span(runs_).first(1);
    }
    for (std::size_t i = 0; i < pages; ++i) runs_[i] = multifd::mutable_buffer(apart_[i].bytes());
    return std::span(runs_).first(pages);
  }

 private:
  Guarded together_;
  std::vector<Guarded> apart_;
  std::array<iovec, decode_most_pages> runs_{};
};

/// The same pages, whatever the runs.
inline bool same_pages(std::span<const iovec> a, std::span<const iovec> b) {
  if (a.size() > b.size()) std::swap(a, b);  // a is one run, or both are alike
  if (a.size() != 1) return a.empty() && b.empty();
  const auto* at = static_cast<const std::byte*>(a[0].iov_base);
  for (const iovec& run : b) {
    if (std::memcmp(at, run.iov_base, run.iov_len) != 0) return false;
    at += run.iov_len;
  }
  return true;
}

inline Bytes contents(std::span<const iovec> runs) {
  Bytes bytes;
  for (const iovec& run : runs) append(bytes, Span(static_cast<const std::byte*>(run.iov_base), run.iov_len));
  return bytes;
}

template <multifd::Compressor C>
C small() {
  C compressor{};
  if constexpr (requires { compressor.max_window_log; }) compressor.max_window_log = 20;
  return compressor;
}

/// Gives each packet to a decoder of `C`. `Rival`: another decoder of the same format, or C itself.
template <multifd::Compressor C, multifd::Compressor Rival = C>
void test_decoder(Span input) {
  using Layout = DecodeMemory::Layout;
  static DecodeMemory memory, other_memory;
  auto decoder = C::Decoder::open(small<C>(), {});
  auto other = Rival::Decoder::open(small<Rival>(), {});
  require(decoder.has_value() && other.has_value(), "Decoder::open");
  std::optional<typename C::Encoder> encoder;
  std::optional<typename C::Decoder> encoder_peer;

  for (Reader in(input); !in.empty();) {
    const std::size_t pages = std::min<std::size_t>(in.u8(), decode_most_pages);
    const auto layout = (in.u8() & 1) != 0 ? Layout::apart : Layout::together;
    const std::size_t size = in.number(2);
    const Span taken = in.take(size);
    const Bytes payload(taken.begin(), taken.end());  // of its own on the heap: one byte too far is seen
    const auto runs = memory.runs(pages, layout);
    const auto other_runs = other_memory.runs(pages, layout == Layout::apart ? Layout::together : Layout::apart);

    const auto decoded = decoder->decode(payload, runs);
    const auto other_decoded = other->decode(payload, other_runs);
    if constexpr (std::is_same_v<C, Rival>)
      require(decoded.has_value() == other_decoded.has_value() &&
                  (decoded || decoded.error().code == other_decoded.error().code),
              "where the pages lie does not matter");
    if (decoded && other_decoded) require(same_pages(runs, other_runs), "both decoders have the same pages");
    if (!decoded) {
      require(decoded.error().code == multifd::Condition::peer_protocol, "a refused payload is the peer's fault");
      require(!decoder->decode(payload, runs).has_value(), "an error stays");
      return;
    }
    if (!other_decoded) return;  // only a rival: both must have seen the same packets
    // What was accepted can be encoded, and comes out the same. Not for many pages: it takes long.
    if (pages > 8) continue;
    if (!encoder) {
      auto opened = C::Encoder::open(small<C>(), {});
      auto peer = C::Decoder::open(small<C>(), {});
      require(opened.has_value() && peer.has_value(), "Encoder::open");
      encoder.emplace(std::move(*opened));
      encoder_peer.emplace(std::move(*peer));
    }
    const auto encoded = encoder->encode(runs);
    require(encoded.has_value(), "what was decoded can be encoded");
    const Bytes wire = contents(*encoded);
    for (const iovec& run : other_runs) std::memset(run.iov_base, 0xee, run.iov_len);
    const auto back = encoder_peer->decode(wire, other_runs);
    require(back.has_value() && same_pages(runs, other_runs), "encoded and decoded again it is the same");
  }
}

}  // namespace fuzz
