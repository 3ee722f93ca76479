// SPDX-License-Identifier: MIT
//
// PageServer: answers the requests for pages that a RemotePages makes, over any number of connections
// (format/page_requests.md section 21). It keeps nothing about any page: what is asked for twice is sent twice.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <new>
#include <utility>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/format/page_requests.hpp"
#include "multifd/options.hpp"
#include "multifd/postcopy/detail/page_server_shared.hpp"
#include "multifd/postcopy/detail/served_link.hpp"
#include "multifd/postcopy/guest_pages.hpp"
#include "multifd/postcopy/page_server_options.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::postcopy {

/// Serves a PageStore, or guest memory without a copy.
///
/// Urgent connections come first: while an urgent request is being answered, no other connection begins a packet, or the
/// next piece of one.
///
/// Threads: any, all methods; open() and the destructor one.
/// Lifetime: the store must outlive the server. The destructor cancels, and waits for the threads of add(); no call of
///   serve() may be under way. Where the store's open() may block, cancel the store first.
template <Transport T, Compressor C = NoComp>
class PageServer {
 public:
  using Options = PageServerOptions<C>;

  /// Errors: Errc::bad_option; ENOMEM; of pthread_create(). Cost: one thread, which watches the time limits.
  [[nodiscard]] static Result<std::unique_ptr<PageServer>> open(GuestPages& guest, Options options = {}) {
    return open_at(guest, &guest, std::move(options));
  }
  [[nodiscard]] static Result<std::unique_ptr<PageServer>> open(PageStore& store, Options options = {}) {
    return open_at(store, nullptr, std::move(options));
  }
  PageServer(const PageServer&) = delete;
  PageServer& operator=(const PageServer&) = delete;
  ~PageServer() {
    cancel();
    for (Worker& worker : workers_) worker.thread.join();
  }

  /// Serves one connection in the caller's thread, until the client ends it. Who has dialled does not matter.
  ///
  /// Errors: those of the connection and of the store; what the client did wrong, which it was told; peer_gave_up;
  ///   cancelled; timed_out; ENOBUFS: too many connections.
  [[nodiscard]] Result<void> serve(T link) noexcept {
    Served served(shared_, next_number(), std::move(link));
    auto entered = shared_.watch.enter(served, shared_.options.max_connections);
    return entered ? run(served) : entered;
  }

  /// Serves one connection in a thread of its own, named mfd-page-N. Errors: as serve(), until it has started.
  [[nodiscard]] Result<void> add(T link) noexcept {
    join_finished();
    return catch_bad_alloc(Stage::setup, "page connection", [&]() -> Result<void> {
      std::list<Worker> made;
      const unsigned number = next_number();
      Worker& worker = made.emplace_back(*this, number, std::move(link));
      MULTIFD_TRY(shared_.watch.enter(worker.served, shared_.options.max_connections));
      return workers_monitor_.update([&]() -> Result<void> {
        auto thread = Thread::start(worker, shared_.options.thread_hook, {.role = "page", .channel = number});
        if (!thread) {
          shared_.watch.leave(worker.served);
          return std::unexpected(thread.error());
        }
        worker.thread = std::move(*thread);
        workers_.splice(workers_.end(), made);
        return {};
      });
    });
  }

  /// Whether a client has said that its guest has every page: the source's memory is not needed any more.
  bool whole() const noexcept {
    const auto held = shared_.end.lock();
    return shared_.whole;
  }

  /// Waits for that. Errors: Errc::timed_out; cancelled.
  [[nodiscard]] Result<void> wait_until_whole(std::chrono::milliseconds timeout) noexcept {
    auto held = shared_.end.lock();
    (void)shared_.end.wait_until(held, deadline_after(timeout), [this] { return shared_.whole; });
    if (shared_.whole) return {};
    if (shared_.end.stopped(held)) return fail(Errc::cancelled, Stage::close, "page server");
    return fail(Errc::timed_out, Stage::close, "page server: the guest does not have every page");
  }

