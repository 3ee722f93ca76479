// SPDX-License-Identifier: MIT
//
// Every Compressor through its contract; and compressors with one fault each, to see that the contract
// notices.
#include "multifd/testing/compressor_contract.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <vector>

#if defined(MULTIFD_HAS_IGZIP)
#include "multifd/compress/igzip.hpp"
#endif
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"

using namespace multifd;

namespace {

template <class C>
void check(const C& parameters, const CodecLimits& limits = {}, std::uint64_t seed = 1) {
  const ContractReport report = check_compressor_contract(parameters, limits, seed);
  CHECK_MESSAGE(report.ok(), report.text());
}

// Short packets, because high levels are slow.
constexpr CodecLimits short_packets{.packet_bytes = 16 * 1024, .payload_bytes = 32 * 1024};

// A decoder's reserved window makes each open() dear under the address sanitizer; most cases do not need 128
// MiB.
constexpr Zstd small_window(int level) { return {.level = level, .window_log = 0, .max_window_log = 23}; }

}  // namespace

TEST_CASE("NoComp keeps the Compressor contract") { check(NoComp{}); }

TEST_CASE("Zlib keeps the Compressor contract") { check(Zlib{}); }

TEST_CASE("Zlib keeps the Compressor contract at every kind of level") {
  for (const int level : {0, 4, 9}) {
    CAPTURE(level);
    check(Zlib{.level = level}, short_packets);
  }
}

#if defined(MULTIFD_HAS_IGZIP)
TEST_CASE("Igzip keeps the Compressor contract at every level") {
  for (const int level : {1, 2, 3}) {
    CAPTURE(level);
    check(Igzip{.level = level});
  }
}

TEST_CASE("Igzip keeps the Compressor contract with pages of every size") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{16384}, std::size_t{65536}})
    check(Igzip{}, {.page_bytes = page_bytes, .packet_bytes = 128 * 1024, .payload_bytes = 256 * 1024}, page_bytes);
}
#endif

TEST_CASE("Zstd keeps the Compressor contract") { check(small_window(1)); }

TEST_CASE("Zstd keeps the Compressor contract at every kind of level") {
  for (const int level : {-50, -1, 3, 16}) {
    CAPTURE(level);
    check(small_window(level), short_packets);
  }
}

TEST_CASE("Zstd keeps the Compressor contract with a chosen window") {
  check(Zstd{.level = 1, .window_log = 17, .max_window_log = 17}, short_packets);
}

TEST_CASE("Compressors keep their contract with pages of every size") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{16384}, std::size_t{65536}}) {
    CAPTURE(page_bytes);
    const CodecLimits limits{.page_bytes = page_bytes, .packet_bytes = 128 * 1024, .payload_bytes = 256 * 1024};
    check(NoComp{}, limits, page_bytes);
    check(Zlib{}, limits, page_bytes);
    check(small_window(1), limits, page_bytes);
  }
}

namespace {

enum class Fault { none, loses_last_byte, accepts_short, accepts_long, writes_past_end };

// Run-length coding, about the smallest codec there is: pairs of count and byte. Each value of Fault breaks
// one rule.
template <Fault fault>
struct RunLength {
  static constexpr std::string_view name = "run-length";
  static constexpr std::uint32_t method = 0x3e;
  static constexpr PayloadForm payload_form = PayloadForm::encoded;

  class Encoder {
   public:
    static Result<Encoder> open(const RunLength&, const CodecLimits&) noexcept { return Encoder{}; }
    Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
      payload_.clear();
      // Of changing bytes only what was copied may be looked at twice.
      for (const std::byte byte : detail::gather(pages)) {
        if (!payload_.empty() && payload_.back() == byte && payload_[payload_.size() - 2] != std::byte{255}) {
          payload_[payload_.size() - 2] = std::byte(std::to_integer<int>(payload_[payload_.size() - 2]) + 1);
        } else {
          payload_.push_back(std::byte{1});
          payload_.push_back(byte);
        }
      }
      view_ = const_buffer(payload_);
      return ConstBuffers(&view_, 1);
    }

   private:
    std::vector<std::byte> payload_;
    iovec view_{};
  };

  class Decoder {
   public:
    static Result<Decoder> open(const RunLength&, const CodecLimits& limits) noexcept {
      Decoder decoder;
      decoder.limits_ = limits;
      return decoder;
    }
    Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
      const auto refused = fail(Errc::corrupt_payload, Stage::decode, "run-length");
      if (payload.size() > limits_.payload_bytes) return refused;
      std::vector<std::byte> bytes;
      for (std::size_t i = 0; i + 1 < payload.size(); i += 2)
        bytes.insert(bytes.end(), std::to_integer<std::size_t>(payload[i]), payload[i + 1]);
      const std::size_t wanted = total_bytes(pages);
      if (payload.size() % 2 != 0 && fault != Fault::accepts_long) return refused;
      if (bytes.size() < wanted && fault != Fault::accepts_short) return refused;
      if (bytes.size() > wanted && fault != Fault::accepts_long) return refused;
      bytes.resize(wanted);
      if (fault == Fault::loses_last_byte && !bytes.empty()) bytes.back() = std::byte{};
      const std::byte* from = bytes.data();
      for (const iovec& run : pages) {
        std::memcpy(run.iov_base, from, run.iov_len);
        if (fault == Fault::writes_past_end) static_cast<std::byte*>(run.iov_base)[run.iov_len] = std::byte{};
        from += run.iov_len;
      }
      return {};
    }

