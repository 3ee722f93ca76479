// SPDX-License-Identifier: MIT
#include "fault/failing_threads.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <cerrno>
#include <limits>

namespace {

constexpr std::uint64_t none_fails = std::numeric_limits<std::uint64_t>::max();
thread_local std::uint64_t good_left = none_fails;
thread_local bool failed = false;

}  // namespace

namespace test {

FailThread::FailThread(std::uint64_t good) noexcept {
  failed = false;
  good_left = good;
}
FailThread::~FailThread() { good_left = none_fails; }
bool FailThread::happened() const noexcept { return failed; }

}  // namespace test

using Create = int(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

extern "C" {
// A sanitizer's, where there is one.
[[gnu::weak]] Create __interceptor_pthread_create;

// The executable's goes before the C library's.
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
  if (good_left != none_fails && good_left-- == 0) {
    good_left = none_fails;
    failed = true;
    return EAGAIN;
  }
  static Create* const next = __interceptor_pthread_create != nullptr
                                  ? __interceptor_pthread_create
                                  : reinterpret_cast<Create*>(dlsym(RTLD_NEXT, "pthread_create"));
  return next(thread, attributes, body, argument);
}
}
