// SPDX-License-Identifier: MIT
#include "multifd_pager/incoming.hpp"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/limits.hpp"
#include "common/program.hpp"

namespace pager {
namespace {

using program::Descriptor;
using program::Failure;

constexpr std::size_t most_at_once = 253;  // of descriptors, in one message: the kernel's SCM_MAX_FD
constexpr int so_peerpidfd = 77;           // Linux 6.5

}  // namespace

void Incoming::read(std::string& to, std::size_t most) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - std::chrono::steady_clock::now());
  // A limit of 0 would be none.
  if (!program::wait_for(socket_, std::max(left, std::chrono::milliseconds(1)), &interrupt_)) {
    if (interrupt_.triggered()) throw Failure("cancelled by a signal");
    throw Failure("the VMM does not end its handshake (--handshake-timeout)");
  }
  const std::size_t old = to.size();
  to.resize(old + most);
  alignas(cmsghdr) char control[CMSG_SPACE(most_at_once * sizeof(int))];
  iovec bytes{.iov_base = to.data() + old, .iov_len = most};
  msghdr message{};
  message.msg_iov = &bytes;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t count = ::recvmsg(socket_, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  const int error = errno;
  to.resize(old + static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
  if (count < 0 && (error == EAGAIN || error == EINTR)) return;
  if (count < 0) throw Failure("handshake: " + program::error_text(error));
  for (cmsghdr* each = CMSG_FIRSTHDR(&message); each != nullptr; each = CMSG_NXTHDR(&message, each)) {
    if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t fds = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < fds; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(each) + i * sizeof fd, sizeof fd);
      Descriptor owned(fd);
      ++seen_;
      if (descriptors_.size() < keep_) descriptors_.push_back(std::move(owned));
    }
  }
  if ((message.msg_flags & MSG_CTRUNC) != 0)
    throw Failure("handshake: not all descriptors came over: this process may have no more (ulimit -n)");
  if (count == 0) throw Failure("the VMM closed the connection in the middle of its handshake");
}

PeerProcess peer_process(int socket) {
  PeerProcess peer;
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0) peer.pid = credentials.pid;
  int fd = -1;
  size = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, so_peerpidfd, &fd, &size) == 0) {
    peer.pidfd = Descriptor(fd);
  } else if (peer.pid > 0) {
    // An older kernel: the number may be another process' by now, if the VMM has ended meanwhile. Then its pages cannot be
    // placed, which ends the guest as well.
    peer.pidfd = Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
  }
  return peer;
}

void answer(int socket, const std::string& bytes) noexcept {
  (void)::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace pager
