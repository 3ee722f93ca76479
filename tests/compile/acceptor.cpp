// SPDX-License-Identifier: MIT
//
// Without a check_acceptor(): the compilers' own notes name the member.
// WITHOUT_NEXT: acceptor.next(deadline, interrupt)
// WITHOUT_WATCH_END: acceptor.watch_end(link
// WITHOUT_PENDING: acceptor.pending()
#include "multifd/transport/acceptor.hpp"

struct Queue {
  using Link = multifd::FdTransport;
#ifndef WITHOUT_NEXT
  multifd::Result<std::optional<multifd::Arrival<Link>>> next(std::chrono::steady_clock::time_point,
                                                              const multifd::Interrupt*) {
    return std::nullopt;
  }
#endif
#ifndef WITHOUT_WATCH_END
  multifd::Result<void> watch_end(const Link&, std::uint32_t) { return {}; }
#endif
#ifndef WITHOUT_PENDING
  bool pending() const { return false; }
#endif
};
static_assert(multifd::Acceptor<Queue>);
