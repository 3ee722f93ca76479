// SPDX-License-Identifier: MIT
//
// Checks the rules of the Compressor concept that types cannot express. Run it on your own policy, in any test
// framework:
//
//   auto report = multifd::check_compressor_contract(MyCompressor{...});
//   assert(report.ok());  // else print report.text()
//
// Checked are round trips over one long stream, the refusal of every payload that is not exactly its packet's, that no
// byte is written outside the pages whatever the payload holds, and the encoding of pages that change meanwhile. These
// are the rules of compress/policy.hpp. Calls that the library never makes (no pages, an empty payload) are not tried.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/testing/contract_report.hpp"

namespace multifd {

namespace detail {

/// Pages as runs with guard bytes around each run, for a decoder to fill or an encoder to read.
class GuardedPages {
 public:
  /// How the pages are arranged in memory.
  enum class Split { one_run, single_pages, random_runs };

  GuardedPages(std::size_t page_bytes, std::size_t pages, Split split, std::mt19937_64& random) {
    std::vector<std::size_t> sizes;
    for (std::size_t left = pages; left != 0;) {
      std::size_t run = left;
      if (split == Split::single_pages) run = 1;
      if (split == Split::random_runs) run = 1 + static_cast<std::size_t>(random() % left);
      sizes.push_back(run * page_bytes);
      left -= run;
    }
    storage_.resize(pages * page_bytes + (sizes.size() + 1) * guard_bytes, guard);
    std::byte* at = storage_.data() + guard_bytes;
    for (const std::size_t size : sizes) {
      runs_.push_back({at, size});
      std::memset(at, 0, size);
      at += size + guard_bytes;
    }
  }

  std::span<const iovec> runs() const noexcept { return runs_; }

  void write(std::span<const std::byte> content) noexcept {
    for (const iovec& run : runs_) {
      std::memcpy(run.iov_base, content.data(), run.iov_len);
      content = content.subspan(run.iov_len);
    }
  }

  bool guards_intact() const noexcept {
    const std::byte* at = storage_.data();
    const auto intact = [&at] { return std::all_of(at, at + guard_bytes, [](std::byte b) { return b == guard; }); };
    for (const iovec& run : runs_) {
      if (!intact()) return false;
      at = static_cast<const std::byte*>(run.iov_base) + run.iov_len;
    }
    return intact();
  }

 private:
  static constexpr std::size_t guard_bytes = 128;
  static constexpr std::byte guard{0xa7};

  std::vector<std::byte> storage_;
  std::vector<iovec> runs_;
};

/// The bytes of all buffers, joined.
inline std::vector<std::byte> gather(std::span<const iovec> buffers) {
  std::vector<std::byte> all;
  all.reserve(total_bytes(buffers));
  for (const iovec& buffer : buffers) {
    const auto* bytes = static_cast<const std::byte*>(buffer.iov_base);
    all.insert(all.end(), bytes, bytes + buffer.iov_len);
  }
  return all;
}

enum class PageContent { zero, text, random, mixed };

inline void fill_page(std::span<std::byte> page, PageContent content, std::mt19937_64& random) {
  constexpr const char* words[] = {"ram ", "block ", "page ", "offset ", "0x7f40", "channel\n", "sync ", "\0\0\0\0"};
  if (content == PageContent::mixed) {
    const std::size_t half = page.size() / 2;
    fill_page(page.first(half), PageContent::text, random);
    fill_page(page.subspan(half), PageContent::random, random);
    return;
  }
  std::uint64_t bits = 0;
  const char* word = "";
  for (std::size_t i = 0; i < page.size(); ++i) {
    if (content == PageContent::random) {
      if (i % 8 == 0) bits = random();
      page[i] = static_cast<std::byte>(bits >> (i % 8 * 8));
    } else if (content == PageContent::text) {
      if (*word == '\0') word = words[random() % std::size(words)];
      page[i] = static_cast<std::byte>(*word);
      if (*word != '\0') ++word;
    } else {
      page[i] = std::byte{};
    }
  }
}

inline std::vector<std::byte> make_pages(std::size_t page_bytes, std::size_t pages, std::mt19937_64& random) {
  std::vector<std::byte> content(page_bytes * pages);
  for (std::size_t i = 0; i < pages; ++i)
    fill_page(std::span(content).subspan(i * page_bytes, page_bytes), static_cast<PageContent>(random() % 4), random);
  return content;
}

// A guest that writes while its pages are encoded. This is a data race by design, so the thread sanitizer must not see
// the writer; volatile prevents the compiler from dropping the stores.
__attribute__((no_sanitize("thread"))) inline void scribble(volatile unsigned char* bytes, std::size_t size,
                                                            const std::atomic<bool>& stop) {
  std::uint64_t state = 1;
  while (!stop.load(std::memory_order_relaxed)) {
    for (int i = 0; i < 64; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      // Copies from elsewhere in the pages make and break matches, which can confuse an encoder.
      bytes[(state >> 33) % size] = bytes[(state >> 13) % size];
    }
  }
}

/// One run of check_compressor_contract().
template <Compressor C>
class CompressorCheck {
 public:
  CompressorCheck(const C& parameters, const CodecLimits& limits, std::uint64_t seed)
      : parameters_(parameters), limits_(limits), seed_(seed), random_(seed) {}

