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
#include "unit/compress/foreign_deflate.hpp"

using namespace multifd;
using namespace codec_payloads;

namespace {

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
      CHECK(ends_with_marker(payload));
      payloads = payloads + payload;
      contents = contents + content;
    }
    CHECK(payloads[0] == std::byte{0x78});  // RFC 1950: deflate, window of 32 KiB
    CHECK(plain_inflate(payloads, contents.size()) == contents);
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

TEST_CASE("Igzip refuses a packet limit of nothing") {
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
