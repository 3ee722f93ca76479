// SPDX-License-Identifier: MIT
//
// The exemplar of an Acceptor: one around another, which knows how many connections have come.
#pragma once

#include <cstdint>
#include <utility>

#include "multifd/transport/acceptor.hpp"

namespace exemplar {

template <multifd::Acceptor Next>
struct Counted {
  using Link = typename Next::Link;

  Next acceptor;
  std::uint64_t connections = 0;

  multifd::Result<std::optional<multifd::Arrival<Link>>> next(std::chrono::steady_clock::time_point deadline,
                                                              const multifd::Interrupt* interrupt = nullptr) {
    auto arrival = acceptor.next(deadline, interrupt);
    if (arrival && *arrival) ++connections;
    return arrival;
  }
  multifd::Result<void> watch_end(const Link& link, std::uint32_t events = 0) {
    return acceptor.watch_end(link, events);
  }
  bool pending() const { return acceptor.pending(); }
};
static_assert(multifd::check_acceptor<Counted<multifd::PlainAcceptor>>());

}  // namespace exemplar
