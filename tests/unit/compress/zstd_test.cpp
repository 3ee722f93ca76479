// SPDX-License-Identifier: MIT
#include "multifd/compress/zstd.hpp"

#include <doctest/doctest.h>
#include <zstd.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "unit/compress/packets.hpp"

using namespace multifd;
using namespace codec_payloads;

namespace {

// A sender that is not ours: plain zstd.
class ForeignZstd {
 public:
  explicit ForeignZstd(std::initializer_list<std::pair<ZSTD_cParameter, int>> parameters = {}) {
    for (const auto& [parameter, value] : parameters)
      REQUIRE(!ZSTD_isError(ZSTD_CCtx_setParameter(stream_.get(), parameter, value)));
  }

  Bytes packet(const Bytes& content, ZSTD_EndDirective directive = ZSTD_e_flush) {
    Bytes out(ZSTD_compressBound(content.size()) + 256 * 1024);
    ZSTD_inBuffer from{content.data(), content.size(), 0};
    ZSTD_outBuffer to{out.data(), out.size(), 0};
    const std::size_t left = ZSTD_compressStream2(stream_.get(), &to, &from, directive);
    REQUIRE(!ZSTD_isError(left));
    REQUIRE((left == 0 || directive == ZSTD_e_continue));
    REQUIRE(from.pos == from.size);
    out.resize(to.pos);
    return out;
  }

  ZSTD_CCtx* get() { return stream_.get(); }

 private:
  struct Free {
    void operator()(ZSTD_CCtx* stream) const { ZSTD_freeCCtx(stream); }
  };
  std::unique_ptr<ZSTD_CCtx, Free> stream_{ZSTD_createCCtx()};
};

Bytes plain_decompress(const Bytes& payloads, std::size_t size) {
  Bytes out(size + 1);
  ZSTD_DStream* const stream = ZSTD_createDStream();
  ZSTD_inBuffer from{payloads.data(), payloads.size(), 0};
  ZSTD_outBuffer to{out.data(), out.size(), 0};
  std::size_t wanted = 1;
  while (from.pos < from.size && !ZSTD_isError(wanted) && to.pos < to.size)
    wanted = ZSTD_decompressStream(stream, &to, &from);
  CHECK(!ZSTD_isError(wanted));
  CHECK(wanted != 0);  // 0 would be the end of the frame
  CHECK(from.pos == from.size);
  ZSTD_freeDStream(stream);
  out.resize(to.pos);
  return out;
}

// Reserves less than the default: sanitizers make 128 MiB for each of many decoders dear.
constexpr Zstd small_window{.max_window_log = 23};

std::error_code refusal_of(const Bytes& payload, std::size_t size, const Zstd& parameters = small_window) {
  auto decoder = open<Zstd::Decoder>(parameters);
  return refusal(decoder, payload, size);
}

const Bytes magic = bytes_of({0x28, 0xb5, 0x2f, 0xfd});

// RFC 8878: descriptor 0 = window byte follows, no content size, no checksum, no dictionary.
Bytes frame_header(int window_log) { return magic + bytes_of({0x00, (window_log - 10) << 3}); }

enum class Last { no, yes };

Bytes block_header(int type, std::size_t size, Last last = Last::no) {
  const auto value = static_cast<int>(size << 3) | type << 1 | (last == Last::yes ? 1 : 0);
  return bytes_of({value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff});
}

// `size` times the same byte.
Bytes rle_block(std::size_t size, Last last = Last::no) { return block_header(1, size, last) + bytes_of({0x2a}); }

Bytes raw_block(const Bytes& content, Last last = Last::no) { return block_header(0, content.size(), last) + content; }

}  // namespace

