// SPDX-License-Identifier: MIT
#include "multifd/qemu/stream_end.hpp"

#include "support/basics.hpp"
#include "unit/qemu/stream.hpp"

using multifd::qemu::StreamEnd;
using test::Bytes;
using test::Stream;

namespace {

Stream description(std::string_view json) { return Stream().be(1, 0).be(1, 6).be(4, json.size()).text(json); }

bool complete(const Bytes& bytes) {
  StreamEnd end;
  end.feed(bytes);
  return end.complete();
}

/// After how many bytes it says complete, fed one at a time.
std::vector<std::size_t> ends(const Bytes& bytes) {
  StreamEnd end;
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    end.feed(std::span(bytes).subspan(i, 1));
    if (end.complete()) found.push_back(i + 1);
  }
  return found;
}

}  // namespace

TEST_CASE("The end of a stream is its description's last byte, wherever the pieces are cut") {
  const Bytes bytes = Stream().devices().bytes;
  CHECK(ends(bytes) == std::vector{bytes.size()});
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    CAPTURE(cut);
    StreamEnd end;
    end.feed(std::span(bytes).first(cut));
    CHECK(end.complete() == (cut == bytes.size()));
    end.feed({});
    CHECK(end.complete() == (cut == bytes.size()));
    end.feed(std::span(bytes).subspan(cut));
    CHECK(end.complete());
  }
}

TEST_CASE("A byte too few or too many is not the end") {
  Bytes bytes = Stream().devices().bytes;
  CHECK(complete(bytes));
  Bytes longer = bytes;
  longer.push_back(std::byte{'}'});
  CHECK_FALSE(complete(longer));
  bytes.pop_back();
  CHECK_FALSE(complete(bytes));
  bytes.push_back(std::byte{']'});
  CHECK_FALSE(complete(bytes));
}

TEST_CASE("Nothing, and the shortest description") {
  CHECK_FALSE(complete({}));
  CHECK_FALSE(StreamEnd{}.complete());
  CHECK(complete(description("{}").bytes));
  CHECK_FALSE(complete(description("{").bytes));
  CHECK_FALSE(complete(description("").bytes));
  CHECK_FALSE(complete(Stream().be(1, 6).be(4, 2).text("{}").bytes));  // without EOF in front
  CHECK_FALSE(complete(Stream().be(1, 0).be(1, 5).be(4, 2).text("{}").bytes));
  CHECK_FALSE(complete(description("[]").bytes));
}

TEST_CASE("A description over the limit is not believed") {
  const Bytes bytes = description("{ 123 }").bytes;
  const auto within = [&](std::uint32_t most) {
    StreamEnd end(most);
    end.feed(bytes);
    return end.complete();
  };
  CHECK(within(7));
  CHECK_FALSE(within(6));
  CHECK(within(0xffffffff));
}

TEST_CASE("What looks like a beginning does not hide the real one") {
  const std::string json = R"({"page_size": 4096, "devices": [{"name": "timer"}]})";
  // False ones that promise to end beyond, at, and just before the real end; many of them.
  for (const std::size_t promised : {2u, 20u, 50u, 57u, 58u, 70u, 1000u, 1000000u}) {
    Stream stream;
    for (int i = 0; i < 50; ++i) stream.be(2, 6).be(4, promised).text("{");
    const std::size_t before = stream.bytes.size();
    stream.append(description(json).bytes);
    CAPTURE(promised);
    CHECK(complete(stream.bytes));
    for (const std::size_t end : ends(stream.bytes)) CHECK((end <= before || end == stream.bytes.size()));
  }
  // In the header itself: a length whose bytes look like the beginning of another.
  const std::string odd = "{" + std::string(0x601 - 2, ' ') + "}";
  CHECK(complete(description(odd).bytes));  // 00 06 00 00 06 01 7b
  const std::string text = "{\"{" + std::string(0x60006 - 4, ' ') + "}";
  CHECK(text.size() == 0x60006);
  CHECK(complete(description(text).bytes));  // 00 06 00 06 00 06 7b 22 7b: two candidates
  const std::string three = "{ { {" + std::string(0x60006 - 6, ' ') + "}";
  CHECK(complete(description(three).bytes));
}

TEST_CASE("A NUL ends what began before it: a description is text") {
  Stream stream;
  stream.be(2, 6).be(4, 10).text("{ 12").be(1, 0).text("4567}");
  REQUIRE(stream.bytes.size() == 6 + 10);
  CHECK_FALSE(complete(stream.bytes));
  stream.bytes[10] = std::byte{'3'};
  CHECK(complete(stream.bytes));
}

TEST_CASE("Random device state in front, and random cuts: the end is found, and only there") {
  test::Rng rng(test::seed());
  for (int round = 0; round < 500; ++round) {
    INFO("seed ", test::seed(), ", round ", round);
    Stream stream;
    for (std::size_t left = test::below(rng, 400); left > 0; --left) stream.be(1, rng() % 4 == 0 ? 0 : rng() % 8);
    stream.append(description("{" + std::string(test::below(rng, 3000), 'x') + "}").bytes);
    StreamEnd end;
    for (std::size_t at = 0; at < stream.bytes.size();) {
      CHECK_FALSE(end.complete());
      const std::size_t n = 1 + test::below(rng, std::min<std::size_t>(stream.bytes.size() - at, 64));
      end.feed(std::span(stream.bytes).subspan(at, n));
      at += n;
    }
    CHECK(end.complete());
  }
}
