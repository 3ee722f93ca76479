// SPDX-License-Identifier: MIT
//
// Main streams cut short at every byte, and twenty thousand broken ones: an error at worst. Meant for sanitizers, too.
#include "support/basics.hpp"
#include "unit/qemu/stream.hpp"

#include "multifd/qemu/main_stream.hpp"

using multifd::Errc;
using test::Bytes;
using test::Outcome;
using test::Stream;

namespace {

/// All that a valid stream can have, in few bytes.
Stream rich_stream() {
  Stream stream;
  stream.header().configuration().subsection("configuration/target-page-bits").be(4, 10);
  stream.capabilities({"x-ignore-shared"}).subsection("configuration/uuid").be(8, 1).be(8, 2);
  stream.command(1).ping(1).advise(0x200400, 1024);
  stream.start().total(5 * 1024).block("ram.a", 3 * 1024).be(8, 0x200000).be(8, 0).block("b", 2 * 1024).be(8, 1 << 20);
  stream.flush().eos().footer();
  stream.part().zero(0, "b").zero(1024).flush().zero(2048, "ram.a").eos().footer();
  stream.command(11).end().full_page(1024, "ram.a", 'x', 1024).zero(0).flush().flush().eos().footer();
  return stream.devices();
}

constexpr multifd::qemu::MainStreamLimits limits{.page_bytes = 1024, .max_blocks = 8};

/// One of the ways to break a stream.
void mutate(Bytes& bytes, test::Rng& rng) {
  static constexpr std::uint8_t telling[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x20, 0x22, 0x7e, 0x7f, 0x80, 0xfe, 0xff};
  const std::size_t at = test::below(rng, bytes.size());
  const auto here = bytes.begin() + static_cast<std::ptrdiff_t>(at);
  const std::size_t length = 1 + test::below(rng, std::min<std::size_t>(bytes.size() - at, 40));
  const auto there = here + static_cast<std::ptrdiff_t>(length);
  switch (rng() % 6) {
    case 0: *here ^= static_cast<std::byte>(1 << rng() % 8); break;
    case 1: *here = static_cast<std::byte>(rng()); break;
    case 2: *here = std::byte{telling[rng() % std::size(telling)]}; break;
    case 3: bytes.erase(here, there); break;
    case 4: {
      const Bytes copy(here, there);
      bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(test::below(rng, bytes.size())), copy.begin(),
                   copy.end());
      break;
    }
    case 5: std::fill(here, std::min(there, here + 8), rng() % 2 == 0 ? std::byte{0xff} : std::byte{0}); break;
  }
  if (bytes.empty()) bytes.push_back(std::byte{0});
}

}  // namespace

TEST_CASE("A stream that ends at any byte ahead of the devices is truncated, however it arrived") {
  for (const auto& [stream, bounds] :
       {std::pair{rich_stream(), limits}, {test::per_section_stream(), {}}, {test::per_round_stream(), {}}}) {
    const Outcome whole = test::parse(stream.bytes, {}, bounds);
    REQUIRE(whole.code == std::error_code{});
    CHECK(whole.bytes == stream.bytes);
    // Whole at the end mark, and at the end of the description behind it.
    const std::size_t end_mark = stream.bytes.size() - 5 - Stream::description.size();
    for (std::size_t size = 0; size <= stream.bytes.size(); ++size) {
      CAPTURE(size);
      const Bytes part(stream.bytes.begin(), stream.bytes.begin() + static_cast<std::ptrdiff_t>(size));
      const Outcome outcome = test::parse(part, {.most = size % 2 == 0 ? SIZE_MAX : 13}, bounds);
      const bool ends = size == end_mark || size == stream.bytes.size();
      CHECK(outcome.code == (ends ? std::error_code{} : std::error_code(Errc::truncated_stream)));
      CHECK(outcome.detail == (ends ? 0 : size));
      REQUIRE(outcome.bytes.size() <= size);
      CHECK(std::equal(outcome.bytes.begin(), outcome.bytes.end(), stream.bytes.begin()));
      CHECK(outcome.bytes.size() + bounds.page_bytes + 300 > size);  // what is missing is less than an element
    }
  }
}

TEST_CASE("Twenty thousand broken streams: no crash, no loop, the same outcome however they arrive") {
  test::Rng rng(test::seed());
  const Bytes good = rich_stream().bytes;
  std::size_t refused = 0;
  for (int round = 0; round < 20000; ++round) {
    Bytes bytes = good;
    for (std::uint64_t changes = 1 + rng() % 4; changes > 0; --changes) mutate(bytes, rng);
    INFO("seed ", test::seed(), ", round ", round);
    const Outcome whole = test::parse(bytes, {}, limits);
    REQUIRE(whole.bytes.size() <= bytes.size());
    CHECK(std::equal(whole.bytes.begin(), whole.bytes.end(), bytes.begin()));
    refused += whole.code != std::error_code{};
    if (round % 4 != 0) continue;
    const Outcome split = test::parse(bytes, {.most = 64, .rng = &rng}, limits);
    CHECK(split.events == whole.events);
    CHECK(split.code == whole.code);
    CHECK(split.detail == whole.detail);
    CHECK(split.subject == whole.subject);
  }
  CHECK(refused > 12000);  // most changes must be seen; some hit the devices' state or a page's bytes
}

TEST_CASE("Random bytes behind a good header are refused or truncated") {
  test::Rng rng(test::seed());
  for (int round = 0; round < 2000; ++round) {
    INFO("seed ", test::seed(), ", round ", round);
    Stream stream;
    stream.header();
    if (round % 2 == 0) stream.configuration().start().two_blocks().eos().footer().part();
    for (std::size_t left = test::below(rng, 300); left > 0; --left) stream.be(1, rng());
    const Outcome outcome = test::parse(stream.bytes);
    CHECK(outcome.code == multifd::Condition::peer_protocol);
  }
}
