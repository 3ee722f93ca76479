// SPDX-License-Identifier: MIT
//
// A source's page connections (format/extension.md section 19.9): each has a thread that dials, waits until the guest
// stands still, serves, and dials again when the connection is lost, until the destination has all pages.
#pragma once

#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/options.hpp"
#include "multifd/postcopy/guest_pages.hpp"
#include "multifd/postcopy/page_server.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"
#include "multifd/zero/untouched_pages.hpp"

namespace multifd::migrate::detail {

/// Makes a connection to the destination. Called by several threads at once; returns soon when the Interrupt is triggered.
template <Transport T>
using Dial = std::function<Result<T>(const Interrupt&)>;

/// Threads: one, the migration's. For one migration.
template <Transport T>
class PageConnections {
 public:
  /// Params `count`: 1 to wire::max_page_connections. `dial`, `hook`: outlive this object.
  /// Errors: the errno of getrandom() and eventfd(); ENOMEM.
  [[nodiscard]] static Result<std::unique_ptr<PageConnections>> create(unsigned count, const Dial<T>& dial,
                                                                       const ThreadHook& hook) {
    MULTIFD_TRY_ASSIGN(Interrupt stop, Interrupt::create());
    Uuid session;
    if (::getrandom(session.data(), session.size(), 0) != static_cast<ssize_t>(session.size()))
      return fail_errno(Stage::setup, "getrandom");
    return std::unique_ptr<PageConnections>(new PageConnections(count, dial, hook, std::move(stop), session));
  }
  PageConnections(const PageConnections&) = delete;
  PageConnections& operator=(const PageConnections&) = delete;
  ~PageConnections() {
    cancel();
    dialers_.clear();  // joins
  }

  const Uuid& session() const noexcept { return session_; }
  unsigned count() const noexcept { return count_; }

  /// Dials for all of them at once, with the guest still running. Errors: of the first that fails; Errc::cancelled by
  /// `interrupt`; of pthread_create().
  [[nodiscard]] Result<void> connect(const Interrupt& interrupt) {
    for (unsigned i = 0; i < count_; ++i) {
      Dialer& dialer = dialers_.emplace_back(*this);
      MULTIFD_TRY_ASSIGN(dialer.thread, Thread::start(dialer, hook_, {.role = "page", .channel = i}));
    }
    auto held = monitor_.lock();
    static_cast<void>(monitor_.wait(
        held, tick, [this] { return dialled_ == count_ || failed_; }, [&] { return !interrupt.triggered(); }));
    if (failed_) return std::unexpected(*failed_);
    if (dialled_ < count_) return fail(Errc::cancelled, Stage::connect, "page connections");
    return {};
  }

  /// Lets the destination ask. The guest stands still from here on. Params `ram`: outlives this object. `bandwidth`: as
  /// PageServerOptions has it. Errors: those of GuestPages and PageServer.
  [[nodiscard]] Result<void> serve(const RamMap& ram, std::uint64_t bandwidth) {
    // Never touched pages are none of those that the destination is told to ask for.
    MULTIFD_TRY_ASSIGN(pages_, postcopy::GuestPages::open(ram, UntouchedPages{}));
    postcopy::PageServerOptions<> options;
    options.session = session_;
    options.max_connections = count_ + 1;
    options.hello_timeout = std::chrono::milliseconds(0);  // the destination takes a connection when it needs one
    options.bandwidth = bandwidth;
    options.thread_hook = hook_;
    MULTIFD_TRY_ASSIGN(auto server, Server::open(*pages_, std::move(options)));
    monitor_.update([&] { server_ = std::move(server); });
    return {};
  }

  /// Whether the destination has said on one of them that it has all pages. Behind serve().
  bool whole() const noexcept { return server_->whole(); }
  /// How many the destination uses now. One that nobody has said a word on says nothing: a listener's queue takes those of a
  /// destination that is gone.
  unsigned connected() const noexcept { return server_->stats().serving; }
  /// How many have ended with an error, while the destination needed pages.
  std::uint64_t lost() const noexcept { return lost_.load(std::memory_order_relaxed); }
  postcopy::PageServerStats stats() const noexcept { return server_ ? server_->stats() : postcopy::PageServerStats{}; }