TEST_CASE("Zstd payloads of a channel in a row are one frame for plain ZSTD_decompressStream") {
  auto encoder = open<Zstd::Encoder>(Zstd{});
  Bytes payloads;
  Bytes contents;
  for (const Bytes& content : stream_of_pages()) {
    payloads = payloads + encode(encoder, content);
    contents = contents + content;
  }
  CHECK(Bytes(payloads.begin(), payloads.begin() + 4) == magic);
  CHECK(payloads[4] == std::byte{0});  // no content size, no checksum, no dictionary
  CHECK(plain_decompress(payloads, contents.size()) == contents);
}

TEST_CASE("Zstd makes the same bytes as plain zstd, however the pages lie") {
  const Bytes content = text_pages(64);
  ForeignZstd foreign({{ZSTD_c_compressionLevel, 3}});
  const Bytes expected = foreign.packet(content);
  for (const std::size_t run : {page_bytes, 5 * page_bytes, content.size()}) {
    CAPTURE(run);
    std::vector<iovec> runs;
    for (std::size_t at = 0; at < content.size(); at += run)
      runs.push_back(const_buffer(content.data() + at, std::min(run, content.size() - at)));
    auto encoder = open<Zstd::Encoder>(Zstd{.level = 3});
    const auto payload = encoder.encode(runs);
    REQUIRE(payload.has_value());
    const auto* bytes = static_cast<const std::byte*>((*payload)[0].iov_base);
    CHECK(Bytes(bytes, bytes + (*payload)[0].iov_len) == expected);
  }
}

TEST_CASE("Zstd decodes what plain zstd made at any level") {
  for (const int level : {-1000, -5, 1, 3, 9, 13}) {
    CAPTURE(level);
    ForeignZstd foreign({{ZSTD_c_compressionLevel, level}});
    auto decoder = open<Zstd::Decoder>(Zstd{});
    Bytes decoded;
    for (const Bytes& content : stream_of_pages()) {
      REQUIRE(decode(decoder, foreign.packet(content), content.size(), decoded).has_value());
      CHECK(decoded == content);
    }
  }
}

TEST_CASE("Zstd decodes a frame that wants a checksum at its end, or found matches far away") {
  ForeignZstd foreign({{ZSTD_c_checksumFlag, 1}, {ZSTD_c_enableLongDistanceMatching, 1}});
  auto decoder = open<Zstd::Decoder>(Zstd{});
  Bytes decoded;
  for (const Bytes& content : stream_of_pages()) {
    REQUIRE(decode(decoder, foreign.packet(content), content.size(), decoded).has_value());
    CHECK(decoded == content);
  }
}

TEST_CASE("Zstd goes round its window many times") {
  auto encoder = open<Zstd::Encoder>(Zstd{.level = 1, .window_log = 10});
  auto decoder = open<Zstd::Decoder>(Zstd{.max_window_log = 10});
  Bytes decoded;
  for (std::uint64_t i = 0; i < 60; ++i) {
    const Bytes content = text_pages(1 + i % 7, i);
    REQUIRE(decode(decoder, encode(encoder, content), content.size(), decoded).has_value());
    REQUIRE(decoded == content);
  }
}

TEST_CASE("Zstd's level 1 is about as small as zstd's own, and smaller windows do for it and those below") {
  const Bytes content = text_pages(128);
  ForeignZstd foreign({{ZSTD_c_compressionLevel, 1}});
  auto encoder = open<Zstd::Encoder>(Zstd{.level = 1});
  const Bytes payload = encode(encoder, content);
  CHECK(static_cast<double>(payload.size()) < 1.15 * static_cast<double>(foreign.packet(content).size()));
  std::size_t smaller = payload.size();
  for (const int level : {-1, -3, -10, -50}) {
    CAPTURE(level);
    auto faster = open<Zstd::Encoder>(Zstd{.level = level});
    const Bytes larger = encode(faster, content);
    CHECK(larger.size() > smaller);
    CHECK(larger[5] == std::byte{(17 - 10) << 3});
    smaller = larger.size();
  }
  CHECK(payload[5] == std::byte{(17 - 10) << 3});
  auto chosen = open<Zstd::Encoder>(Zstd{.level = -1, .window_log = 20});
  CHECK(encode(chosen, content)[5] == std::byte{(20 - 10) << 3});
}

