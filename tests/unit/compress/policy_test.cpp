// SPDX-License-Identifier: MIT
#include "multifd/compress/policy.hpp"

#include <doctest/doctest.h>

#include <type_traits>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/format/constants.hpp"
#include "support/allocation_count.hpp"
#include "unit/compress/packets.hpp"

using namespace multifd;
using namespace codec_payloads;

static_assert(Compressor<NoComp> && Compressor<Zlib> && Compressor<Zstd>);

// What is not a Compressor, each for the one thing that NoComp has and it has not.
struct Nameless {
  static constexpr std::uint32_t method = 0;
  static constexpr PayloadForm payload_form = PayloadForm::pages;
  struct Encoder {
    static Result<Encoder> open(const Nameless&, const CodecLimits&) noexcept;
    Result<ConstBuffers> encode(ConstBuffers) noexcept;
  };
  struct Decoder {
    static Result<Decoder> open(const Nameless&, const CodecLimits&) noexcept;
    Result<void> decode(std::span<const std::byte>, MutableBuffers) noexcept;
  };
};
static_assert(HasEncoder<Nameless> && HasDecoder<Nameless> && !HasCompressorName<Nameless> && !Compressor<Nameless>);

struct ThrowingEncoder : NoComp {
  struct Encoder {
    static Result<Encoder> open(const ThrowingEncoder&, const CodecLimits&) noexcept;
    Result<ConstBuffers> encode(ConstBuffers);  // not noexcept
  };
  struct Decoder {
    static Result<Decoder> open(const ThrowingEncoder&, const CodecLimits&) noexcept;
    Result<void> decode(std::span<const std::byte>, MutableBuffers) noexcept;
  };
};
static_assert(HasDecoder<ThrowingEncoder> && !HasEncoder<ThrowingEncoder> && !Compressor<ThrowingEncoder>);

struct DecoderSaysBool : NoComp {
  struct Encoder {
    static Result<Encoder> open(const DecoderSaysBool&, const CodecLimits&) noexcept;
    Result<ConstBuffers> encode(ConstBuffers) noexcept;
  };
  struct Decoder {
    static Result<Decoder> open(const DecoderSaysBool&, const CodecLimits&) noexcept;
    bool decode(std::span<const std::byte>, MutableBuffers) noexcept;
  };
};
static_assert(HasEncoder<DecoderSaysBool> && !HasDecoder<DecoderSaysBool> && !Compressor<DecoderSaysBool>);

// Inherits all of NoComp, but NoComp's coders are not its own.
struct BorrowedCoders : NoComp {
  using Encoder = Zlib::Encoder;
};
static_assert(!HasEncoder<BorrowedCoders> && !Compressor<BorrowedCoders>);

struct ParametersWithoutDefault : NoComp {
  explicit ParametersWithoutDefault(int) {}
};
static_assert(!Compressor<ParametersWithoutDefault>);

// Only zlib can change its level inside a stream.
static_assert(HasLiveLevel<Zlib> && !HasLiveLevel<Zstd> && !HasLiveLevel<NoComp>);

template <class Coder>
constexpr bool is_move_only_handle =
    std::is_nothrow_move_constructible_v<Coder> && std::is_nothrow_move_assignable_v<Coder> &&
    !std::is_copy_constructible_v<Coder> && !std::is_copy_assignable_v<Coder>;
static_assert(is_move_only_handle<Zlib::Encoder> && is_move_only_handle<Zlib::Decoder>);
static_assert(is_move_only_handle<Zstd::Encoder> && is_move_only_handle<Zstd::Decoder>);

TEST_CASE("compressors carry the names that people type and the bits of the wire") {
  CHECK(NoComp::name == "none");
  CHECK(Zlib::name == "zlib");
  CHECK(Zstd::name == "zstd");
  CHECK(NoComp::method == 0x00);
  CHECK(Zlib::method == 0x02);
  CHECK(Zstd::method == 0x04);
}

