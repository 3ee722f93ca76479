// SPDX-License-Identifier: MIT
#include <multifd/testing/memory_transport.hpp>

#include "soak/run.hpp"

namespace soak {

Outcome run_memory(const Plan& plan, Arena& arena) {
  Ends<testing::MemoryTransport> ends;
  for (unsigned i = 0; i < plan.channels; ++i) {
    auto [near, far] = testing::memory_transport_pair(64 * 1024);
    ends.sender.push_back(std::move(near));
    ends.receiver.push_back(std::move(far));
  }
  return run_stack(plan, arena, std::move(ends));
}

}  // namespace soak