TEST_CASE("Zstd gives many random pages blocks of their own, however they lie among others") {
  const Bytes noise = random_pages(40);
  const Bytes text = text_pages(8);
  for (const std::size_t run : {std::size_t{4}, std::size_t{16}, std::size_t{88}}) {
    CAPTURE(run);
    const Bytes content = text + noise + text + random_pages(40, 2);
    std::vector<iovec> runs;
    for (std::size_t at = 0; at < content.size(); at += run * page_bytes)
      runs.push_back(const_buffer(content.data() + at, std::min(run * page_bytes, content.size() - at)));
    auto encoder = open<Zstd::Encoder>(Zstd{.level = 3});
    auto decoder = open<Zstd::Decoder>(small_window);
    const auto encoded = encoder.encode(runs);
    REQUIRE(encoded.has_value());
    const auto* bytes = static_cast<const std::byte*>((*encoded)[0].iov_base);
    const Bytes payload(bytes, bytes + (*encoded)[0].iov_len);
    Bytes decoded;
    REQUIRE(decode(decoder, payload, content.size(), decoded).has_value());
    CHECK(decoded == content);
    // Stored whole, so that a part of it is found as it is.
    const auto part = std::search(payload.begin(), payload.end(), noise.begin() + 5000, noise.begin() + 6000);
    CHECK(part != payload.end());
    ForeignZstd foreign({{ZSTD_c_compressionLevel, 3}});
    CHECK(payload.size() < foreign.packet(content).size());
  }
}

TEST_CASE("Zstd does not cut blocks for single random pages") {
  Bytes content;
  for (std::uint64_t i = 0; i < 32; ++i) content = content + text_pages(1, i) + random_pages(1, i);
  auto encoder = open<Zstd::Encoder>(Zstd{.level = 3});
  ForeignZstd foreign({{ZSTD_c_compressionLevel, 3}});
  CHECK(encode(encoder, content) == foreign.packet(content));
}

TEST_CASE("Zstd refuses pages of no size") {
  CHECK(Zstd::Encoder::open({}, {.page_bytes = 0}).error().code == Errc::bad_option);
}

TEST_CASE("zstd copies its input") {
  // Why pages may change while they are encoded: input of a call is not looked at once the call is over...
  ForeignZstd foreign;
  Bytes page = text_pages(1);
  const Bytes before = page;
  Bytes payload = foreign.packet(page, ZSTD_e_continue);
  page = random_pages(1);
  payload = payload + foreign.packet({}, ZSTD_e_flush);
  CHECK(plain_decompress(payload, page_bytes) == before);
  // ... which is so in the buffered mode that is zstd's default, and is not offered as a parameter here.
}

TEST_CASE("Zstd takes the levels that zstd has and no others") {
  // The highest ones need most of a GiB; 19 is the highest that is called regular.
  for (const int level : {ZSTD_minCLevel(), -7, 0, 1, 19}) {
    CAPTURE(level);
    CHECK(Zstd::Encoder::open({.level = level}, {}).has_value());
  }
  for (const int level : {ZSTD_minCLevel() - 1, ZSTD_maxCLevel() + 1, 1000}) {
    CAPTURE(level);
    const auto refused = Zstd::Encoder::open({.level = level}, {});
    REQUIRE(!refused.has_value());
    CHECK(refused.error().code == Errc::bad_option);
    CHECK(Zstd::Decoder::open({.level = level}, {}).has_value());  // none of a receiver's business
  }
}

TEST_CASE("Zstd takes windows that peers can decode and no others") {
  CHECK(Zstd::Encoder::open({.window_log = 10}, {}).has_value());
  CHECK(Zstd::Decoder::open({.max_window_log = 10}, {}).has_value());
  for (const int log : {-1, 1, 9, 28, 31, 64}) {
    CAPTURE(log);
    CHECK(Zstd::Encoder::open({.window_log = log}, {}).error().code == Errc::bad_option);
    CHECK(Zstd::Decoder::open({.max_window_log = log}, {}).error().code == Errc::bad_option);
  }
  CHECK(Zstd::Decoder::open({.max_window_log = 0}, {}).error().code == Errc::bad_option);
}

