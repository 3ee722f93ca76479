// SPDX-License-Identifier: MIT
#include "multifd/memory/ram_map.hpp"

#include <doctest/doctest.h>

#include <ostream>  // lets doctest print a std::error_code
#include <string>
#include <vector>

using multifd::Access;
using multifd::BlockId;
using multifd::Errc;
using multifd::RamMap;
using multifd::Result;
using multifd::Stage;

namespace {

using Bytes = std::vector<std::byte>;

template <class T>
void check_refused(const Result<T>& result, Errc code, std::uint64_t detail, Stage stage = Stage::setup) {
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().code == code, multifd::describe(result.error()));
  CHECK(result.error().detail == detail);
  CHECK(result.error().stage == stage);
}

}  // namespace

TEST_CASE("Blocks get their ids in the order of add() and are found by idstr") {
  Bytes ram(4 * 4096);
  Bytes rom(4096);
  RamMap map;
  const auto first = map.add("pc.ram", ram);
  const auto second = map.add_read_only("pc.rom", rom);
  REQUIRE(first);
  REQUIRE(second);
  CHECK(multifd::index(*first) == 0);
  CHECK(multifd::index(*second) == 1);
  CHECK(map.find("pc.ram").value() == *first);
  CHECK(map.find("pc.rom").value() == *second);
  CHECK(map.block(*first).access == Access::read_write);
  CHECK(map.block(*second).access == Access::read_only);
  CHECK(map.block(*first).idstr == "pc.ram");
  CHECK(map.block(*first).host.data() == ram.data());
  CHECK(map.pages(*first) == 4);
  CHECK(map.total_bytes() == 5 * 4096);
  CHECK(map.blocks().size() == 2);
  CHECK(map.contains(*second));
  CHECK_FALSE(map.contains(BlockId{2}));
}

TEST_CASE("find() takes the whole name, not a beginning of it") {
  Bytes ram(4096);
  RamMap map;
  REQUIRE(map.add("pc.ram", ram));
  for (const char* name : {"", "pc.ra", "pc.ram0", "PC.RAM", "pc.ram "}) {
    CAPTURE(name);
    check_refused(map.find(name), Errc::unknown_block, 0, Stage::parse);
  }
  check_refused(map.find(std::string_view("pc.ram\0", 7)), Errc::unknown_block, 0, Stage::parse);
  check_refused(RamMap().find("pc.ram"), Errc::unknown_block, 0, Stage::parse);
}

TEST_CASE("RamMap refuses page sizes that are no power of two from 1024 to 65536") {
  Bytes ram(131072 * 3);
  for (const std::size_t page_bytes : {0u, 1u, 512u, 1000u, 1025u, 3072u, 4095u, 4097u, 12288u, 65537u, 131072u}) {
    CAPTURE(page_bytes);
    RamMap map(page_bytes);
    check_refused(map.add("pc.ram", ram), Errc::bad_page_size, page_bytes);
    CHECK(map.blocks().empty());
  }
  for (const std::size_t page_bytes : {1024u, 2048u, 4096u, 8192u, 16384u, 32768u, 65536u}) {
    CAPTURE(page_bytes);
    RamMap map(page_bytes);
    CHECK(map.add("pc.ram", ram));
    CHECK(map.batch_pages() * page_bytes == 512 * 1024);
  }
}

TEST_CASE("RamMap refuses a block that is empty or no whole number of pages") {
  Bytes ram(3 * 16384);
  RamMap map(16384);
  for (const std::size_t size : {0u, 1u, 4096u, 16383u, 16385u, 2 * 16384u + 8192u}) {
    CAPTURE(size);
    check_refused(map.add("pc.ram", std::span(ram).first(size)), Errc::bad_block_size, size);
  }
  CHECK(map.add("one", std::span(ram).first(16384)));
  CHECK(map.add("three", ram));
}

