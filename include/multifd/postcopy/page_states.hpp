// SPDX-License-Identifier: MIT
//
// What is known of each page of a guest that runs already, and who deals with it: the one place where threads that fetch
// the same page meet. tests/model/ runs it in every order of its steps.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "multifd/result.hpp"

namespace multifd::postcopy {

/// Of one unit (LazyRegion::unit_bytes).
///
///   absent <-> claimed --+--> zero --> placing --> placed
///      |          |      |     ^                      |
///      +----------+------+---> placing    (removed)   |
///                              ^----------------------+ (zero)
enum class PageState : std::uint8_t {
  absent,   ///< nobody has asked for it
  claimed,  ///< somebody has, so that nobody else does without need; who has its bytes may place them all the same
  zero,     ///< known to be zero, and not in memory
  placing,  ///< one thread puts it into memory, and nobody else
  placed,   ///< in memory
};

/// The states of all units, four bits each, and how many are absent or claimed.
///
/// A unit that a fault waits for can be marked as wanted while it is absent or claimed: who finds out what is in it learns
/// that from the call, and places it also where it is zero.
///
/// Threads: any, all methods but mark_missing(). Lock-free.
/// Params: a unit is below size() (contract).
class PageStates {
 public:
  /// All are placed. Errors: ENOMEM. Cost: half a byte for each.
  [[nodiscard]] static Result<PageStates> create(std::uint64_t units) {
    return catch_bad_alloc(Stage::setup, "allocate page states", [&]() -> Result<PageStates> {
      PageStates states;
      states.units_ = units;
      const std::uint64_t words = (units + per_word - 1) / per_word;
      states.words_ = std::make_unique<Word[]>(words);
      // Relaxed here and in mark_missing(): before there are threads.
      for (std::uint64_t i = 0; i < words; ++i) states.words_[i].store(all_placed, std::memory_order_relaxed);
      states.remaining_ = std::make_unique<Word>(0);
      return states;
    });
  }

  /// Makes a placed unit absent. Before there are threads.
  void mark_missing(std::uint64_t unit) noexcept {
    if (state(unit) != PageState::placed) return;
    change(unit, [](unsigned) { return static_cast<unsigned>(PageState::absent); });
    remaining_->fetch_add(1, std::memory_order_relaxed);
  }

  std::uint64_t size() const noexcept { return units_; }
  /// Units that are absent or claimed, or are being placed from there.
  std::uint64_t remaining() const noexcept { return remaining_->load(std::memory_order_relaxed); }
  PageState state(std::uint64_t unit) const noexcept { return state_of(nibble(unit)); }
  bool wanted(std::uint64_t unit) const noexcept { return (nibble(unit) & wanted_bit) != 0; }

  /// The first unit at or behind `from` that is absent, below `end`; `end`: there is none.
  std::uint64_t next_absent(std::uint64_t from, std::uint64_t end) const noexcept {
    return next(from, end, [](std::uint64_t word) { return ~(word | word >> 1 | word >> 2); });
  }
  /// The same for units that are wanted.
  std::uint64_t next_wanted(std::uint64_t from, std::uint64_t end) const noexcept {
    return next(from, end, [](std::uint64_t word) { return word >> 3; });
  }

  /// From absent to claimed. False: it was not absent.
  bool claim(std::uint64_t unit) noexcept {
    return change(unit,
                  [](unsigned was) {
                    return state_of(was) == PageState::absent ? with_state(was, PageState::claimed) : was;
                  })
        .first;
  }

  /// From claimed to absent, by who has claimed it. Returns whether a fault waits for it.
  bool give_back(std::uint64_t unit) noexcept {
    const auto [changed, was] = change(unit, [](unsigned now) {
      return state_of(now) == PageState::claimed ? with_state(now, PageState::absent) : now;
    });
    return changed && (was & wanted_bit) != 0;
  }

  /// Marks as wanted what is absent, claimed or being placed. Returns its state; of a unit that is zero or placed the
  /// caller has to take care.
  PageState want(std::uint64_t unit) noexcept {
    const auto mark = [](unsigned was) {
      return unknown(was) || state_of(was) == PageState::placing ? was | wanted_bit : was;
    };
    return state_of(change(unit, mark).second);
  }