  ContractReport run() {
    round_trips();
    if constexpr (C::payload_form == PayloadForm::encoded) {
      wrong_sizes();
      corruption();
    }
    changing_pages();
    return report_;
  }

 private:
  using Split = GuardedPages::Split;
  using Bytes = std::vector<std::byte>;
  using Packet = std::vector<std::byte>;

  std::size_t packet_pages() const { return limits_.packet_bytes / limits_.page_bytes; }

  Split any_split() { return static_cast<Split>(random_() % 3); }

  void fail(const std::string& what) { report_.fail(what + " (seed " + std::to_string(seed_) + ")"); }

  bool open(auto& coder, const char* which) {
    if (!coder) fail(std::string(which) + "::open: " + describe(coder.error()));
    return coder.has_value();
  }

  // Encodes content and checks the rules for every payload.
  bool encode(typename C::Encoder& encoder, const Bytes& content, Packet& payload, const std::string& where) {
    GuardedPages pages(limits_.page_bytes, content.size() / limits_.page_bytes, any_split(), random_);
    pages.write(content);
    const Result<ConstBuffers> encoded = encoder.encode(pages.runs());
    if (!encoded) {
      fail(where + ": encode: " + describe(encoded.error()));
      return false;
    }
    payload = gather(*encoded);
    if (payload.size() > limits_.payload_bytes) fail(where + ": payload larger than its bound");
    if (payload.empty() || encoded->size() > packet_pages()) {  // a sender would fail here
      fail(where + (payload.empty() ? ": empty payload for pages" : ": payload in more parts than a packet has pages"));
      return false;
    }
    if (gather(pages.runs()) != content || !pages.guards_intact()) fail(where + ": encode wrote to its input");
    if (C::payload_form == PayloadForm::pages && payload != content) fail(where + ": payload is not the pages");
    return true;
  }

  // Decodes into pages between guards. Returns whether the decoder accepted the payload; `content` gets the
  // pages.
  bool decode(typename C::Decoder& decoder, std::span<const std::byte> payload, std::size_t page_count, Bytes& content,
              const std::string& where) {
    // A copy of exactly this length, so that an address sanitizer sees a read past its end.
    const Bytes exact(payload.begin(), payload.end());
    GuardedPages pages(limits_.page_bytes, page_count, any_split(), random_);
    const Result<void> decoded = decoder.decode(exact, pages.runs());
    if (!pages.guards_intact()) fail(where + ": decode wrote outside the pages");
    content = gather(pages.runs());
    return decoded.has_value();
  }

  // One encoder, one decoder, many packets: both sides must keep the same state between packets.
  void round_trips() {
    auto encoder = C::Encoder::open(parameters_, limits_);
    auto decoder = C::Decoder::open(parameters_, limits_);
    if (!open(encoder, "Encoder") || !open(decoder, "Decoder")) return;
    constexpr std::size_t packets = 24;
    for (std::size_t i = 0; i < packets; ++i) {
      const std::string where = "round trip, packet " + std::to_string(i);
      std::size_t count = 1 + static_cast<std::size_t>(random_() % packet_pages());
      if (i % 8 == 2) count = packet_pages();
      Bytes content = make_pages(limits_.page_bytes, count, random_);
      if (i % 8 == 2) fill_page(content, i % 16 == 2 ? PageContent::random : PageContent::zero, random_);
      Packet payload;
      if (!encode(*encoder, content, payload, where)) return;
      if (C::payload_form == PayloadForm::pages) continue;
      Bytes decoded;
      if (!decode(*decoder, payload, count, decoded, where)) {
        fail(where + ": decode refused the encoder's payload");
        return;
      }
      if (decoded != content) {
        fail(where + ": pages differ");
        return;
      }
    }
  }

  struct Sample {
    Packet first, second;  // two packets of one stream, so that the second one has a history
    Bytes content;         // of the second
    std::size_t pages = 0;
  };

  bool make_sample(Sample& sample) {
    auto encoder = C::Encoder::open(parameters_, limits_);
    if (!open(encoder, "Encoder")) return false;
    sample.pages = std::min<std::size_t>(2, packet_pages());
    sample.content.resize(sample.pages * limits_.page_bytes);
    fill_page(sample.content, PageContent::text, random_);
    // A little noise, so that the payload has literals and matches, and damage can hit either.
    fill_page(std::span(sample.content).first(64), PageContent::random, random_);
    return encode(*encoder, sample.content, sample.first, "sample") &&
           encode(*encoder, sample.content, sample.second, "sample");
  }

  // Decodes the sample's first packet, then offers `payload` as the second. Returns whether that was
  // accepted.
  bool offer(const Sample& sample, std::span<const std::byte> payload, std::size_t pages, const std::string& where) {
    auto decoder = C::Decoder::open(parameters_, limits_);
    if (!open(decoder, "Decoder")) return false;
    Bytes content;
    if (!decode(*decoder, sample.first, sample.pages, content, where))
      fail(where + ": decode refused the encoder's payload");
    return decode(*decoder, payload, pages, content, where);
  }

