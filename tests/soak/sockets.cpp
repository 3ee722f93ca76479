// SPDX-License-Identifier: MIT
#include <sys/socket.h>
#include <multifd/transport/socket.hpp>

#include "soak/run.hpp"

namespace soak {
namespace {

template <class T>
T need(Result<T> result) {
  if (!result) throw std::runtime_error(describe(result.error()));
  return std::move(*result);
}

Ends<FdTransport> tcp_ends(unsigned channels) {
  auto listener = need(Listener::listen({.host = "127.0.0.1"}, channels));
  Ends<FdTransport> ends;
  ends.sender = need(connect_channels(listener.local_address(), channels));
  ends.receiver = need(listener.accept_channels(channels, std::chrono::seconds(10)));
  return ends;
}

Ends<FdTransport> unix_ends(unsigned channels) {
  Ends<FdTransport> ends;
  for (unsigned i = 0; i < channels; ++i) {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) throw std::runtime_error("socketpair");
    ends.sender.push_back(need(FdTransport::adopt(fds[0])));
    ends.receiver.push_back(need(FdTransport::adopt(fds[1])));
  }
  return ends;
}

}  // namespace

Outcome run_sockets(const Plan& plan, Arena& arena) {
  return run_stack(plan, arena, plan.wire == Wire::tcp ? tcp_ends(plan.channels) : unix_ends(plan.channels));
}

}  // namespace soak
