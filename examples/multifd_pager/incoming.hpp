// SPDX-License-Identifier: MIT
//
// What a VMM says on a UNIX socket, and the descriptors that come with it (SCM_RIGHTS). Nothing of it is believed.
#pragma once

#include <multifd/transport/interrupt.hpp>

#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

#include "common/descriptor.hpp"

namespace pager {

/// A connection on its way through a handshake. Each wait ends with the handshake's time limit, or a signal.
class Incoming {
 public:
  /// Params `keep`: how many descriptors are kept; the others are counted and closed.
  Incoming(int socket, std::size_t keep, std::chrono::milliseconds limit, const multifd::Interrupt& interrupt)
      : socket_(socket), keep_(keep), deadline_(std::chrono::steady_clock::now() + limit), interrupt_(interrupt) {}
  Incoming(const Incoming&) = delete;
  Incoming& operator=(const Incoming&) = delete;

  /// Appends what comes next, at least a byte and at most `most`.
  /// Throws Failure: the end, a time limit, a signal, descriptors that did not fit this process.
  void read(std::string& to, std::size_t most);

  /// The first ones, in the order in which they came, and how many there were. Takes them.
  std::vector<program::Descriptor> take_descriptors() { return std::move(descriptors_); }
  std::size_t descriptors_seen() const noexcept { return seen_; }

 private:
  int socket_;
  std::size_t keep_;
  std::chrono::steady_clock::time_point deadline_;
  const multifd::Interrupt& interrupt_;
  std::vector<program::Descriptor> descriptors_;
  std::size_t seen_ = 0;
};

/// The process at the other end of a UNIX socket.
struct PeerProcess {
  int pid = 0;                  ///< 0: unknown, as for one of another pid namespace
  program::Descriptor pidfd{};  ///< readable when it has ended; -1: nobody will tell
};
PeerProcess peer_process(int socket);

/// Sends a short answer, or drops it where the peer does not take it: no VMM may hold up its pager.
void answer(int socket, const std::string& bytes) noexcept;

}  // namespace pager
