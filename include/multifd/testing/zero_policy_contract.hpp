// SPDX-License-Identifier: MIT
//
// Checks the rules of the ZeroPagePolicy concept that types cannot express. Run it on your own policy, in any test
// framework:
//
//   auto report = multifd::check_zero_policy_contract(MyPolicy{...});
//   assert(report.ok());  // else print report.text()
//
// The check writes to the pages that it passes to the policy, but never while the policy reads them. A policy must
// survive such writes; that is for its author to argue, because the thread sanitizer rightly calls them a race.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "multifd/memory/ram_block.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd {

/// The pages that check_zero_policy_contract() uses.
struct ZeroPolicyContractSetup {
  std::size_t page_bytes = 4096;
  /// At least one page of memory for the check to overwrite, for policies that know their memory (by its address, or by
  /// a bitmap). Default: empty, and the check allocates its own.
  std::span<std::byte> memory = {};
  BlockId block{};  ///< the block whose memory `memory` is, from offset 0
};

namespace detail {

/// A byte value for a position. All positions together try the lowest bit, the highest bit, and all bits.
constexpr std::byte contract_byte(std::size_t position) noexcept {
  constexpr std::array values{std::byte{0x01}, std::byte{0x80}, std::byte{0xff}};
  return values[position % values.size()];
}

/// Sets one non-zero byte at each `stride`-th position in turn, and asks the policy. Returns how often the policy
/// called the page zero.
template <ZeroPagePolicy Z>
std::size_t count_false_zero_claims(const Z& policy, PageRef page, std::span<std::byte> bytes, std::size_t stride) {
  std::size_t claims = 0;
  for (std::size_t at = 0; at < bytes.size(); at += stride) {
    bytes[at] = contract_byte(at);
    if (policy.is_zero(page)) ++claims;
    bytes[at] = std::byte{};
  }
  return claims;
}

}  // namespace detail

/// Checks that a policy never calls a page with a non-zero byte zero, whatever it was asked before, in its copies too,
/// and when four threads ask one object at once. A policy need not find every zero page; `notes` say what was observed.
/// A policy that knows the memory from before the check may use this for its first answer about each page, which it
/// gives while the page is still zero, as in a migration's first round.
///
/// Params: `policy`: copied, not changed; `setup`: pages and memory.
/// Threads: makes four of its own and joins them.
template <class Z>
ContractReport check_zero_policy_contract(const Z& policy, ZeroPolicyContractSetup setup = {}) {
  static_assert(check_zero_page_policy<Z>());
  constexpr std::size_t thread_count = 4;
  ContractReport report;

  const std::size_t page_bytes = setup.page_bytes;
  std::vector<std::byte> own_memory;
  if (setup.memory.empty() && page_bytes != 0) {
    own_memory.resize((thread_count + 1) * page_bytes);
    const std::size_t misplaced = reinterpret_cast<std::uintptr_t>(own_memory.data()) % page_bytes;
    const std::size_t skipped = misplaced == 0 ? 0 : page_bytes - misplaced;
    setup.memory = std::span(own_memory).subspan(skipped, thread_count * page_bytes);
  }
  if (!report.expect(page_bytes != 0 && setup.memory.size() >= page_bytes, "setup: needs memory for one page"))
    return report;

  // Memory that is zero already is not written: it may never have been touched.
  for (std::byte& byte : setup.memory)
    if (byte != std::byte{}) byte = std::byte{};
  const std::size_t page_count = setup.memory.size() / page_bytes;
  const auto bytes_of = [&](std::size_t i) { return setup.memory.subspan(i * page_bytes, page_bytes); };
  const auto page_at = [&](std::size_t i) {
    return PageRef{.block = setup.block, .offset = std::uint64_t{i} * page_bytes, .bytes = bytes_of(i)};
  };
  const PageRef page = page_at(0);
  const std::span<std::byte> bytes = bytes_of(0);

  report.expect(!std::string_view(Z::name).empty(), "name: is empty");

  const bool finds_zero = policy.is_zero(page);
  for (std::size_t i = 1; i < page_count; ++i) static_cast<void>(policy.is_zero(page_at(i)));
  report.note(finds_zero ? "finds a zero page" : "does not find a zero page");

  std::size_t claims = detail::count_false_zero_claims(policy, page, bytes, 1);
  report.expect(claims == 0, "is_zero: true for a page with one non-zero byte, at " + std::to_string(claims) + " of " +
                                 std::to_string(page_bytes) + " positions");

  std::ranges::fill(bytes, std::byte{0xff});
  report.expect(!policy.is_zero(page), "is_zero: true for a page of 0xff bytes");

  // Ask about the zero page, write to it, ask again: a cached answer is wrong.
  std::ranges::fill(bytes, std::byte{});
  static_cast<void>(policy.is_zero(page));
  bytes[page_bytes / 2] = std::byte{1};
  report.expect(!policy.is_zero(page), "is_zero: true for a page written since it was last asked");

  const Z copy = policy;
  report.expect(!copy.is_zero(page), "copy: claims zero for a page with a non-zero byte");
  bytes[page_bytes / 2] = std::byte{};
  report.expect(copy.is_zero(page) == policy.is_zero(page), "copy: answers otherwise than the original");

  // Each thread writes to a page of its own. With fewer pages than threads there are fewer threads.
  std::array<std::size_t, thread_count> false_claims{};
  const std::size_t writers = std::min(page_count, thread_count);
  {
    std::latch start(static_cast<std::ptrdiff_t>(writers));
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i < writers; ++i) {
      threads.emplace_back([&, i] {
        start.arrive_and_wait();
        for (std::size_t round = 0; round < 4; ++round)
          false_claims[i] += detail::count_false_zero_claims(policy, page_at(i), bytes_of(i), 13);
      });
    }
  }
  claims = 0;
  for (std::size_t count : false_claims) claims += count;
  report.expect(claims == 0, "is_zero: true for a page with a non-zero byte when " + std::to_string(writers) +
                                 " threads ask at once, " + std::to_string(claims) + " times");
  return report;
}

}  // namespace multifd
