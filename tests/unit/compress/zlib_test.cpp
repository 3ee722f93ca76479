// SPDX-License-Identifier: MIT
#include "multifd/compress/zlib.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <concepts>
#include <initializer_list>
#include <vector>

#include "unit/compress/foreign_deflate.hpp"

// Whoever reads zlib's format: the same cases for each.
#if defined(MULTIFD_HAS_IGZIP)
#include "multifd/compress/igzip.hpp"
#define READERS multifd::Zlib, multifd::Igzip
#else
#define READERS multifd::Zlib
#endif

using namespace multifd;
using namespace codec_payloads;

namespace {

template <class C>
std::error_code refusal_of(const Bytes& payload, std::size_t size) {
  auto decoder = open<typename C::Decoder>(C{});
  return refusal(decoder, payload, size);
}

}  // namespace

TEST_CASE("Zlib payloads of a channel in a row are one stream for plain inflate") {
  auto encoder = open<Zlib::Encoder>(Zlib{});
  Bytes payloads;
  Bytes contents;
  for (const Bytes& content : stream_of_pages()) {
    const Bytes payload = encode(encoder, content);
    CHECK(ends_with_marker(payload));
    payloads = payloads + payload;
    contents = contents + content;
  }
  CHECK(payloads[0] == std::byte{0x78});  // RFC 1950: deflate, window of 32 KiB
  CHECK(plain_inflate(payloads, contents.size()) == contents);
}

TEST_CASE("Zlib makes the same bytes as plain deflate fed page by page") {
  const Bytes content = text_pages(16);
  ForeignDeflate foreign(1);
  Bytes expected;
  for (std::size_t at = 0; at < content.size(); at += page_bytes) {
    const auto page = content.begin() + static_cast<std::ptrdiff_t>(at);
    const bool last = at + page_bytes == content.size();
    expected = expected + foreign.packet(Bytes(page, page + page_bytes), last ? Z_SYNC_FLUSH : Z_NO_FLUSH);
  }
  auto encoder = open<Zlib::Encoder>(Zlib{.level = 1});
  CHECK(encode(encoder, content) == expected);
}

TEST_CASE("Zlib stores random pages, wherever they lie, and compresses the others as before") {
  // Single pages, runs that end in mid-packet and at its end, more than a window of them, at every level.
  const std::vector<Bytes> stream = {text_pages(2) + random_pages(1) + text_pages(1, 2) + random_pages(1, 2),
                                     text_pages(8, 3) + random_pages(40, 3), random_pages(3, 4), text_pages(8, 3),
                                     random_pages(20, 5) + text_pages(8, 4) + random_pages(20, 5) + text_pages(8, 4)};
  for (int level = 0; level <= 9; ++level) {
    CAPTURE(level);
    auto encoder = open<Zlib::Encoder>(Zlib{.level = level});
    ForeignDeflate plain(level);
    Bytes payloads, contents;
    std::size_t plain_bytes = 0;
    for (const Bytes& content : stream) {
      payloads = payloads + encode(encoder, content);
      contents = contents + content;
      plain_bytes += plain.packet(content).size();
    }
    CHECK(plain_inflate(payloads, contents.size()) == contents);
    CHECK(static_cast<double>(payloads.size()) < 1.01 * static_cast<double>(plain_bytes));
  }
}

TEST_CASE("Zlib does not search random pages") {
  // A search would find that the second half is the first one again.
  const Bytes noise = random_pages(4);
  const Bytes twice = noise + noise;
  REQUIRE(ForeignDeflate(1).packet(twice).size() < twice.size() * 2 / 3);
  auto encoder = open<Zlib::Encoder>(Zlib{});
  CHECK(encode(encoder, twice).size() > twice.size());
}

