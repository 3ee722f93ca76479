// SPDX-License-Identifier: MIT
//
// A migration's two ends in one process, over real sockets whose every operation a test can count, and at which it can do
// something: cancel, cut, kill.
#pragma once

#include <doctest/doctest.h>
#include <sys/socket.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/destination_report.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/listen.hpp"
#include "multifd/transport/path.hpp"
#include "support/basics.hpp"
#include "support/migrate_guest.hpp"

namespace test {

/// What happens at the n-th operation of all WatchedLinks, of both sides. One at a time, while migrations are made with it.
class Script {
 public:
  static constexpr std::uint64_t never = ~std::uint64_t{0};

  /// Params `port`: the destination's. `then`: called ahead of operation `at`, by whoever does it.
  explicit Script(std::uint16_t port, std::uint64_t at = never, std::function<void()> then = {})
      : Script(port, at, std::move(then), false) {}
  /// Of the writes of the source's main connection number `at` is made, `then` called, and the write said to have failed.
  static Script behind_write(std::uint16_t port, std::uint64_t at, std::function<void()> then) {
    return Script(port, at, std::move(then), true);
  }
  Script(const Script&) = delete;
  Script& operator=(const Script&) = delete;
  ~Script();

  std::uint64_t operations() const noexcept { return operations_; }
  /// Breaks connections as a network does: neither side has done it. Params `number`: 0 is the main connection; none: all.
  ///   `reset`: what is under way is lost; else it arrives.
  void break_links(std::optional<unsigned> number, bool reset) noexcept;

 private:
  friend class WatchedLink;
  Script(std::uint16_t port, std::uint64_t at, std::function<void()> then, bool behind_write);
  const std::uint16_t port_;
  const std::uint64_t at_;
  const std::function<void()> then_;
  const bool behind_write_;
  std::atomic<std::uint64_t> operations_ = 0;
  std::mutex mutex_;
  unsigned made_ = 0;                           ///< the source's links so far
  std::vector<std::pair<unsigned, int>> open_;  ///< their numbers and descriptors
};

/// An FdTransport that counts what it does in the running Script.
class WatchedLink {
 public:
  explicit(false) WatchedLink(multifd::FdTransport link);

  [[nodiscard]] multifd::Result<std::size_t> write_some(multifd::ConstBuffers buffers) noexcept {
    return write([&] { return open_->link.write_some(buffers); });
  }
  [[nodiscard]] multifd::Result<std::size_t> read_some(multifd::MutableBuffers buffers) noexcept {
    step();
    return open_->link.read_some(buffers);
  }
  [[nodiscard]] multifd::Result<std::size_t> write_some(multifd::ConstBuffers buffers,
                                                        std::chrono::milliseconds timeout,
                                                        const multifd::Interrupt* interrupt) noexcept {
    return write([&] { return open_->link.write_some(buffers, timeout, interrupt); });
  }
  [[nodiscard]] multifd::Result<std::size_t> read_some(multifd::MutableBuffers buffers,
                                                       std::chrono::milliseconds timeout,
                                                       const multifd::Interrupt* interrupt) noexcept {
    step();
    return open_->link.read_some(buffers, timeout, interrupt);
  }
  bool is_two_way() const noexcept { return open_->link.is_two_way(); }
  [[nodiscard]] multifd::Result<std::size_t> write_now(multifd::ConstBuffers buffers) noexcept {
    return open_->link.write_now(buffers);
  }
  [[nodiscard]] multifd::Result<std::size_t> read_now(multifd::MutableBuffers buffers) noexcept {
    return open_->link.read_now(buffers);
  }
  [[nodiscard]] multifd::Result<void> finish() noexcept {
    step();
    return open_->link.finish();
  }
  void shutdown() noexcept { open_->link.shutdown(); }
  int native_handle() const noexcept { return open_->link.native_handle(); }

