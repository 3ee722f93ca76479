// SPDX-License-Identifier: MIT
//
// The DirtySources that need no kernel through their contract, the exemplar among them; and some with one fault each, to
// see that the contract notices. tests/unit/migrate/ has KVM's and userfaultfd's.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "exemplar/dirty_source.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty/dirty_hooks.hpp"
#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/dirty/dirty_union.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/testing/dirty_source_contract.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::chrono_literals;
using test::check;
using test::DirtyRam;

namespace {

enum class Wrong {
  none,
  open_when_off,      // fetches although it is off
  assigns,            // overwrites the caller's bitmap
  last_page,          // forgets the last page of a block
  one_block,          // reports every block's pages in the first
  past_end,           // sets bits behind the block
  never_clears,       // rearm() does nothing
  first_chunk,        // rearm() forgets first_page
  whole_chunk,        // rearm() clears pages whose bit is not set
  clears_late,        // rearm() clears at the next fetch, when the page has long been read
  reads_then_clears,  // fetch() takes the marks in two steps
  compares,           // a page is dirty when it differs
  small_pages,        // takes the map's pages for 4 KiB
  no_bounds,          // believes its arguments
  restart_deaf,       // hears nothing after the second start()
  costs_on,           // writes cost something after stop()
};

/// A log as KVM's with manual protect, in memory, which a rule is taken from.
template <Wrong wrong>
class ToyLog {
 public:
  static constexpr auto fetches = DirtyFetch::complete;
  using Word = std::atomic<std::uint64_t>;

  explicit ToyLog(const RamMap& ram) : ram_(ram) {
    for (std::uint32_t id = 0; id < ram.blocks().size(); ++id) {
      const std::size_t words = bitmap_words(ram.pages(BlockId{id}));
      dirty_.push_back(std::make_unique<Word[]>(words + 1));
      late_.emplace_back(words);
      seen_.emplace_back(ram.pages(BlockId{id}));
    }
  }

  /// Behind each store of the guest.
  void stored(BlockId block, std::uint64_t offset) {
    ++stores_;
    if (wrong == Wrong::costs_on && stopped_) ++faults;
    if (!on_.load()) return;
    const std::uint64_t page = offset / (wrong == Wrong::small_pages ? 4096 : ram_.page_bytes());
    const std::uint32_t id = wrong == Wrong::one_block ? 0 : index(block);
    if (page / 64 > bitmap_words(ram_.pages(BlockId{id}))) return;
    const std::uint64_t bit = std::uint64_t{1} << page % 64;
    if ((dirty_[id][page / 64].fetch_or(bit) & bit) == 0) ++faults;
  }

  Result<void> start() noexcept {
    for (std::uint32_t id = 0; id < dirty_.size(); ++id)
      for (std::size_t i = 0; i < words(id); ++i) dirty_[id][i].store(~std::uint64_t{0} >> spare(id, i));
    on_.store(wrong != Wrong::restart_deaf || !stopped_);
    open_ = true;
    return {};
  }

  Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    if (wrong != Wrong::open_when_off) MULTIFD_TRY(check_on(open_));
    if (wrong != Wrong::no_bounds && wrong != Wrong::open_when_off) MULTIFD_TRY(check_fetch(ram_, block, bitmap));
    const std::uint32_t id = index(block);
    if (id >= dirty_.size()) return {};
    for (std::size_t i = 0; i < std::min(words(id), bitmap.size()); ++i) {
      if (wrong == Wrong::clears_late) dirty_[id][i].fetch_and(~std::exchange(late_[id][i], 0));
      std::uint64_t bits = dirty_[id][i].load();
      if (wrong == Wrong::reads_then_clears && bits != 0) {
        // Long enough for a writer, if there is one, to write more pages.
        const std::uint64_t before = stores_.load();
        for (const test::Stopwatch watch; stores_.load() < before + 5 && watch.elapsed() < 3ms;)
          std::this_thread::yield();
        dirty_[id][i].store(0);
      }
      if (wrong == Wrong::compares) bits = differing(id, i);
      if (wrong == Wrong::last_page && i + 1 == words(id)) bits &= ~std::uint64_t{0} >> (spare(id, i) + 1);
      if (wrong == Wrong::past_end && bits != 0) bits |= ~(~std::uint64_t{0} >> spare(id, i));
      bitmap[i] = wrong == Wrong::assigns ? bits : bitmap[i] | bits;
    }
    return {};
  }

