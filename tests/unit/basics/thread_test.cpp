// SPDX-License-Identifier: MIT
#include "multifd/thread.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <string>
#include <vector>

using multifd::Thread;
using multifd::ThreadHook;
using multifd::ThreadInfo;

namespace {

/// What a thread saw of itself.
struct Witness {
  std::atomic<bool> ran{false};
  std::string name;
  sigset_t mask{};
  bool hook_came_first = false;
  bool hooked = false;

  void run() noexcept {
    char buffer[16] = "";
    pthread_getname_np(pthread_self(), buffer, sizeof buffer);
    name = buffer;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    hook_came_first = hooked;
    ran = true;
  }
};

}  // namespace

TEST_CASE("A thread runs the object's run(), with a name of role and channel") {
  const ThreadHook no_hook;
  Witness witness;
  multifd::Result<Thread> thread = Thread::start(witness, no_hook, {.role = "send", .channel = 3});
  REQUIRE(thread);
  thread->join();
  CHECK(witness.ran);
  CHECK(witness.name == "mfd-send-3");
  thread->join();  // a second one is no error
}

TEST_CASE("The longest name still fits what the kernel takes") {
  const ThreadHook no_hook;
  Witness witness;
  multifd::Result<Thread> thread = Thread::start(witness, no_hook, {.role = "receive", .channel = 4294967295});
  REQUIRE(thread);
  thread->join();
  CHECK(witness.name == "mfd-rece-295");
}

TEST_CASE("A new thread blocks every signal but its own faults, and the caller's own mask stays as it was") {
  sigset_t before;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  REQUIRE_FALSE(sigismember(&before, SIGUSR1));
  const ThreadHook no_hook;
  Witness witness;
  multifd::Result<Thread> thread = Thread::start(witness, no_hook, {.role = "recv", .channel = 0});
  REQUIRE(thread);
  thread->join();
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGPIPE, SIGALRM}) {
    CAPTURE(signal);
    CHECK(sigismember(&witness.mask, signal) == 1);
  }
  for (const int signal : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) {
    CAPTURE(signal);
    CHECK(sigismember(&witness.mask, signal) == 0);
  }
  sigset_t after;
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGPIPE, SIGALRM})
    CHECK(sigismember(&after, signal) == sigismember(&before, signal));
}

TEST_CASE("The hook runs in the new thread, before run(), and learns role and channel") {
  Witness witness;
  std::string role;
  std::uint32_t channel = 0;
  pthread_t hook_thread{};
  const ThreadHook hook = [&](const ThreadInfo& info) {
    role = info.role;
    channel = info.channel;
    hook_thread = pthread_self();
    witness.hooked = true;
  };
  multifd::Result<Thread> thread = Thread::start(witness, hook, {.role = "send", .channel = 7});
  REQUIRE(thread);
  thread->join();
  CHECK(witness.hook_came_first);
  CHECK(role == "send");
  CHECK(channel == 7);
  CHECK_FALSE(pthread_equal(hook_thread, pthread_self()));
}

TEST_CASE("Threads can be kept in a vector, which joins them when it goes") {
  const ThreadHook no_hook;
  std::vector<Witness> witnesses(8);
  {
    std::vector<Thread> threads;
    for (std::uint32_t i = 0; i < witnesses.size(); ++i) {
      multifd::Result<Thread> thread = Thread::start(witnesses[i], no_hook, {.role = "send", .channel = i});
      REQUIRE(thread);
      threads.push_back(std::move(*thread));
    }
  }
  for (const Witness& witness : witnesses) CHECK(witness.ran);
}

TEST_CASE("Assigning over a running thread joins it first") {
  const ThreadHook no_hook;
  Witness first;
  Witness second;
  multifd::Result<Thread> thread = Thread::start(first, no_hook, {.role = "send", .channel = 0});
  multifd::Result<Thread> other = Thread::start(second, no_hook, {.role = "send", .channel = 1});
  REQUIRE(thread);
  REQUIRE(other);
  *thread = std::move(*other);
  CHECK(first.ran);
  thread->join();
  CHECK(second.ran);
}

TEST_CASE("thread_cpu_ns() grows with the work of this thread") {
  const std::uint64_t before = multifd::thread_cpu_ns();
  volatile unsigned work = 0;
  for (unsigned i = 0; i < 2'000'000; ++i) work = work + i;
  CHECK(multifd::thread_cpu_ns() > before);
}
