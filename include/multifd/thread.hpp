// SPDX-License-Identifier: MIT
//
// Worker threads: created without exceptions, named, with every signal blocked (signals belong to the program) but
// those of a thread's own faults, and with a hook of the caller's that runs in each of them before its first packet.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <cstdint>
#include <cstdio>
#include <ctime>
#include <functional>
#include <new>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// A joinable thread. The destructor joins, so the owner must have told the thread to end before.
/// Threads: one at a time, the owner's.
class Thread {
 public:
  Thread() = default;
  Thread(Thread&& other) noexcept : handle_(other.handle_), joinable_(std::exchange(other.joinable_, false)) {}
  Thread& operator=(Thread&& other) noexcept {
    join();
    handle_ = other.handle_;
    joinable_ = std::exchange(other.joinable_, false);
    return *this;
  }
  ~Thread() { join(); }

  /// Starts `object.run()` in a new thread named mfd-ROLE-CHANNEL, after `hook`.
  ///
  /// Params: `object`, `hook`: must live until the thread is joined.
  /// Errors: ENOMEM; errno of pthread_create().
  template <class Object>
  [[nodiscard]] static Result<Thread> start(Object& object, const ThreadHook& hook, ThreadInfo info) noexcept {
    struct Start {
      Object* object;
      const ThreadHook* hook;
      ThreadInfo info;
    };
    auto* start = new (std::nothrow) Start{&object, &hook, info};
    if (start == nullptr) return fail_errno(Stage::setup, "start thread", ENOMEM);
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    // A blocked fault ends the process even if the program handles it: SIGBUS of a mapped file that became shorter,
    // say.
    for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    Thread thread;
    const int error = pthread_create(
        &thread.handle_, nullptr,
        [](void* argument) -> void* {
          auto* mine = static_cast<Start*>(argument);
          const Start copy = *mine;
          delete mine;
          char name[16];
          std::snprintf(name, sizeof name, "mfd-%.4s-%u", copy.info.role, copy.info.channel % 1000);
          pthread_setname_np(pthread_self(), name);
          if (*copy.hook) (*copy.hook)(copy.info);
          copy.object->run();
          return nullptr;
        },
        start);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error != 0) {
      delete start;
      return fail_errno(Stage::setup, "start thread", error);
    }
    thread.joinable_ = true;
    return thread;
  }

  void join() noexcept {
    if (std::exchange(joinable_, false)) pthread_join(handle_, nullptr);
  }

 private:
  pthread_t handle_{};
  bool joinable_ = false;
};

/// CPU time of the calling thread in nanoseconds.
inline std::uint64_t thread_cpu_ns() noexcept {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace multifd