TEST_CASE("NoComp hands back the very buffers it was given") {
  auto encoder = open<NoComp::Encoder>(NoComp{});
  Bytes content = text_pages(4);
  const iovec runs[] = {const_buffer(content.data(), page_bytes),
                        const_buffer(content.data() + 2 * page_bytes, page_bytes)};
  const auto payload = encoder.encode(runs);
  REQUIRE(payload.has_value());
  CHECK(payload->data() == runs);
  CHECK(payload->size() == 2);
}

TEST_CASE("NoComp decodes exactly one payload size") {
  auto decoder = open<NoComp::Decoder>(NoComp{});
  const Bytes content = text_pages(2);
  Bytes decoded;
  REQUIRE(decode(decoder, content, content.size(), decoded).has_value());
  CHECK(decoded == content);
  CHECK(refusal(decoder, content, content.size() - page_bytes) == Errc::bad_payload_size);
  CHECK(refusal(decoder, content, content.size() + page_bytes) == Errc::bad_payload_size);
  CHECK(refusal(decoder, {}, page_bytes) == Errc::bad_payload_size);
}

TEST_CASE_TEMPLATE("nothing is allocated after open()", C, NoComp, Zlib, Zstd) {
  const std::vector<Bytes> stream = stream_of_pages();
  const std::uint64_t before_open = test::allocations_of_this_thread();
  auto encoder = open<typename C::Encoder>(C{});
  auto decoder = open<typename C::Decoder>(C{});
  if (C::payload_form == PayloadForm::encoded)
    CHECK(test::allocations_of_this_thread() > before_open);  // or the counter does not count

  Bytes pages(128 * page_bytes);
  const std::uint64_t before = test::allocations_of_this_thread();
  bool fine = true;
  for (int round = 0; round < 3; ++round) {
    for (const Bytes& content : stream) {
      if constexpr (HasLiveLevel<C>) fine = fine && encoder.set_level(round * 4).has_value();
      const iovec from = const_buffer(content);
      const auto payload = encoder.encode(ConstBuffers(&from, 1));
      fine = fine && payload.has_value() && payload->size() == 1;
      if (!fine) break;
      const iovec to{pages.data(), content.size()};
      const std::span<const std::byte> bytes(static_cast<const std::byte*>((*payload)[0].iov_base),
                                             (*payload)[0].iov_len);
      fine = decoder.decode(bytes, MutableBuffers(&to, 1)).has_value();
    }
  }
  const std::uint64_t after = test::allocations_of_this_thread();
  CHECK(fine);
  CHECK(after - before == 0);
}

TEST_CASE_TEMPLATE("a coder that moved goes on with its stream", C, Zlib, Zstd) {
  auto encoder = open<typename C::Encoder>(C{});
  auto decoder = open<typename C::Decoder>(C{});
  Bytes decoded;
  for (const Bytes& content : stream_of_pages()) {
    auto next_encoder = std::move(encoder);
    auto next_decoder = std::move(decoder);
    REQUIRE(decode(next_decoder, encode(next_encoder, content), content.size(), decoded).has_value());
    CHECK(decoded == content);
    encoder = std::move(next_encoder);
    decoder = std::move(next_decoder);
  }
}

TEST_CASE_TEMPLATE("packets without pages do not touch the stream", C, Zlib, Zstd) {
  auto encoder = open<typename C::Encoder>(C{});
  auto undisturbed = open<typename C::Encoder>(C{});
  auto decoder = open<typename C::Decoder>(C{});
  Bytes decoded;
  for (const Bytes& content : stream_of_pages()) {
    CHECK(encode(encoder, {}).empty());
    CHECK(decode(decoder, {}, 0, decoded).has_value());
    const Bytes payload = encode(encoder, content);
    CHECK(payload == encode(undisturbed, content));
    REQUIRE(decode(decoder, payload, content.size(), decoded).has_value());
    CHECK(decoded == content);
  }
}

TEST_CASE_TEMPLATE("a full packet of random bytes stays under the peers' buffer of 1 MiB", C, Zlib, Zstd) {
  auto encoder = open<typename C::Encoder>(C{});
  for (int i = 0; i < 4; ++i) {
    const std::size_t size = encode(encoder, random_pages(128, static_cast<std::uint64_t>(i))).size();
    CHECK(size > 512 * 1024);
    CHECK(size < 520 * 1024);
    CHECK(size <= wire::max_payload_bytes);
  }
}

