// SPDX-License-Identifier: MIT
#include "fault/tally.hpp"

#include <cstdio>

namespace {

struct Tally {
  std::atomic<std::uint64_t> faults{0};
  ~Tally() {
    std::printf("faults injected: %llu\n", static_cast<unsigned long long>(faults.load()));
    std::fflush(stdout);
  }
};

}  // namespace

std::atomic<std::uint64_t>& test::faults_injected() noexcept {
  static Tally tally;
  return tally.faults;
}
