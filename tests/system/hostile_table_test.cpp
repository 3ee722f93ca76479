// SPDX-License-Identifier: MIT
//
// hostile_peers.md is held against the sources: it has every row of format/hardening.md section 16, and its tests
// exist.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>

#include "support/basics.hpp"

namespace {

const std::filesystem::path tests = std::filesystem::path(__FILE__).parent_path().parent_path();

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path);
  REQUIRE_MESSAGE(file.good(), path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("Every row of section 16 has its tests, and they exist") {
  std::ifstream table(tests / "hostile_peers.md");
  REQUIRE(table.good());
  const std::regex row_form(R"(\| (\d+|source) \|.*\| (.*) \|)");
  const std::regex test_form(R"re(`([^`]+)` "([^"]+)")re");
  std::set<std::string> rows;
  std::size_t named = 0;
  for (std::string line; std::getline(table, line);) {
    std::smatch row;
    if (!std::regex_match(line, row, row_form)) continue;
    CAPTURE(line);
    rows.insert(row[1]);
    const std::string cell = row[2];
    if (cell.starts_with("not ")) continue;  // and why
    const std::size_t before = named;
    for (std::sregex_iterator test(cell.begin(), cell.end(), test_form); test != std::sregex_iterator(); ++test) {
      const std::string name = (*test)[2];
      CHECK_MESSAGE(content(tests / (*test)[1].str()).find('"' + name + '"') != std::string::npos, name);
      ++named;
    }
    CHECK(named > before);
  }
  for (int row = 1; row <= 30; ++row) CHECK_MESSAGE(rows.contains(std::to_string(row)), "row ", row);
  CHECK(rows.contains("source"));
  CHECK(named > 40);
}
