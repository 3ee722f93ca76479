// SPDX-License-Identifier: MIT
// WITHOUT_BEGIN: Outlet: needs  Result<Sent> begin() noexcept
// WITHOUT_SEND: Outlet: needs  Result<Sent> send(const PageList&, Meter&) noexcept
// WITHOUT_PUSH_OUT: Outlet: needs  Result<void> push_out(Meter&) noexcept
// WITHOUT_CLOSE_EPOCH: Outlet: needs  Result<Sent> close_epoch(std::uint64_t epoch, Meter&) noexcept
// WITHOUT_END: Outlet: needs  Result<void> end() noexcept
// WITHOUT_SHUTDOWN: Outlet: needs  void shutdown() noexcept
#include "multifd/engine/outlet.hpp"

using multifd::Result;
using multifd::engine::Meter;
using multifd::engine::Sent;

struct Tape {
#ifndef WITHOUT_BEGIN
  Result<Sent> begin() noexcept { return Sent{}; }
#endif
#ifndef WITHOUT_SEND
  Result<Sent> send(const multifd::engine::PageList&, Meter&) noexcept { return Sent{}; }
#endif
#ifndef WITHOUT_PUSH_OUT
  Result<void> push_out(Meter&) noexcept { return {}; }
#endif
#ifndef WITHOUT_CLOSE_EPOCH
  Result<Sent> close_epoch(std::uint64_t, Meter&) noexcept { return Sent{}; }
#endif
#ifndef WITHOUT_END
  Result<void> end() noexcept { return {}; }
#endif
#ifndef WITHOUT_SHUTDOWN
  void shutdown() noexcept {}
#endif
};
static_assert(multifd::engine::check_outlet<Tape>());
