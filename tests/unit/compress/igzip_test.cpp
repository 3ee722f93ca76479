// SPDX-License-Identifier: MIT
#if defined(MULTIFD_HAS_IGZIP)
#include "multifd/compress/igzip.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <zlib.h>

#include <algorithm>
#include <random>
#include <vector>

#include "multifd/compress/zlib.hpp"
#include "support/allocation_count.hpp"
#include "unit/compress/packets.hpp"

using namespace multifd;
using namespace packets;

namespace {

const Bytes sync_marker = bytes_of({0x00, 0x00, 0xff, 0xff});

// A sender that is not ours: plain zlib.
class ForeignDeflate {
 public:
  explicit ForeignDeflate(int level = 6, int window_bits = 15) {
    REQUIRE(deflateInit2(&stream_, level, Z_DEFLATED, window_bits, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  }
  ~ForeignDeflate() { deflateEnd(&stream_); }
  ForeignDeflate(const ForeignDeflate&) = delete;
  ForeignDeflate& operator=(const ForeignDeflate&) = delete;

  Bytes packet(const Bytes& content, int flush = Z_SYNC_FLUSH) {
    Bytes out(content.size() + content.size() / 8 + 256 * 1024);
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(content.data()));
    stream_.avail_in = static_cast<uInt>(content.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    REQUIRE(deflate(&stream_, flush) == (flush == Z_FINISH ? Z_STREAM_END : Z_OK));
    out.resize(out.size() - stream_.avail_out);
    return out;
  }

  z_stream* get() { return &stream_; }

 private:
  z_stream stream_{};
};

std::error_code refusal_of(const Bytes& payload, std::size_t size) {
  auto decoder = open<Igzip::Decoder>(Igzip{});
  return refusal(decoder, payload, size);
}

/// Bytes whose neighbours on both sides are not mapped: one byte too far is a crash, in assembly code as well.
class Fenced {
 public:
  explicit Fenced(std::size_t size) : size_(size) {
    const std::size_t inside = (size + 4095) / 4096 * 4096;
    memory_ = mmap(nullptr, inside + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory_ != MAP_FAILED);
    mapped_ = inside + 8192;
    REQUIRE(mprotect(static_cast<std::byte*>(memory_) + 4096, inside, PROT_READ | PROT_WRITE) == 0);
    bytes_ = static_cast<std::byte*>(memory_) + 4096 + inside - size;
  }
  ~Fenced() { munmap(memory_, mapped_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  std::span<std::byte> bytes() const { return {bytes_, size_}; }

 private:
  void* memory_ = nullptr;
  std::size_t mapped_ = 0;
  std::byte* bytes_ = nullptr;
  std::size_t size_;
};

}  // namespace

TEST_CASE("Igzip's payloads in a row are one zlib stream for plain inflate") {
  for (const int level : {1, 2, 3}) {
    CAPTURE(level);
    auto encoder = open<Igzip::Encoder>(Igzip{.level = level});
    Bytes payloads, contents;
    for (const Bytes& content : stream_of_pages()) {
      const Bytes payload = encode(encoder, content);
      CHECK(Bytes(payload.end() - 4, payload.end()) == sync_marker);
      payloads = payloads + payload;
      contents = contents + content;
    }
    CHECK(payloads[0] == std::byte{0x78});  // RFC 1950: deflate, window of 32 KiB
    Bytes out(contents.size() + 1);
    z_stream stream{};
    REQUIRE(inflateInit(&stream) == Z_OK);
    stream.next_in = reinterpret_cast<Bytef*>(payloads.data());
    stream.avail_in = static_cast<uInt>(payloads.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    CHECK(inflate(&stream, Z_SYNC_FLUSH) == Z_OK);
    CHECK(stream.avail_in == 0);
    out.resize(out.size() - stream.avail_out);
    inflateEnd(&stream);
    CHECK(out == contents);
  }
}

TEST_CASE("Zlib decodes what Igzip makes, packet by packet") {
  for (const int level : {1, 2, 3}) {
    CAPTURE(level);
    auto encoder = open<Igzip::Encoder>(Igzip{.level = level});
    auto decoder = open<Zlib::Decoder>(Zlib{});
    Bytes decoded;
    for (const Bytes& content : stream_of_pages()) {
      REQUIRE(decode(decoder, encode(encoder, content), content.size(), decoded).has_value());
      CHECK(decoded == content);
    }
  }
}

TEST_CASE("Igzip decodes what Zlib makes, packet by packet") {
  for (int level = 0; level <= 9; ++level) {
    CAPTURE(level);
    auto encoder = open<Zlib::Encoder>(Zlib{.level = level});
    auto decoder = open<Igzip::Decoder>(Igzip{});
    Bytes decoded;
    for (const Bytes& content : stream_of_pages()) {
      REQUIRE(encoder.set_level(level).has_value());
      REQUIRE(decode(decoder, encode(encoder, content), content.size(), decoded).has_value());
      CHECK(decoded == content);
    }
  }
}

TEST_CASE("Igzip decodes what plain deflate made at any level and window") {
  for (const int level : {0, 1, 6, 9}) {
    for (const int window_bits : {9, 12, 15}) {
      CAPTURE(level);
      CAPTURE(window_bits);
      ForeignDeflate foreign(level, window_bits);
      auto decoder = open<Igzip::Decoder>(Igzip{});
      Bytes decoded;
      for (const Bytes& content : stream_of_pages()) {
        REQUIRE(decode(decoder, foreign.packet(content), content.size(), decoded).has_value());
        CHECK(decoded == content);
      }
    }
  }
}

TEST_CASE("Igzip decodes into pages that lie apart") {
  const Bytes content = text_pages(5) + Bytes(page_bytes) + random_pages(1);
  ForeignDeflate foreign(9);
  const Bytes payload = foreign.packet(content);
  for (const std::size_t run : {std::size_t{1}, std::size_t{7}, std::size_t{4096}, std::size_t{5000}}) {
    auto decoder = open<Igzip::Decoder>(Igzip{});
    Bytes decoded(content.size());
    std::vector<iovec> runs;
    for (std::size_t at = 0; at < decoded.size(); at += run)
      runs.push_back({decoded.data() + at, std::min(run, decoded.size() - at)});
    CAPTURE(run);
    CHECK(decoder.decode(payload, runs).has_value());
    CHECK(decoded == content);
  }
}

TEST_CASE("Igzip takes the levels 1 to 3 and no others") {
  for (int level = 1; level <= 3; ++level) CHECK(Igzip::Encoder::open({.level = level}, {}).has_value());
  for (const int level : {-1, 0, 4, 1000}) {
    CAPTURE(level);
    const auto refused = Igzip::Encoder::open({.level = level}, {});
    REQUIRE(!refused.has_value());
    CHECK(refused.error().code == Errc::bad_option);
    CHECK(Igzip::Decoder::open({.level = level}, {}).has_value());  // none of a receiver's business
  }
}

TEST_CASE("Igzip refuses limits that it cannot count") {
  const CodecLimits limits{.payload_bytes = std::size_t{1} << 32};
  CHECK(Igzip::Encoder::open({}, limits).error().code == Errc::bad_option);
  CHECK(Igzip::Decoder::open({}, limits).error().code == Errc::bad_option);
  CHECK(Igzip::Encoder::open({}, {.packet_bytes = 0}).error().code == Errc::bad_option);
}

TEST_CASE("Igzip makes random pages hardly larger at any level") {
  const Bytes content = random_pages(128);
  for (const int level : {1, 2, 3}) {
    CAPTURE(level);
    auto encoder = open<Igzip::Encoder>(Igzip{.level = level});
    for (int packet = 0; packet < 3; ++packet) CHECK(encode(encoder, content).size() < content.size() + 512);
  }
}

TEST_CASE("Igzip says so when a payload does not fit, and fails from then on") {
  const Bytes content = random_pages(16);
  const iovec run = const_buffer(content);
  for (const std::size_t room : {std::size_t{1}, std::size_t{100}, content.size(), content.size() + 4}) {
    CAPTURE(room);
    auto encoder = open<Igzip::Encoder>(Igzip{}, {.payload_bytes = room});
    for (int call = 0; call < 2; ++call) {
      const auto refused = encoder.encode(ConstBuffers(&run, 1));
      REQUIRE(!refused.has_value());
      CHECK(refused.error().code == Errc::payload_too_large);
    }
  }
}

TEST_CASE("Igzip takes a packet over its limit in pieces") {
  const Bytes content = text_pages(40) + random_pages(3) + text_pages(10, 2);
  auto encoder = open<Igzip::Encoder>(Igzip{}, {.packet_bytes = 16 * page_bytes});
  auto decoder = open<Igzip::Decoder>(Igzip{});
  Bytes decoded;
  for (int packet = 0; packet < 3; ++packet) {
    REQUIRE(decode(decoder, encode(encoder, content), content.size(), decoded).has_value());
    CHECK(decoded == content);
  }
}

TEST_CASE("Igzip takes a full flush, which is a sync flush that forgets") {
  ForeignDeflate foreign;
  const Bytes content = text_pages(4);
  CHECK(!refusal_of(foreign.packet(content, Z_FULL_FLUSH), content.size()));
}

TEST_CASE("Igzip refuses a payload that does not end with a sync flush") {
  const Bytes content = text_pages(4);
  SUBCASE("cut anywhere") {
    const Bytes payload = ForeignDeflate().packet(content);
    for (std::size_t cut = 1; cut < payload.size(); cut += cut < 20 ? 1 : 7) {
      CAPTURE(cut);
      CHECK(refusal_of(without_tail(payload, cut), content.size()) == Errc::corrupt_payload);
    }
  }
  SUBCASE("stored blocks, which need no flush to be complete") {
    CHECK(refusal_of(without_tail(ForeignDeflate(0).packet(content), 5), content.size()) == Errc::corrupt_payload);
  }
  SUBCASE("a stored block whose content ends as a flush does") {
    const Bytes page = without_tail(text_pages(1), 4) + sync_marker;
    const Bytes payload = without_tail(ForeignDeflate(0).packet(page), 5);
    REQUIRE(Bytes(payload.end() - 4, payload.end()) == sync_marker);
    CHECK(refusal_of(payload, page.size()) == Errc::bad_payload_size);
  }
  SUBCASE("partial flush") {
    CHECK(refusal_of(ForeignDeflate().packet(content, Z_PARTIAL_FLUSH), content.size()) == Errc::corrupt_payload);
  }
  SUBCASE("partial flush, and the marker's bytes") {
    CHECK(refusal_of(ForeignDeflate().packet(content, Z_PARTIAL_FLUSH) + sync_marker, content.size()) ==
          Errc::corrupt_payload);
  }
  SUBCASE("bytes after the marker") {
    CHECK(refusal_of(ForeignDeflate().packet(content) + bytes_of({0}), content.size()) == Errc::corrupt_payload);
    CHECK(refusal_of(ForeignDeflate().packet(content) + sync_marker, content.size()) == Errc::corrupt_payload);
  }
}

TEST_CASE("Igzip refuses a flushed payload of which a piece is missing") {
  const Bytes content = text_pages(4);
  const Bytes payload = ForeignDeflate(0).packet(content);
  CHECK(refusal_of(without_tail(payload, 5 + 100) + sync_marker, content.size()) == Errc::bad_payload_size);
  CHECK(refusal_of(payload, content.size() + page_bytes) == Errc::bad_payload_size);
  CHECK(refusal_of(payload, content.size() - page_bytes) == Errc::bad_payload_size);
}

TEST_CASE("Igzip refuses an end of stream") {
  const Bytes content = text_pages(4);
  const Bytes finished = ForeignDeflate().packet(content, Z_FINISH);
  CHECK(refusal_of(finished, content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of(finished + sync_marker, content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of(finished + ForeignDeflate().packet(content), content.size()) == Errc::corrupt_payload);
  CHECK(refusal_of(finished + sync_marker, content.size() + page_bytes) == Errc::corrupt_payload);
}

TEST_CASE("Igzip refuses a preset dictionary") {
  ForeignDeflate foreign;
  const Bytes dictionary = text_pages(1);
  REQUIRE(deflateSetDictionary(foreign.get(), reinterpret_cast<const Bytef*>(dictionary.data()),
                               static_cast<uInt>(dictionary.size())) == Z_OK);
  CHECK(refusal_of(foreign.packet(dictionary), dictionary.size()) == Errc::corrupt_payload);
}

TEST_CASE("Igzip refuses streams that are not zlib's") {
  const Bytes content = text_pages(2);
  CHECK(refusal_of(ForeignDeflate(6, -15).packet(content), content.size()) == Errc::corrupt_payload);  // raw
  CHECK(refusal_of(ForeignDeflate(6, 31).packet(content), content.size()) == Errc::corrupt_payload);   // gzip
  CHECK(refusal_of(sync_marker, content.size()) == Errc::corrupt_payload);
}

TEST_CASE("Igzip refuses a second stream header") {
  const Bytes content = text_pages(2);
  auto decoder = open<Igzip::Decoder>(Igzip{});
  CHECK(!refusal(decoder, ForeignDeflate().packet(content), content.size()));
  CHECK(refusal(decoder, ForeignDeflate().packet(content), content.size()) == Errc::corrupt_payload);
}

TEST_CASE("Igzip refuses a match from before the stream's first byte") {
  // Fixed block: a match of length 3 at distance 1, with nothing before it.
  CHECK(refusal_of(bytes_of({0x78, 0x9c, 0x02, 0x02, 0x00}) + sync_marker, page_bytes) == Errc::corrupt_payload);
}

TEST_CASE("Igzip refuses a bomb without unpacking it") {
  constexpr std::size_t bomb = std::size_t{256} << 10;
  Bytes payload = ForeignDeflate(9).packet(Bytes(bomb));
  // Whoever unpacks it comes to a block of a type that does not exist, and says something else.
  payload = payload + bytes_of({0x06}) + sync_marker;
  CHECK(refusal_of(payload, bomb + page_bytes) == Errc::corrupt_payload);
  CHECK(refusal_of(payload, page_bytes) == Errc::bad_payload_size);
}

TEST_CASE("Igzip takes and refuses the same damaged payloads as Zlib, inside payload and pages") {
  std::mt19937_64 random(7);
  const Bytes content = text_pages(3) + random_pages(1) + Bytes(page_bytes);
  std::size_t taken = 0;
  for (int round = 0; round < 4000; ++round) {
    CAPTURE(round);
    ForeignDeflate foreign(round % 10);
    const Bytes first = foreign.packet(content);
    Bytes second = foreign.packet(content);
    if (round % 4 != 0)
      for (std::size_t hits = 1 + random() % 3; hits != 0; --hits)
        second[random() % second.size()] = static_cast<std::byte>(random());
    if (round % 4 == 3) second = without_tail(second, random() % second.size()) + sync_marker;
    const Fenced payload(second.size());
    std::ranges::copy(second, payload.bytes().begin());
    const Fenced pages(content.size());
    auto igzip = open<Igzip::Decoder>(Igzip{});
    auto zlib = open<Zlib::Decoder>(Zlib{});
    Bytes by_zlib;
    REQUIRE(!refusal(igzip, first, content.size()));
    REQUIRE(!refusal(zlib, first, content.size()));
    const iovec run = mutable_buffer(pages.bytes());
    const bool accepted = igzip.decode(payload.bytes(), MutableBuffers(&run, 1)).has_value();
    CHECK(accepted == decode(zlib, second, content.size(), by_zlib).has_value());
    if (accepted) CHECK(std::ranges::equal(pages.bytes(), by_zlib));
    taken += accepted ? 1 : 0;
  }
  CHECK(taken >= 1000);
  CHECK(taken < 4000);
}

TEST_CASE("Igzip allocates nothing after open") {
  const std::vector<Bytes> stream = stream_of_pages();
  auto encoder = open<Igzip::Encoder>(Igzip{});
  auto decoder = open<Igzip::Decoder>(Igzip{});
  Bytes pages(128 * page_bytes);
  const std::uint64_t before = test::allocations_of_watched_threads();
  test::watch_this_thread(true);
  bool good = true;
  for (const Bytes& content : stream) {
    const iovec run = const_buffer(content);
    const iovec target{pages.data(), content.size()};
    const auto payload = encoder.encode(ConstBuffers(&run, 1));
    good = good && payload.has_value();
    if (good)
      good = decoder
                 .decode({static_cast<const std::byte*>((*payload)[0].iov_base), (*payload)[0].iov_len},
                         MutableBuffers(&target, 1))
                 .has_value();
  }
  test::watch_this_thread(false);
  CHECK(good);
  CHECK(test::allocations_of_watched_threads() == before);
}

#else
#include <doctest/doctest.h>

TEST_CASE("Igzip is not in this build") { MESSAGE("ISA-L was not found, or MULTIFD_WITH_IGZIP is off"); }
#endif
