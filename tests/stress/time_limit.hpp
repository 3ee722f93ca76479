// SPDX-License-Identifier: MIT
//
// A test that hangs cannot be joined, so it must end the program: with a line that says which limit it broke.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

/// Ends the program unless it is destroyed within the limit.
class TimeLimit {
 public:
  TimeLimit(const char* what, std::chrono::seconds limit)
      : thread_([this, what, limit] {
          std::unique_lock lock(mutex_);
          if (changed_.wait_for(lock, limit, [this] { return over_; })) return;
          std::fprintf(stderr, "TIME LIMIT: %s did not end within %lld s\n", what,
                       static_cast<long long>(limit.count()));
          std::_Exit(1);
        }) {}

  TimeLimit(const TimeLimit&) = delete;
  TimeLimit& operator=(const TimeLimit&) = delete;

  ~TimeLimit() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  std::thread thread_;
};
