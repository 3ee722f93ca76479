// SPDX-License-Identifier: MIT
//
// Where connections under TLS come in: their handshakes are made all at once, and so is the wait for the first bytes of
// each. A source makes the handshakes of all its channels before any of them speaks, so one at a time would not do.
#pragma once

#include <multifd/qemu/accept_source.hpp>

#include <chrono>
#include <cstdint>
#include <list>
#include <optional>
#include <utility>

#include "common/part_file.hpp"
#include "common/tls.hpp"

namespace program {

class TlsDoor {
 public:
  /// Params `each`: how long a connection may take to say its first bytes, its handshake included.
  TlsDoor(multifd::Listener& listener, const Tls& tls, const multifd::Interrupt& interrupt,
          std::chrono::milliseconds each);

  /// Whether somebody waits to be let in, or has not said anything yet.
  bool pending() const noexcept;

  using Clock = std::chrono::steady_clock;
  /// What multifd::detail::collect_source() wants of a door: the next connection that has said its first four bytes, which
  /// stay there to be read; none when one that watch_end() watches has ended. What cannot be trusted is closed with a word
  /// on stderr: whoever that was, the source that is waited for may be another.
  /// Errors: timed_out, cancelled, errno.
  multifd::Result<std::optional<multifd::detail::Arrival<Link>>> next(Clock::time_point deadline,
                                                                      const multifd::Interrupt* = nullptr);
  multifd::Result<void> watch_end(const Link& link, std::uint32_t also = 0);

 private:
  struct Newcomer {
#if defined(MULTIFD_HAS_TLS)
    multifd::TlsHandshake handshake;
#endif
    Clock::time_point deadline;
    std::uint64_t number;
    std::optional<Link> link{};  ///< once the handshake is done
  };

  multifd::Result<void> accept();
  /// Whether it has said its first bytes; a failure is the end of it.
  multifd::Result<std::optional<std::uint32_t>> go_on(Newcomer& newcomer);
  /// Closes what has taken too long; returns when the next one will have.
  Clock::time_point close_late();

  multifd::Listener& listener_;
  const Tls& tls_;
  const multifd::Interrupt& interrupt_;
  const std::chrono::milliseconds each_;
  const Descriptor epoll_;
  std::list<Newcomer> newcomers_;  // a list: epoll holds their addresses
  std::uint64_t accepted_ = 0;
};

}  // namespace program
