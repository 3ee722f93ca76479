// SPDX-License-Identifier: MIT
#include "multifd/postcopy/prefetch_list.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "support/basics.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using test::code_of;

namespace {

constexpr std::uint64_t page = 4096;
const std::vector<StoreBlock> blocks{{"pc.ram", 1024 * page}, {"a b%c", 16 * page}};
const std::string head = "multifd-prefetch-list 1 4096 2 " + std::to_string(1040 * page) + "\n";

std::uint64_t refused_line(const std::string& text) {
  const auto list = parse_prefetch_list(text, blocks, page);
  REQUIRE_FALSE(list.has_value());
  CHECK(list.error().code == Errc::bad_prefetch_list);
  return list.error().detail;
}

}  // namespace

TEST_CASE("prefetch list: what is written is read, in its order") {
  const std::vector<PageRange> ranges{{BlockId{0}, 8 * page, page},
                                      {BlockId{1}, 0, 2 * page},
                                      {BlockId{0}, 0, 4 * page},
                                      {BlockId{0}, 100 * page, batch_bytes}};
  const std::string text = prefetch_list_text(ranges, blocks, page);
  CHECK(text.starts_with(head));
  CHECK(text.contains("\na%20b%25c 0 8192\n"));
  const auto list = parse_prefetch_list(text, blocks, page);
  REQUIRE(list.has_value());
  CHECK(*list == ranges);
}

TEST_CASE("prefetch list: adjacent ranges become one line, and a long line several ranges") {
  const std::vector<PageRange> ranges{{BlockId{0}, 0, batch_bytes}, {BlockId{0}, batch_bytes, page}};
  const std::string text = prefetch_list_text(ranges, blocks, page);
  CHECK(text == head + "pc.ram 0 " + std::to_string(batch_bytes + page) + "\n");
  const auto list = parse_prefetch_list(text, blocks, page);
  REQUIRE(list.has_value());
  CHECK(*list == ranges);
  const auto none = parse_prefetch_list(head, blocks, page);
  REQUIRE(none.has_value());
  CHECK(none->empty());
}

TEST_CASE("prefetch list: another guest's is refused, and so is no list at all") {
  for (const char* const other :
       {"", "\n", "multifd-prefetch-list", "multifd-prefetch-list 2 4096 2 4259840\n",
        "multifd-prefetch-list 1 8192 2 4259840\n", "multifd-prefetch-list 1 4096 1 4259840\n",
        "multifd-prefetch-list 1 4096 2 4259841\n", "multifd-prefetch-list 1 4096 2 4259840 \n x",
        "multifd-prefetch-list 1 4096 2 4259840 7\n", "\x7f\x45\x4c\x46 1 4096 2 4259840\n"}) {
    INFO(other);
    if (std::string(other).ends_with(" \n x")) {
      CHECK(refused_line(other) == 2);  // a blank at the end of the head is nothing more
      continue;
    }
    CHECK(refused_line(other) == 1);
  }
  CHECK(head == "multifd-prefetch-list 1 4096 2 4259840\n");
}

TEST_CASE("prefetch list: a range that the guest does not have is refused, by its line") {
  const std::string good = head + "pc.ram 0 4096\n";
  for (const char* const line :
       {"pc.ram", "pc.ram 0", "pc.ram 0 0", "pc.ram 0 1", "pc.ram 1 4096", "pc.ram -4096 4096", "pc.ram 4194304 4096",
        "pc.ram 4190208 8192", "pc.ram 18446744073709547520 4096", "pc.ram 4096 18446744073709547520",
        "pc.ram 0 4096 7", "pc.ram 0x0 4096", "pc.ram 99999999999999999999 4096", "other 0 4096", "a b%c 0 4096",
        "a%20b%25c 65536 4096", "", " 0 4096"}) {
    INFO(line);
    CHECK(refused_line(good + line + "\n" + "pc.ram 0 4096\n") == 3);
  }
}

TEST_CASE("prefetch list: no more pages than the guest has, however often a line stands there") {
  std::string text = head;
  for (int i = 0; i < 1040; ++i) text += "pc.ram 0 4096\n";
  CHECK(parse_prefetch_list(text, blocks, page).has_value());
  text += "pc.ram 0 4096\n";
  CHECK(refused_line(text) == 1042);
}
