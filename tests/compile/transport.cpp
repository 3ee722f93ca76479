// SPDX-License-Identifier: MIT
// WITHOUT_WRITE_SOME: Transport: needs  Result<std::size_t> write_some(ConstBuffers) noexcept
// WITHOUT_READ_SOME: Transport: needs  Result<std::size_t> read_some(MutableBuffers) noexcept
// WITHOUT_FINISH: Transport: needs  Result<void> finish() noexcept
// WITHOUT_SHUTDOWN: Transport: needs  void shutdown() noexcept
// WITH_THROWING_SHUTDOWN: Transport: needs  void shutdown() noexcept
#include "multifd/transport/policy.hpp"

struct Pipe {
#ifndef WITHOUT_WRITE_SOME
  multifd::Result<std::size_t> write_some(multifd::ConstBuffers) noexcept { return 0; }
#endif
#ifndef WITHOUT_READ_SOME
  multifd::Result<std::size_t> read_some(multifd::MutableBuffers) noexcept { return 0; }
#endif
#ifndef WITHOUT_FINISH
  multifd::Result<void> finish() noexcept { return {}; }
#endif
#if defined(WITH_THROWING_SHUTDOWN)
  void shutdown() {}  // the library calls it where nothing may be thrown
#elif !defined(WITHOUT_SHUTDOWN)
  void shutdown() noexcept {}
#endif
};
static_assert(multifd::check_transport<Pipe>());
