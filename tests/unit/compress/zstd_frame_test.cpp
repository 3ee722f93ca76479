// SPDX-License-Identifier: MIT
#include "multifd/compress/zstd_frame.hpp"

#include <doctest/doctest.h>
#include <zstd.h>

#include <algorithm>
#include <ostream>  // lets doctest print a std::error_code
#include <vector>

#include "multifd/memory/page_digest.hpp"
#include "support/allocation_count.hpp"
#include "support/memory.hpp"

using namespace multifd;

namespace {

using Bytes = std::vector<std::byte>;

Bytes text(std::size_t bytes) {
  test::Rng rng(test::seed());
  Bytes all(bytes);
  for (std::byte& byte : all) byte = std::byte(rng() % 20);
  return all;
}

Bytes frame_of(const Bytes& content, int level = 1) {
  auto encoder = ZstdFrameEncoder::create(level, content.size());
  REQUIRE(encoder.has_value());
  Bytes frame(ZstdFrameEncoder::bound(content.size()));
  const auto bytes = encoder->encode(content, frame);
  REQUIRE(bytes.has_value());
  frame.resize(*bytes);
  return frame;
}

Bytes plain(const Bytes& content, bool content_size, bool checksum) {
  ZSTD_CCtx* const context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, content_size);
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, checksum);
  Bytes frame(ZSTD_compressBound(content.size()) + 16);
  frame.resize(ZSTD_compress2(context, frame.data(), frame.size(), content.data(), content.size()));
  ZSTD_freeCCtx(context);
  return frame;
}

std::error_code decode(const Bytes& frame, std::size_t bytes, ZstdContentSize size = ZstdContentSize::required) {
  auto decoder = ZstdFrameDecoder::create();
  REQUIRE(decoder.has_value());
  const test::Block to(bytes);  // between pages that cannot be touched
  return test::code_of(decoder->decode(frame, to.bytes(), size));
}

}  // namespace

TEST_CASE("A frame is plain zstd with its checksum at the end, and comes back") {
  for (const std::size_t bytes : {0uz, 1uz, 100uz, 65536uz, 300'000uz})
    for (const int level : {-7, 1, 9}) {
      const Bytes content = text(bytes);
      const Bytes frame = frame_of(content, level);
      CHECK(ZSTD_getFrameContentSize(frame.data(), frame.size()) == bytes);
      auto decoder = ZstdFrameDecoder::create();
      Bytes back(bytes);
      const auto checksum = decoder->decode(frame, back, ZstdContentSize::required);
      REQUIRE(checksum.has_value());
      CHECK(*checksum == zstd_checksum_of(content));
      CHECK(back == content);
      CHECK(ZSTD_decompress(back.data(), back.size(), frame.data(), frame.size()) == bytes);
    }
}

TEST_CASE("A frame that is not just what was asked for is refused") {
  const Bytes content = text(5000);
  const Bytes good = frame_of(content);
  REQUIRE(decode(good, 5000) == std::error_code{});
  CHECK(decode(good, 4999) == Errc::corrupt_frame);
  CHECK(decode(good, 5001) == Errc::corrupt_frame);
  CHECK(decode({}, 0) == Errc::corrupt_frame);
  const auto with = [&](const Bytes& more) {
    Bytes both = good;
    both.insert(both.end(), more.begin(), more.end());
    return both;
  };
  CHECK(decode(with({std::byte{0}}), 5000) == Errc::corrupt_frame);
  CHECK(decode(with(frame_of({})), 5000) == Errc::corrupt_frame);  // nothing comes of it
  CHECK(decode(with(good), 5000) == Errc::corrupt_frame);
  CHECK(decode(with(good), 10'000) == Errc::corrupt_frame);
  CHECK(decode(frame_of({}), 0) == std::error_code{});
  Bytes skippable(12);
  wire::store_le(skippable.data(), std::uint32_t{0x184d2a50});
  wire::store_le(skippable.data() + 4, std::uint32_t{4});
  CHECK(decode(skippable, 0) == Errc::corrupt_frame);
  CHECK(decode(with(skippable), 5000) == Errc::corrupt_frame);
  for (std::size_t bytes = 0; bytes < good.size(); ++bytes)
    REQUIRE(decode(Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(bytes)), 5000) ==
            Errc::corrupt_frame);
  for (std::uint8_t version = 0x22; version < 0x28; ++version) {  // the formats of before 1.0
    Bytes old = good;
    old[0] = std::byte{version};
    REQUIRE(decode(old, 5000) == Errc::corrupt_frame);
  }
}

TEST_CASE("Content size and checksum may be absent where that is allowed") {
  const Bytes content = text(5000);
  CHECK(decode(plain(content, false, false), 5000) == Errc::corrupt_frame);
  for (const bool checksum : {true, false}) {
    const Bytes frame = plain(content, false, checksum);
    CHECK(decode(frame, 5000, ZstdContentSize::may_be_absent) == std::error_code{});
    CHECK(decode(frame, 4999, ZstdContentSize::may_be_absent) == Errc::corrupt_frame);
    CHECK(decode(frame, 5001, ZstdContentSize::may_be_absent) == Errc::corrupt_frame);
    auto decoder = ZstdFrameDecoder::create();
    Bytes back(5000);
    CHECK(decoder->decode(frame, back, ZstdContentSize::may_be_absent)->has_value() == checksum);
  }
  CHECK(decode(plain(content, true, false), 4999, ZstdContentSize::may_be_absent) == Errc::corrupt_frame);
}

TEST_CASE("Encoders and decoders allocate when they are made, and not after") {
  const Bytes content = text(256 * 1024);
  for (const int level : {-5, 1, 3, 9}) {
    auto encoder = ZstdFrameEncoder::create(level, content.size());
    auto decoder = ZstdFrameDecoder::create();
    Bytes frame(ZstdFrameEncoder::bound(content.size()));
    Bytes back(content.size());
    const std::uint64_t before = test::allocations();
    for (const std::size_t bytes : {content.size(), std::size_t{4096}, content.size()}) {
      const auto size = encoder->encode(std::span(content).first(bytes), frame);
      CHECK(decoder->decode(std::span(frame).first(*size), std::span(back).first(bytes), ZstdContentSize::required));
    }
    CHECK(test::allocations() == before);
  }
}

TEST_CASE("A level that zstd has not, and room that is too small, are refused") {
  CHECK(test::code_of(ZstdFrameEncoder::create(ZSTD_maxCLevel() + 1, 4096)) == Errc::bad_option);
  CHECK(test::code_of(ZstdFrameEncoder::create(ZSTD_minCLevel() - 1, 4096)) == Errc::bad_option);
  auto encoder = ZstdFrameEncoder::create(1, 4096);
  Bytes small(10);
  CHECK(test::code_of(encoder->encode(text(4096), small)) == Errc::payload_too_large);
}