   private:
    CodecLimits limits_;
  };
};

template <Fault fault>
ContractReport check_run_length() {
  // Small pages: it goes byte by byte, many hundred times, and without optimisation.
  return check_compressor_contract(RunLength<fault>{},
                                   {.page_bytes = 1024, .packet_bytes = 16 * 1024, .payload_bytes = 32 * 1024});
}

}  // namespace

TEST_CASE("a third party's Compressor passes the contract") {
  const ContractReport report = check_run_length<Fault::none>();
  CHECK_MESSAGE(report.ok(), report.text());
}

TEST_CASE("the contract finds a decoder that changes a byte") {
  CHECK(check_run_length<Fault::loses_last_byte>().text().find("pages differ") != std::string::npos);
}

TEST_CASE("the contract finds a decoder that accepts a cut payload") {
  CHECK(check_run_length<Fault::accepts_short>().text().find("payload cut from") != std::string::npos);
}

TEST_CASE("the contract finds a decoder that ignores bytes left over") {
  CHECK(check_run_length<Fault::accepts_long>().text().find("with one more byte") != std::string::npos);
}

TEST_CASE("the contract finds a decoder that writes outside the pages") {
  CHECK(check_run_length<Fault::writes_past_end>().text().find("outside the pages") != std::string::npos);
}

namespace {

enum class Payload { one_part, empty, too_many_parts };

// A block format with a header: it knows of no packets without pages and of no empty payloads, and need not, because the
// library has neither.
template <Payload form>
struct Framed {
  static constexpr std::string_view name = "framed";
  static constexpr std::uint32_t method = 0x06;
  static constexpr PayloadForm payload_form = PayloadForm::encoded;
  static constexpr std::size_t header = 8;

  struct Encoder {
    std::vector<std::byte> out;
    std::vector<iovec> parts;
    static Result<Encoder> open(const Framed&, const CodecLimits& limits) noexcept {
      return Encoder{std::vector<std::byte>(limits.packet_bytes + header), {}};
    }
    Result<ConstBuffers> encode(ConstBuffers pages) noexcept {
      const std::uint64_t bytes = total_bytes(pages);
      REQUIRE(bytes > 0);
      std::memcpy(out.data(), &bytes, header);
      std::size_t at = header;
      for (const iovec& run : pages) {
        std::memcpy(out.data() + at, run.iov_base, run.iov_len);
        at += run.iov_len;
      }
      const std::size_t parts_wanted = form == Payload::too_many_parts ? 129 : 1;
      parts.clear();
      for (std::size_t i = 0, done = 0; form != Payload::empty && i < parts_wanted; ++i) {
        const std::size_t some = i + 1 == parts_wanted ? at - done : 1;
        parts.push_back({out.data() + done, some});
        done += some;
      }
      return ConstBuffers(parts);
    }
  };

  struct Decoder {
    bool refused = false;
    static Result<Decoder> open(const Framed&, const CodecLimits&) noexcept { return Decoder{}; }
    Result<void> decode(std::span<const std::byte> payload, MutableBuffers pages) noexcept {
      const std::uint64_t wanted = total_bytes(pages);
      // What the library never does, in packets and behind a refusal.
      CHECK(wanted > 0);
      CHECK_FALSE(payload.empty());
      CHECK_FALSE(refused);
      refused = true;
      std::uint64_t bytes = 0;
      if (payload.size() < header) return fail(Errc::corrupt_payload, Stage::decode, "framed");
      std::memcpy(&bytes, payload.data(), header);
      if (bytes != wanted || payload.size() != header + bytes)
        return fail(Errc::bad_payload_size, Stage::decode, "framed");
      const std::byte* from = payload.data() + header;
      for (const iovec& run : pages) {
        std::memcpy(run.iov_base, from, run.iov_len);
        from += run.iov_len;
      }
      refused = false;
      return {};
    }
  };
};

}  // namespace

TEST_CASE("the contract asks for nothing that the library never does: a block format passes") {
  for (const std::size_t page_bytes : {1024u, 4096u, 65536u}) {
    CAPTURE(page_bytes);
    const auto report = check_compressor_contract(Framed<Payload::one_part>{}, {.page_bytes = page_bytes});
    CHECK_MESSAGE(report.ok(), report.text());
  }
  // A packet of one page, too.
  const auto report =
      check_compressor_contract(Framed<Payload::one_part>{}, {.page_bytes = 4096, .packet_bytes = 4096});
  CHECK_MESSAGE(report.ok(), report.text());
}

TEST_CASE("the contract finds an encoder whose payload the sender refuses") {
  CHECK(check_compressor_contract(Framed<Payload::empty>{}).text().find("empty payload") != std::string::npos);
  CHECK(check_compressor_contract(Framed<Payload::too_many_parts>{}).text().find("in more parts") != std::string::npos);
}
