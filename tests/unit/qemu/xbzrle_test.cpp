// SPDX-License-Identifier: MIT
#include "multifd/qemu/xbzrle.hpp"

#include <random>

#include "unit/qemu/stream.hpp"

namespace {

using multifd::Errc;
using multifd::qemu::apply_xbzrle;
using test::Bytes;
using test::page;
using test::Stream;

constexpr multifd::qemu::MainStreamLimits with_xbzrle{.xbzrle = true};

Bytes bytes_of(std::string_view text) { return Stream().text(text).bytes; }

Bytes uleb128(std::size_t value) {
  Bytes bytes;
  for (; value > 0x7f; value >>= 7) bytes.push_back(static_cast<std::byte>((value & 0x7f) | 0x80));
  bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

/// What a source writes that had `before` and has `now`.
Bytes encoded(const Bytes& before, const Bytes& now) {
  Stream changes;
  for (std::size_t at = 0;;) {
    std::size_t differs = at;
    while (differs < now.size() && before[differs] == now[differs]) ++differs;
    if (differs == now.size()) return changes.bytes;
    std::size_t end = differs;
    while (end < now.size() && before[end] != now[end]) ++end;
    changes.append(uleb128(differs - at)).append(uleb128(end - differs));
    changes.append(
        {now.begin() + static_cast<std::ptrdiff_t>(differs), now.begin() + static_cast<std::ptrdiff_t>(end)});
    at = end;
  }
}

Stream in_part() { return Stream().up_to_start().part(); }

}  // namespace

TEST_CASE("XBZRLE: runs of bytes that stay and bytes that change") {
  Bytes memory = bytes_of("0123456789");
  const auto apply = [&](const Bytes& changes) { return apply_xbzrle(changes, memory).has_value(); };
  CHECK(apply(Stream().be(1, 0).be(1, 2).text("ab").be(1, 3).be(1, 1).text("c").bytes));
  CHECK(memory == bytes_of("ab234c6789"));
  CHECK(apply(Stream().be(1, 9).be(1, 1).text("z").bytes));  // up to the page's last byte
  CHECK(memory == bytes_of("ab234c678z"));
  CHECK(apply({}));
  CHECK(memory == bytes_of("ab234c678z"));
}

TEST_CASE("XBZRLE: every page can be made of every other, in all page sizes") {
  const auto seed = std::random_device()();
  CAPTURE(seed);
  std::mt19937 rng(seed);
  for (const std::size_t size : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    for (const unsigned rarity : {1u, 2u, 50u, 5000u}) {
      Bytes before(size), now;
      for (std::byte& byte : before) byte = static_cast<std::byte>(rng());
      now = before;
      for (std::byte& byte : now)
        if (rng() % rarity == 0) byte ^= static_cast<std::byte>(rng());
      REQUIRE(apply_xbzrle(encoded(before, now), before));
      CHECK(before == now);
    }
  }
}

TEST_CASE("XBZRLE: refused with the place in the record") {
  struct Row {
    const char* what;
    Bytes changes;
    std::uint64_t at;
  };
  const Row rows[] = {
      {"bytes that stay past the page", Stream().be(2, 0x8120).be(1, 1).text("x").bytes, 0},
      {"all bytes stay, and one more changes", Stream().be(2, 0x8020).be(1, 1).text("x").bytes, 0},
      {"bytes that change past the page", Stream().be(2, 0xff1f).be(1, 2).text("xy").bytes, 0},
      {"the same in the second run", Stream().be(1, 0).be(1, 1).text("x").be(2, 0xff1f).be(1, 1).text("y").bytes, 3},
      {"nothing changes behind the bytes that stay", Stream().be(1, 5).bytes, 0},
      {"a run of no byte to change", Stream().be(1, 0).be(1, 0).bytes, 0},
      {"the same in the second run", Stream().be(1, 0).be(1, 1).text("x").be(1, 0).be(1, 0).be(1, 9).bytes, 3},
      {"fewer bytes than the count says", Stream().be(1, 0).be(1, 3).text("xy").bytes, 0},
      {"a byte behind the last run", Stream().be(1, 0).be(1, 1).text("xy").bytes, 3},
      {"a count that is cut off", Stream().be(1, 0x80).bytes, 0},
      {"the second count cut off", Stream().be(1, 1).be(1, 0x81).bytes, 0},
      {"a count of four bytes", Stream().be(4, 0x80808000).be(1, 1).text("x").bytes, 0},
      {"a count of eleven bytes", Stream().be(8, ~0ull).be(3, 0xffff7f).be(1, 1).text("x").bytes, 0},
      {"the largest count of three bytes", Stream().be(3, 0xffff7f).be(1, 1).text("x").bytes, 0},
      {"the largest count of bytes to change", Stream().be(1, 0).be(3, 0xffff7f).text("x").bytes, 0},
  };
  for (const Row& row : rows) {
    CAPTURE(row.what);
    Bytes memory(page);
    const auto applied = apply_xbzrle(row.changes, memory);
    REQUIRE(!applied);
    CHECK(applied.error().code == Errc::bad_xbzrle);
    CHECK(applied.error().code == multifd::Condition::peer_protocol);
    CHECK(applied.error().detail == row.at);
  }
}

TEST_CASE("XBZRLE records are taken where the limits say so, at any size of reads, and also with CONTINUE") {
  const Stream stream =
      in_part().full_page(page, "ram.a").xbzrle(page, "", "abc").xbzrle(0, "rom/b", "").zero(page).eos().footer();
  for (const std::size_t most : {SIZE_MAX, std::size_t{1}}) {
    const auto outcome = test::parse(stream.bytes, {.most = most}, with_xbzrle);
    CHECK(outcome.code == Errc::truncated_stream);  // the END is missing
    CHECK(outcome.bytes == stream.bytes);
    CHECK(outcome.count("xbzrle continued ram.a#0+4096 3") == 1);
    CHECK(outcome.count("xbzrle rom/b#1+0 0") == 1);
    CHECK(outcome.count("zero continued rom/b#1+4096") == 1);
  }
}

TEST_CASE("XBZRLE records are refused: of another encoding, longer than a page, outside their block") {
  const auto refused = [](const Stream& stream, Errc code, std::uint64_t detail, std::string_view subject) {
    test::check_refused(stream, code, detail, subject, with_xbzrle);
  };
  refused(in_part().xbzrle(0, "ram.a", "abc", 2), Errc::bad_xbzrle, 2, "ram.a");
  refused(in_part().xbzrle(0, "ram.a", std::string(page + 1, 'x')), Errc::bad_xbzrle, page + 1, "ram.a");
  refused(in_part().xbzrle(8 * page, "ram.a", "abc"), Errc::offset_past_block, 8 * page, "ram.a");
  refused(in_part().xbzrle(0, "ram.c", "abc"), Errc::unknown_block, 0, "ram.c");
  refused(in_part().xbzrle(0, "", "abc"), Errc::record_without_block, 0, "");
  const auto longest = in_part().xbzrle(0, "ram.a", std::string(page, 'x'));
  CHECK(test::parse(longest.bytes, {}, with_xbzrle).code == Errc::truncated_stream);
}
