// SPDX-License-Identifier: MIT
//
// Checks the rules of the DirtySource concept that types cannot express. Run it on your own source, in any test
// framework:
//
//   auto report = multifd::check_dirty_source_contract(source, {.ram = ram, .write = as_the_guest_writes});
//   assert(report.ok());  // else print report.text()
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/testing/contract_report.hpp"

namespace multifd {

/// What check_dirty_source_contract() works on.
struct DirtySourceContractSetup {
  /// The map of the source. Two blocks or more, of different sizes that are no multiples of 64 pages, find most. The check
  /// overwrites the memory, which is in this process.
  RamMap ram;
  /// Writes 8 bytes, at a multiple of 8, as the source's guest writes, and returns when it is done; with vCPUs, when the
  /// vCPU has left the guest. Called from one thread at a time, not always the same, and beside the source's calls.
  std::function<void(BlockId, std::uint64_t offset, std::uint64_t value)> write;
  /// Faults, exits or whatever watching costs, that write() has taken so far. Default: empty, and it is not checked that
  /// writes cost nothing after stop().
  std::function<std::uint64_t()> faults{};
  std::size_t rounds = 100;  ///< of the race between the writer and the source
  std::uint64_t seed = 1;
};

namespace testing::detail {

template <migrate::DirtySource S>
class DirtySourceCheck {
  using Bitmap = std::vector<std::uint64_t>;
  using Pages = std::set<std::uint64_t>;

 public:
  DirtySourceCheck(S& source, const DirtySourceContractSetup& setup)
      : source_(source), setup_(setup), ram_(setup.ram), random_(setup.seed) {}

  ContractReport run() {
    if (!report_.expect(!ram_.blocks().empty() && setup_.write != nullptr, "setup: needs a block and write()"))
      return std::move(report_);
    for (std::uint32_t block = 0; block < blocks(); ++block)
      copy_all(block);  // makes memory resident, which may count as written
    off(" before the first start()");
    // Each leaves the source on and silent, or there is no sense in the next.
    if (started("start()") && silent("start()") && reports_each_page() && reports_later_writes() && spares_others() &&
        reports_values() && bad_arguments())
      races();
    stops();
    if (report_.ok() && started("second start()") && silent("second start()")) static_cast<void>(reports_each_page());
    good(source_.stop(), "stop()");
    return std::move(report_);
  }

 private:
  bool good(const Result<void>& result, const std::string& call) {
    return report_.expect(result.has_value(), call + " failed" + (result ? "" : ": " + describe(result.error())));
  }

  std::uint64_t pages(std::uint32_t block) const { return ram_.pages(BlockId{block}); }
  std::uint32_t blocks() const { return static_cast<std::uint32_t>(ram_.blocks().size()); }
  static bool has(std::span<const std::uint64_t> bitmap, std::uint64_t page) {
    return (bitmap[page / 64] >> page % 64 & 1) != 0;
  }

  void write(std::uint32_t block, std::uint64_t page) {
    setup_.write(BlockId{block}, page * ram_.page_bytes(), ++value_);
  }

  /// The bitmap is longer than it need be, and has bits that must stay: those behind the block, and every fifth page.
  bool fetch(std::uint32_t block, Bitmap& bitmap) {
    const std::size_t words = bitmap_words(pages(block));
    Bitmap ours(words + 1);
    for (std::uint64_t bit = 0; bit < ours.size() * 64; bit += 5) ours[bit / 64] |= std::uint64_t{1} << bit % 64;
    Bitmap plain(words + 1), kept = ours;
    if (!good(source_.fetch(BlockId{block}, plain), "fetch()")) return false;
    const bool clean = plain[words] == 0 && (plain[words - 1] & ~every_page(block).back()) == 0;
    if (!report_.expect(clean, "fetch: sets bits past the end of the block")) return false;
    // What comes now was written meanwhile, or is reported again because it was not re-armed.
    if (!good(source_.fetch(BlockId{block}, kept), "fetch()")) return false;
    for (std::size_t i = 0; i < ours.size(); ++i)
      if (!report_.expect((kept[i] & ours[i]) == ours[i],
                          "fetch: clears bits of the caller's bitmap, which it has to OR into"))
        return false;
    for (std::size_t i = 0; i < words; ++i) plain[i] |= kept[i] & ~ours[i];
    plain.resize(words);
    bitmap = std::move(plain);
    return true;
  }