  Result<void> rearm(BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> bitmap) noexcept {
    if (wrong != Wrong::open_when_off) MULTIFD_TRY(check_on(open_));
    if (wrong != Wrong::no_bounds) MULTIFD_TRY(check_rearm(ram_, block, first_page, bitmap));
    const std::uint32_t id = index(block);
    if (id >= dirty_.size() || wrong == Wrong::never_clears) return {};
    for (std::size_t i = 0; i < bitmap.size(); ++i) {
      const std::size_t word = (wrong == Wrong::first_chunk ? 0 : first_page / 64) + i;
      if (word >= words(id)) return {};
      if (wrong == Wrong::clears_late)
        late_[id][word] |= bitmap[i];
      else
        dirty_[id][word].fetch_and(wrong == Wrong::whole_chunk && bitmap[i] != 0 ? 0 : ~bitmap[i]);
    }
    return {};
  }
  bool needs_rearm() const noexcept { return true; }

  Result<void> stop() noexcept {
    stopped_ = stopped_ || open_;
    on_.store(false);
    open_ = false;
    return {};
  }
  std::size_t page_bytes() const noexcept { return ram_.page_bytes(); }

  std::atomic<std::uint64_t> faults{0};

 private:
  std::size_t words(std::uint32_t id) const { return bitmap_words(ram_.pages(BlockId{id})); }
  /// Bits of a word that stand for no page.
  unsigned spare(std::uint32_t id, std::size_t word) const {
    const std::uint64_t left = ram_.pages(BlockId{id}) - word * 64;
    return left >= 64 ? 0 : static_cast<unsigned>(64 - left);
  }
  std::uint64_t differing(std::uint32_t id, std::size_t word) {
    std::uint64_t bits = 0;
    for (std::uint64_t page = word * 64; page < std::min<std::uint64_t>(word * 64 + 64, seen_[id].size()); ++page) {
      std::uint64_t sum = 0;
      auto* const at = reinterpret_cast<std::uint64_t*>(ram_.block(BlockId{id}).host.data() + page * ram_.page_bytes());
      for (std::size_t i = 0; i < ram_.page_bytes() / 8; ++i)
        sum = sum * 31 + std::atomic_ref(at[i]).load(std::memory_order_relaxed);
      if (std::exchange(seen_[id][page], sum) != sum) bits |= std::uint64_t{1} << page % 64;
    }
    return bits;
  }

  RamMap ram_;
  std::vector<std::unique_ptr<Word[]>> dirty_;
  std::vector<std::vector<std::uint64_t>> late_, seen_;
  std::atomic<std::uint64_t> stores_{0};
  std::atomic<bool> on_{false};
  bool open_ = false;
  std::atomic<bool> stopped_{false};
};
static_assert(check_dirty_source<ToyLog<Wrong::none>>());

template <Wrong wrong>
ContractReport check_toy(std::size_t page_bytes = 4096) {
  const DirtyRam ram(page_bytes);
  ToyLog<wrong> log(ram.map);
  return check_dirty_source_contract(log, {.ram = ram.map,
                                           .write =
                                               [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                 ram.store(block, offset, value);
                                                 log.stored(block, offset);
                                               },
                                           .faults = [&] { return log.faults.load(); },
                                           .seed = test::seed()});
}

template <Wrong wrong>
void check_fails(const char* because, std::size_t page_bytes = 4096) {
  const ContractReport report = check_toy<wrong>(page_bytes);
  const std::string text = std::string(because) + ": " + report.text();
  CHECK_MESSAGE(report.text().find(because) != std::string::npos, text);
}

constexpr std::size_t page_sizes[] = {1024, 4096, 65536};

}  // namespace

TEST_CASE("the exemplar and DirtyPages keep the DirtySource contract, with all page sizes") {
  for (const std::size_t page_bytes : page_sizes) {
    CAPTURE(page_bytes);
    const DirtyRam ram(page_bytes);
    exemplar::EmulatorLog emulator(ram.map);
    check(check_dirty_source_contract(emulator, {.ram = ram.map,
                                                 .write =
                                                     [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                       ram.store(block, offset, value);
                                                       emulator.stored(block, offset);
                                                     },
                                                 .seed = test::seed()}));
    auto pages = DirtyPages::create(ram.map);
    REQUIRE(pages.has_value());
    check(check_dirty_source_contract(*pages, {.ram = ram.map,
                                               .write =
                                                   [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                     ram.store(block, offset, value);
                                                     pages->mark(block, offset, 8);
                                                   },
                                               .seed = test::seed()}));
  }
}