 private:
  template <class Write>
  multifd::Result<std::size_t> write(Write&& write) noexcept {
    const bool lies = step(true);
    auto written = write();
    if (!lies) return written;
    open_->script->then_();
    return multifd::fail_errno(multifd::Stage::write, "write", ECONNRESET);
  }
  /// Counts an operation, ahead of it. Returns whether it is a write that is made, and then is said to have failed.
  bool step(bool is_write = false) noexcept;
  struct Open {
    explicit Open(multifd::FdTransport from);
    ~Open();
    multifd::FdTransport link;
    Script* script;
    bool is_main = false;  ///< the source's
  };
  std::unique_ptr<Open> open_;
};

/// migrate_to() and migrate_from() over WatchedLinks, compiled once: zlib and no compression, all zero modes.
multifd::Result<multifd::migrate::MigrationReport> send_guest(MigratingGuest& guest, const multifd::Address& address,
                                                              const multifd::migrate::SourceOptions& options);
/// The same over paths. Params `down`: called for each connection that is made; an error: it cannot be made now.
multifd::Result<multifd::migrate::MigrationReport> send_guest(MigratingGuest& guest,
                                                              std::span<const multifd::Path> paths,
                                                              const multifd::migrate::SourceOptions& options,
                                                              const std::function<multifd::Result<void>()>& down);
multifd::Result<multifd::migrate::ArrivalReport> take_guest(MigratingGuest& guest, multifd::Listener& listener,
                                                            const multifd::migrate::DestinationOptions& options);

/// One side's handle, and what its events have said.
struct Followed {
  Followed() {
    auto made = multifd::migrate::Migration::create();
    REQUIRE(made.has_value());
    handle.emplace(std::move(*made));
  }
  multifd::migrate::Migration* operator->() { return &*handle; }
  void note(const multifd::migrate::Event& event) {
    const std::scoped_lock lock(mutex);
    if (event.kind == multifd::migrate::EventKind::status) {
      statuses.push_back(to_string(event.progress.status));
    } else if (event.kind == multifd::migrate::EventKind::round_end) {
      statuses.push_back("round");
      rounds.push_back(*event.round);
    }
  }
  /// "setup active round device completed"
  std::string said() const {
    const std::scoped_lock lock(mutex);
    std::string text;
    for (const std::string& each : statuses) text += (text.empty() ? "" : " ") + each;
    return text;
  }

  std::optional<multifd::migrate::Migration> handle;
  mutable std::mutex mutex;
  std::vector<std::string> statuses;
  std::vector<multifd::migrate::Round> rounds;
};

/// A destination that listens, and takes one guest in.
class There {
 public:
  explicit There(std::size_t pages, multifd::migrate::DestinationOptions options = {}, std::string idstr = "pc.ram")
      : guest(pages, std::move(idstr)), options_(std::move(options)) {
    auto opened = multifd::Listener::listen({.host = "127.0.0.1"}, 64);
    REQUIRE(opened.has_value());
    address = opened->local_address();
    listener_.emplace(std::move(*opened));
    options_.migration = &*followed.handle;
    options_.on_event = [this](const auto& event) {
      followed.note(event);
      if (on_event) on_event(event);
    };
  }
  ~There() {
    if (taken_.valid() && !ended()) followed->cancel();
  }
  /// From here on it takes what comes. `guest` may be changed before.
  void begin() {
    taken_ = std::async(std::launch::async, [this] {
      auto taken = take_guest(guest, *listener_, options_);
      listener_.reset();  // who is in its queue learns that nobody answers
      return taken;
    });
  }
  bool ended() const { return taken_.wait_for(0s) == std::future_status::ready; }
  multifd::Result<multifd::migrate::ArrivalReport> result() { return taken_.get(); }

  MigratingGuest guest;
  multifd::Address address;
  Followed followed;
  std::function<void(const multifd::migrate::Event&)> on_event{};

 private:
  multifd::migrate::DestinationOptions options_;
  std::optional<multifd::Listener> listener_;
  std::future<multifd::Result<multifd::migrate::ArrivalReport>> taken_;
};

/// A whole migration, whatever comes of it.
struct Tried {
  multifd::Result<multifd::migrate::MigrationReport> sent = std::unexpected(multifd::Error{});
  multifd::Result<multifd::migrate::ArrivalReport> taken = std::unexpected(multifd::Error{});
};

/// Sends `here` to `there`, and waits for both. A destination that still waits for a source when the source has given up is
/// cancelled.
///
/// Params `send`: send_guest() by another way; empty: to the destination's address.
inline Tried migrate_once(
    MigratingGuest& here, Followed& followed, There& there, multifd::migrate::SourceOptions options = {},
    const std::function<multifd::Result<multifd::migrate::MigrationReport>(const multifd::migrate::SourceOptions&)>&
        send = {}) {
  options.migration = &*followed.handle;
  auto next = std::move(options.on_event);
  options.on_event = [&followed, next](const auto& event) {
    followed.note(event);
    if (next) next(event);
  };
  there.begin();
  Tried tried;
  tried.sent = send ? send(options) : send_guest(here, there.address, options);
  if (!tried.sent)
    for (const Stopwatch waiting; !there.ended(); std::this_thread::sleep_for(1ms))
      if (waiting.elapsed() > 300ms && there.followed->progress().status == multifd::migrate::MigrationStatus::setup)
        there.followed->cancel();
  tried.taken = there.result();
  return tried;
}

}  // namespace test