  bool rearm(std::uint32_t block, const Bitmap& bitmap) {
    for (std::uint64_t word = 0; word < bitmap.size(); ++word)
      if (bitmap[word] != 0 &&
          !good(source_.rearm(BlockId{block}, word * 64, std::span(bitmap).subspan(word, 1)), "rearm()"))
        return false;
    return true;
  }

  bool take_all(std::vector<Bitmap>& all) {
    all.resize(blocks());
    for (std::uint32_t block = 0; block < blocks(); ++block)
      if (!fetch(block, all[block]) || !rearm(block, all[block])) return false;
    return true;
  }

  Bitmap every_page(std::uint32_t block) const {
    Bitmap all(bitmap_words(pages(block)), ~std::uint64_t{0});
    if (pages(block) % 64 != 0) all.back() >>= 64 - pages(block) % 64;
    return all;
  }

  bool started(const std::string& call) {
    if (!good(source_.start(), call)) return false;
    for (std::uint32_t block = 0; block < blocks(); ++block)
      if (!rearm(block, every_page(block))) return false;
    return true;
  }

  /// Nobody writes: so there is soon nothing to report. (Reading memory may count once.)
  bool silent(const std::string& after) {
    std::vector<Bitmap> all;
    for (int round = 0; round < 3; ++round) {
      if (!take_all(all)) return false;
      std::uint64_t left = 0;
      for (const Bitmap& bitmap : all) left += count_dirty(bitmap);
      if (left == 0) return true;
    }
    return report_.expect(false, "fetch: after " + after + " reports pages for ever that nobody writes");
  }

  /// Pages of each block where an error by one, or of a word, shows.
  std::vector<Pages> corners() {
    std::vector<Pages> all;
    for (std::uint32_t block = 0; block < blocks(); ++block) {
      Pages& chosen = all.emplace_back(Pages{0, 1, 62, 63, 64, 65, 127, 128, pages(block) - 1});
      for (int i = 0; i < 5; ++i) chosen.insert(random_() % pages(block));
      std::erase_if(chosen, [&](std::uint64_t page) { return page >= pages(block); });
    }
    return all;
  }
  void write_pages(const std::vector<Pages>& chosen) {
    for (std::uint32_t block = 0; block < blocks(); ++block)
      for (const std::uint64_t page : chosen[block]) write(block, page);
  }

  /// Whether exactly the pages that were written are reported, give or take the unit in which the source watches.
  bool reported(const std::vector<Bitmap>& all, const std::vector<Pages>& written, const std::string& what) {
    const std::uint64_t unit = std::max<std::uint64_t>(1, source_.page_bytes() / ram_.page_bytes());
    std::uint64_t lost = 0, invented = 0;
    for (std::uint32_t block = 0; block < blocks(); ++block) {
      Pages units;
      for (const std::uint64_t page : written[block]) {
        lost += !has(all[block], page);
        units.insert(page / unit);
      }
      for (std::uint64_t page = 0; page < pages(block); ++page)
        invented += has(all[block], page) && !units.contains(page / unit);
    }
    report_.expect(lost == 0, "fetch: " + std::to_string(lost) + " pages lost, " + what);
    return report_.expect(invented == 0,
                          "fetch: " + std::to_string(invented) + " pages reported that nobody wrote, " + what) &&
           lost == 0;
  }

  bool reports_each_page() {
    const std::vector<Pages> written = corners();
    write_pages(written);
    std::vector<Bitmap> all;
    return take_all(all) && reported(all, written, "when several pages of each block were written") &&
           silent("pages were written,");
  }

  /// Once before the fetch, once after it, and once more after the re-arm.
  bool reports_later_writes() {
    const std::vector<Pages> written = corners();
    std::vector<Bitmap> all;
    write_pages(written);
    if (!take_all(all)) return false;
    for (int again = 0; again < 2; ++again) {
      write_pages(written);
      if (!take_all(all) || !reported(all, written, "when a page was written after the fetch that reported it"))
        return false;
    }
    // Fetched, not re-armed, written again: it has to come again.
    for (std::uint32_t block = 0; block < blocks(); ++block) {
      write(block, 0);
      if (Bitmap first; !fetch(block, first)) return false;
      write(block, 0);
      Bitmap second;
      if (!fetch(block, second) ||
          !report_.expect(has(second, 0), "fetch: a page lost that was written between fetch and re-arm"))
        return false;
    }
    return silent("pages were written twice,");
  }