TEST_CASE("DirtyFromHooks keeps the DirtySource contract, with hooks that clear in rearm() and in fetch()") {
  const DirtyRam ram;
  ToyLog<Wrong::none> log(ram.map);
  auto manual = DirtyFromHooks::create(
      ram.map, {.start = [&] { return log.start(); },
                .fetch = [&](BlockId block, std::span<std::uint64_t> bitmap) { return log.fetch(block, bitmap); },
                .rearm = [&](BlockId block, std::uint64_t first_page,
                             std::span<const std::uint64_t> bitmap) { return log.rearm(block, first_page, bitmap); },
                .stop = [&] { return log.stop(); }});
  REQUIRE(manual.has_value());
  CHECK(manual->needs_rearm());
  check(check_dirty_source_contract(*manual, {.ram = ram.map,
                                              .write =
                                                  [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                    ram.store(block, offset, value);
                                                    log.stored(block, offset);
                                                  },
                                              .faults = [&] { return log.faults.load(); },
                                              .seed = test::seed()}));

  // Always on, as vhost's: nothing but fetch.
  std::vector<std::vector<std::atomic<std::uint64_t>>> vhost(2);
  for (std::uint32_t id = 0; id < 2; ++id)
    vhost[id] = std::vector<std::atomic<std::uint64_t>>(bitmap_words(ram.map.pages(BlockId{id})));
  auto automatic =
      DirtyFromHooks::create(ram.map, {.fetch = [&](BlockId block, std::span<std::uint64_t> bitmap) -> Result<void> {
                               for (std::size_t i = 0; i < bitmap.size(); ++i)
                                 bitmap[i] |= vhost[index(block)][i].exchange(0);
                               return {};
                             }});
  REQUIRE(automatic.has_value());
  CHECK(!automatic->needs_rearm());
  check(check_dirty_source_contract(*automatic, {.ram = ram.map,
                                                 .write =
                                                     [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                       ram.store(block, offset, value);
                                                       const std::uint64_t page = offset / 4096;
                                                       vhost[index(block)][page / 64].fetch_or(std::uint64_t{1}
                                                                                               << page % 64);
                                                     },
                                                 .seed = test::seed()}));
}

TEST_CASE("DirtyUnion keeps the DirtySource contract when each write is reported by another source") {
  const DirtyRam ram;
  ToyLog<Wrong::none> vcpus(ram.map);
  auto devices = DirtyPages::create(ram.map);
  REQUIRE(devices.has_value());
  DirtyUnion both(vcpus, *devices);
  CHECK(both.needs_rearm());
  check(check_dirty_source_contract(both, {.ram = ram.map,
                                           .write =
                                               [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                 ram.store(block, offset, value);
                                                 if (value % 2 == 0)
                                                   vcpus.stored(block, offset);
                                                 else
                                                   devices->mark(block, offset, 8);
                                               },
                                           .seed = test::seed()}));
}

TEST_CASE("the DirtySource contract notices a source that breaks it") {
  check(check_toy<Wrong::none>());
  check_fails<Wrong::open_when_off>("is not Errc::already_closed");
  check_fails<Wrong::assigns>("clears bits of the caller's bitmap");
  check_fails<Wrong::last_page>("pages lost, when several pages");
  check_fails<Wrong::one_block>("pages lost, when several pages");
  check_fails<Wrong::past_end>("bits past the end");
  check_fails<Wrong::never_clears>("reports pages for ever");
  check_fails<Wrong::first_chunk>("reports pages for ever");
  check_fails<Wrong::whole_chunk>("clears a page whose bit is not set");
  check_fails<Wrong::clears_late>("lost");
  check_fails<Wrong::reads_then_clears>("is not what was written last");
  check_fails<Wrong::compares>("written back to what it was");
  check_fails<Wrong::small_pages>("bits past the end", 65536);
  check_fails<Wrong::no_bounds>("of a block that the map does not have");
  check_fails<Wrong::restart_deaf>("pages lost, when several pages");
  check_fails<Wrong::costs_on>("writes still cost something");
}