  /// Waits a moment, or until something changes.
  void wait_a_moment() noexcept {
    auto held = monitor_.lock();
    const unsigned before = changes_;
    static_cast<void>(monitor_.wait_until(held, deadline_after(tick), [&] { return changes_ != before; }));
  }

  /// Ends all of them, in bounded time.
  void cancel() noexcept {
    stop_.trigger();
    monitor_.stop();
    const auto held = monitor_.lock();
    if (server_) server_->cancel();
  }

 private:
  using Server = postcopy::PageServer<T>;
  static constexpr std::chrono::milliseconds tick{20};
  static constexpr std::chrono::milliseconds first_pause{20};
  static constexpr std::chrono::milliseconds longest_pause{1000};

  /// One of them.
  struct Dialer {
    explicit Dialer(PageConnections& connections) : of(connections) {}
    void run() noexcept { of.run(); }
    PageConnections& of;
    Thread thread;
  };

  PageConnections(unsigned count, const Dial<T>& dial, const ThreadHook& hook, Interrupt stop, const Uuid& session)
      : count_(count), dial_(dial), hook_(hook), stop_(std::move(stop)), session_(session) {}

  void run() noexcept {
    auto pause = first_pause;
    for (bool first = true; !over(); first = false) {
      auto link = catch_bad_alloc(Stage::connect, "page connection", [&] { return connection(); });
      if (first) {
        monitor_.update([&] {
          if (link) ++dialled_;
          if (!link && !failed_) failed_ = link.error();
        });
        if (!link) return;
      }
      if (link) {
        const auto began = std::chrono::steady_clock::now();
        change();
        const bool well = wait_for_server() && server_->serve(std::move(*link));
        change();
        if (!well && !over()) lost_.fetch_add(1, std::memory_order_relaxed);
        // The destination ends a connection when it wants another one. Who accepts, and closes at once, is nobody to hurry for.
        if (well || std::chrono::steady_clock::now() - began > longest_pause) pause = first_pause;
        if (well && std::chrono::steady_clock::now() - began > first_pause) continue;
      }
      if (over()) return;
      auto held = monitor_.lock();
      static_cast<void>(monitor_.wait_until(held, deadline_after(pause), [] { return false; }));
      pause = std::min(2 * pause, longest_pause);
    }
  }

  /// A new one, which has said what it is.
  [[nodiscard]] Result<T> connection() {
    MULTIFD_TRY_ASSIGN(T link, dial_(stop_));
    const auto words = wire::encode_page_connection(session_);
    iovec buffer = const_buffer(words.view());
    MULTIFD_TRY(write_all(link, std::span(&buffer, 1)));
    return link;
  }

  /// Waits for serve(). Returns whether it was called.
  bool wait_for_server() noexcept {
    auto held = monitor_.lock();
    monitor_.wait(held, [this] { return server_ != nullptr; });
    return server_ != nullptr && !monitor_.stopped(held);
  }

  bool over() const noexcept {
    const auto held = monitor_.lock();
    return monitor_.stopped(held) || (server_ && server_->whole());
  }

  void change() noexcept {
    monitor_.update([this] { ++changes_; });
  }

  const unsigned count_;
  const Dial<T>& dial_;
  const ThreadHook& hook_;
  Interrupt stop_;
  const Uuid session_;
  engine::Monitor monitor_;      ///< of all below
  unsigned dialled_ = 0;         ///< threads that have had a connection
  std::optional<Error> failed_;  ///< why a thread has had none
  unsigned changes_ = 0;         ///< connections made and lost
  std::atomic<std::uint64_t> lost_ = 0;
  std::unique_ptr<postcopy::GuestPages> pages_;
  std::unique_ptr<Server> server_;  ///< set once
  std::list<Dialer> dialers_;       ///< the migration's thread only
};

}  // namespace multifd::migrate::detail