TEST_CASE("Zlib's level changes between packets with random pages at their ends") {
  auto encoder = open<Zlib::Encoder>(Zlib{.level = 1});
  auto decoder = open<Zlib::Decoder>(Zlib{});
  const Bytes content = text_pages(3) + random_pages(2);
  Bytes decoded;
  for (const int level : {1, 9, 0, 9, 1, 0, 0, 5}) {
    REQUIRE(encoder.set_level(level).has_value());
    const Bytes payload = encode(encoder, content);
    REQUIRE(decode(decoder, payload, content.size(), decoded).has_value());
    CHECK(decoded == content);
    CHECK((payload.size() > content.size()) == (level == 0));
  }
}

TEST_CASE_TEMPLATE("What plain deflate made is decoded, at any level and window", C, READERS) {
  for (const int level : {0, 1, 6, 9}) {
    for (const int window_bits : {9, 12, 15}) {
      CAPTURE(level);
      CAPTURE(window_bits);
      ForeignDeflate foreign(level, window_bits);
      auto decoder = open<typename C::Decoder>(C{});
      Bytes decoded;
      for (const Bytes& content : stream_of_pages()) {
        REQUIRE(decode(decoder, foreign.packet(content), content.size(), decoded).has_value());
        CHECK(decoded == content);
      }
    }
  }
}

TEST_CASE_TEMPLATE("Payloads are decoded into pages that lie apart", C, READERS) {
  const Bytes content = text_pages(5) + Bytes(page_bytes) + random_pages(1);
  ForeignDeflate foreign(9);
  const Bytes payload = foreign.packet(content);
  // Runs of one byte and more: matches and literals end in the middle, with the input at its end or not.
  for (const std::size_t run : {std::size_t{1}, std::size_t{7}, std::size_t{4096}, std::size_t{5000}}) {
    auto decoder = open<typename C::Decoder>(C{});
    Bytes decoded(content.size());
    std::vector<iovec> runs;
    for (std::size_t at = 0; at < decoded.size(); at += run)
      runs.push_back({decoded.data() + at, std::min(run, decoded.size() - at)});
    CAPTURE(run);
    CHECK(decoder.decode(payload, runs).has_value());
    CHECK(decoded == content);
  }
}

TEST_CASE("Zlib takes the levels 0 to 9 and no others") {
  for (int level = 0; level <= 9; ++level) CHECK(Zlib::Encoder::open({.level = level}, {}).has_value());
  for (const int level : {-2, -1, 10, 1000}) {
    CAPTURE(level);
    const auto refused = Zlib::Encoder::open({.level = level}, {});
    REQUIRE(!refused.has_value());
    CHECK(refused.error().code == Errc::bad_option);
    CHECK(Zlib::Decoder::open({.level = level}, {}).has_value());  // none of a receiver's business
  }
}

TEST_CASE_TEMPLATE("Limits that zlib's format cannot count are refused", C, READERS) {
  const CodecLimits limits{.payload_bytes = std::size_t{1} << 32};
  CHECK(C::Encoder::open({}, limits).error().code == Errc::bad_option);
  CHECK(C::Decoder::open({}, limits).error().code == Errc::bad_option);
}

TEST_CASE("Zlib refuses a page size of nothing") {
  CHECK(Zlib::Encoder::open({}, {.page_bytes = 0}).error().code == Errc::bad_option);
}

TEST_CASE("Zlib's level changes between any two packets of a stream") {
  auto encoder = open<Zlib::Encoder>(Zlib{.level = 1});
  auto decoder = open<Zlib::Decoder>(Zlib{});
  Bytes payloads;
  Bytes contents;
  Bytes decoded;
  const std::vector<Bytes> kinds = {text_pages(8, 5), random_pages(3, 6), Bytes(4 * page_bytes)};
  for (int from = 0; from <= 9; ++from) {
    for (int to = 0; to <= 9; ++to) {
      CAPTURE(from);
      CAPTURE(to);
      for (const int level : {from, to}) {
        REQUIRE(encoder.set_level(level).has_value());
        const Bytes& content = kinds[static_cast<std::size_t>(from + 2 * to + level) % kinds.size()];
        const Bytes payload = encode(encoder, content);
        REQUIRE(decode(decoder, payload, content.size(), decoded).has_value());
        REQUIRE(decoded == content);
        payloads = payloads + payload;
        contents = contents + content;
      }
    }
  }
  CHECK(plain_inflate(payloads, contents.size()) == contents);
}

