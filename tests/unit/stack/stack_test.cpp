// SPDX-License-Identifier: MIT
#include "multifd/stack.hpp"

#include <doctest/doctest.h>

#include <ostream>  // lets doctest print a std::error_code
#include <string>

using multifd::Errc;
using multifd::PolicyList;
using multifd::Result;
using multifd::Stage;

namespace {

struct Plain {
  static constexpr std::string_view name = "plain";
  static constexpr int value = 1;
};
struct Squeezed {
  static constexpr std::string_view name = "squeezed";
  static constexpr int value = 2;
};
struct Folded {
  static constexpr std::string_view name = "folded";
  static constexpr int value = 3;
};
struct Never {
  static constexpr std::string_view name = "never";
  static constexpr int value = 10;
};
struct Always {
  static constexpr std::string_view name = "always";
  static constexpr int value = 20;
};

using Methods = PolicyList<Plain, Squeezed, Folded>;
using Checks = PolicyList<Never, Always>;

static_assert(Methods::names == std::array<std::string_view, 3>{"plain", "squeezed", "folded"});
static_assert(Checks::names.size() == 2);

constexpr auto value_of = []<class P>() -> Result<int> { return P::value; };
constexpr auto sum_of = []<class C, class Z>() -> Result<int> { return C::value + Z::value; };

}  // namespace

TEST_CASE("with_policy() calls the body for the policy of that name, first, middle or last") {
  CHECK(multifd::with_policy("plain", Methods{}, value_of).value() == 1);
  CHECK(multifd::with_policy("squeezed", Methods{}, value_of).value() == 2);
  CHECK(multifd::with_policy("folded", Methods{}, value_of).value() == 3);
  CHECK(multifd::with_policy("plain", PolicyList<Plain>{}, value_of).value() == 1);
}

TEST_CASE("with_policy() calls the body once, and only for the one that was named") {
  std::string called;
  const auto body = [&]<class P>() -> Result<void> {
    called += P::name;
    return {};
  };
  CHECK(multifd::with_policy("squeezed", Methods{}, body));
  CHECK(called == "squeezed");
}

TEST_CASE("A name that no policy has is refused, and nothing is called") {
  bool called = false;
  const auto body = [&]<class P>() -> Result<int> {
    called = true;
    return 0;
  };
  for (const char* name : {"", "Plain", "plain ", "plai", "none", "always"}) {
    CAPTURE(name);
    const Result<int> result = multifd::with_policy(name, Methods{}, body);
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code == Errc::unknown_policy);
    CHECK(result.error().code == multifd::Condition::misuse);
    CHECK(result.error().stage == Stage::setup);
  }
  CHECK_FALSE(called);
}

TEST_CASE("with_policies() picks on both axes") {
  for (const auto& [method, method_value] : {std::pair{"plain", 1}, std::pair{"squeezed", 2}, std::pair{"folded", 3}})
    for (const auto& [check, check_value] : {std::pair{"never", 10}, std::pair{"always", 20}})
      CHECK(multifd::with_policies(method, Methods{}, check, Checks{}, sum_of).value() == method_value + check_value);
}

TEST_CASE("with_policies() refuses an unknown name on either axis") {
  for (const auto& [method, check] :
       {std::pair{"unknown", "never"}, std::pair{"plain", "unknown"}, std::pair{"never", "plain"}}) {
    CAPTURE(method);
    const Result<int> result = multifd::with_policies(method, Methods{}, check, Checks{}, sum_of);
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code == Errc::unknown_policy);
  }
}

TEST_CASE("The body's own error comes back as it is") {
  const auto body = []<class P>() -> Result<void> { return multifd::fail(Errc::timed_out, Stage::read, "", P::value); };
  const Result<void> result = multifd::with_policy("folded", Methods{}, body);
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == Errc::timed_out);
  CHECK(result.error().detail == 3);
}
