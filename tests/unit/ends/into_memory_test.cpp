// SPDX-License-Identifier: MIT
#include "multifd/ends/into_memory.hpp"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>

#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

/// While it lives, a write to a read-only page of `block` succeeds, but only after `before_write` has looked at it.
class WriteWatch {
 public:
  WriteWatch(const Block& block, bool (*before_write)(std::uint64_t offset)) {
    base_ = block.data();
    bytes_ = block.size();
    look_ = before_write;
    writes_ = too_early_ = 0;
    struct sigaction action{};
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
      auto* const at = static_cast<std::byte*>(info->si_addr);
      if (at < base_ || at >= base_ + bytes_) ::_exit(3);  // not ours
      const auto host_page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
      const std::uint64_t offset = static_cast<std::uint64_t>(at - base_) / host_page * host_page;
      ++writes_;
      if (look_(offset)) ++too_early_;
      ::mprotect(base_ + offset, host_page, PROT_READ | PROT_WRITE);
    };
    action.sa_flags = SA_SIGINFO;
    REQUIRE(::sigaction(SIGSEGV, &action, &before_) == 0);
    REQUIRE(::mprotect(base_, bytes_, PROT_READ) == 0);
  }
  WriteWatch(const WriteWatch&) = delete;
  WriteWatch& operator=(const WriteWatch&) = delete;
  ~WriteWatch() {
    ::mprotect(base_, bytes_, PROT_READ | PROT_WRITE);
    ::sigaction(SIGSEGV, &before_, nullptr);
  }
  static int writes() { return writes_; }
  static int too_early() { return too_early_; }

 private:
  static inline std::byte* base_ = nullptr;
  static inline std::size_t bytes_ = 0;
  static inline bool (*look_)(std::uint64_t) = nullptr;
  static inline std::atomic<int> writes_ = 0, too_early_ = 0;
  struct sigaction before_{};
};

IntoMemory::Sink* looked_at = nullptr;
std::uint64_t looked_page_bytes = 0;

}  // namespace

TEST_CASE("A page counts as received when its content is in memory, and not before: zero pages as well as bytes") {
  constexpr std::size_t pages = 4;
  for (const std::size_t page_bytes : {std::size_t{4096}, std::size_t{65536}})
    for (const DestinationMemory destination : {DestinationMemory::unknown, DestinationMemory::zeroed}) {
      CAPTURE(page_bytes);
      CAPTURE(static_cast<int>(destination));
      Block memory(pages * page_bytes);
      memory.fill(std::byte{0xee});
      RamMap map(page_bytes);
      const BlockId block = map.add("pc.ram", memory.bytes()).value();
      auto sink = IntoMemory::Sink::create(map, {.destination = destination}, {}).value();
      // Bytes have come here, so that zero pages are written to fresh memory, too.
      auto channel = IntoMemory::Sink::Channel::create(*sink).value();
      auto runs = PageRuns::create(map.batch_pages()).value();
      std::array<std::uint64_t, 2> bytes_at{2 * page_bytes, 3 * page_bytes};
      ArrivingPages bytes{.block = block, .offsets = bytes_at, .normal_pages = 2};
      REQUIRE(channel.place(bytes, runs).has_value());
      bytes.runs = runs.view();
      channel.begin(bytes);
      CHECK_FALSE(sink->received().test(block, bytes_at[0]));  // placed, and still under way

      looked_at = sink.get();
      looked_page_bytes = page_bytes;
      const WriteWatch watch(memory, [](std::uint64_t offset) {
        return looked_at->received().test(BlockId{0}, offset / looked_page_bytes * looked_page_bytes);
      });
      const bool all = destination == DestinationMemory::unknown;
      REQUIRE(sink->apply_zero(block, 0).has_value());
      const std::vector<std::byte> content(page_bytes, std::byte{7});
      REQUIRE(sink->apply_page(block, page_bytes, content).has_value());
      std::array<std::uint64_t, 1> zero_at{2 * page_bytes};
      channel.begin({.block = block, .offsets = zero_at, .normal_pages = 0});
      CHECK(WriteWatch::writes() > (all ? 2 : 1));
      CHECK(WriteWatch::too_early() == 0);
      for (const std::size_t p : {0u, 1u, 2u}) CHECK(sink->received().test(block, p * page_bytes));
      CHECK(memory.page(0, page_bytes)[0] == (all ? std::byte{0} : std::byte{0xee}));
      CHECK(memory.page(1, page_bytes)[page_bytes - 1] == std::byte{7});
      CHECK(memory.page(2, page_bytes)[page_bytes - 1] == std::byte{0});
      CHECK(sink->zeros_written() == (all ? 2 : 1));
    }
}
