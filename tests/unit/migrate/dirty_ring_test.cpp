// SPDX-License-Identifier: MIT
//
// One ring in memory, with a thread in KVM's place.
#include "multifd/migrate/dirty/detail/dirty_ring.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <thread>
#include <vector>

#include "support/basics.hpp"

using multifd::migrate::detail::DirtyRing;

namespace {

constexpr std::uint32_t dirty = KVM_DIRTY_GFN_F_DIRTY, reset = KVM_DIRTY_GFN_F_RESET;

/// KVM's side of a ring.
class FakeKvm {
 public:
  explicit FakeKvm(std::vector<kvm_dirty_gfn>& entries) : entries_(entries) {}

  /// Whether there was room.
  bool push(std::uint32_t slot, std::uint64_t page) {
    kvm_dirty_gfn& entry = entries_[pushed_ % entries_.size()];
    if (__atomic_load_n(&entry.flags, __ATOMIC_ACQUIRE) != 0) return false;
    entry.slot = slot;
    entry.offset = page;
    __atomic_store_n(&entry.flags, dirty, __ATOMIC_RELEASE);
    ++pushed_;
    return true;
  }
  /// KVM_RESET_DIRTY_RINGS. Returns how many entries came back.
  std::uint64_t take_back() {
    std::uint64_t count = 0;
    for (; taken_ < pushed_; ++taken_, ++count) {
      kvm_dirty_gfn& entry = entries_[taken_ % entries_.size()];
      if ((__atomic_load_n(&entry.flags, __ATOMIC_ACQUIRE) & reset) == 0) break;
      __atomic_store_n(&entry.flags, 0u, __ATOMIC_RELEASE);
    }
    return count;
  }

 private:
  std::vector<kvm_dirty_gfn>& entries_;
  std::uint64_t pushed_ = 0, taken_ = 0;
};

}  // namespace

TEST_CASE("A ring is harvested in order, once, and not beyond what KVM has taken back") {
  std::vector<kvm_dirty_gfn> entries(8);
  FakeKvm kvm(entries);
  DirtyRing ring(entries);
  std::vector<std::uint64_t> got;
  const auto take = [&](std::uint32_t slot, std::uint64_t page) { got.push_back(slot * 1000 + page); };
  CHECK(ring.harvest(take) == 0);
  for (std::uint64_t page = 0; page < 8; ++page) CHECK(kvm.push(3, page));
  CHECK(!kvm.push(3, 8));
  CHECK(ring.harvest(take) == 8);
  CHECK(ring.harvest(take) == 0);  // the entries are on their way back, and not to be read again
  CHECK(got == std::vector<std::uint64_t>{3000, 3001, 3002, 3003, 3004, 3005, 3006, 3007});
  CHECK(!kvm.push(3, 8));
  CHECK(kvm.take_back() == 8);
  got.clear();
  CHECK(kvm.push(65539, 8));
  CHECK(ring.harvest(take) == 1);
  CHECK(got == std::vector<std::uint64_t>{65539008});
}

TEST_CASE("Every page that KVM pushes while the ring is harvested is found, in order") {
  constexpr std::uint64_t pages = 200'000;
  std::vector<kvm_dirty_gfn> entries(64);
  DirtyRing ring(entries);
  std::jthread vcpu([&] {
    FakeKvm kvm(entries);
    for (std::uint64_t page = 0; page < pages;) {
      if (kvm.push(static_cast<std::uint32_t>(page % 7), page))
        ++page;
      else if (kvm.take_back() == 0)
        std::this_thread::yield();
    }
  });
  std::uint64_t next = 0, wrong = 0;
  const test::Stopwatch watch;
  while (next < pages && watch.elapsed() < test::no_hang) {
    const std::uint64_t count = ring.harvest([&](std::uint32_t slot, std::uint64_t page) {
      wrong += page != next || slot != page % 7;
      ++next;
    });
    if (count == 0) std::this_thread::yield();
  }
  CHECK(next == pages);
  CHECK(wrong == 0);
}