TEST_CASE("a changed level of Zlib takes effect") {
  const Bytes content = text_pages(64);
  auto encoder = open<Zlib::Encoder>(Zlib{.level = 0});
  const std::size_t stored = encode(encoder, content).size();
  CHECK(stored > content.size());
  REQUIRE(encoder.set_level(1).has_value());
  const std::size_t fast = encode(encoder, text_pages(64, 2)).size();
  CHECK(fast < content.size() / 2);
  REQUIRE(encoder.set_level(9).has_value());
  CHECK(encode(encoder, text_pages(64, 3)).size() < fast);
  REQUIRE(encoder.set_level(0).has_value());
  CHECK(encode(encoder, content).size() > content.size());
}

TEST_CASE("Zlib refuses a level out of range in mid-stream and goes on with the old one") {
  auto encoder = open<Zlib::Encoder>(Zlib{.level = 1});
  auto undisturbed = open<Zlib::Encoder>(Zlib{.level = 1});
  const Bytes content = text_pages(8);
  CHECK(encode(encoder, content) == encode(undisturbed, content));
  for (const int level : {-1, 10}) {
    const auto refused = encoder.set_level(level);
    REQUIRE(!refused.has_value());
    CHECK(refused.error().code == Errc::bad_option);
  }
  CHECK(encode(encoder, content) == encode(undisturbed, content));
}

TEST_CASE("zlib writes nothing when its level changes after a sync flush") {
  // What lets set_level() leave the last payload alone, for every pair of levels of the zlib at hand.
  const Bytes content = text_pages(2) + random_pages(1);
  for (int from = 0; from <= 9; ++from) {
    for (int to = 0; to <= 9; ++to) {
      ForeignDeflate foreign(from);
      foreign.packet(content);
      Bytef out[64];
      foreign.get()->next_out = out;
      foreign.get()->avail_out = sizeof(out);
      CHECK(deflateParams(foreign.get(), to, Z_DEFAULT_STRATEGY) == Z_OK);
      CHECK(foreign.get()->avail_out == sizeof(out));
    }
  }
}

TEST_CASE_TEMPLATE("A full flush is taken, which is a sync flush that forgets", C, READERS) {
  ForeignDeflate foreign;
  const Bytes content = text_pages(4);
  CHECK(!refusal_of<C>(foreign.packet(content, Z_FULL_FLUSH), content.size()));
}

TEST_CASE_TEMPLATE("A payload that does not end with a sync flush is refused", C, READERS) {
  const Bytes content = text_pages(4);
  SUBCASE("cut anywhere") {
    const Bytes payload = ForeignDeflate().packet(content);
    for (std::size_t cut = 1; cut < payload.size(); cut += cut < 20 ? 1 : 7) {
      CAPTURE(cut);
      CHECK(refusal_of<C>(without_tail(payload, cut), content.size()) == Errc::corrupt_payload);
    }
  }
  SUBCASE("stored blocks, which need no flush to be complete") {
    CHECK(refusal_of<C>(without_tail(ForeignDeflate(0).packet(content), 5), content.size()) == Errc::corrupt_payload);
  }
  SUBCASE("a stored block whose content ends as a flush does") {
    const Bytes page = without_tail(text_pages(1), 4) + sync_marker;
    const Bytes payload = without_tail(ForeignDeflate(0).packet(page), 5);
    REQUIRE(ends_with_marker(payload));
    CHECK(refusal_of<C>(payload, page.size()) == Errc::bad_payload_size);
  }
  SUBCASE("partial flush") {
    CHECK(refusal_of<C>(ForeignDeflate().packet(content, Z_PARTIAL_FLUSH), content.size()) == Errc::corrupt_payload);
  }
  SUBCASE("partial flush, and the marker's bytes") {
    CHECK(refusal_of<C>(ForeignDeflate().packet(content, Z_PARTIAL_FLUSH) + sync_marker, content.size()) ==
          Errc::corrupt_payload);
  }
  SUBCASE("bytes after the marker") {
    CHECK(refusal_of<C>(ForeignDeflate().packet(content) + bytes_of({0}), content.size()) == Errc::corrupt_payload);
    CHECK(refusal_of<C>(ForeignDeflate().packet(content) + sync_marker, content.size()) == Errc::corrupt_payload);
  }
}