  /// Re-arming a page must not clear its neighbour, which was written after the fetch and is not sent now.
  bool spares_others() {
    for (std::uint32_t block = 0; block < blocks(); ++block) {
      for (const std::uint64_t other : {std::uint64_t{1}, std::uint64_t{63}, pages(block) - 1}) {
        if (other == 0 || other >= pages(block)) continue;
        write(block, 0);
        Bitmap first, second, one(1, 1);
        if (!fetch(block, first)) return false;
        write(block, other);
        if (!good(source_.rearm(BlockId{block}, 0, one), "rearm()") || !fetch(block, second)) return false;
        if (!report_.expect(has(second, other), "rearm: clears a page whose bit is not set, and its write is lost"))
          return false;
        if (!rearm(block, second)) return false;
      }
    }
    return silent("a page was re-armed,");
  }

  /// A page is dirty when it was written, not when it differs: its other value may have been sent in between.
  bool reports_values() {
    std::vector<Bitmap> all;
    setup_.write(BlockId{0}, 0, 1);
    if (!take_all(all)) return false;
    setup_.write(BlockId{0}, 0, 2);
    setup_.write(BlockId{0}, 0, 1);
    if (!take_all(all)) return false;
    return report_.expect(has(all[0], 0),
                          "fetch: a page lost that was written back to what it was at the fetch before");
  }

  bool bad_arguments() {
    const auto refused = [&](const Result<void>& result, const char* what) {
      return report_.expect(!result.has_value() && result.error().code == Errc::bad_range,
                            std::string(what) + ", and the error is not Errc::bad_range");
    };
    const std::size_t words = bitmap_words(pages(0));
    Bitmap bitmap(words + 1);
    return refused(source_.fetch(BlockId{blocks()}, bitmap), "fetch: of a block that the map does not have") &&
           refused(source_.fetch(BlockId{0}, std::span(bitmap).first(words - 1)), "fetch: into too short a bitmap") &&
           refused(source_.rearm(BlockId{blocks()}, 0, bitmap), "rearm: of a block that the map does not have") &&
           refused(source_.rearm(BlockId{0}, 1, std::span(bitmap).first(1)), "rearm: from a page within a word") &&
           refused(source_.rearm(BlockId{0}, 0, bitmap), "rearm: of a chunk past the block") &&
           refused(source_.rearm(BlockId{0}, words * 64 + 64, {}), "rearm: from a page past the block") &&
           good(source_.rearm(BlockId{0}, 0, {}), "rearm() of nothing") && silent("bad arguments");
  }

  void off(const std::string& when) {
    Bitmap bitmap(bitmap_words(pages(0)));
    const auto closed = [](const Result<void>& result) {
      return !result.has_value() && result.error().code == Errc::already_closed;
    };
    report_.expect(closed(source_.fetch(BlockId{0}, bitmap)), "fetch:" + when + " is not Errc::already_closed");
    report_.expect(closed(source_.rearm(BlockId{0}, 0, bitmap)), "rearm:" + when + " is not Errc::already_closed");
    good(source_.stop(), "stop()" + when);
  }

  /// As a migration reads: word by word, because the guest writes meanwhile.
  void copy(std::uint32_t block, std::uint64_t page, Bitmap& to) const {
    const std::size_t words = ram_.page_bytes() / 8;
    auto* const from = reinterpret_cast<std::uint64_t*>(ram_.block(BlockId{block}).host.data());
    for (std::size_t i = page * words; i < (page + 1) * words; ++i)
      to[i] = std::atomic_ref(from[i]).load(std::memory_order_relaxed);
  }

  Bitmap copy_all(std::uint32_t block) const {
    Bitmap all(ram_.block(BlockId{block}).bytes / 8);
    for (std::uint64_t page = 0; page < pages(block); ++page) copy(block, page, all);
    return all;
  }

  /// Re-arms and copies, chunk by chunk.
  bool send(std::uint32_t block, const Bitmap& dirty, Bitmap& to) {
    for (std::uint64_t word = 0; word < dirty.size(); ++word) {
      if (dirty[word] == 0) continue;
      if (!good(source_.rearm(BlockId{block}, word * 64, std::span(dirty).subspan(word, 1)), "rearm()")) return false;
      for (std::uint64_t page = word * 64; page < std::min(word * 64 + 64, pages(block)); ++page)
        if (has(dirty, page)) copy(block, page, to);
    }
    return true;
  }