  /// Where a unit was when its placing began.
  enum class From : std::uint8_t {
    nowhere,  ///< another thread places it, or has: nothing to do
    unknown,  ///< absent or claimed
    zero,     ///< known to be zero: it must be placed as zeros, whatever the caller has
  };
  /// To placing, from unknown only, or from zero as well. Whoever gets one of these two has to call end_place(), or
  /// undo_place() and then to begin again until it is placed or somebody else's: a fault that comes meanwhile relies on it.
  From begin_place(std::uint64_t unit, From most = From::zero) noexcept {
    const auto [changed, was] = change(unit, [most](unsigned now) {
      const bool may = unknown(now) || (most == From::zero && state_of(now) == PageState::zero);
      return may ? with_state(now, PageState::placing) : now;
    });
    if (!changed) return From::nowhere;
    return state_of(was) == PageState::zero ? From::zero : From::unknown;
  }
  /// From placing to placed; what was in memory before is seen by who finds it placed. Returns whether all is known now:
  /// true once.
  bool end_place(std::uint64_t unit, From from) noexcept {
    change(unit, [](unsigned) { return static_cast<unsigned>(PageState::placed); });
    return from == From::unknown && one_less();
  }
  /// From placing to where it was, or to claimed.
  void undo_place(std::uint64_t unit, From from) noexcept {
    const PageState to = from == From::zero ? PageState::zero : PageState::claimed;
    change(unit, [to](unsigned was) { return with_state(was, to); });
  }

  /// What note_zero() and remove() came to.
  struct Noted {
    bool changed = false;    ///< it was not zero before
    bool wanted = false;     ///< a fault waits: place it
    bool all_known = false;  ///< as end_place()
  };
  /// From absent or claimed to zero.
  Noted note_zero(std::uint64_t unit) noexcept {
    const auto [changed, was] =
        change(unit, [](unsigned now) { return unknown(now) ? static_cast<unsigned>(PageState::zero) : now; });
    return {.changed = changed, .wanted = changed && (was & wanted_bit) != 0, .all_known = changed && one_less()};
  }
  /// From wherever it is to zero: the guest has given it back. Not while it is being placed (PlacementGate).
  Noted remove(std::uint64_t unit) noexcept {
    const auto [changed, was] = change(unit, [](unsigned now) {
      return state_of(now) == PageState::placing ? now : static_cast<unsigned>(PageState::zero);
    });
    return {.changed = changed,
            .wanted = changed && (was & wanted_bit) != 0,
            .all_known = changed && unknown(was) && one_less()};
  }

 private:
  using Word = std::atomic<std::uint64_t>;
  static constexpr unsigned per_word = 16;
  static constexpr unsigned wanted_bit = 8;
  static constexpr std::uint64_t lowest_bits = 0x1111'1111'1111'1111;
  static constexpr std::uint64_t all_placed = lowest_bits * static_cast<unsigned>(PageState::placed);

  PageStates() = default;

  static constexpr PageState state_of(unsigned nibble) noexcept { return static_cast<PageState>(nibble & 7); }
  static constexpr unsigned with_state(unsigned nibble, PageState state) noexcept {
    return (nibble & wanted_bit) | static_cast<unsigned>(state);
  }
  static constexpr bool unknown(unsigned nibble) noexcept {
    return state_of(nibble) == PageState::absent || state_of(nibble) == PageState::claimed;
  }

  unsigned nibble(std::uint64_t unit) const noexcept {
    return words_[unit / per_word].load(std::memory_order_acquire) >> (unit % per_word * 4) & 15;  // meets change()
  }

  /// Replaces a unit's four bits by `to(bits)`. Returns whether they were others before, and what they were.
  template <class To>
  std::pair<bool, unsigned> change(std::uint64_t unit, To&& to) noexcept {
    Word& word = words_[unit / per_word];
    const auto shift = static_cast<unsigned>(unit % per_word) * 4;
    std::uint64_t was = word.load(std::memory_order_acquire);  // meets change()
    for (;;) {
      const auto before = static_cast<unsigned>(was >> shift & 15);
      const unsigned after = to(before);
      if (after == before) return {false, before};
      const std::uint64_t now = (was & ~(std::uint64_t{15} << shift)) | std::uint64_t{after} << shift;
      // Release: who finds a page placed finds in memory what was written there before; meets change() and nibble().
      if (word.compare_exchange_weak(was, now, std::memory_order_acq_rel, std::memory_order_acquire))
        return {true, before};
    }
  }

  /// `hits(word)` has the lowest of a unit's four bits set where the unit is one of those.
  template <class Hits>
  std::uint64_t next(std::uint64_t from, std::uint64_t end, Hits&& hits) const noexcept {
    while (from < end) {
      const unsigned skipped = static_cast<unsigned>(from % per_word) * 4;
      // Relaxed: a hint; claim() and want() decide.
      const std::uint64_t found =
          (hits(words_[from / per_word].load(std::memory_order_relaxed)) & lowest_bits) >> skipped << skipped;
      const std::uint64_t word_begin = from / per_word * per_word;
      if (found != 0) return std::min(end, word_begin + static_cast<unsigned>(std::countr_zero(found)) / 4);
      from = word_begin + per_word;
    }
    return end;
  }

  bool one_less() noexcept { return remaining_->fetch_sub(1, std::memory_order_acq_rel) == 1; }  // meets one_less()

  std::uint64_t units_ = 0;
  std::unique_ptr<Word[]> words_;
  std::unique_ptr<Word> remaining_;
};

}  // namespace multifd::postcopy
