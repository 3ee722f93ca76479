// SPDX-License-Identifier: MIT
//
// A link that swallows everything at once, so that nothing but the library is measured.
#pragma once

#include <cstddef>

#include "multifd/buffers.hpp"
#include "multifd/transport/policy.hpp"

struct NullTransport {
  multifd::Result<std::size_t> write_some(multifd::ConstBuffers buffers) noexcept {
    return multifd::total_bytes(buffers);
  }
  multifd::Result<std::size_t> read_some(multifd::MutableBuffers) noexcept { return std::size_t{0}; }
  multifd::Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}
};
static_assert(multifd::check_transport<NullTransport>());
