// SPDX-License-Identifier: MIT
//
// What the system tests share: the seed of a run, how long is too long, and waiting for a condition.
#pragma once

#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ostream>  // doctest prints std::string with it
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "multifd/engine/monitor.hpp"
#include "multifd/error_value.hpp"
#include "multifd/result.hpp"

namespace test {

using namespace std::chrono_literals;
using Rng = std::mt19937_64;

#if defined(__SANITIZE_THREAD__)
inline constexpr bool under_tsan = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
inline constexpr bool under_tsan = true;
#else
inline constexpr bool under_tsan = false;
#endif
#else
inline constexpr bool under_tsan = false;
#endif

/// Whether to take every nth case only: ThreadSanitizer checks threads, not data, and is slow.
/// MULTIFD_TEST_QUICK=1 or 0 decides otherwise.
inline bool quick() {
  const char* wanted = std::getenv("MULTIFD_TEST_QUICK");
  return wanted != nullptr ? *wanted == '1' : under_tsan;
}

/// Whether to take every case: the long run, for a night or a release.
inline bool full() {
  const char* wanted = std::getenv("MULTIFD_TEST_FULL");
  return wanted != nullptr && *wanted == '1';
}

/// The seed of this run: always the same, or MULTIFD_TEST_SEED. Tests print it when they fail.
inline std::uint64_t seed() {
  const char* wanted = std::getenv("MULTIFD_TEST_SEED");
  return wanted != nullptr ? std::strtoull(wanted, nullptr, 0) : 20260101;
}

/// How often a test does what the night does more often: what the variable says, or `usually`.
inline unsigned how_often(const char* variable, unsigned usually) {
  const char* const said = std::getenv(variable);
  return said != nullptr ? static_cast<unsigned>(std::strtoul(said, nullptr, 0)) : usually;
}

/// A number below `end`.
inline std::size_t below(Rng& rng, std::size_t end) { return static_cast<std::size_t>(rng() % end); }

/// Within which something that does not hang has ended, also on a machine that is busy with other things. No measure.
inline constexpr std::chrono::milliseconds no_hang{20'000};

class Stopwatch {
 public:
  std::chrono::milliseconds elapsed() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start_);
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Ends the program with a message if it is not destroyed in time: a hang names its test.
class Watchdog {
 public:
  explicit Watchdog(std::string what, std::chrono::seconds limit = 60s)
      : thread_([this, what = std::move(what), limit] {
          multifd::engine::Monitor::Lock held = over_.lock();
          if (over_.wait_until(held, std::chrono::steady_clock::now() + limit, [] { return false; })) return;
          std::fprintf(stderr, "HANG: %s did not end in %lld s\n", what.c_str(), static_cast<long long>(limit.count()));
          std::abort();
        }) {}
  ~Watchdog() {
    over_.stop();
    thread_.join();
  }

 private:
  multifd::engine::Monitor over_;
  std::thread thread_;
};

/// Waits for a condition that has no way to call; false after 20 seconds.
template <class Condition>
bool eventually(Condition&& holds) {
  for (const Stopwatch watch; watch.elapsed() < 20s; std::this_thread::sleep_for(200us))
    if (holds()) return true;
  return holds();
}

inline std::string text(const multifd::Error& error) { return multifd::describe(error); }
template <class T>
std::string text(const multifd::Result<T>& result) {
  return result ? "ok" : multifd::describe(result.error());
}

/// The code of a failure; Errc 0 does not exist, so success never equals one.
template <class T>
std::error_code code_of(const multifd::Result<T>& result) {
  return result ? std::error_code{} : result.error().code;
}

}  // namespace test
