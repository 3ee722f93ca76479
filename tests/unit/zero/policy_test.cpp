// SPDX-License-Identifier: MIT
#include "multifd/zero/policy.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "multifd/testing/zero_policy_contract.hpp"

namespace {

using multifd::PageRef;
using multifd::ZeroPagePolicy;
using multifd::ZeroPagesLegacy;
using multifd::ZeroPagesMultifd;
using multifd::ZeroPagesNone;
using multifd::ZeroStage;

static_assert(multifd::check_zero_page_policy<ZeroPagesNone>());
static_assert(multifd::check_zero_page_policy<ZeroPagesLegacy>());
static_assert(multifd::check_zero_page_policy<ZeroPagesMultifd>());

// What is not a policy, one missing piece each.
struct Complete {
  static constexpr std::string_view name = "complete";
  static constexpr ZeroStage stage = ZeroStage::channel;
  bool is_zero(PageRef) const noexcept { return false; }
};
struct WithoutStage {
  static constexpr std::string_view name = "without stage";
  bool is_zero(PageRef) const noexcept { return false; }
};
struct WithoutName {
  [[maybe_unused]] static constexpr ZeroStage stage = ZeroStage::channel;
  bool is_zero(PageRef) const noexcept { return false; }
};
struct WithoutIsZero {
  static constexpr std::string_view name = "without is_zero";
  static constexpr ZeroStage stage = ZeroStage::channel;
};
struct MayThrow {
  static constexpr std::string_view name = "may throw";
  static constexpr ZeroStage stage = ZeroStage::channel;
  bool is_zero(PageRef) const { return false; }
};
struct NotConst {
  static constexpr std::string_view name = "not const";
  static constexpr ZeroStage stage = ZeroStage::channel;
  bool is_zero(PageRef) noexcept { return false; }
};
struct AnswersInt {
  static constexpr std::string_view name = "answers int";
  static constexpr ZeroStage stage = ZeroStage::channel;
  int is_zero(PageRef) const noexcept { return 0; }
};
struct StageIsText {
  static constexpr std::string_view name = "stage is text";
  static constexpr std::string_view stage = "channel";
  bool is_zero(PageRef) const noexcept { return false; }
};
struct NotCopyable : Complete {
  NotCopyable() = default;
  NotCopyable(const NotCopyable&) = delete;
  NotCopyable& operator=(const NotCopyable&) = delete;
};
static_assert(ZeroPagePolicy<Complete>);
static_assert(!ZeroPagePolicy<WithoutStage>);
static_assert(!ZeroPagePolicy<WithoutName>);
static_assert(!ZeroPagePolicy<WithoutIsZero>);
static_assert(!ZeroPagePolicy<MayThrow>);
static_assert(!ZeroPagePolicy<NotConst>);
static_assert(!ZeroPagePolicy<AnswersInt>);
static_assert(!ZeroPagePolicy<StageIsText>);
static_assert(!ZeroPagePolicy<NotCopyable>);
static_assert(!ZeroPagePolicy<int>);

// What keeps the types and breaks the contract.
struct LooksAtTheHeadOnly : Complete {
  bool is_zero(PageRef page) const noexcept { return multifd::buffer_is_zero(page.bytes.data(), 64); }
};
struct MissesTheLastByte : Complete {
  bool is_zero(PageRef page) const noexcept {
    return multifd::buffer_is_zero(page.bytes.data(), page.bytes.size() - 1);
  }
};
struct IgnoresTheHighestBit : Complete {
  bool is_zero(PageRef page) const noexcept {
    for (std::byte b : page.bytes) {
      if ((b & std::byte{0x7f}) != std::byte{}) return false;
    }
    return true;
  }
};
struct RemembersItsFirstAnswer : Complete {
  mutable int known = -1;
  bool is_zero(PageRef page) const noexcept {
    if (known < 0) known = multifd::buffer_is_zero(page.bytes.data(), page.bytes.size()) ? 1 : 0;
    return known == 1;
  }
};
struct Nameless : Complete {
  static constexpr std::string_view name = "";
};

template <class Z>
bool finds_zero_page(const Z& policy) {
  const std::vector<std::byte> bytes(4096);
  return policy.is_zero(PageRef{.bytes = bytes});
}

}  // namespace

TEST_CASE("None checks nothing, Legacy checks in the producer, Multifd on the channels") {
  CHECK(ZeroPagesNone::stage == ZeroStage::none);
  CHECK(ZeroPagesLegacy::stage == ZeroStage::producer);
  CHECK(ZeroPagesMultifd::stage == ZeroStage::channel);
  CHECK(ZeroPagesNone::name == "none");
  CHECK(ZeroPagesLegacy::name == "legacy");
  CHECK(ZeroPagesMultifd::name == "multifd");
  CHECK(!finds_zero_page(ZeroPagesNone{}));
  CHECK(finds_zero_page(ZeroPagesLegacy{}));
  CHECK(finds_zero_page(ZeroPagesMultifd{}));
}

TEST_CASE_TEMPLATE("the library's zero page policies keep their contract", Z, ZeroPagesNone, ZeroPagesLegacy,
                   ZeroPagesMultifd) {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{16384}}) {
    CAPTURE(page_bytes);
    const multifd::ContractReport report = multifd::check_zero_policy_contract(Z{}, {.page_bytes = page_bytes});
    CHECK_MESSAGE(report.ok(), report.text());
    REQUIRE(report.notes.size() == 1);
    CHECK((report.notes[0] == "finds a zero page") == !std::is_same_v<Z, ZeroPagesNone>);
  }
}

TEST_CASE_TEMPLATE("the contract check reports a policy that breaks its contract", Z, LooksAtTheHeadOnly,
                   MissesTheLastByte, IgnoresTheHighestBit, RemembersItsFirstAnswer, Nameless) {
  const multifd::ContractReport report = multifd::check_zero_policy_contract(Z{});
  CHECK(!report.ok());
  CHECK(!report.text().empty());
}

TEST_CASE("the contract check uses the memory it is given, down to one page, and refuses less") {
  std::vector<std::byte> memory(4096, std::byte{7});
  CHECK(multifd::check_zero_policy_contract(ZeroPagesMultifd{}, {.memory = memory}).ok());
  CHECK(multifd::buffer_is_zero(memory.data(), memory.size()));
  CHECK(!multifd::check_zero_policy_contract(ZeroPagesMultifd{}, {.page_bytes = 8192, .memory = memory}).ok());
  CHECK(!multifd::check_zero_policy_contract(ZeroPagesMultifd{}, {.page_bytes = 0, .memory = memory}).ok());
}

TEST_CASE("a ContractReport adds up failures and notes") {
  multifd::ContractReport sum;
  CHECK(sum.expect(true, "kept"));
  CHECK(sum.ok());
  multifd::ContractReport other;
  CHECK(!other.expect(false, "first"));
  other.fail("second");
  other.note("seen");
  sum.merge(other);
  CHECK(!sum.ok());
  CHECK(sum.text() == "first\nsecond");
  CHECK(sum.notes.size() == 1);
}