TEST_CASE("RamMap refuses an idstr of 0 or 256 bytes, or with a NUL anywhere") {
  Bytes ram(4096);
  RamMap map;
  check_refused(map.add("", ram), Errc::bad_block_idstr, 0);
  check_refused(map.add(std::string(256, 'x'), ram), Errc::bad_block_idstr, 256);
  check_refused(map.add(std::string(100'000, 'x'), ram), Errc::bad_block_idstr, 100'000);
  check_refused(map.add(std::string("a\0b", 3), ram), Errc::bad_block_idstr, 3);
  check_refused(map.add(std::string("\0", 1), ram), Errc::bad_block_idstr, 1);
  check_refused(map.add(std::string("ab\0", 3), ram), Errc::bad_block_idstr, 3);
  CHECK(map.blocks().empty());
  CHECK(map.add("x", ram));
  CHECK(map.add(std::string(255, 'x'), ram));
}

TEST_CASE("RamMap refuses a second block of the same idstr and keeps the first") {
  Bytes ram(4096);
  Bytes other(8192);
  RamMap map;
  REQUIRE(map.add("pc.ram", ram));
  check_refused(map.add("pc.ram", other), Errc::duplicate_block, 0);
  check_refused(map.add_read_only("pc.ram", other), Errc::duplicate_block, 0);
  CHECK(map.blocks().size() == 1);
  CHECK(map.block(BlockId{0}).host.data() == ram.data());
}

TEST_CASE("resolve() gives exactly the page, up to the last one") {
  for (const std::size_t page_bytes : {1024u, 4096u, 65536u}) {
    CAPTURE(page_bytes);
    Bytes ram(5 * page_bytes);
    RamMap map(page_bytes);
    const BlockId id = map.add("pc.ram", ram).value();
    for (std::size_t page = 0; page < 5; ++page) {
      const auto bytes = map.resolve(id, page * page_bytes);
      REQUIRE(bytes);
      CHECK(bytes->data() == ram.data() + page * page_bytes);
      CHECK(bytes->size() == page_bytes);
    }
  }
}

TEST_CASE("resolve() returns adjacent pages in one call, or names the first page that is not in the block") {
  Bytes ram(5 * 4096);
  RamMap map;
  const BlockId id = map.add("pc.ram", ram).value();
  for (std::uint64_t first = 0; first < 8; ++first) {
    for (std::size_t pages = 1; pages < 9; ++pages) {
      CAPTURE(first);
      CAPTURE(pages);
      const auto bytes = map.resolve(id, first * 4096, pages);
      if (first + pages > 5) {
        check_refused(bytes, Errc::offset_past_block, std::max<std::uint64_t>(first, 5) * 4096, Stage::parse);
        continue;
      }
      REQUIRE(bytes);
      CHECK(bytes->data() == ram.data() + first * 4096);
      CHECK(bytes->size() == pages * 4096);
    }
  }
  const std::uint64_t last = std::uint64_t{0} - 4096;  // whose neighbour would be page 0
  check_refused(map.resolve(id, last, 2), Errc::offset_past_block, last, Stage::parse);
}

TEST_CASE("RamMap refuses an offset past the last page, however far") {
  Bytes ram(5 * 4096);
  RamMap map;
  const BlockId id = map.add("pc.ram", ram).value();
  constexpr std::uint64_t top = std::uint64_t{1} << 63;
  for (const std::uint64_t offset :
       {std::uint64_t{5 * 4096}, std::uint64_t{6 * 4096}, std::uint64_t{1} << 31, std::uint64_t{1} << 32, top - 4096,
        top, top + 4096, top + 4 * 4096, std::uint64_t{0} - 2 * 4096, std::uint64_t{0} - 4096}) {
    CAPTURE(offset);
    check_refused(map.resolve(id, offset), Errc::offset_past_block, offset, Stage::parse);
  }
}

TEST_CASE("RamMap refuses an offset one byte past the last page, or anywhere that is no page's start") {
  Bytes ram(5 * 4096);
  RamMap map;
  const BlockId id = map.add("pc.ram", ram).value();
  for (const std::uint64_t offset :
       {std::uint64_t{1}, std::uint64_t{8}, std::uint64_t{512}, std::uint64_t{1024}, std::uint64_t{4095},
        std::uint64_t{4097}, std::uint64_t{4 * 4096 + 1}, std::uint64_t{5 * 4096 - 1}, std::uint64_t{5 * 4096 + 1},
        (std::uint64_t{1} << 63) + 1, ~std::uint64_t{0}}) {
    CAPTURE(offset);
    check_refused(map.resolve(id, offset), Errc::offset_misaligned, offset, Stage::parse);
  }
}

TEST_CASE("A block of one page resolves offset 0 and nothing else: the bound does not wrap (row 6 of section 16)") {
  Bytes ram(65536);
  RamMap map(65536);
  const BlockId id = map.add("tiny", ram).value();
  CHECK(map.resolve(id, 0));
  for (std::uint64_t offset = 65536; offset != 0; offset <<= 1) {
    CAPTURE(offset);
    CHECK_FALSE(map.resolve(id, offset).has_value());
  }
}

TEST_CASE("Every offset of a small block is either inside or refused") {
  Bytes ram(4 * 1024);
  RamMap map(1024);
  const BlockId id = map.add("pc.ram", ram).value();
  unsigned inside = 0;
  for (std::uint64_t offset = 0; offset < 16 * 1024; ++offset) {
    const auto bytes = map.resolve(id, offset);
    if (!bytes) continue;
    ++inside;
    REQUIRE(bytes->data() >= ram.data());
    REQUIRE(bytes->data() + bytes->size() <= ram.data() + ram.size());
  }
  CHECK(inside == 4);
}

TEST_CASE("A copy of a map is independent of the original") {
  Bytes ram(4096);
  Bytes more(4096);
  RamMap map;
  REQUIRE(map.add("pc.ram", ram));
  const RamMap copy = map;
  REQUIRE(map.add("more", more));
  CHECK(copy.blocks().size() == 1);
  CHECK(copy.resolve(BlockId{0}, 0)->data() == ram.data());
}

TEST_CASE("A block that lies elsewhere has a name, a size and places, and no memory") {
  Bytes here(4096);
  RamMap map;
  // Larger than any address space, to show that nothing is allocated or mapped.
  constexpr std::uint64_t bytes = (std::uint64_t{1} << 63) + 4096;
  const auto far = map.add_elsewhere("pc.ram", bytes);
  REQUIRE(far);
  REQUIRE(map.add("vga", here));
  CHECK(map.find("pc.ram").value() == *far);
  CHECK(map.block(*far).access == Access::none);
  CHECK(map.block(*far).host.empty());
  CHECK(map.block(*far).bytes == bytes);
  CHECK(map.block(BlockId{1}).bytes == 4096);
  CHECK(map.pages(*far) == bytes / 4096);
  CHECK(map.total_bytes() == bytes + 4096);
}

TEST_CASE("add_elsewhere refuses what add refuses") {
  RamMap map;
  check_refused(map.add_elsewhere("", 4096), Errc::bad_block_idstr, 0);
  check_refused(map.add_elsewhere(std::string(256, 'x'), 4096), Errc::bad_block_idstr, 256);
  check_refused(map.add_elsewhere(std::string("a\0b", 3), 4096), Errc::bad_block_idstr, 3);
  for (const std::uint64_t size : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{4095}, ~std::uint64_t{0}})
    check_refused(map.add_elsewhere("pc.ram", size), Errc::bad_block_size, size);
  RamMap odd(3072);
  check_refused(odd.add_elsewhere("pc.ram", 3072), Errc::bad_page_size, 3072);
  CHECK(map.blocks().empty());
  REQUIRE(map.add_elsewhere("pc.ram", 4096));
  check_refused(map.add_elsewhere("pc.ram", 8192), Errc::duplicate_block, 0);
  Bytes ram(4096);
  check_refused(map.add("pc.ram", ram), Errc::duplicate_block, 0);
  CHECK(map.blocks().size() == 1);
}

TEST_CASE("check() and resolve() agree about every place of a block") {
  Bytes ram(4 * 1024);
  RamMap map(1024);
  const BlockId here = map.add("here", ram).value();
  const BlockId far = map.add_elsewhere("far", ram.size()).value();
  unsigned inside = 0;
  for (std::uint64_t offset = 0; offset < 16 * 1024; ++offset) {
    const auto resolved = map.resolve(here, offset);
    for (const BlockId block : {here, far}) {
      const Result<void> checked = map.check(block, offset);
      REQUIRE(checked.has_value() == resolved.has_value());
      if (!checked) REQUIRE(checked.error().code == resolved.error().code);
    }
    inside += resolved.has_value();
  }
  CHECK(inside == 4);
}

TEST_CASE("check() refuses places past the end of a block that lies elsewhere, however large it or they are") {
  RamMap map;
  const BlockId tiny = map.add_elsewhere("tiny", 4096).value();
  constexpr std::uint64_t bytes = ~std::uint64_t{0} - 4095;  // the largest that there is
  const BlockId huge = map.add_elsewhere("huge", bytes).value();
  CHECK(map.check(tiny, 0));
  for (std::uint64_t offset = 4096; offset != 0; offset <<= 1) {
    CAPTURE(offset);
    check_refused(map.check(tiny, offset), Errc::offset_past_block, offset, Stage::parse);
    CHECK(map.check(huge, offset));
  }
  CHECK(map.check(huge, bytes - 4096));
  check_refused(map.check(huge, bytes), Errc::offset_past_block, bytes, Stage::parse);
  for (const std::uint64_t offset : {std::uint64_t{1}, std::uint64_t{4095}, ~std::uint64_t{0}})
    check_refused(map.check(huge, offset), Errc::offset_misaligned, offset, Stage::parse);
}

TEST_CASE("RamMap refuses a block at a null pointer, and errors name their block") {
  RamMap map;
  const auto null = map.add("pc.ram", std::span<std::byte>(static_cast<std::byte*>(nullptr), 4096));
  check_refused(null, Errc::block_without_memory, 0);
  CHECK(null.error().subject.view() == "pc.ram");
  check_refused(map.add_read_only("pc.rom", std::span<const std::byte>(static_cast<const std::byte*>(nullptr), 4096)),
                Errc::block_without_memory, 0);
  CHECK(map.blocks().empty());
  CHECK(map.add_elsewhere("pc.ram", 8192));
  CHECK(map.find("vga").error().subject.view() == "vga");
  const auto past = map.check(BlockId{0}, 8192);
  CHECK(past.error().subject.view() == "pc.ram");
  CHECK(describe(past.error()) ==
        "parse: page offset lies past the end of its RAM block (pc.ram, offset 8192, of 8192)");
}