TEST_CASE_TEMPLATE("A flushed payload of which a piece is missing is refused", C, READERS) {
  const Bytes content = text_pages(4);
  const Bytes payload = ForeignDeflate(0).packet(content);
  CHECK(refusal_of<C>(without_tail(payload, 5 + 100) + sync_marker, content.size()) == Errc::bad_payload_size);
  CHECK(refusal_of<C>(payload, content.size() + page_bytes) == Errc::bad_payload_size);
  CHECK(refusal_of<C>(payload, content.size() - page_bytes) == Errc::bad_payload_size);
}

TEST_CASE_TEMPLATE("An end of stream is refused", C, READERS) {
  const Bytes content = text_pages(4);
  const Bytes finished = ForeignDeflate().packet(content, Z_FINISH);
  CHECK(refusal_of<C>(finished, content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of<C>(finished + sync_marker, content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of<C>(finished + ForeignDeflate().packet(content), content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of<C>(finished + sync_marker, content.size() + page_bytes) == Errc::corrupt_payload);
}

TEST_CASE_TEMPLATE("A preset dictionary is refused", C, READERS) {
  ForeignDeflate foreign;
  const Bytes dictionary = text_pages(1);
  REQUIRE(deflateSetDictionary(foreign.get(), reinterpret_cast<const Bytef*>(dictionary.data()),
                               static_cast<uInt>(dictionary.size())) == Z_OK);
  CHECK(refusal_of<C>(foreign.packet(dictionary), dictionary.size()) == Errc::corrupt_payload);
}

TEST_CASE_TEMPLATE("Streams that are not zlib's are refused", C, READERS) {
  const Bytes content = text_pages(2);
  CHECK(refusal_of<C>(ForeignDeflate(6, -15).packet(content), content.size()) == Errc::corrupt_payload);  // raw
  CHECK(refusal_of<C>(ForeignDeflate(6, 31).packet(content), content.size()) == Errc::corrupt_payload);   // gzip
  // A marker alone: Zlib misses the pages, Igzip the header.
  CHECK(refusal_of<C>(sync_marker, content.size()) ==
        (std::same_as<C, Zlib> ? Errc::bad_payload_size : Errc::corrupt_payload));
}

TEST_CASE_TEMPLATE("A second stream header is refused", C, READERS) {
  const Bytes content = text_pages(2);
  auto decoder = open<typename C::Decoder>(C{});
  CHECK(!refusal(decoder, ForeignDeflate().packet(content), content.size()));
  CHECK(refusal(decoder, ForeignDeflate().packet(content), content.size()) == Errc::corrupt_payload);
}

TEST_CASE_TEMPLATE("A match from before the stream's first byte is refused", C, READERS) {
  // Fixed block: a match of length 3 at distance 1, with nothing before it.
  CHECK(refusal_of<C>(bytes_of({0x78, 0x9c, 0x02, 0x02, 0x00}) + sync_marker, page_bytes) == Errc::corrupt_payload);
}

TEST_CASE_TEMPLATE("A bomb is refused without being unpacked", C, READERS) {
  constexpr std::size_t bomb = std::size_t{256} << 10;
  Bytes payload = ForeignDeflate(9).packet(Bytes(bomb));
  // Whoever unpacks it comes to a block of a type that does not exist, and says something else.
  payload = payload + bytes_of({0x06}) + sync_marker;
  CHECK(refusal_of<C>(payload, bomb + page_bytes) == Errc::corrupt_payload);
  CHECK(refusal_of<C>(payload, page_bytes) == Errc::bad_payload_size);
}