  void wrong_sizes() {
    Sample sample;
    if (!make_sample(sample)) return;
    const std::span<const std::byte> whole(sample.second);
    if (!offer(sample, whole, sample.pages, "whole payload")) fail("the whole payload was refused");
    // All of a short payload; of a long one all lengths near its ends and a part of the others.
    const std::size_t stride = 1 + whole.size() / 256;
    for (std::size_t size = 1; size < whole.size(); ++size) {
      if (size % stride != 0 && size > 32 && size + 32 < whole.size()) continue;
      const std::string where = "payload cut from " + std::to_string(whole.size()) + " to " + std::to_string(size);
      if (offer(sample, whole.first(size), sample.pages, where)) fail(where + " was accepted");
    }
    for (const int extra : {0x00, 0x01, 0x55, 0xff}) {
      Packet longer = sample.second;
      longer.push_back(static_cast<std::byte>(extra));
      if (offer(sample, longer, sample.pages, "longer payload"))
        fail("payload with one more byte, " + std::to_string(extra) + ", was accepted");
    }
    if (sample.pages < packet_pages() && offer(sample, whole, sample.pages + 1, "more pages"))
      fail("payload of fewer pages was accepted");
    if (sample.pages > 1 && offer(sample, whole, sample.pages - 1, "fewer pages"))
      fail("payload of more pages was accepted");
  }

  // Damage may go unseen by the codec (the wire format has no checksum), but must stay inside the pages.
  void corruption() {
    Sample sample;
    if (!make_sample(sample)) return;
    std::size_t accepted = 0;
    constexpr std::size_t rounds = 300;
    for (std::size_t i = 0; i < rounds; ++i) {
      Packet first = sample.first;
      Packet second = sample.second;
      Packet& victim = i % 2 == 0 ? first : second;
      for (std::size_t hits = 1 + static_cast<std::size_t>(random_() % 4); hits != 0; --hits)
        victim[random_() % victim.size()] = static_cast<std::byte>(random_());
      if (i % 16 == 0) fill_page(victim, PageContent::random, random_);
      auto decoder = C::Decoder::open(parameters_, limits_);
      if (!open(decoder, "Decoder")) return;
      const std::string where = "corrupt payload " + std::to_string(i);
      Bytes content;
      const bool fine = decode(*decoder, first, sample.pages, content, where) &&
                        decode(*decoder, second, sample.pages, content, where);
      accepted += fine ? 1 : 0;
    }
    report_.note(std::to_string(accepted) + " of " + std::to_string(rounds) + " damaged streams decoded");
  }

  void changing_pages() {
    auto encoder = C::Encoder::open(parameters_, limits_);
    auto decoder = C::Decoder::open(parameters_, limits_);
    if (!open(encoder, "Encoder") || !open(decoder, "Decoder")) return;
    Bytes content = make_pages(limits_.page_bytes, packet_pages(), random_);
    const iovec run = mutable_buffer(content);
    std::vector<Packet> payloads;
    std::atomic<bool> stop{false};
    std::thread guest([&] { scribble(reinterpret_cast<unsigned char*>(content.data()), content.size(), stop); });
    for (int i = 0; i < 12; ++i) {
      const Result<ConstBuffers> encoded = encoder->encode(ConstBuffers(&run, 1));
      if (!encoded) {
        fail("changing pages: encode: " + describe(encoded.error()));
        break;
      }
      if (total_bytes(*encoded) == 0) {
        fail("changing pages: empty payload for pages");
        break;
      }
      if (C::payload_form == PayloadForm::encoded) payloads.push_back(gather(*encoded));
    }
    stop.store(true, std::memory_order_relaxed);
    guest.join();
    Bytes decoded;
    for (const Packet& payload : payloads) {
      if (decode(*decoder, payload, packet_pages(), decoded, "changing pages")) continue;
      fail("changing pages: decode refused the encoder's payload");
      return;
    }
    // The guest has stopped: from here on the decoded content must be right again.
    Packet payload;
    if (C::payload_form == PayloadForm::pages || !encode(*encoder, content, payload, "after changing pages")) return;
    if (!decode(*decoder, payload, packet_pages(), decoded, "after changing pages") || decoded != content)
      fail("after changing pages: pages differ");
  }

  C parameters_;
  CodecLimits limits_;
  std::uint64_t seed_;
  std::mt19937_64 random_;
  ContractReport report_;
};

}  // namespace detail

/// Checks a compressor against the rules of its concept. Takes about a second.
///
/// Not checked: that nothing is allocated after open(), because only a whole program can count allocations.
template <Compressor C>
ContractReport check_compressor_contract(const C& parameters = {}, const CodecLimits& limits = {},
                                         std::uint64_t seed = 1) {
  return detail::CompressorCheck<C>(parameters, limits, seed).run();
}

}  // namespace multifd
