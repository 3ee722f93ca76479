// SPDX-License-Identifier: MIT
//
// RemotePages: a PageStore whose pages come from a PageServer elsewhere, over connections that may be lost and made anew
// (format/page_requests.md section 21).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/options.hpp"
#include "multifd/postcopy/detail/remote_link.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/postcopy/remote_pages_options.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::postcopy {

/// A fetcher is one connection. All connections are alike to the server, but for their kind.
///
/// Threads: any, all methods; open() and the destructor one.
template <Transport T, Compressor C = NoComp>
class RemotePages final : public PageStore {
 public:
  using Options = RemotePagesOptions<C>;
  /// Makes a connection, or waits for one that the server makes. May block, but not when the Interrupt is triggered;
  /// called again after an error, less and less often, and by several threads at once. Must not throw.
  using Connect = std::function<Result<T>(FetchKind, const Interrupt&)>;

  /// Errors: Errc::bad_option, bad_page_size; without `blocks` those of one connection: of `connect`, peer_gave_up with
  ///   the server's reason, wrong_session, page_size_mismatch, wrong_compression. Cost: one thread, one descriptor.
  [[nodiscard]] static Result<std::unique_ptr<RemotePages>> open(Connect connect, Options options = {}) {
    if (auto good = check(options); !good) return std::unexpected(good.error());
    MULTIFD_TRY_ASSIGN(auto interrupt, Interrupt::create());
    return catch_bad_alloc(Stage::setup, "RemotePages", [&]() -> Result<std::unique_ptr<RemotePages>> {
      std::unique_ptr<RemotePages> pages(new RemotePages(std::move(connect), std::move(interrupt), std::move(options)));
      Shared& shared = pages->shared_;
      const auto shortest =
          std::min(as_timeout(shared.options.hello_timeout), as_timeout(shared.options.progress_timeout));
      if (auto started = shared.watch.start(shortest, shared.options.thread_hook); !started)
        return std::unexpected(started.error());
      if (!shared.blocks.empty()) return pages;
      auto first = pages->link(FetchKind::background, pages->interrupt_, Link::Purpose::fetch);
      if (!first) return std::unexpected(first.error());
      shared.page_bytes = (*first)->page_bytes();
      shared.blocks = std::move((*first)->server_blocks());
      return pages;
    });
  }

  using PageStore::open;

  std::span<const StoreBlock> blocks() const noexcept override { return shared_.blocks; }
  std::size_t page_bytes() const noexcept override { return shared_.page_bytes; }

  /// A lost connection, or one that was silent for too long; not what a server does wrong, or says.
  bool may_return(const Error& error) const noexcept override {
    if (error.code == Errc::peer_gave_up || error.code == Errc::memory_lost) return false;
    return error.code == Condition::peer_gone || error.code == Condition::timed_out;
  }

  /// Does not end fetchers, nor finish().
  void cancel() noexcept override {
    shared_.cancelled.store(true, std::memory_order_relaxed);
    interrupt_.trigger();
    pause_.stop();
    shared_.watch.cancel_opening();
  }

  /// Tells the server that the guest has every page, over a connection of its own, and waits until it has heard that. Also
  /// behind cancel().
  ///
  /// Params `timeout`: for all tries (time_limit.hpp); `interrupt`: ends them between two waits, may be null.
  /// Errors: timed_out, with the last reason; cancelled; as open(). Whatever comes back, the guest needs the server no more.
  [[nodiscard]] Result<void> finish(std::chrono::milliseconds timeout = std::chrono::seconds(10),
                                    const Interrupt* interrupt = nullptr) noexcept {
    MULTIFD_TRY_ASSIGN(const auto none, Interrupt::create());
    if (interrupt == nullptr) interrupt = &none;
    const engine::Monitor pause;
    return again_and_again(pause, *interrupt, as_timeout(timeout), Errc::timed_out, [&]() -> Result<void> {
      auto made = link(FetchKind::background, *interrupt, Link::Purpose::finish);
      return made ? (*made)->say_whole() : std::unexpected(made.error());
    });
  }

