// SPDX-License-Identifier: MIT
//
// FdTransport: the Transport over a connected descriptor of the operating system. Sockets (TCP, UNIX, vsock)
// are what it is for; pipes and files work, one way at a time. How a descriptor comes to be connected:
// socket.hpp.
//
// The one subtle thing is the end. A stream that is cut in the middle must not look to the peer as if it had
// ended in order, so on TCP a shutdown(), a destructor without finish(), and the death of the process reset the
// connection instead of closing it.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <optional>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

namespace detail {

/// Keeps a write to a broken pipe from raising SIGPIPE in this thread, leaving the program's handlers and
/// masks as they were. Sockets have MSG_NOSIGNAL instead.
class SigpipeGuard {
 public:
  SigpipeGuard() noexcept {
    pthread_sigmask(SIG_BLOCK, only_sigpipe(), &old_mask_);
    was_blocked_ = sigismember(&old_mask_, SIGPIPE) == 1;
    if (!was_blocked_) return;
    sigset_t pending;  // only a blocked signal can be
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
  }
  SigpipeGuard(const SigpipeGuard&) = delete;
  SigpipeGuard& operator=(const SigpipeGuard&) = delete;
  ~SigpipeGuard() {
    const int saved_errno = errno;
    if (saved_errno == EPIPE && !was_pending_) {
      const timespec now{};
      while (sigtimedwait(only_sigpipe(), nullptr, &now) < 0 && errno == EINTR) {
      }
    }
    if (!was_blocked_) pthread_sigmask(SIG_SETMASK, &old_mask_, nullptr);
    errno = saved_errno;
  }

 private:
  const sigset_t* only_sigpipe() noexcept {
    sigemptyset(&set_);
    sigaddset(&set_, SIGPIPE);
    return &set_;
  }

  sigset_t old_mask_;
  sigset_t set_;
  bool was_blocked_ = false;
  bool was_pending_ = false;
};

}  // namespace detail

