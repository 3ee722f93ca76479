// SPDX-License-Identifier: MIT
//
// A source behind HAND_OVER of a guest whose memory follows: gives the destination pages until it has all of them, whatever
// becomes of the main connection (format/extension.md section 19.9).
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>

#include "multifd/format/extension.hpp"
#include "multifd/migrate/detail/page_connections.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/source_stream.hpp"
#include "multifd/migrate/ownership.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"

namespace multifd::migrate::detail {

/// Threads: one, the migration's. For one migration.
template <class Stacks>
class PageGiver {
 public:
  using Link = typename SourceStream<Stacks>::Link;

  /// Params: all outlive this object. `report`: has a SourcePostcopyReport.
  PageGiver(SourceStream<Stacks>& stream, PageConnections<Link>& pages, SourceOwnership& ownership,
            const SourceOptions& options, MigrationReporter& reporter, MigrationReport& report)
      : stream_(stream),
        pages_(pages),
        ownership_(ownership),
        options_(options),
        reporter_(reporter),
        report_(report),
        begin_(reporter.now()) {}
  PageGiver(const PageGiver&) = delete;
  PageGiver& operator=(const PageGiver&) = delete;
  ~PageGiver() { reporter_.channels({}, {}); }

  /// Params `heard`: RUNNING, or why it was not. Errors: Errc::memory_lost: cancelled while the destination was out of reach;
  ///   `heard`'s, of the same, where nobody knows whether the guest runs there; peer_gave_up: it does not.
  [[nodiscard]] Result<void> run(const Result<std::uint64_t>& heard) {
    if (heard) running();
    // No hook that gets no memory ends this: the guest would be lost.
    reporter_.channels([this] { return moved(); }, {});
    reporter_.end_status(MigrationStatus::postcopy_active);
    Time last_connected = begin_;
    for (unsigned cancels = reporter_.cancels(); !ended_ && !pages_.whole(); pages_.wait_a_moment()) {
      Result<void> listened;
      ignore_bad_alloc([&] { listened = listen(); });  // SourceOptions::on_user_data
      if (!listened) return listened;
      if (ownership_.owner() == Owner::destination) close_channels();
      const bool connected = pages_.connected() > 0;
      const bool paused = reporter_.is(MigrationStatus::postcopy_paused);
      const Time now = reporter_.now();
      if (connected && paused) {
        report_.postcopy->paused += now - last_connected;
        reporter_.end_status(MigrationStatus::postcopy_recover);
        reporter_.end_status(MigrationStatus::postcopy_active);
      } else if (!connected && !paused && now - last_connected > a_moment) {
        reporter_.end_status(MigrationStatus::postcopy_paused);
      }
      if (connected) last_connected = now;
      if (!paused) cancels = reporter_.cancels();
      if (reporter_.cancels() != cancels) return give_up(heard);
    }
    return end();
  }

 private:
  /// Connections end one after the other when all pages are there, and are made again when one is lost.
  static constexpr std::chrono::milliseconds a_moment{250};

  void running() {
    ownership_.running_there();
    reporter_.owner(ownership_);
  }

  /// Takes what the main connection has to say, if it is there still. Its loss ends nothing.
  /// Errors: Errc::peer_gave_up: the destination has not started the guest.
  [[nodiscard]] Result<void> listen() {
    auto& from = stream_.return_path;
    if (!main_lost_ && ownership_.owner() == Owner::unknown) {
      const auto heard = from.await(wire::ExtensionKind::running, std::chrono::milliseconds(0), nullptr);
      if (from.gave_up) return std::unexpected(heard.error());
      if (!heard && heard.error().code == Errc::timed_out) return {};
      if (heard) running();
      main_lost_ = !heard;
    }
    if (main_lost_) return {};
    const auto status = from.await(std::nullopt, std::chrono::milliseconds(0), nullptr);
    ended_ = status && *status == 0;
    main_lost_ = status || status.error().code != Errc::timed_out;
    return {};
  }

  [[nodiscard]] Result<void> give_up(const Result<std::uint64_t>& heard) {
    ownership_.memory_lost();
    reporter_.owner(ownership_);
    if (ownership_.owner() == Owner::unknown) return std::unexpected(heard.error());
    return fail(Errc::memory_lost, Stage::close, "cancelled while the destination was out of reach");
  }

  /// The destination needs nothing more. Where it can, it says its farewell.
  [[nodiscard]] Result<void> end() {
    ownership_.memory_there();
    reporter_.owner(ownership_);
    const postcopy::PageServerStats stats = pages_.stats();
    SourcePostcopyReport& report = *report_.postcopy;
    report.normal_pages = stats.normal_pages;
    report.zero_pages = stats.zero_pages;
    report.urgent_requests = stats.urgent_requests;
    report.wire_bytes = stats.wire_bytes;
    report.connections_lost = pages_.lost();
    report.time = reporter_.now() - begin_;
    close_channels();
    ignore_bad_alloc([&] {
      reporter_.step(MigrationStep::farewell);
      if (!main_lost_)
        static_cast<void>(stream_.return_path.await(std::nullopt, as_timeout(options_.farewell_timeout), nullptr));
    });
    static_cast<void>(stream_.main().finish());
    return {};
  }

  Moved moved() const {
    Moved moved = stream_.moved();
    const postcopy::PageServerStats stats = pages_.stats();
    moved.normal_pages += stats.normal_pages;
    moved.zero_pages += stats.zero_pages;
    moved.wire_bytes += stats.wire_bytes;
    return moved;
  }

  void close_channels() {
    if (std::exchange(channels_closed_, true)) return;
    static_cast<void>(stream_.sender().close_channels());
    ignore_bad_alloc([&] { report_.stats = stream_.stats(); });
  }

  SourceStream<Stacks>& stream_;
  PageConnections<Link>& pages_;
  SourceOwnership& ownership_;
  const SourceOptions& options_;
  MigrationReporter& reporter_;
  MigrationReport& report_;
  const Time begin_;
  bool main_lost_ = false;
  bool ended_ = false;  ///< SHUT(0) was read: the destination has all pages
  bool channels_closed_ = false;
};

}  // namespace multifd::migrate::detail