  /// Cost: some loads.
  RemotePagesStats stats() const noexcept {
    constexpr auto relaxed = std::memory_order_relaxed;
    return {.connections_made = shared_.made.load(relaxed),
            .connections_lost = shared_.lost.load(relaxed),
            .wire_bytes = shared_.wire_bytes.load(relaxed)};
  }

 private:
  using Shared = detail::RemotePagesShared<C>;
  using Link = detail::RemoteLink<T, C>;

  RemotePages(Connect connect, Interrupt interrupt, Options options)
      : connect_(std::move(connect)), interrupt_(std::move(interrupt)), shared_(std::move(options)) {}

  [[nodiscard]] static Result<void> check(const Options& options) {
    constexpr auto stage = Stage::setup;
    if (options.window < 1 || options.window > max_page_window)
      return fail(Errc::bad_option, stage, "RemotePagesOptions::window", options.window, max_page_window);
    if (!valid_page_bytes(options.page_bytes) && (options.page_bytes != 0 || !options.blocks.empty()))
      return fail(Errc::bad_page_size, stage, "RemotePagesOptions::page_bytes", options.page_bytes);
    MULTIFD_TRY(check_time_limit("RemotePagesOptions::hello_timeout", options.hello_timeout, stage));
    MULTIFD_TRY(check_time_limit("RemotePagesOptions::progress_timeout", options.progress_timeout, stage));
    return check_time_limit("RemotePagesOptions::reconnect_timeout", options.reconnect_timeout, stage);
  }

  [[nodiscard]] Result<std::unique_ptr<PageFetcher>> do_open(FetchKind kind) noexcept override {
    std::unique_ptr<PageFetcher> fetcher;
    auto opened = again_and_again(pause_, interrupt_, as_timeout(shared_.options.reconnect_timeout), Errc::memory_lost,
                                  [&]() -> Result<void> {
                                    auto made = link(kind, interrupt_, Link::Purpose::fetch);
                                    if (!made) return std::unexpected(made.error());
                                    fetcher = std::move(*made);
                                    return {};
                                  });
    if (!opened) return std::unexpected(opened.error());
    return fetcher;
  }

  /// One connection, and its hello.
  [[nodiscard]] Result<std::unique_ptr<Link>> link(FetchKind kind, const Interrupt& interrupt,
                                                   typename Link::Purpose purpose) noexcept {
    auto connected = connect_(kind, interrupt);
    if (!connected) return std::unexpected(connected.error());
    return Link::create(shared_, kind, std::move(*connected), purpose);
  }

  /// Whether another try may succeed. Beside what may return: whatever keeps one from connecting, a socket that is not there
  /// yet for instance.
  bool try_again(const Error& error) const noexcept {
    const bool connecting = error.stage == Stage::connect || error.stage == Stage::accept;
    return may_return(error) || (connecting && error.code == Condition::local_io);
  }

  /// Calls `attempt` until it succeeds or what it returns cannot be mended, less and less often, for so long. Between two
  /// tries it waits at `monitor`.
  template <class Attempt>
  [[nodiscard]] Result<void> again_and_again(const engine::Monitor& monitor, const Interrupt& interrupt,
                                             std::chrono::milliseconds limit, Errc too_late,
                                             Attempt&& attempt) noexcept {
    using namespace std::chrono_literals;
    const auto deadline = deadline_after(limit);
    for (std::chrono::milliseconds pause = 5ms;; pause = std::min<std::chrono::milliseconds>(pause * 2, 500ms)) {
      auto done = attempt();
      if (done) return done;
      if (interrupt.triggered()) return fail(Errc::cancelled, Stage::connect, "page connection");
      if (!try_again(done.error())) return done;
      const auto next = std::min(deadline, deadline_after(pause));
      auto held = monitor.lock();
      (void)monitor.wait_until(held, next, [] { return false; });
      if (monitor.stopped(held)) return fail(Errc::cancelled, Stage::connect, "page connection");
      if (next != deadline) continue;
      Error error = done.error();
      error.peer_reason = error.peer_reason ? error.peer_reason : error.code;
      error.code = too_late;
      return std::unexpected(error);
    }
  }

  const Connect connect_;
  Interrupt interrupt_;
  engine::Monitor pause_;  ///< stopped by cancel()
  Shared shared_;
};

}  // namespace multifd::postcopy
