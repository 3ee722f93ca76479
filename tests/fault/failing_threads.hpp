// SPDX-License-Identifier: MIT
//
// Threads that cannot be had, on demand.
#pragma once

#include <cstdint>

namespace test {

/// Lets a pthread_create() of the calling thread fail with EAGAIN while it lives: the one that comes after `good` others.
class FailThread {
 public:
  explicit FailThread(std::uint64_t good) noexcept;
  FailThread(const FailThread&) = delete;
  FailThread& operator=(const FailThread&) = delete;
  ~FailThread();
  /// Whether it has failed.
  bool happened() const noexcept;
};

}  // namespace test
