// SPDX-License-Identifier: MIT
//
// Ways of a packet into a socket that do not copy pages, as pump::Sendmsg (socket_pump.hpp) is one that does: a pipe and
// splice(), sendfile(), MSG_ZEROCOPY. io_ring.hpp has those by io_uring. For kernel_ways.cpp, which measures them: what is
// worth it stands in the library.
#pragma once

#include <fcntl.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include <vector>

#include "socket_pump.hpp"

namespace ways {

[[noreturn]] inline void fail_errno(const char* what, int error = errno) {
  throw std::system_error(error, std::generic_category(), what);
}

/// Copies of headers, for ways that let the kernel read them later. More of them than packets are under way at once.
class Headers {
 public:
  iovec keep(const iovec& header) {
    if (header.iov_len > slot_bytes) throw std::invalid_argument("a header that is too large");
    std::byte* const slot = bytes_.data() + next_++ % slots * slot_bytes;
    std::memcpy(slot, header.iov_base, header.iov_len);
    return {slot, header.iov_len};
  }

 private:
  static constexpr std::size_t slots = 256, slot_bytes = 2048;
  std::vector<std::byte> bytes_ = std::vector<std::byte>(slots * slot_bytes);
  std::size_t next_ = 0;
};

/// Where a header goes that pages by splice() follow.
enum class HeaderBy { send, vmsplice };

/// vmsplice() puts references to the pages into a pipe, splice() moves them to the socket. The other end's recvmsg() is the
/// only one that copies, and it copies what the page holds then.
class Splice {
 public:
  Splice(int fd, HeaderBy header_by) : fd_(fd), header_by_(header_by) {
    if (::pipe2(pipe_, O_CLOEXEC) != 0) fail_errno("pipe2");
    // A packet of 128 pages, the header, and ends that are no whole pages: the next power of two.
    if (::fcntl(pipe_[1], F_SETPIPE_SZ, 2 * pump::default_packet_bytes) < 0) fail_errno("F_SETPIPE_SZ");
  }
  Splice(const Splice&) = delete;
  Splice& operator=(const Splice&) = delete;
  ~Splice() {
    ::close(pipe_[0]);
    ::close(pipe_[1]);
  }

  void send(std::span<iovec> parts) {
    if (header_by_ == HeaderBy::send || parts.size() == 1) {
      const int more = parts.size() > 1 ? MSG_MORE : 0;
      pump::move_all(parts.first(1), "sendmsg", calls_,
                     [&](const msghdr* message) { return ::sendmsg(fd_, message, MSG_NOSIGNAL | more); });
      parts = parts.subspan(1);
    } else {
      parts[0] = headers_.keep(parts[0]);
    }
    while (!parts.empty()) {
      const ssize_t piped = ::vmsplice(pipe_[1], parts.data(), parts.size(), 0);
      ++calls_;
      if (piped < 0) fail_errno("vmsplice");
      for (auto left = static_cast<std::size_t>(piped); left > 0;) {
        const ssize_t moved = ::splice(pipe_[0], nullptr, fd_, nullptr, left, 0);
        ++calls_;
        if (moved < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (moved <= 0) fail_errno("splice");
        left -= static_cast<std::size_t>(moved);
      }
      parts = pump::drop(parts, static_cast<std::size_t>(piped));
    }
  }
  void finish() {}
  std::uint64_t calls() const { return calls_; }

 private:
  int fd_;
  HeaderBy header_by_;
  int pipe_[2] = {-1, -1};
  Headers headers_;
  std::uint64_t calls_ = 0;
};

/// The pages are a file's.
class Sendfile {
 public:
  /// Params `file`: what `memory` maps.
  Sendfile(int fd, int file, const std::byte* memory) : fd_(fd), file_(file), memory_(memory) {}

  void send(std::span<iovec> parts) {
    const int more = parts.size() > 1 ? MSG_MORE : 0;
    pump::move_all(parts.first(1), "sendmsg", calls_,
                   [&](const msghdr* message) { return ::sendmsg(fd_, message, MSG_NOSIGNAL | more); });
    for (const iovec& part : parts.subspan(1)) {
      off_t at = static_cast<const std::byte*>(part.iov_base) - memory_;
      for (std::size_t left = part.iov_len; left > 0;) {
        const ssize_t moved = ::sendfile(fd_, file_, &at, left);
        ++calls_;
        if (moved < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (moved <= 0) fail_errno("sendfile");
        left -= static_cast<std::size_t>(moved);
      }
    }
  }
  void finish() {}
  std::uint64_t calls() const { return calls_; }

 private:
  int fd_;
  int file_;
  const std::byte* memory_;
  std::uint64_t calls_ = 0;
};

/// MSG_ZEROCOPY, and its notices read from the socket's error queue.
class Zerocopy {
 public:
  explicit Zerocopy(int fd) : fd_(fd) {
    const int on = 1;
    if (::setsockopt(fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof on) != 0) fail_errno("SO_ZEROCOPY");
  }

  void send(std::span<iovec> parts) {
    parts[0] = headers_.keep(parts[0]);
    while (sent_ - told_ >= most_under_way) read_notices(true);
    while (!parts.empty()) {
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = parts.size();
      const ssize_t count = ::sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_ZEROCOPY);
      ++calls_;
      if (count < 0 && errno == ENOBUFS) {  // as many notices as the kernel keeps
        read_notices(true);
        continue;
      }
      if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;
      if (count <= 0) fail_errno("sendmsg");
      ++sent_;
      parts = pump::drop(parts, static_cast<std::size_t>(count));
    }
  }
  void finish() {
    while (sent_ != told_) read_notices(true);
  }
  std::uint64_t calls() const { return calls_; }

 private:
  static constexpr std::uint64_t most_under_way = 16;

  void read_notices(bool wait) {
    for (;;) {
      char control[128];
      msghdr message{};
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      const ssize_t got = ::recvmsg(fd_, &message, MSG_ERRQUEUE);
      ++calls_;
      if (got < 0) {
        if (errno != EAGAIN || !wait) return;
        pollfd entry{.fd = fd_, .events = 0, .revents = 0};
        ++calls_;
        if (::poll(&entry, 1, 10'000) <= 0) throw std::runtime_error("no notice of MSG_ZEROCOPY in 10 s");
        if ((entry.revents & POLLHUP) != 0) throw std::runtime_error("the other side has closed");
        continue;
      }
      for (cmsghdr* each = CMSG_FIRSTHDR(&message); each != nullptr; each = CMSG_NXTHDR(&message, each)) {
        const auto* const notice = reinterpret_cast<const sock_extended_err*>(CMSG_DATA(each));
        if (notice->ee_origin == SO_EE_ORIGIN_ZEROCOPY) told_ += notice->ee_data - notice->ee_info + 1;
      }
      wait = false;
    }
  }

  int fd_;
  Headers headers_;
  std::uint64_t sent_ = 0;
  std::uint64_t told_ = 0;
  std::uint64_t calls_ = 0;
};

}  // namespace ways
