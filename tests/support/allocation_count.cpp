// SPDX-License-Identifier: MIT
#include "support/allocation_count.hpp"

#include <atomic>
#include <cstddef>

namespace {

std::atomic<std::uint64_t> count{0};
std::atomic<std::uint64_t> count_watched{0};
thread_local std::uint64_t count_here = 0;
thread_local bool watched = false;

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

void* malloc(std::size_t size) noexcept {
  count_one();
  return __libc_malloc(size);
}
void* calloc(std::size_t items, std::size_t size) noexcept {
  count_one();
  return __libc_calloc(items, size);
}
void* realloc(void* memory, std::size_t size) noexcept {
  count_one();
  return __libc_realloc(memory, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  count_one();
  return __libc_memalign(alignment, size);
}
}

#endif
