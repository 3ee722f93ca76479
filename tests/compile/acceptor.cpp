// SPDX-License-Identifier: MIT
// WITH_A_LINK_THAT_IS_NONE: Acceptor: needs  using Link = ...;  a Transport
// WITHOUT_NEXT: Acceptor: needs  Result<std::optional<Arrival<Link>>> next(std::chrono::steady_clock::time_point, const Interrupt*)
// WITHOUT_WATCH_END: Acceptor: needs  Result<void> watch_end(const Link&, std::uint32_t events)
// WITHOUT_EVENTS: Acceptor: needs  Result<void> watch_end(const Link&, std::uint32_t events)
// WITHOUT_PENDING: Acceptor: needs  bool pending() const
#include "multifd/transport/acceptor.hpp"

struct Door {
#if defined(WITH_A_LINK_THAT_IS_NONE)
  using Link = int;
#else
  using Link = multifd::FdTransport;
#endif
#ifndef WITHOUT_NEXT
  multifd::Result<std::optional<multifd::Arrival<Link>>> next(std::chrono::steady_clock::time_point,
                                                              const multifd::Interrupt*) {
    return std::nullopt;
  }
#endif
#if defined(WITHOUT_EVENTS)
  multifd::Result<void> watch_end(const Link&) { return {}; }
#elif !defined(WITHOUT_WATCH_END)
  multifd::Result<void> watch_end(const Link&, std::uint32_t) { return {}; }
#endif
#ifndef WITHOUT_PENDING
  bool pending() const { return false; }
#endif
};
static_assert(multifd::check_acceptor<Door>());