TEST_CASE("Zstd's largest window goes through the default decoder") {
  // As large as level 22 wants it, the highest of all; without that level's cost in memory.
  auto encoder = open<Zstd::Encoder>(Zstd{.level = 1, .window_log = 27});
  const Bytes content = text_pages(128);
  const Bytes payload = encode(encoder, content);
  CHECK(payload[5] == std::byte{(27 - 10) << 3});
  CHECK(!refusal_of(payload, content.size(), Zstd{}));
  CHECK(refusal_of(payload, content.size(), {.max_window_log = 26}) == Errc::corrupt_payload);
}

TEST_CASE("Zstd refuses a window over its cap, before any memory is had for it") {
  const Bytes block = rle_block(page_bytes);
  CHECK(!refusal_of(frame_header(20) + block, page_bytes, {.max_window_log = 20}));
  CHECK(refusal_of(frame_header(21) + block, page_bytes, {.max_window_log = 20}) == Errc::corrupt_payload);
  CHECK(!refusal_of(frame_header(27) + block, page_bytes, Zstd{}));
  CHECK(refusal_of(frame_header(28) + block, page_bytes, Zstd{}) == Errc::corrupt_payload);
  CHECK(refusal_of(frame_header(41) + block, page_bytes, Zstd{}) == Errc::corrupt_payload);
  // An eighth over 2^27: the window byte's mantissa.
  CHECK(refusal_of(magic + bytes_of({0x00, (27 - 10) << 3 | 1}) + block, page_bytes, Zstd{}) == Errc::corrupt_payload);
  // Single segment: no window byte, the content size (4 GiB - 1, then 8 bytes of ff) is the window.
  CHECK(refusal_of(magic + bytes_of({0xa0, 0xff, 0xff, 0xff, 0xff}) + block, page_bytes, Zstd{}) ==
        Errc::corrupt_payload);
  CHECK(refusal_of(magic + bytes_of({0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) + block, page_bytes) ==
        Errc::corrupt_payload);
}

TEST_CASE("Zstd refuses a dictionary") {
  const Bytes block = rle_block(page_bytes);
  CHECK(!refusal_of(magic + bytes_of({0x01, 0x50, 0x00}) + block, page_bytes));  // id 0 means none
  CHECK(refusal_of(magic + bytes_of({0x01, 0x50, 0x07}) + block, page_bytes) == Errc::corrupt_payload);
}

TEST_CASE("Zstd refuses an end of frame") {
  const Bytes content = text_pages(2);
  const Bytes ended = ForeignZstd().packet(content, ZSTD_e_end);
  CHECK(refusal_of(ended, content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of(ended + ForeignZstd().packet(content), content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of(ended, content.size() + page_bytes) == Errc::corrupt_payload);
  SUBCASE("in a block of its own") {
    const Bytes empty_last = raw_block({}, Last::yes);
    CHECK(refusal_of(frame_header(17) + rle_block(page_bytes) + empty_last, page_bytes) == Errc::corrupt_payload);
  }
  SUBCASE("with the last page") {
    CHECK(refusal_of(frame_header(17) + rle_block(page_bytes, Last::yes), page_bytes) == Errc::corrupt_payload);
  }
  SUBCASE("before a checksum that does not come") {
    const Bytes header = magic + bytes_of({0x04, 0x38});
    CHECK(refusal_of(header + rle_block(page_bytes, Last::yes), page_bytes) == Errc::corrupt_payload);
  }
}

TEST_CASE("Zstd refuses a payload that ends inside a block") {
  const Bytes content = random_pages(1);
  const Bytes whole = frame_header(17) + raw_block(content);
  CHECK(!refusal_of(whole, content.size()));
  const Bytes next = raw_block(content);
  for (std::size_t taken = 1; taken < 16; ++taken) {
    // Up to its header a block says nothing; after it, raw bytes come out at once.
    CAPTURE(taken);
    const auto code = refusal_of(whole + without_tail(next, next.size() - taken), content.size());
    CHECK(code == (taken <= 3 ? Errc::corrupt_payload : Errc::bad_payload_size));
  }
  for (const std::size_t cut : {std::size_t{1}, std::size_t{5}, content.size()})
    CHECK(refusal_of(without_tail(whole, cut), content.size()) == Errc::bad_payload_size);
}

TEST_CASE("Zstd refuses frames of other kinds") {
  const Bytes content = text_pages(1);
  SUBCASE("pre-1.0 formats") {
    for (int version = 0x22; version <= 0x27; ++version)
      CHECK(refusal_of(bytes_of({version, 0xb5, 0x2f, 0xfd}) + content, page_bytes) == Errc::corrupt_payload);
  }
  SUBCASE("skippable") {
    const Bytes skippable = bytes_of({0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4});
    CHECK(refusal_of(skippable, page_bytes) == Errc::corrupt_payload);
    CHECK(refusal_of(skippable + ForeignZstd().packet(content), page_bytes) == Errc::corrupt_payload);
    const Bytes endless = bytes_of({0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff});
    CHECK(refusal_of(endless + content, page_bytes) == Errc::bad_payload_size);
  }
  SUBCASE("without magic number") {
    ForeignZstd foreign;
    const Bytes payload = foreign.packet(content);
    CHECK(refusal_of(Bytes(payload.begin() + 4, payload.end()), page_bytes) == Errc::corrupt_payload);
  }
  SUBCASE("a second one") {
    auto decoder = open<Zstd::Decoder>(Zstd{});
    CHECK(!refusal(decoder, ForeignZstd().packet(content), page_bytes));
    CHECK(refusal(decoder, ForeignZstd().packet(content), page_bytes) == Errc::corrupt_payload);
  }
}

TEST_CASE("Zstd refuses a block type that does not exist, and blocks that are too large") {
  CHECK(refusal_of(frame_header(17) + block_header(3, 1) + bytes_of({0}), page_bytes) == Errc::corrupt_payload);
  CHECK(refusal_of(frame_header(17) + rle_block(128 * 1024 + 1), 33 * page_bytes) == Errc::corrupt_payload);
  CHECK(refusal_of(frame_header(10) + rle_block(1025), page_bytes) == Errc::corrupt_payload);
}

TEST_CASE("Zstd refuses a bomb without unpacking it") {
  constexpr std::size_t blocks = 3;
  Bytes payload = frame_header(17);
  for (std::size_t i = 0; i < blocks; ++i) payload = payload + rle_block(128 * 1024);
  // Whoever unpacks them comes to this one, of a type that does not exist, and says something else.
  payload = payload + block_header(3, 1);
  CHECK(refusal_of(payload, blocks * 128 * 1024 + page_bytes) == Errc::corrupt_payload);
  CHECK(refusal_of(payload, page_bytes) == Errc::bad_payload_size);
}

TEST_CASE("Zstd refuses a payload that was cut") {
  const Bytes content = text_pages(2);
  const Bytes payload = ForeignZstd().packet(content);
  for (std::size_t size = 1; size < payload.size(); size += 7)
    CHECK(refusal_of(without_tail(payload, payload.size() - size), content.size()) == Errc::bad_payload_size);
}

TEST_CASE("Zstd takes a payload of empty blocks for what it is") {
  Bytes payload = frame_header(17);
  const Bytes empty = raw_block({});
  while (payload.size() + 16 <= 1024 * 1024) payload.insert(payload.end(), empty.begin(), empty.end());
  CHECK(refusal_of(payload, page_bytes) == Errc::bad_payload_size);
  CHECK(!refusal_of(payload + rle_block(page_bytes), page_bytes));
}