  bool send_dirty(std::vector<Bitmap>& copies) {
    for (std::uint32_t block = 0; block < blocks(); ++block) {
      Bitmap dirty(bitmap_words(pages(block)));
      if (!good(source_.fetch(BlockId{block}, dirty), "fetch()") || !send(block, dirty, copies[block])) return false;
    }
    return true;
  }

  struct Race {
    std::atomic<std::uint64_t> allowed{0}, done{0};  ///< writes
    std::atomic<bool> end{false};
  };

  /// Writes at random places, half of it to a few pages, and in each round so little that most pages stay clean: a write
  /// that is lost is not made good by the next one.
  void write_on(Race& race) {
    std::mt19937_64 random(setup_.seed + 1);
    for (std::uint64_t value = std::uint64_t{1} << 32; !race.end.load(std::memory_order_relaxed); ++value) {
      if (race.done.load(std::memory_order_relaxed) >= race.allowed.load(std::memory_order_relaxed)) {
        std::this_thread::yield();
        continue;
      }
      const auto block = static_cast<std::uint32_t>(random() % blocks());
      const std::uint64_t page =
          random() % (random() % 2 == 0 ? std::min<std::uint64_t>(8, pages(block)) : pages(block));
      setup_.write(BlockId{block}, page * ram_.page_bytes() + random() % (ram_.page_bytes() / 8) * 8, value);
      race.done.fetch_add(1, std::memory_order_release);  // meets races()
    }
  }

  /// A whole migration of memory that is being written. Now and then the writer pauses, and what was copied last has to be
  /// what is there.
  void races() {
    std::vector<Bitmap> copies;
    for (const RamBlock& block : ram_.blocks()) copies.emplace_back(block.bytes / 8);
    Race race;
    std::jthread writer([&] { write_on(race); });
    race.allowed.store(100, std::memory_order_relaxed);
    bool whole = good(source_.start(), "start() of a source that is on");
    for (std::uint32_t block = 0; whole && block < blocks(); ++block)
      whole = send(block, every_page(block), copies[block]);
    for (std::size_t round = 0; whole && round < setup_.rounds; ++round) {
      const std::uint64_t goal = race.allowed.load(std::memory_order_relaxed) + 10 + random_() % 200;
      race.allowed.store(goal, std::memory_order_relaxed);
      whole = send_dirty(copies);
      while (race.done.load(std::memory_order_acquire) < goal) std::this_thread::yield();  // meets write_on()
      if (!whole || round % 4 != 3) continue;
      whole = send_dirty(copies);
      for (std::uint32_t block = 0; whole && block < blocks(); ++block)
        whole = report_.expect(copy_all(block) == copies[block],
                               "race: of a memory that was written all the time, what was read last is not what was "
                               "written last");
    }
    race.end.store(true, std::memory_order_relaxed);
  }

  void write_all() {
    for (std::uint32_t block = 0; block < blocks(); ++block)
      for (std::uint64_t page = 0; page < pages(block); ++page) write(block, page);
  }

  void stops() {
    if (!good(source_.stop(), "stop()")) return;
    off(" after stop()");
    if (!setup_.faults) return report_.note("stop: not checked whether writes cost nothing, there is no faults()");
    write_all();  // the first write may still find what stop() left behind
    std::uint64_t taken = 1;
    for (int tries = 0; taken != 0 && tries < 3; ++tries) {  // now and then the system has reasons of its own
      const std::uint64_t before = setup_.faults();
      write_all();
      taken = setup_.faults() - before;
    }
    report_.expect(taken == 0, "stop: " + std::to_string(taken) + " writes still cost something");
  }

  S& source_;
  const DirtySourceContractSetup& setup_;
  const RamMap& ram_;
  std::mt19937_64 random_;
  std::uint64_t value_ = 1000;
  ContractReport report_;
};

}  // namespace testing::detail

/// Checks that a source reports every page that is written, in the right block and at the right place, also when it is
/// written again after a fetch or a re-arm; that re-arming a page spares all others; that nothing is lost when writes race
/// with fetch and re-arm; that pages fall silent; that wrong arguments are refused; and that nothing costs anything after
/// stop(). Leaves the source off.
///
/// Threads: makes one for the race and joins it. Cost: the memory once more; some thousand writes.
template <class S>
[[nodiscard]] ContractReport check_dirty_source_contract(S& source, const DirtySourceContractSetup& setup) {
  static_assert(migrate::check_dirty_source<S>());
  return testing::detail::DirtySourceCheck<S>(source, setup).run();
}

}  // namespace multifd