  /// Cost: some loads; waits for no connection.
  PageServerStats stats() const noexcept {
    constexpr auto relaxed = std::memory_order_relaxed;
    return {.requests = shared_.requests.load(relaxed),
            .urgent_requests = shared_.urgent_requests.load(relaxed),
            .normal_pages = shared_.normal_pages.load(relaxed),
            .zero_pages = shared_.zero_pages.load(relaxed),
            .payload_bytes = shared_.payload_bytes.load(relaxed),
            .wire_bytes = shared_.wire_bytes.load(relaxed),
            .connections_seen = shared_.seen.load(relaxed),
            .connections_failed = shared_.failed.load(relaxed),
            .connections = shared_.watch.count(),
            .serving = shared_.serving.load(relaxed)};
  }

  /// Changes PageServerOptions::bandwidth; 0 lifts it.
  void set_bandwidth(std::uint64_t bytes_per_s) noexcept { shared_.limiter.set_rate(bytes_per_s); }

  /// Ends all connections, now and later, in bounded time.
  void cancel() noexcept {
    shared_.limiter.stop();
    shared_.end.stop();
    shared_.watch.cancel();
  }

 private:
  using Shared = detail::PageServerShared<C>;
  using Served = detail::ServedLink<T, C>;

  /// A connection of add(), and its thread.
  struct Worker {
    Worker(PageServer& of, unsigned number, T link) noexcept
        : server(of), served(of.shared_, number, std::move(link)) {}
    void run() noexcept {
      (void)server.run(served);
      server.workers_monitor_.update([this] { finished = true; });
    }

    PageServer& server;
    Served served;
    bool finished = false;  ///< guarded by the server's workers_monitor_
    Thread thread;
  };

  PageServer(PageStore& store, const GuestPages* guest, Options options) : shared_(store, guest, std::move(options)) {}

  [[nodiscard]] static Result<std::unique_ptr<PageServer>> open_at(PageStore& store, const GuestPages* guest,
                                                                   Options options) {
    const auto bad = [](const char* what, std::uint64_t value = 0) {
      return fail(Errc::bad_option, Stage::setup, what, value);
    };
    const std::span<const StoreBlock> blocks = store.blocks();
    if (blocks.empty() || blocks.size() > wire::max_page_blocks) return bad("PageServer: RAM blocks", blocks.size());
    if (options.max_connections == 0) return bad("PageServerOptions::max_connections");
    if (options.piece_bytes == 0) return bad("PageServerOptions::piece_bytes");
    MULTIFD_TRY(check_time_limit("PageServerOptions::hello_timeout", options.hello_timeout, Stage::setup));
    MULTIFD_TRY(check_time_limit("PageServerOptions::progress_timeout", options.progress_timeout, Stage::setup));
    return catch_bad_alloc(Stage::setup, "PageServer", [&]() -> Result<std::unique_ptr<PageServer>> {
      std::unique_ptr<PageServer> server(new PageServer(store, guest, std::move(options)));
      Shared& shared = server->shared_;
      for (const StoreBlock& block : blocks)
        shared.blocks.push_back({.idstr = block.idstr, .host = {}, .bytes = block.bytes, .access = Access::none});
      const auto shortest =
          std::min(as_timeout(shared.options.hello_timeout), as_timeout(shared.options.progress_timeout));
      MULTIFD_TRY(shared.watch.start(shortest, shared.options.thread_hook));
      return server;
    });
  }

  unsigned next_number() noexcept {
    return static_cast<unsigned>(shared_.seen.fetch_add(1, std::memory_order_relaxed) + 1);
  }

  [[nodiscard]] Result<void> run(Served& served) noexcept {
    auto ended = served.run();
    shared_.watch.leave(served);
    served.close();
    if (ended) return ended;
    shared_.failed.fetch_add(1, std::memory_order_relaxed);
    if (shared_.options.on_error) shared_.options.on_error(ended.error());
    return ended;
  }

  /// Takes down connections of add() that are over.
  void join_finished() noexcept {
    std::list<Worker> over;
    workers_monitor_.update([&] {
      for (auto worker = workers_.begin(); worker != workers_.end();) {
        const auto next = std::next(worker);
        if (worker->finished) over.splice(over.end(), workers_, worker);
        worker = next;
      }
    });
    for (Worker& worker : over) worker.thread.join();
  }

  Shared shared_;
  engine::Monitor workers_monitor_;  ///< guards workers_
  std::list<Worker> workers_;
};

}  // namespace multifd::postcopy
