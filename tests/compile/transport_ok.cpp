// SPDX-License-Identifier: MIT
#include "multifd/transport/policy.hpp"

struct Pipe {
  multifd::Result<std::size_t> write_some(multifd::ConstBuffers) noexcept { return 0; }
  multifd::Result<std::size_t> read_some(multifd::MutableBuffers) noexcept { return 0; }
  multifd::Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}
};
static_assert(multifd::check_transport<Pipe>());
