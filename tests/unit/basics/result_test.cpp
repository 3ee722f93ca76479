// SPDX-License-Identifier: MIT
#include "multifd/result.hpp"

#include <doctest/doctest.h>

#include <memory>

#include <cstring>
#include <ostream>  // lets doctest print a std::error_code

using multifd::Errc;
using multifd::Error;
using multifd::Result;
using multifd::Stage;

TEST_CASE("fail() makes the failure arm of any Result, blaming no channel and no packet") {
  const Result<int> result = multifd::fail(Errc::bad_range, Stage::produce, "queue_range", 12345);
  REQUIRE_FALSE(result.has_value());
  const Error& error = result.error();
  CHECK(error.code == Errc::bad_range);
  CHECK(error.stage == Stage::produce);
  CHECK(std::strcmp(error.op, "queue_range") == 0);
  CHECK(error.detail == 12345);
  CHECK(error.channel == multifd::no_channel);
  CHECK(error.packet == multifd::no_packet);

  const Result<void> nothing = multifd::fail(Errc::cancelled, Stage::sync);
  REQUIRE_FALSE(nothing.has_value());
  CHECK(nothing.error().op[0] == '\0');
  CHECK(nothing.error().detail == 0);
}

TEST_CASE("fail_errno() takes the current errno, or the one that it is given") {
  errno = EMFILE;
  const Result<void> current = multifd::fail_errno(Stage::accept, "accept4");
  REQUIRE_FALSE(current.has_value());
  CHECK(current.error().code == std::error_code(EMFILE, std::system_category()));
  CHECK(current.error().stage == Stage::accept);
  CHECK(std::strcmp(current.error().op, "accept4") == 0);

  const Result<void> given = multifd::fail_errno(Stage::setup, "mmap", ENOMEM);
  REQUIRE_FALSE(given.has_value());
  CHECK(given.error().code == std::error_code(ENOMEM, std::system_category()));
}

namespace {

multifd::Result<int> give(int value) {
  if (value < 0) return multifd::fail(multifd::Errc::bad_range, multifd::Stage::setup, "give", 7);
  return value;
}
multifd::Result<void> agree(bool yes) {
  if (!yes) return multifd::fail(multifd::Errc::cancelled, multifd::Stage::setup, "agree");
  return {};
}
multifd::Result<std::unique_ptr<int>> sum(int a, int b, bool yes, int& reached) {
  MULTIFD_TRY_ASSIGN(const int first, give(a));
  ++reached;
  MULTIFD_TRY(agree(yes));
  ++reached;
  std::unique_ptr<int> result;
  MULTIFD_TRY_ASSIGN(result, [](multifd::Result<int> value) -> multifd::Result<std::unique_ptr<int>> {
    MULTIFD_TRY_ASSIGN(int number, std::move(value));
    return std::make_unique<int>(number);
  }(give(b)));
  *result += first;
  return result;
}

}  // namespace

TEST_CASE("MULTIFD_TRY hands errors on, at once and whole, and values that can only be moved") {
  int reached = 0;
  const auto good = sum(3, 4, true, reached);
  REQUIRE(good.has_value());
  CHECK(**good == 7);
  CHECK(reached == 2);
  reached = 0;
  CHECK(sum(-1, 4, true, reached).error().detail == 7);
  CHECK(reached == 0);
  CHECK(sum(1, 4, false, reached).error().code == multifd::Errc::cancelled);
  CHECK(reached == 1);
  CHECK(sum(1, -4, true, reached).error().code == multifd::Errc::bad_range);
}
