// SPDX-License-Identifier: MIT
//
// Accepts what a source connects later than at the beginning: page connections (format/extension.md section 19.9) and
// connections that take a lost one's place (19.10).
#pragma once

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <functional>
#include <list>
#include <optional>
#include <span>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/migrate/detail/destination_reconnect.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/page_arrivals.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::migrate::detail {

/// Accepts connections that a migration's source makes late, and closes all others: they are strangers'.
///
/// Threads: one; it has one of its own.
template <Acceptor A, Transport T>
class LateAcceptor {
 public:
  /// Params: all outlive this object. `returning`: null: no connection returns. `on_stranger`: called by the own thread; may
  /// be empty.
  LateAcceptor(A& acceptor, PageArrivals<T>& arrivals, DestinationReconnect<T>* returning,
               const std::function<void(const char*)>& on_stranger)
      : acceptor_(acceptor), arrivals_(arrivals), returning_(returning), on_stranger_(on_stranger) {}
  LateAcceptor(const LateAcceptor&) = delete;
  LateAcceptor& operator=(const LateAcceptor&) = delete;
  ~LateAcceptor() {
    arrivals_.close();
    if (stop_) stop_->trigger();
    thread_.join();
  }

  /// Errors: the errno of eventfd() and pthread_create().
  [[nodiscard]] Result<void> start(const ThreadHook& hook) {
    MULTIFD_TRY_ASSIGN(stop_, Interrupt::create());
    MULTIFD_TRY_ASSIGN(thread_, Thread::start(*this, hook, {.role = "acc", .channel = 0}));
    return {};
  }

  void run() noexcept {
    while (!stop_->triggered()) {
      const bool look_again = std::ranges::any_of(begun_, [](const Begun& each) { return is_secured(each.link); });
      const auto arrived = catch_bad_alloc(Stage::accept, "page connection", [&]() -> Result<void> {
        auto next = acceptor_.next(deadline_after(std::chrono::milliseconds(look_again ? 50 : 1000)), &*stop_);
        if (!next) return std::unexpected(next.error());
        if (!*next) return {};
        return begin(std::move(**next));
      });
      read_on();
      // Out of descriptors or memory: what waits goes on waiting.
      if (!arrived && arrived.error().code != Errc::timed_out && !stop_->triggered()) {
        auto held = rest_.lock();
        static_cast<void>(rest_.wait_until(held, deadline_after(std::chrono::milliseconds(20)), [] { return false; }));
      }
    }
  }

 private:
  /// A connection that has not said its session yet.
  struct Begun {
    typename A::Link link;
    bool returns = false;  ///< it says REJOIN, else the session of page connections
    std::array<std::byte, std::max(wire::page_connection_bytes, wire::rejoin_bytes)> said{};
    std::size_t size = 0;

    std::size_t whole() const noexcept { return returns ? wire::rejoin_bytes : wire::page_connection_bytes; }
  };
  static constexpr std::size_t most_begun = 64;

  [[nodiscard]] Result<void> begin(Arrival<typename A::Link> arrival) {
    const bool returns = arrival.magic == wire::rejoin_magic && returning_ != nullptr;
    if (arrival.magic != wire::page_connection_magic && !returns) {
      if (arrival.magic) stranger("a connection that is none of this migration's");
      return {};
    }
    MULTIFD_TRY(acceptor_.watch_end(arrival.link, EPOLLIN));
    if (begun_.size() == most_begun) {
      begun_.pop_front();
      stranger("a connection that did not say its session");
    }
    begun_.push_back({.link = std::move(arrival.link), .returns = returns});
    return {};
  }

  /// Reads what has come, and never waits.
  void read_on() noexcept {
    for (auto each = begun_.begin(); each != begun_.end();) {
      const iovec room = mutable_buffer(std::span(each->said).first(each->whole()).subspan(each->size));
      const auto got = each->link.read_now(std::span(&room, 1));
      if (got) each->size += *got;
      const bool whole = each->size == each->whole();
      if (got && !whole) {
        ++each;
        continue;
      }
      if (whole) add(*each);
      each = begun_.erase(each);
    }
  }

  void add(Begun& begun) noexcept {
    if (begun.returns) {
      const auto rejoin = wire::parse_rejoin(std::span(begun.said).template first<wire::rejoin_bytes>());
      if (!rejoin) return stranger("a connection whose REJOIN is malformed");
      if (const char* refused = returning_->offer(T(std::move(begun.link)), *rejoin)) stranger(refused);
      return;
    }
    const auto session =
        wire::parse_page_connection(std::span(begun.said).template first<wire::page_connection_bytes>());
    if (!session) return;
    const auto added = arrivals_.add(T(std::move(begun.link)), *session);
    if (added && *added == PageArrivals<T>::Added::other_session) stranger("a page connection of another migration");
  }

  void stranger(const char* why) const noexcept {
    if (on_stranger_) on_stranger_(why);
  }

  A& acceptor_;
  PageArrivals<T>& arrivals_;
  DestinationReconnect<T>* const returning_;
  const std::function<void(const char*)>& on_stranger_;
  std::optional<Interrupt> stop_;
  engine::Monitor rest_;
  std::list<Begun> begun_;
  Thread thread_;
};

}  // namespace multifd::migrate::detail
