// SPDX-License-Identifier: MIT
//
// Checks the rules of the PageSource concept that types cannot express. Run it on your own policy, in any test
// framework:
//
//   auto report = multifd::check_page_source_contract<MySource>();
//   assert(report.ok());  // else print report.text()
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/ends/page_source.hpp"
#include "multifd/limits.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/testing/page_content.hpp"

namespace multifd {

namespace testing::detail {

/// One run of check_page_source_contract() at one page size.
template <PageSource S>
class PageSourceCheck {
 public:
  PageSourceCheck(std::size_t page_bytes, bool copied, std::uint64_t seed)
      : page_bytes_(page_bytes), copied_(copied), random_(seed) {}

  ContractReport run() {
    // Beyond 4 GiB, where a 32-bit offset ends. Only the pages that are written become resident.
    std::size_t bytes = 0;
    void* mapped = MAP_FAILED;
    for (const std::size_t far : {std::size_t{4} << 30, std::size_t{0}}) {
      far_ = far;
      bytes = far + 32 * batch_bytes;
      mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped != MAP_FAILED) break;
      report_.note("the system gives no address space: offsets beyond 4 GiB were not checked");
    }
    if (!expect(mapped != MAP_FAILED, "setup: no memory for a RAM block")) return std::move(report_);
    host_ = {static_cast<std::byte*>(mapped), bytes};
    finds_pages();
    finds_pages_at_once();
    ::munmap(mapped, bytes);
    return std::move(report_);
  }

 private:
  /// A batch, and what its pages hold.
  struct Pages {
    std::vector<std::uint64_t> slots;
    PageBatch batch;
    RamBlock block;
    std::vector<std::vector<std::byte>> contents;
  };

  bool expect(bool held, const std::string& what) {
    return report_.expect(held, what + " (pages of " + std::to_string(page_bytes_) + " bytes)");
  }

  /// Pages in no order, neighbours among them. Guest memory and copies hold other bytes.
  void fill(Pages& pages, std::size_t count, std::uint64_t first_page) {
    pages.block = {.idstr = "pc.ram", .host = {}, .bytes = host_.size()};
    if constexpr (S::guest) pages.block.host = host_;
    pages.slots.resize(batch_bytes / page_bytes_);
    pages.batch = PageBatch(pages.slots);
    if (auto buffer = PageBuffer::create(); S::copies && expect(buffer.has_value(), "setup: no memory for a buffer"))
      pages.batch.copies = std::move(*buffer);
    pages.batch.copied = copied_;
    std::vector<std::uint64_t> order(count);
    for (std::size_t i = 0; i < count; ++i) order[i] = first_page + i + (i % 3 == 0 ? 0 : far_ / page_bytes_);
    std::ranges::shuffle(order, random_);
    pages.batch.push_all(order);
    pages.contents.clear();
    for (std::size_t i = 0; i < count; ++i) {
      pages.batch.offsets()[i] *= page_bytes_;
      std::vector<std::byte>& content = pages.contents.emplace_back(page_bytes_);
      fill_differently(content, random_);
      std::byte* to = host_.data() + pages.batch.offsets()[i];
      if constexpr (S::copies) {
        std::byte* const copy = pages.batch.copies.data() + i * page_bytes_;
        std::memset(copied_ ? to : copy, 0xee, page_bytes_);
        if (copied_) to = copy;
      }
      std::memcpy(to, content.data(), page_bytes_);
    }
  }

  static bool holds(const std::byte* page, std::span<const std::byte> content) {
    return page != nullptr && std::memcmp(page, content.data(), content.size()) == 0;
  }

  bool right(const Pages& pages, std::size_t i) const {
    return holds(S::page(pages.block, pages.batch, i, page_bytes_), pages.contents[i]);
  }

  void finds_pages() {
    for (const std::size_t count : {std::size_t{1}, std::size_t{2}, batch_bytes / page_bytes_}) {
      Pages pages;
      fill(pages, count, 0);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < count; ++i) wrong += !right(pages, i);
      if (!expect(wrong == 0, "page: other bytes than were queued, for " + std::to_string(wrong) + " of " +
                                  std::to_string(count) + " pages"))
        return;  // nothing else can hold
      for (std::size_t i = count; i-- > 0;) wrong += !right(pages, i) || !right(pages, i);
      expect(wrong == 0, "page: asked again, and backwards, it says something else");

      // As the worker goes through a batch with zero pages: what is before has been moved.
      for (std::size_t i = 0; i < count; ++i) {
        wrong += !right(pages, i);
        pages.batch.offsets()[i] = pages.batch.offsets()[0];
      }
      expect(wrong == 0, "page: depends on the offsets before its own, which the worker rearranges");
    }
  }

  void finds_pages_at_once() {
    constexpr std::size_t threads = 4;
    const std::size_t count = std::min<std::size_t>(32, batch_bytes / page_bytes_);
    std::array<Pages, threads> pages;
    std::array<std::size_t, threads> wrong{};
    for (std::size_t t = 0; t < threads; ++t) fill(pages[t], count, t * count);
    {
      std::vector<std::jthread> running;
      for (std::size_t t = 0; t < threads; ++t)
        running.emplace_back([&, t] {
          for (int round = 0; round < 20; ++round)
            for (std::size_t i = 0; i < count; ++i) wrong[t] += !right(pages[t], i);
        });
    }
    std::size_t sum = 0;
    for (const std::size_t each : wrong) sum += each;
    expect(sum == 0, "page: " + std::to_string(sum) + " wrong answers when four threads ask at once");
  }

  const std::size_t page_bytes_;
  const bool copied_;  ///< where the pages are that a batch is asked for
  std::mt19937_64 random_;
  std::size_t far_ = 0;  ///< how much further on two pages of three lie
  std::span<std::byte> host_;
  ContractReport report_;
};

}  // namespace testing::detail

/// Checks that a page source finds each page of a batch, in memory or among the copies: in any order, beyond 4 GiB, when
/// the worker has rearranged the offsets before, and for four threads at once.
///
/// Not checked: that nothing is allocated, because only a whole program can count allocations.
/// Threads: makes four of its own and joins them. Cost: 4 GiB of address space, 2 MiB of it touched.
template <class S>
[[nodiscard]] ContractReport check_page_source_contract(std::uint64_t seed = 1) {
  static_assert(check_page_source<S>());
  ContractReport report;
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    if (S::guest) report.merge(testing::detail::PageSourceCheck<S>(page_bytes, false, seed).run());
    if (S::copies) report.merge(testing::detail::PageSourceCheck<S>(page_bytes, true, seed).run());
  }
  return report;
}

}  // namespace multifd