/// A Transport over a connected descriptor, which it owns.
///
/// Errors: the errno of the failing call; `Errc::cancelled` after this side's own shutdown(), whatever the operating
///   system calls it; `Errc::timed_out` when the program has set SO_RCVTIMEO or SO_SNDTIMEO and it passed.
/// Threads: one writes and finishes, one reads; shutdown() from any while they do.
/// Cost: one system call per read or write (three more on what is not a socket), and four a second while a socket's call
///   waits; nothing is allocated.
class FdTransport {
 public:
  /// Takes over a connected descriptor; closes it even when it fails.
  /// Params `fd`: a stream socket, blocking or not, or a pipe, FIFO or file. A socket gets time limits (SO_RCVTIMEO,
  ///   SO_SNDTIMEO), unless it has some, so that its calls do not hide for long what a slow peer moves. What is not a
  ///   socket is made non-blocking, because nothing else lets shutdown() end a write that waits for room.
  /// Errors: `not_supported` for a datagram socket; errno for a bad descriptor.
  [[nodiscard]] static Result<FdTransport> adopt(int fd) noexcept {
    detail::UniqueFd owned(fd);
    int type = 0;
    socklen_t size = sizeof type;
    if (::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0) {
      if (type != SOCK_STREAM) return fail(Errc::not_supported, Stage::setup, "adopt a datagram socket");
      int protocol = 0;
      size = sizeof protocol;
      ::getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size);
      const bool resets = protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
      return FdTransport(std::move(owned), resets ? Kind::tcp : Kind::socket, std::nullopt);
    }
    if (errno != ENOTSOCK) return fail_errno(Stage::setup, "adopt a descriptor");
    Result<Interrupt> cut = Interrupt::create();
    if (!cut) return std::unexpected(cut.error());
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) return fail_errno(Stage::setup, "fcntl");
    return FdTransport(std::move(owned), Kind::file, std::move(*cut));
  }

  FdTransport(FdTransport&& other) noexcept
      : fd_(std::move(other.fd_)),
        cut_(std::move(other.cut_)),
        own_limit_us_(other.own_limit_us_),
        kind_(other.kind_),
        finished_(other.finished_),
        shut_down_(other.shut_down_.load(std::memory_order_relaxed)) {}

  FdTransport& operator=(FdTransport&& other) noexcept {
    if (this == &other) return *this;
    close();
    fd_ = std::move(other.fd_);
    cut_ = std::move(other.cut_);
    own_limit_us_ = other.own_limit_us_;
    kind_ = other.kind_;
    finished_ = other.finished_;
    shut_down_.store(other.shut_down_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    return *this;
  }

  /// Closes. Without finish() a TCP peer sees a reset; after it, all that was written still arrives.
  ~FdTransport() { close(); }

  /// Threads: one writing thread.
  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return transfer(Stage::write, "write", POLLOUT, [&]() noexcept -> ssize_t {
      if (kind_ == Kind::file) {
        const detail::SigpipeGuard guard;
        return ::writev(fd_.get(), buffers.data(), static_cast<int>(buffers.size()));
      }
      const msghdr message = as_message(buffers);
      return ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
    });
  }

  /// Threads: one reading thread.
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept { return read(buffers, 0); }

  /// As above with a time limit for the wait (0: none at all; or no_timeout) and an Interrupt (may be null) that ends it.
  /// When the wait has ended, nothing has been read or written.
  /// Errors: `timed_out`, `cancelled`, beside those above.
  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept {
    // A socket may be ready for less than all of it, and would block for the rest.
    if (total_bytes(buffers) == 0) return std::size_t{0};  // else it would look like a socket without room
    return in_time(Stage::write, "write", POLLOUT, timeout, interrupt,
                   [&] { return kind_ == Kind::file ? write_some(buffers) : write_now(buffers); });
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept {
    return in_time(Stage::read, "read", POLLIN, timeout, interrupt, [&] { return read_some(buffers); });
  }

  /// As read_some(), but a socket waits for more until all buffers are full, 0.26 s have passed with some bytes, the
  /// stream ends, or a signal comes: read_at_least() calls it in a loop. Threads: one reading thread.
  [[nodiscard]] Result<std::size_t> read_full(MutableBuffers buffers) noexcept { return read(buffers, MSG_WAITALL); }

  /// Whether bytes can also come back: on sockets. Threads: any.
  bool is_two_way() const noexcept { return kind_ != Kind::file; }

  /// write_some() that does not wait for room: 0 then. Sockets only. Threads: one writing thread.
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept {
    const msghdr message = as_message(buffers);
    return unless_it_would_wait(Stage::write, "write", ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT));
  }

  /// read_some() that does not wait for bytes: 0 then, and at the end. Sockets only. Threads: one reading thread.
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept {
    msghdr message = as_message(buffers);
    return unless_it_would_wait(Stage::read, "read", ::recvmsg(fd_.get(), &message, MSG_DONTWAIT));
  }

  /// Ends the writing direction in order. What is not a socket is closed, for reading too.
  /// Errors: `cancelled` after shutdown(); `already_closed` the second time on what is not a socket; errno.
  /// Threads: the writing thread.
  [[nodiscard]] Result<void> finish() noexcept {
    if (shut_down_.load(std::memory_order_relaxed)) return fail(Errc::cancelled, Stage::close, "finish");
    if (fd_.get() < 0) return fail(Errc::already_closed, Stage::close, "finish");
    if (kind_ == Kind::file) {
      if (::close(fd_.release()) != 0) return fail_errno(Stage::close, "close");
    } else {
      if (kind_ == Kind::tcp) reset_on_close(false);
      if (::shutdown(fd_.get(), SHUT_WR) != 0) return fail_errno(Stage::close, "finish");
    }
    finished_ = true;
    return {};
  }

  /// Cuts the stream: blocked calls end at once, later ones fail. A TCP peer sees a reset. A UNIX peer sees an end (that
  /// kind of socket knows no reset), the other end of a pipe sees one when this object is destroyed.
  /// Threads: any thread while others read and write, any number of times; not beside the destructor.
  void shutdown() noexcept {
    // Relaxed: the flag only chooses the name of the error, the system calls below do the work.
    shut_down_.store(true, std::memory_order_relaxed);
    if (kind_ == Kind::file) {
      if (cut_) cut_->trigger();
    } else if (fd_.get() >= 0 && !(kind_ == Kind::tcp && reset_connection())) {
      ::shutdown(fd_.get(), SHUT_RDWR);
    }
  }

  /// The descriptor, still owned by this object, with the time limits that adopt() gave it; -1 after finish() on what is
  /// not a socket, or when moved from.
  int native_handle() const noexcept { return fd_.get(); }

 private:
  friend class SpliceTransport;  // whose pages move by another call, with the same waits and errors
  enum class Kind : unsigned char { tcp, socket, file };

  FdTransport(detail::UniqueFd fd, Kind kind, std::optional<Interrupt> cut) noexcept
      : fd_(std::move(fd)), cut_(std::move(cut)), kind_(kind) {
    if (kind_ == Kind::tcp) reset_on_close(true);  // from now on: a process that is killed closes without asking us
    if (kind_ != Kind::file) limit_calls();
  }

  /// Gives a socket SO_RCVTIMEO and SO_SNDTIMEO, unless the program has. A call that waits for long then returns with
  /// what has moved by then, and whoever counts sees the bytes of a slow peer as they move. A call that nothing has come
  /// of is repeated. A write to a UNIX socket is limited for each buffer of the kernel (16 KiB or more) by itself, so
  /// that a packet may take up to eight seconds unseen.
  void limit_calls() noexcept {
    const timeval often{.tv_sec = 0, .tv_usec = 260'000};  // in ticks of every kernel, and no program's choice
    for (const int option : {SO_RCVTIMEO, SO_SNDTIMEO}) {
      // A socket that was adopted before, by way of dup() or in another process, has it already.
      const std::int64_t now = limit_us(option);
      if (now != 0 && now != often.tv_usec) continue;
      if (now == 0 && ::setsockopt(fd_.get(), SOL_SOCKET, option, &often, sizeof often) != 0) continue;
      own_limit_us_ = often.tv_usec;
    }
  }

  /// SO_RCVTIMEO or SO_SNDTIMEO; 0: none.
  std::int64_t limit_us(int option) const noexcept {
    timeval limit{};
    socklen_t size = sizeof limit;
    ::getsockopt(fd_.get(), SOL_SOCKET, option, &limit, &size);
    return std::int64_t{limit.tv_sec} * 1'000'000 + limit.tv_usec;
  }

  static msghdr as_message(std::span<const iovec> buffers) noexcept {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(buffers.data());  // the calls do not write to the array
    message.msg_iovlen = buffers.size();
    return message;
  }

  [[nodiscard]] Result<std::size_t> read(MutableBuffers buffers, int flags) noexcept {
    return transfer(Stage::read, "read", POLLIN, [&]() noexcept -> ssize_t {
      if (kind_ == Kind::file) return ::readv(fd_.get(), buffers.data(), static_cast<int>(buffers.size()));
      msghdr message = as_message(buffers);
      return ::recvmsg(fd_.get(), &message, flags);
    });
  }

  template <class Call>
  [[nodiscard]] Result<std::size_t> transfer(Stage stage, const char* op, short events, Call call) noexcept {
    if (fd_.get() < 0) return fail(Errc::already_closed, stage, op);
    if (kind_ == Kind::file) {
      if (auto ready = wait_ready(events, stage, op); !ready) return std::unexpected(ready.error());
    }
    for (;;) {
      const ssize_t count = call();
      if (count > 0) return static_cast<std::size_t>(count);
      if (count < 0 && errno == EINTR) continue;
      const int error = count < 0 ? errno : 0;
      if (shut_down_.load(std::memory_order_relaxed)) return fail(Errc::cancelled, stage, op);
      if (error == 0) return std::size_t{0};
      if (error != EAGAIN && error != EWOULDBLOCK) return fail_errno(stage, op, error);
      if ((::fcntl(fd_.get(), F_GETFL) & O_NONBLOCK) == 0) {
        const std::int64_t limit = limit_us(events == POLLOUT ? SO_SNDTIMEO : SO_RCVTIMEO);
        if (limit == own_limit_us_ && limit != 0) continue;
        return fail(Errc::timed_out, stage, op);
      }
      if (auto ready = wait_ready(events, stage, op); !ready) return std::unexpected(ready.error());
    }
  }

  template <class Call>
  [[nodiscard]] Result<std::size_t> in_time(Stage stage, const char* op, short events,
                                            std::chrono::milliseconds timeout, const Interrupt* interrupt,
                                            Call call) noexcept {
    if (fd_.get() < 0) return fail(Errc::already_closed, stage, op);
    const auto deadline = deadline_after(timeout);
    for (;;) {
      if (auto ready = wait_ready(events, stage, op, deadline, interrupt); !ready)
        return std::unexpected(ready.error());
      const Result<std::size_t> count = call();
      if (!count || *count > 0 || events == POLLIN) return count;
    }
  }

  [[nodiscard]] static Result<std::size_t> unless_it_would_wait(Stage stage, const char* op, ssize_t count) noexcept {
    if (count >= 0) return static_cast<std::size_t>(count);
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return std::size_t{0};
    return fail_errno(stage, op);
  }

  /// Waits until a call would not block. What is not a socket is cancelled by shutdown() through a second descriptor; a
  /// socket's own shutdown makes it ready.
  [[nodiscard]] Result<void> wait_ready(short events, Stage stage, const char* op,
                                        detail::Clock::time_point deadline = detail::Clock::time_point::max(),
                                        const Interrupt* interrupt = nullptr) noexcept {
    pollfd entries[] = {{.fd = fd_.get(), .events = events, .revents = 0},
                        {.fd = cut_ ? cut_->native_handle() : -1, .events = POLLIN, .revents = 0},
                        {.fd = interrupt != nullptr ? interrupt->native_handle() : -1, .events = POLLIN, .revents = 0}};
    for (;;) {
      const int ready = ::poll(entries, 3, detail::poll_timeout(deadline));
      if (ready < 0 && errno != EINTR) return fail_errno(stage, op);
      if (ready > 0) {
        if ((entries[1].revents | entries[2].revents) != 0) return fail(Errc::cancelled, stage, op);
        return {};
      }
      if (ready == 0 && detail::Clock::now() >= deadline) return fail(Errc::timed_out, stage, op);
    }
  }

  /// Resets a TCP connection although other threads may block in it. close() with a linger time of 0 would
  /// also send RST, but must not happen while others use the descriptor.
  bool reset_connection() noexcept {
    const sockaddr nowhere{.sa_family = AF_UNSPEC, .sa_data = {}};
    // The bare system call, because TSan takes connect() for the birth of a descriptor and reports every
    // other use.
    const auto disconnect = [&] { return ::syscall(SYS_connect, fd_.get(), &nowhere, sizeof nowhere) == 0; };
    if (disconnect()) return true;
    // Linux 6.5, 6.6 and their contemporaries refuse with EBUSY while another thread blocks in the socket.
    // Then end the blocked reader first, which sends nothing, and try again when it has left.
    if (errno != EBUSY) return false;
    reset_on_close(true);
    ::shutdown(fd_.get(), SHUT_RD);
    for (int attempt = 0; attempt < 50; ++attempt) {
      if (disconnect()) return true;
      ::poll(nullptr, 0, 1);
    }
    return false;  // a blocked writer: its data is in front of the FIN, and the reset follows on close
  }

  void reset_on_close(bool reset) noexcept {
    const linger value{.l_onoff = reset ? 1 : 0, .l_linger = 0};
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_LINGER, &value, sizeof value);
  }

  void close() noexcept {
    if (fd_.get() >= 0 && kind_ == Kind::tcp && !finished_) reset_on_close(true);
    fd_.reset();
  }

  detail::UniqueFd fd_;
  std::optional<Interrupt> cut_;   ///< ends poll() on what is not a socket
  std::int64_t own_limit_us_ = 0;  ///< what limit_calls() has set; 0: nothing
  Kind kind_ = Kind::file;
  bool finished_ = false;
  std::atomic<bool> shut_down_ = false;
};

static_assert(check_transport<FdTransport>());

}  // namespace multifd
