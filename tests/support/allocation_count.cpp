// SPDX-License-Identifier: MIT
#include "support/allocation_count.hpp"

#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <limits>

namespace {

std::atomic<std::uint64_t> count{0};
std::atomic<std::uint64_t> count_watched{0};
thread_local std::uint64_t count_here = 0;
thread_local bool watched = false;
std::atomic<std::int64_t> live{0};
std::atomic<std::int64_t> peak{0};

constexpr std::uint64_t none_fails = std::numeric_limits<std::uint64_t>::max();
thread_local std::uint64_t good_left = none_fails;  ///< allocations until one fails
thread_local bool stays_short = false;
thread_local bool failed = false;

void count_one() noexcept {
  count.fetch_add(1, std::memory_order_relaxed);
  ++count_here;
  if (watched) count_watched.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

namespace test {

std::uint64_t allocations() noexcept { return count.load(std::memory_order_relaxed); }
std::uint64_t allocations_of_this_thread() noexcept { return count_here; }
std::uint64_t allocations_of_watched_threads() noexcept { return count_watched.load(std::memory_order_relaxed); }
void watch_this_thread(bool on) noexcept { watched = on; }

std::int64_t live_bytes() noexcept { return live.load(std::memory_order_relaxed); }
std::int64_t peak_bytes() noexcept { return peak.load(std::memory_order_relaxed); }
void restart_peak() noexcept { peak.store(live_bytes(), std::memory_order_relaxed); }

FailAllocation::FailAllocation(std::uint64_t good, Shortage shortage) noexcept {
  failed = false;
  stays_short = shortage == Shortage::from_then_on;
  good_left = good;
}
FailAllocation::~FailAllocation() { good_left = none_fails; }
bool FailAllocation::happened() const noexcept { return failed; }

bool allocation_fails() noexcept {
  if (good_left == none_fails) return false;
  if (good_left > 0) {
    --good_left;
    return false;
  }
  failed = true;
  if (!stays_short) good_left = none_fails;
  return true;
}

}  // namespace test

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define COUNT_BY_SANITIZER 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNT_BY_SANITIZER 1
#endif

#if defined(COUNT_BY_SANITIZER)

// A sanitizer has put itself in the place of malloc and operator new already (Clang's cannot be replaced at
// all), and offers a hook.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, std::size_t),
                                                         void (*on_free)(const volatile void*));

namespace {
[[maybe_unused]] const int installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, std::size_t) { count_one(); }, [](const volatile void*) {});
}  // namespace

#else

// The executable's malloc goes before glibc's; what is not replaced here works on the same heap.
extern "C" {
void* __libc_malloc(std::size_t) noexcept;
void* __libc_calloc(std::size_t, std::size_t) noexcept;
void* __libc_realloc(void*, std::size_t) noexcept;
void* __libc_memalign(std::size_t, std::size_t) noexcept;
void __libc_free(void*) noexcept;
}

namespace {

template <class Get>
void* get(Get&& get) noexcept {
  count_one();
  if (test::allocation_fails()) {
    errno = ENOMEM;
    return nullptr;
  }
  void* const memory = get();
  if (memory == nullptr) return nullptr;
  const auto bytes = static_cast<std::int64_t>(malloc_usable_size(memory));
  const std::int64_t now = live.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  for (std::int64_t most = peak.load(std::memory_order_relaxed);
       now > most && !peak.compare_exchange_weak(most, now, std::memory_order_relaxed);) {
  }
  return memory;
}

void forget(void* memory) noexcept {
  if (memory == nullptr) return;
  live.fetch_sub(static_cast<std::int64_t>(malloc_usable_size(memory)), std::memory_order_relaxed);
}

}  // namespace

extern "C" {
void* malloc(std::size_t size) noexcept {
  return get([&] { return __libc_malloc(size); });
}
void* calloc(std::size_t items, std::size_t size) noexcept {
  return get([&] { return __libc_calloc(items, size); });
}
void* realloc(void* memory, std::size_t size) noexcept {
  if (memory == nullptr) return malloc(size);
  return get([&] {
    const auto before = static_cast<std::int64_t>(malloc_usable_size(memory));
    void* const grown = __libc_realloc(memory, size);
    if (grown != nullptr || size == 0) live.fetch_sub(before, std::memory_order_relaxed);
    return grown;
  });
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  return get([&] { return __libc_memalign(alignment, size); });
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  return get([&] { return __libc_memalign(alignment, size); });
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) noexcept {
  *memory = get([&] { return __libc_memalign(alignment, size); });
  return *memory != nullptr ? 0 : ENOMEM;
}
void free(void* memory) noexcept {
  forget(memory);
  __libc_free(memory);
}
}

#endif
