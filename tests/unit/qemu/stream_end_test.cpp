// SPDX-License-Identifier: MIT
#include "multifd/qemu/stream_end.hpp"

#include "support/basics.hpp"
#include "unit/qemu/stream.hpp"

using multifd::qemu::StreamEnd;
using multifd::qemu::StreamTail;
using test::Bytes;
using test::Stream;

namespace {

Stream description(std::string_view json) { return Stream().be(1, 0).be(1, 6).be(4, json.size()).text(json); }

bool complete(const StreamEnd& end) { return end.tail(true) == StreamTail::description; }

bool complete(const Bytes& bytes) {
  StreamEnd end;
  end.feed(bytes);
  return complete(end);
}

/// What it says after each byte, fed one at a time: the number of bytes so far, for those that end in `wanted`.
std::vector<std::size_t> tails(const Bytes& bytes, StreamTail wanted, bool footers = true) {
  StreamEnd end;
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    end.feed(std::span(bytes).subspan(i, 1));
    if (end.tail(footers) == wanted) found.push_back(i + 1);
  }
  return found;
}

/// After how many bytes it says complete, fed one at a time.
std::vector<std::size_t> ends(const Bytes& bytes) {
  StreamEnd end;
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    end.feed(std::span(bytes).subspan(i, 1));
    if (complete(end)) found.push_back(i + 1);
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
    CHECK(complete(end) == (cut == bytes.size()));
    end.feed({});
    CHECK(complete(end) == (cut == bytes.size()));
    end.feed(std::span(bytes).subspan(cut));
    CHECK(complete(end));
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
  CHECK_FALSE(complete(Bytes{}));
  CHECK_FALSE(complete(StreamEnd{}));
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
    return complete(end);
  };
  CHECK(within(7));
  CHECK_FALSE(within(6));
  CHECK(within(0xffffffff));
}

TEST_CASE("An apparent beginning does not hide the real one") {
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
      CHECK_FALSE(complete(end));
      const std::size_t n = 1 + test::below(rng, std::min<std::size_t>(stream.bytes.size() - at, 64));
      end.feed(std::span(stream.bytes).subspan(at, n));
      at += n;
    }
    CHECK(complete(end));
  }
}

TEST_CASE("The end mark behind the open section's footer is an end, and no other zero byte is") {
  Stream stream;
  stream.full("timer", 1).be(8, 0).be(1, 0x7e).be(4, 2).be(1, 0).footer(1);  // another section's footer in its state
  stream.full("a/very:long name with everything that text has ~", 0x7e).be(4, 0x7e00).be(4, 0).be(1, 0).footer(0x7e);
  stream.full("cpu", 0xffffffff).be(8, 0x0400'0000'0000'7e7e).footer(0xffffffff).full("last", 0).be(1, 0).footer(0);
  stream.be(1, 0);
  const std::size_t end = stream.bytes.size();
  CHECK(tails(stream.bytes, StreamTail::end_mark) == std::vector{end});
  CHECK(tails(stream.bytes, StreamTail::description).empty());
  // The description goes on where the mark seemed to be the end, and nothing in it is one.
  const std::string json = R"({"page_size": 4096, "devices": [{"name": "~"}]})";
  stream.be(1, 6).be(4, json.size()).text(json);
  CHECK(tails(stream.bytes, StreamTail::end_mark) == std::vector{end});
  CHECK(tails(stream.bytes, StreamTail::description) == std::vector{stream.bytes.size()});
  // No device at all.
  CHECK(tails(Stream().be(1, 0).bytes, StreamTail::end_mark) == std::vector<std::size_t>{1});
}

TEST_CASE("State that looks like the end of its own section is forgotten as soon as the state goes on") {
  for (const unsigned next : {0x00u, 0x01u, 0x7eu, 0x80u, 0xffu}) {
    CAPTURE(next);
    Stream stream;
    stream.full("serial", 5).be(3, 0x123456).footer(5).be(1, 0).be(1, next);
    const std::size_t false_end = stream.bytes.size() - 1;
    stream.be(4, 0).footer(5).be(1, 0);
    CHECK(tails(stream.bytes, StreamTail::end_mark) == std::vector{false_end, stream.bytes.size()});
  }
  // A header that is none, because its name is no text, or empty, does not lead away from the section.
  for (const char* name : {"\x01name", "", "na\xffme"}) {
    CAPTURE(name);
    Stream stream;
    stream.full("serial", 5).footer(5).full(name, 6).be(4, 0).footer(5).be(1, 0);
    CHECK(tails(stream.bytes, StreamTail::end_mark) == std::vector{stream.bytes.size()});
  }
}

TEST_CASE("A state with another section's header behind its own footer hides the end mark, not the description") {
  Stream stream;
  stream.full("serial", 5).footer(5).full("made-up", 77).be(4, 0).footer(5).append(description("{}").bytes);
  CHECK(tails(stream.bytes, StreamTail::end_mark).empty());
  CHECK(tails(stream.bytes, StreamTail::description) == std::vector{stream.bytes.size()});
}

TEST_CASE("Without footers a zero byte may be the end, or not") {
  Stream stream;
  stream.full("timer", 1).be(2, 0x0100).be(2, 1).be(1, 0);
  const std::size_t bytes = stream.bytes.size();
  const auto maybe = tails(stream.bytes, StreamTail::maybe, false);
  CHECK(maybe.back() == bytes);
  for (std::size_t i = 1; i <= bytes; ++i)
    CHECK(std::ranges::count(maybe, i) == (stream.bytes[i - 1] == std::byte{0} ? 1 : 0));
  CHECK(tails(stream.bytes, StreamTail::end_mark, false).empty());
}
