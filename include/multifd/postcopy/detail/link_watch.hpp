// SPDX-License-Identifier: MIT
//
// Who cuts connections: a thread that watches that bytes move where they should, and cancel(). Beside the transports,
// because not all of them have time limits, and because a wait with a limit costs another system call per page.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "multifd/engine/counters.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/options.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"

namespace multifd::postcopy::detail {

class LinkWatch;

/// A connection as the watch sees it. Threads: one, the connection's; but cut_for() any.
class WatchedLink {
 public:
  WatchedLink() = default;
  WatchedLink(const WatchedLink&) = delete;
  WatchedLink& operator=(const WatchedLink&) = delete;

  enum class Cut : std::uint8_t { no, late, cancelled, crowded };

  /// From now on bytes have to move at least that often; 0: there is no limit, as when nothing is under way.
  void expect(std::chrono::milliseconds limit) noexcept { limit_ms_.store(limit.count(), std::memory_order_relaxed); }
  void moved(std::size_t bytes) noexcept { moved_.add(bytes); }
  std::uint64_t moved_bytes() const noexcept { return moved_.get(); }

  /// The hello is over: such a connection makes way for no other.
  void settle() noexcept { opening_.store(false, std::memory_order_relaxed); }
  bool opening() const noexcept { return opening_.load(std::memory_order_relaxed); }

  /// Cuts the connection; the first reason stays.
  void cut_for(Cut why) noexcept {
    Cut none = Cut::no;
    why_.compare_exchange_strong(none, why, std::memory_order_relaxed);
    cut();
  }

  bool is_cut() const noexcept { return why_.load(std::memory_order_relaxed) != Cut::no; }

  /// The error that a call of the connection has ended with, or that of the cut that ended it.
  Error explain(Error error) const noexcept {
    switch (why_.load(std::memory_order_relaxed)) {
      case Cut::no: break;
      case Cut::late: error.code = Errc::timed_out; break;
      case Cut::cancelled: error.code = Errc::cancelled; break;
      case Cut::crowded: error.code = {ENOBUFS, std::system_category()}; break;
    }
    return error;
  }

 protected:
  virtual ~WatchedLink() = default;

 private:
  friend class LinkWatch;

  /// Ends the connection's calls, now and later.
  virtual void cut() noexcept = 0;

  engine::Counter moved_;
  std::atomic<std::int64_t> limit_ms_{0};
  std::atomic<bool> opening_{true};
  std::atomic<Cut> why_{Cut::no};

  // The watch's, under its monitor.
  WatchedLink* before_ = nullptr;
  WatchedLink* behind_ = nullptr;
  std::uint64_t seen_bytes_ = 0;
  std::chrono::steady_clock::time_point since_{};
};

/// Threads: any, all methods; start() and the destructor one.
class LinkWatch {
 public:
  LinkWatch() = default;
  LinkWatch(const LinkWatch&) = delete;
  LinkWatch& operator=(const LinkWatch&) = delete;
  ~LinkWatch() {
    monitor_.stop();
    thread_.join();
  }

  /// Starts the thread. Params `shortest`: of the limits that will be expected (0: none); `hook`: must live as long as
  /// this object. Errors: ENOMEM; of pthread_create().
  [[nodiscard]] Result<void> start(std::chrono::milliseconds shortest, const ThreadHook& hook) noexcept {
    using namespace std::chrono_literals;
    slice_ = std::clamp<std::chrono::milliseconds>(ProgressWatch::bounded(shortest) / 8, 1ms, 250ms);
    MULTIFD_TRY_ASSIGN(thread_, Thread::start(*this, hook, {.role = "page", .channel = 0}));
    return {};
  }

  /// Adds a connection. When there are `most`, the oldest that is in its hello is cut, and a second is waited for room: one
  /// whose peer has closed it is there until its thread has noticed that.
  /// Errors (stage setup): cancelled; ENOBUFS.
  [[nodiscard]] Result<void> enter(WatchedLink& link, unsigned most) noexcept {
    using namespace std::chrono_literals;
    engine::Monitor::Lock held = monitor_.lock();
    if (count_ >= most) {
      for (WatchedLink* each = first_; each != nullptr; each = each->behind_) {
        if (!each->opening() || each->is_cut()) continue;
        each->cut_for(WatchedLink::Cut::crowded);
        break;
      }
      const auto until = std::chrono::steady_clock::now() + 1s;
      (void)monitor_.wait_until(held, until, [&] { return count_ < most || cancelled_; });
    }
    if (cancelled_ || monitor_.stopped(held)) return fail(Errc::cancelled, Stage::setup, "page connection");
    if (count_ >= most) return fail_errno(Stage::setup, "page connection: too many at once", ENOBUFS);
    link.before_ = last_;
    link.behind_ = nullptr;
    (last_ != nullptr ? last_->behind_ : first_) = &link;
    last_ = &link;
    link.since_ = std::chrono::steady_clock::now();
    ++count_;
    return {};
  }

  /// Takes a connection out again; it is not cut any more behind this call.
  void leave(WatchedLink& link) noexcept {
    monitor_.update([&] {
      (link.before_ != nullptr ? link.before_->behind_ : first_) = link.behind_;
      (link.behind_ != nullptr ? link.behind_->before_ : last_) = link.before_;
      --count_;
    });
  }

  unsigned count() const noexcept {
    const auto held = monitor_.lock();
    return count_;
  }

  /// Cuts all connections, and lets none in any more.
  void cancel() noexcept {
    monitor_.update([&] {
      cancelled_ = true;
      for (WatchedLink* each = first_; each != nullptr; each = each->behind_)
        each->cut_for(WatchedLink::Cut::cancelled);
    });
  }

  /// Cuts those that are in their hello.
  void cancel_opening() noexcept {
    const auto held = monitor_.lock();
    for (WatchedLink* each = first_; each != nullptr; each = each->behind_)
      if (each->opening()) each->cut_for(WatchedLink::Cut::cancelled);
  }

  void run() noexcept {
    engine::Monitor::Lock held = monitor_.lock();
    while (!monitor_.stopped(held)) {
      (void)monitor_.wait_until(held, std::chrono::steady_clock::now() + slice_, [] { return false; });
      const auto now = std::chrono::steady_clock::now();
      for (WatchedLink* each = first_; each != nullptr; each = each->behind_) {
        const std::chrono::milliseconds limit(each->limit_ms_.load(std::memory_order_relaxed));
        const std::uint64_t moved = each->moved_.get();
        if (limit.count() == 0 || moved != each->seen_bytes_) {
          each->seen_bytes_ = moved;
          each->since_ = now;
        } else if (now - each->since_ >= ProgressWatch::bounded(limit)) {
          each->cut_for(WatchedLink::Cut::late);
        }
      }
    }
  }

 private:
  engine::Monitor monitor_;
  WatchedLink* first_ = nullptr;
  WatchedLink* last_ = nullptr;
  unsigned count_ = 0;
  bool cancelled_ = false;
  std::chrono::milliseconds slice_{250};
  Thread thread_;
};

}  // namespace multifd::postcopy::detail
