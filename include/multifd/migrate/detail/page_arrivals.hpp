// SPDX-License-Identifier: MIT
//
// A destination's page connections (format/extension.md section 19.9): the source makes them, late_acceptor.hpp accepts them,
// and those who need one take it.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::migrate::detail {

/// Page connections that nobody has taken yet.
///
/// Threads: any.
template <Transport T>
class PageArrivals {
 public:
  /// From here on connections of other sessions are refused. Returns how many of those there were.
  unsigned expect(const Uuid& session) noexcept {
    unsigned others = 0;
    monitor_.update([&] {
      session_ = session;
      others =
          static_cast<unsigned>(std::erase_if(links_, [&](const Waiting& each) { return each.session != session; }));
    });
    return others;
  }

  enum class Added : std::uint8_t { yes, other_session };

  /// Once there are more than any source makes, the oldest is closed. Errors: ENOMEM.
  [[nodiscard]] Result<Added> add(T link, const Uuid& session) noexcept {
    return catch_bad_alloc(Stage::accept, "page connection", [&]() -> Result<Added> {
      return monitor_.update([&]() -> Result<Added> {
        if (session_ && session != *session_) return Added::other_session;
        if (links_.size() == wire::max_page_connections) links_.pop_front();
        links_.push_back({std::move(link), session});
        return Added::yes;
      });
    });
  }

  /// Waits for one. Errors: Errc::timed_out; cancelled by `interrupt`, or close().
  [[nodiscard]] Result<T> take(const Interrupt& interrupt, std::chrono::steady_clock::time_point deadline) noexcept {
    using Clock = std::chrono::steady_clock;
    auto held = monitor_.lock();
    static_cast<void>(monitor_.wait(
        held, std::chrono::milliseconds(50), [this] { return !links_.empty(); },
        [&] { return !interrupt.triggered() && Clock::now() < deadline; }));
    if (monitor_.stopped(held) || interrupt.triggered()) return fail(Errc::cancelled, Stage::accept, "page connection");
    if (links_.empty()) return fail(Errc::timed_out, Stage::accept, "page connection");
    T link = std::move(links_.back().link);  // the newest: older ones may have ended
    links_.pop_back();
    return link;
  }
  void close() noexcept { monitor_.stop(); }

 private:
  struct Waiting {
    T link;
    Uuid session;
  };
  engine::Monitor monitor_;  ///< of all below
  std::optional<Uuid> session_;
  std::deque<Waiting> links_;
};

}  // namespace multifd::migrate::detail