TEST_CASE_TEMPLATE("a payload may be as long as its bound, and not a byte longer", C, Zlib, Zstd) {
  const Bytes content = random_pages(3);
  auto measure = open<typename C::Encoder>(C{});
  const Bytes payload = encode(measure, content);

  auto exact = open<typename C::Encoder>(C{}, {.payload_bytes = payload.size()});
  CHECK(encode(exact, content) == payload);

  for (const std::size_t bound : {payload.size() - 1, payload.size() / 2, std::size_t{1}, std::size_t{0}}) {
    CAPTURE(bound);
    auto tight = open<typename C::Encoder>(C{}, {.payload_bytes = bound});
    const iovec run = const_buffer(content);
    const auto refused = tight.encode(ConstBuffers(&run, 1));
    REQUIRE(!refused.has_value());
    CHECK(refused.error().code == Errc::payload_too_large);
    CHECK(refused.error().stage == Stage::encode);
    // Part of the packet is in the stream now: nothing may follow.
    const iovec small = const_buffer(content.data(), page_bytes);
    const auto later = tight.encode(ConstBuffers(&small, 1));
    REQUIRE(!later.has_value());
    CHECK(later.error().code == Errc::payload_too_large);
  }
}

TEST_CASE_TEMPLATE("a decoder refuses payloads of a wrong size", C, Zlib, Zstd) {
  const Bytes content = text_pages(2);
  auto encoder = open<typename C::Encoder>(C{});
  const Bytes payload = encode(encoder, content);
  const auto refuse = [](const Bytes& bytes, std::size_t size, const CodecLimits& limits = {}) {
    auto decoder = open<typename C::Decoder>(C{}, limits);
    return refusal(decoder, bytes, size);
  };
  CHECK(!refuse(payload, content.size()));
  SUBCASE("none for pages") { CHECK(refuse({}, content.size()) == Errc::bad_payload_size); }
  SUBCASE("some for no pages") { CHECK(refuse(payload, 0) == Errc::bad_payload_size); }
  SUBCASE("too short for the pages") { CHECK(refuse(payload, content.size() + 1) == Errc::bad_payload_size); }
  SUBCASE("too long for the pages by one byte") {
    CHECK(refuse(payload, content.size() - 1) == Errc::bad_payload_size);
  }
  SUBCASE("too long for the pages by one page") {
    CHECK(refuse(payload, content.size() - page_bytes) == Errc::bad_payload_size);
  }
  SUBCASE("two packets at once") {
    CHECK(refuse(payload + encode(encoder, content), content.size()) == Errc::bad_payload_size);
  }
  SUBCASE("over the bound by one byte") {
    CHECK(!refuse(payload, content.size(), {.payload_bytes = payload.size()}));
    CHECK(refuse(payload, content.size(), {.payload_bytes = payload.size() - 1}) == Errc::payload_too_large);
  }
  SUBCASE("more pages than a packet holds") {
    CHECK(refuse(payload, content.size(), {.packet_bytes = page_bytes}) == Errc::bad_payload_size);
  }
}

TEST_CASE_TEMPLATE("a decoder that refused a payload refuses all later ones", C, Zlib, Zstd) {
  auto encoder = open<typename C::Encoder>(C{});
  const Bytes content = text_pages(1);
  const Bytes first = encode(encoder, content);
  auto decoder = open<typename C::Decoder>(C{});
  CHECK(refusal(decoder, {}, content.size()) == Errc::bad_payload_size);
  CHECK(refusal(decoder, first, content.size()) == Errc::corrupt_payload);
  CHECK(refusal(decoder, {}, 0) == Errc::corrupt_payload);
}

TEST_CASE_TEMPLATE("a payload of noise is corrupt", C, Zlib, Zstd) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    auto decoder = open<typename C::Decoder>(C{});
    CHECK(refusal(decoder, random_pages(1, seed), page_bytes) == Errc::corrupt_payload);
  }
}
