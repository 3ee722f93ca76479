// SPDX-License-Identifier: MIT
//
// SpliceTransport: an FdTransport that does not copy guest pages into the kernel. References to them go through a pipe to
// the socket, and the only copy is the one that the peer's read makes:
//
//   guest pages --vmsplice()--> pipe --splice()--> socket --recvmsg()--> the peer's memory
//
// So the peer gets what a page holds when it reads, not what it held when it was written. That is right for pages that a
// dirty log follows, and wrong for everything else: a Sender sends nothing else this way.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

/// A Transport over a connected socket that sends guest pages without copying them (HasPinnedWrites).
///
/// What write_some() gets is copied, as by FdTransport. What write_pinned() gets is read when the peer reads it. A Sender
/// passes pages that way that it sends as they lie in the map's memory: not headers, not what was compressed, not
/// pages under Digest::on, not those of queue_copies().
/// Whoever composes a stack of it has to hold:
///   * A page that changes after it was queued is queued again, until it changes no more: as in every live migration. A
///     program that sends memory once must not write to it until finish() has returned, which waits until the peer has
///     everything; close_channels() does not.
///   * Memory may be unmapped, or given back, at any time after it was sent: the kernel keeps its pages until they have
///     arrived. But a part of a huge page of shared memory that is given back (a punched hole) may be zeroed where it is.
///   * Nothing is concluded about the peer's copy from what a page held when it was queued, while its guest runs.
///     `skip_unchanged` concludes it from copies alone, and may be on.
/// It pays over UNIX sockets. Over TCP on one machine it gains little with several channels, and costs speed with one:
/// benchmarks/README.md. Where the kernel refuses (no pipe of 1 MiB left, a seccomp filter, memory of a device), pages are
/// copied.
/// Errors: those of FdTransport. Threads: as FdTransport.
/// Cost: two descriptors, from the first write_pinned() on; two system calls for each of its calls, and two more that keep
///   SIGPIPE away. Pages are pinned while they are under way, no more of them than the sockets' buffers hold.
class SpliceTransport {
 public:
  /// Not explicit, so that FdTransport converts to it.
  SpliceTransport(FdTransport link) noexcept : link_(std::move(link)) {}

  /// Closes, as FdTransport.
  ~SpliceTransport() = default;
  SpliceTransport(SpliceTransport&&) noexcept = default;
  SpliceTransport& operator=(SpliceTransport&&) noexcept = default;

  /// write_some() of bytes that are read until the peer has read them: HasPinnedWrites. Threads: one writing thread.
  [[nodiscard]] Result<std::size_t> write_pinned(ConstBuffers buffers) noexcept {
    const std::size_t piped = fill_pipe(buffers);
    if (piped == 0) return link_.write_some(buffers);
    const Result<std::size_t> moved = link_.transfer(Stage::write, "write", POLLOUT, [&]() noexcept -> ssize_t {
      const detail::SigpipeGuard guard;
      const ssize_t count = ::splice(pipe_out_.get(), nullptr, link_.native_handle(), nullptr, piped, 0);
      // It writes in pieces. A later one may have raised the signal.
      if (count >= 0 && static_cast<std::size_t>(count) < piped) errno = EPIPE;
      return count;
    });
    // The caller comes again with what has not left, so that nothing waits here unseen.
    if (const std::size_t left = piped - moved.value_or(0); left > 0) empty_pipe(left);
    if (moved || !is_refusal(moved.error())) return moved;
    copies_ = true;
    return link_.write_some(buffers);
  }

  // The Transport policy, and its optional parts: as FdTransport.

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept { return link_.write_some(buffers); }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept { return link_.read_some(buffers); }
  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept {
    return link_.write_some(buffers, timeout, interrupt);
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept {
    return link_.read_some(buffers, timeout, interrupt);
  }
  [[nodiscard]] Result<std::size_t> read_full(MutableBuffers buffers) noexcept { return link_.read_full(buffers); }
  bool is_two_way() const noexcept { return link_.is_two_way(); }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept { return link_.write_now(buffers); }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept { return link_.read_now(buffers); }
  [[nodiscard]] Result<void> finish() noexcept { return link_.finish(); }
  void shutdown() noexcept { link_.shutdown(); }
  /// FdTransport's.
  int native_handle() const noexcept { return link_.native_handle(); }

  /// False when the kernel has refused, so that pages are copied from then on. Threads: the writing thread.
  bool pins() const noexcept { return !copies_; }

  /// peek_magic() of listen.hpp.
  template <std::same_as<SpliceTransport> T>
  [[nodiscard]] friend Result<std::uint32_t> peek_magic(T& transport, std::chrono::milliseconds timeout,
                                                        const Interrupt* interrupt = nullptr) noexcept {
    return peek_magic(transport.link_, timeout, interrupt);
  }

 private:
  /// Room for a packet of 128 pages that begins and ends within a page: the next power of two, and what every user may have
  /// by default. But all pipes of a user together have a limit, behind which new ones hold a page or two.
  static constexpr int pipe_bytes = 2 * batch_bytes;

  /// Puts references to the front of `buffers` into the pipe, which is empty between calls.
  /// Returns how many bytes; 0: none, they have to be copied.
  std::size_t fill_pipe(ConstBuffers buffers) noexcept {
    if (copies_ || (pipe_in_.get() < 0 && !open_pipe())) return 0;
    for (;;) {
      const ssize_t piped = ::vmsplice(pipe_in_.get(), buffers.data(), buffers.size(), SPLICE_F_NONBLOCK);
      if (piped >= 0) return static_cast<std::size_t>(piped);
      if (errno == EINTR) continue;
      // EFAULT is about these bytes: they are no memory that has pages.
      if (errno != EFAULT) copies_ = true;
      return 0;
    }
  }

  bool open_pipe() noexcept {
    int ends[2];
    copies_ = !link_.is_two_way() || ::pipe2(ends, O_CLOEXEC) != 0;
    if (copies_) return false;
    detail::UniqueFd out(ends[0]);
    detail::UniqueFd in(ends[1]);
    copies_ = ::fcntl(in.get(), F_SETPIPE_SZ, pipe_bytes) < pipe_bytes;
    if (copies_) return false;
    pipe_out_ = std::move(out);
    pipe_in_ = std::move(in);
    return true;
  }

  void empty_pipe(std::size_t bytes) noexcept {
    std::byte nowhere[16 * 1024];
    while (bytes > 0) {
      const ssize_t count = ::read(pipe_out_.get(), nowhere, bytes < sizeof nowhere ? bytes : sizeof nowhere);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) break;
      bytes -= static_cast<std::size_t>(count);
    }
    // Never seen. A pipe that holds what belongs to no call must not be used again.
    if (bytes > 0) copies_ = true;
  }

  static bool is_refusal(const Error& error) noexcept {
    return error.code == std::error_code(EINVAL, std::system_category()) ||
           error.code == std::error_code(ENOSYS, std::system_category()) ||
           error.code == std::error_code(EOPNOTSUPP, std::system_category());
  }

  FdTransport link_;
  detail::UniqueFd pipe_in_;
  detail::UniqueFd pipe_out_;
  bool copies_ = false;
};

static_assert(check_transport<SpliceTransport>() && HasPinnedWrites<SpliceTransport>);

}  // namespace multifd
