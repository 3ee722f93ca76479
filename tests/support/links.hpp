// SPDX-License-Identifier: MIT
//
// Connected channels of every kind, and transports that do something to what passes through them.
#pragma once

#include <doctest/doctest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/socket.hpp"
#include "support/adopt.hpp"
#include "support/basics.hpp"

namespace test {

using multifd::ConstBuffers;
using multifd::Errc;
using multifd::FdTransport;
using multifd::MutableBuffers;
using multifd::Result;
using multifd::Stage;
using multifd::testing::MemoryTransport;

enum class Wire { tcp, unix_socket, memory };

constexpr const char* name(Wire wire) {
  constexpr const char* names[] = {"tcp", "unix", "memory"};
  return names[static_cast<int>(wire)];
}

/// The two ends of some channels; index is channel on the sending side.
template <class T>
struct Links {
  std::vector<T> sender;
  std::vector<T> receiver;
};

inline Links<FdTransport> tcp_links(unsigned channels) {
  auto listener = multifd::Listener::listen({.host = "127.0.0.1"}, channels);
  REQUIRE_MESSAGE(listener.has_value(), text(listener));
  auto connected = multifd::connect_channels(listener->local_address(), channels);
  REQUIRE_MESSAGE(connected.has_value(), text(connected));
  auto accepted = listener->accept_channels(channels, 10s);
  REQUIRE_MESSAGE(accepted.has_value(), text(accepted));
  return {std::move(*connected), std::move(*accepted)};
}

inline Links<FdTransport> unix_links(unsigned channels) {
  Links<FdTransport> links;
  for (unsigned i = 0; i < channels; ++i) {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    links.sender.push_back(adopt(fds[0]));
    links.receiver.push_back(adopt(fds[1]));
  }
  return links;
}

inline Links<MemoryTransport> memory_links(unsigned channels, std::size_t capacity_bytes = 64 * 1024,
                                           multifd::testing::MemoryTransportOptions options = {}) {
  Links<MemoryTransport> links;
  for (unsigned i = 0; i < channels; ++i) {
    auto [near, far] = multifd::testing::memory_transport_pair(capacity_bytes, options);
    links.sender.push_back(std::move(near));
    links.receiver.push_back(std::move(far));
  }
  return links;
}

template <class T>
std::vector<T> one(T transport) {
  std::vector<T> links;
  links.push_back(std::move(transport));
  return links;
}

/// Keeps everything that is written, for all to see: what a channel sends, without a peer.
class CaptureTransport {
 public:
  struct Tape {
    std::mutex mutex;
    std::vector<std::byte> bytes;
    bool finished = false;

    std::size_t size() {
      const std::scoped_lock lock(mutex);
      return bytes.size();
    }
  };
  using Shared = std::shared_ptr<Tape>;

  explicit CaptureTransport(Shared tape) : tape_(std::move(tape)) {}

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    const std::scoped_lock lock(tape_->mutex);
    for (const iovec& buffer : buffers) {
      const auto* from = static_cast<const std::byte*>(buffer.iov_base);
      tape_->bytes.insert(tape_->bytes.end(), from, from + buffer.iov_len);
    }
    return multifd::total_bytes(buffers);
  }
  Result<std::size_t> read_some(MutableBuffers) noexcept { return std::size_t{0}; }
  Result<void> finish() noexcept {
    const std::scoped_lock lock(tape_->mutex);
    tape_->finished = true;
    return {};
  }
  void shutdown() noexcept {}

 private:
  Shared tape_;
};

struct Captures {
  std::vector<CaptureTransport> links;
  std::vector<CaptureTransport::Shared> tapes;
};

inline Captures captures(unsigned channels) {
  Captures result;
  for (unsigned i = 0; i < channels; ++i) {
    result.tapes.push_back(std::make_shared<CaptureTransport::Tape>());
    result.links.emplace_back(result.tapes.back());
  }
  return result;
}

/// What all channels have sent so far. A packet under a cap leaves in pieces, and counts in stats() when it is whole.
inline std::size_t captured_bytes(const std::vector<CaptureTransport::Shared>& tapes) {
  std::size_t bytes = 0;
  for (const auto& tape : tapes) {
    const std::scoped_lock lock(tape->mutex);
    bytes += tape->bytes.size();
  }
  return bytes;
}

/// A gate that lets bytes through only while it is open; shutdown() passes it always.
class Gate {
 public:
  explicit Gate(bool open) : open_(open) {}

  void open() {
    monitor_.update([this] { open_ = true; });
  }
  void close() {
    monitor_.update([this] { open_ = false; });
  }
  /// Returns when a thread waits at the closed gate; false after 20 seconds.
  bool wait_for_visitor() {
    auto held = monitor_.lock();
    monitor_.wait_until(held, std::chrono::steady_clock::now() + 20s, [this] { return waiting_ > 0; });
    return waiting_ > 0;
  }

  bool pass() {
    auto held = monitor_.lock();
    ++waiting_;
    monitor_.notify();
    monitor_.wait(held, [this] { return open_; });
    --waiting_;
    return !monitor_.stopped(held);
  }
  void shut_down() { monitor_.stop(); }

 private:
  multifd::engine::Monitor monitor_;
  bool open_;
  int waiting_ = 0;
};

/// Holds every read and write back while its gate is closed.
template <multifd::Transport Next>
class GatedTransport {
 public:
  GatedTransport(Next next, std::shared_ptr<Gate> gate) : next_(std::move(next)), gate_(std::move(gate)) {}

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    if (!gate_->pass()) return multifd::fail(Errc::cancelled, Stage::write, "gate");
    return next_.write_some(buffers);
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    if (!gate_->pass()) return multifd::fail(Errc::cancelled, Stage::read, "gate");
    return next_.read_some(buffers);
  }
  Result<void> finish() noexcept { return next_.finish(); }
  void shutdown() noexcept {
    gate_->shut_down();
    next_.shutdown();
  }

 private:
  Next next_;
  std::shared_ptr<Gate> gate_;
};

/// Stops before some reads and writes, for a random while of its own: channels run far apart.
template <multifd::Transport Next>
class JitterTransport {
 public:
  JitterTransport(Next next, std::uint64_t channel_seed, unsigned most_us)
      : next_(std::move(next)), rng_(channel_seed), most_us_(most_us) {}

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept { return next_.write_some(buffers); }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    if (rng_() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(rng_() % most_us_));
    return next_.read_some(buffers);
  }
  Result<void> finish() noexcept { return next_.finish(); }
  void shutdown() noexcept { next_.shutdown(); }

 private:
  Next next_;
  Rng rng_;
  unsigned most_us_;
};

}  // namespace test
