// SPDX-License-Identifier: MIT
//
// One migration at its source, from the first byte to the last (format/roles.md section 18, format/extension.md section
// 19.3).
//
//   open         the channels' hellos; the question, SETTINGS, RAM's START  ->  ACCEPTED      source_stream.hpp
//   rounds       PART: rearm and queue what is dirty, close the epoch, wait, fetch, decide    precopy.hpp
//   switchover   the guest stops; END: what is dirty still; devices, digests, STATE_WHOLE  ->  LOADED
//   hand over    HAND_OVER, the stream's end  ->  RUNNING, SHUT(0)
//
// Where the memory follows, END has no pages: MISSING_PAGES and MEMORY_FOLLOWS name them, and the destination asks for them
// on connections of their own (page_connections.hpp), which are made before the guest stops, and last until it has all.
#pragma once

#include <poll.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/page_connections.hpp"
#include "multifd/migrate/detail/page_giver.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/detail/precopy.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/source_stream.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/ownership.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/qemu/vm_description.hpp"

namespace multifd::migrate::detail {

/// Threads: one. For one migration.
template <class Stacks, SourceGuest G>
class SourceRun {
 public:
  using Link = typename SourceStream<Stacks>::Link;

  /// Params: all outlive this object.
  SourceRun(G& guest, const SourceOptions& options, Migration& migration, PathSet<Link>& paths)
      : guest_(guest), options_(options), paths_(paths), reporter_(migration, options.on_event) {}

  /// Params `connect`: returns a Result of the SourceLinks; called when the options are good, and the guest has said its memory.
  template <class Connect>
  [[nodiscard]] Result<MigrationReport> migrate(Connect&& connect) {
    // Without memory, too, the guest has to be resumed, and the destination told.
    Result<void> done = catch_bad_alloc(Stage::none, "migrate_to", [&] { return run(connect); });
    // Where RUNNING was read the migration has completed, whatever came then, but for memory that was to follow.
    if (!done && (ownership_.owner() != Owner::destination || done.error().code == Errc::memory_lost))
      return std::unexpected(give_up(done.error()));
    report_.total = reporter_.now();
    reporter_.channels({}, {});
    reporter_.end_status(MigrationStatus::completed);
    return std::move(report_);
  }

 private:
  template <class Connect>
  [[nodiscard]] Result<void> run(Connect& connect) {
    reporter_.owner(ownership_);
    reporter_.status(MigrationStatus::setup);
    MULTIFD_TRY(check_options());
    MULTIFD_TRY_ASSIGN(ram_, guest_.ram());
    reporter_.memory(ram_->total_bytes());
    MULTIFD_TRY_ASSIGN(SourceLinks<Link> links, connect());
    if (options_.resume.enabled) {
      MULTIFD_TRY_ASSIGN(Interrupt stop, Interrupt::create());
      MULTIFD_TRY_ASSIGN(Interrupt never, Interrupt::create());
      reconnect_.emplace(paths_, options_.resume, reporter_.interrupt(), std::move(stop), std::move(never),
                         options_.on_path);
    }
    stream_.emplace(*ram_, std::move(links.main), options_, reporter_, paths_, reconnect_ ? &*reconnect_ : nullptr);
    MULTIFD_TRY(stream_->open(std::move(links.channels)));
    report_.own_peer = stream_->own_peer();
    reporter_.status(MigrationStatus::active);
    precopy_.emplace(guest_, *ram_, options_, reporter_, *stream_, report_);
    MULTIFD_TRY(options_.postcopy.strategy == Postcopy::at_once ? precopy_->send_no_round() : precopy_->run());
    if (report_.switchover.action == Action::memory_on_demand) {
      MULTIFD_TRY(connect_for_pages());
    }
    MULTIFD_TRY(switch_over());
    return hand_over();
  }

  [[nodiscard]] Result<void> check_options() const noexcept {
    if (options_.user.size() > wire::max_user_setting_bytes)
      return fail(Errc::bad_option, Stage::setup, "SourceOptions::user", options_.user.size(),
                  wire::max_user_setting_bytes);
    MULTIFD_TRY(check_postcopy());
    MULTIFD_TRY(check_resume());
    for (const auto& [name, limit] : {std::pair("SourceOptions::answer_timeout", options_.answer_timeout),
                                      std::pair("SourceOptions::load_timeout", options_.load_timeout),
                                      std::pair("SourceOptions::farewell_timeout", options_.farewell_timeout)}) {
      MULTIFD_TRY(check_time_limit(name, limit, Stage::setup));
    }
    return {};
  }

  [[nodiscard]] Result<void> check_resume() const noexcept {
    if (!options_.resume.enabled) return {};
    if (!paths_.can_dial())
      return fail(Errc::bad_option, Stage::setup,
                  "ResumeOptions::enabled: migrate_to() has links and no way to make them again");
    if (options_.resume.path_timeout < std::chrono::milliseconds(1000))
      return fail(Errc::bad_option, Stage::setup, "ResumeOptions::path_timeout",
                  static_cast<std::uint64_t>(options_.resume.path_timeout.count()), 1000);
    return check_time_limit("ResumeOptions::timeout", options_.resume.timeout, Stage::setup);
  }

  [[nodiscard]] Result<void> check_postcopy() const noexcept {
    const PostcopyOptions& postcopy = options_.postcopy;
    if (postcopy.channels > max_channels)
      return fail(Errc::bad_option, Stage::setup, "PostcopyOptions::channels", postcopy.channels, max_channels);
    if (postcopy.strategy == Postcopy::never) {
      if (options_.converge.at_time_limit == Action::memory_on_demand)
        return fail(Errc::not_supported, Stage::setup,
                    "ConvergeOptions::at_time_limit: memory on demand, without PostcopyOptions::strategy");
      return {};
    }
    if (options_.verify == Verify::required)
      return fail(Errc::bad_option, Stage::setup,
                  "SourceOptions::verify: memory that follows cannot be compared (PostcopyOptions::strategy)");
    if (!paths_.can_dial())
      return fail(Errc::bad_option, Stage::setup,
                  "PostcopyOptions::strategy: migrate_to() has links and no way to make page connections");
    return {};
  }

  // ---- Switchover

  /// Ahead of the switchover, because connecting takes time.
  [[nodiscard]] Result<void> connect_for_pages() {
    const unsigned channels = options_.postcopy.channels != 0 ? options_.postcopy.channels : stream_->channels();
    MULTIFD_TRY_ASSIGN(pages_, PageConnections<Link>::create(channels + 1, dial_page_, no_hook_));
    return pages_->connect(reporter_.interrupt());
  }

  /// Ends RAM, and names what the destination does not have; from here on it may ask for that.
  [[nodiscard]] Result<void> announce_missing() {
    MULTIFD_TRY_ASSIGN(const DirtyBitmaps* missing, precopy_->send_no_last_round());
    const auto& blocks = stream_->blocks();
    for (std::uint32_t i = 0; i < blocks.size(); ++i) {
      MULTIFD_TRY_ASSIGN(const BlockId block, ram_->find(blocks[i].idstr));
      MULTIFD_TRY(stream_->writer.missing_pages(i, (*missing)[block]));
    }
    report_.postcopy.emplace().missing_pages = missing->count();
    reporter_.missing(report_.postcopy->missing_pages);
    ownership_.memory_follows();
    MULTIFD_TRY(stream_->writer.memory_follows({.pages = report_.postcopy->missing_pages,
                                                .connections = static_cast<std::uint16_t>(pages_->count()),
                                                .session = pages_->session()}));
    MULTIFD_TRY(stream_->writer.push_out());
    stream_->end_return();  // the page connections return by themselves, and outlive the main one
    return pages_->serve(*ram_, options_.postcopy.bandwidth);
  }

  [[nodiscard]] Result<void> switch_over() {
    if (options_.pause_before_switchover) {
      MULTIFD_TRY(pause());
      reporter_.status(MigrationStatus::pre_switchover);
      MULTIFD_TRY(wait_for_proceed());
    }
    reporter_.status(MigrationStatus::device);
    const Time stopped = reporter_.now();
    MULTIFD_TRY(pause());
    reporter_.step(MigrationStep::pages);
    MULTIFD_TRY(pages_ ? announce_missing() : precopy_->send_last_round());
    report_.downtime.pages = reporter_.now() - stopped - report_.downtime.sync;
    const Time saving = reporter_.now();
    reporter_.step(MigrationStep::device_state);
    MULTIFD_TRY(save_devices());
    report_.downtime.device_state = reporter_.now() - saving;
    if (!report_.own_peer) return stream_->writer.push_out();
    if (verifies()) {
      MULTIFD_TRY(send_digests());
    }
    MULTIFD_TRY(stream_->writer.state_whole());
    MULTIFD_TRY(stream_->writer.push_out());
    const Time waiting = reporter_.now();
    reporter_.step(MigrationStep::load);
    MULTIFD_TRY_ASSIGN(report_.pages_verified,
                       stream_->return_path.await(wire::ExtensionKind::loaded, as_timeout(options_.load_timeout),
                                                  &reporter_.interrupt()));
    // The destination compares meanwhile, and loading cannot be told from that.
    (verifies() ? report_.verify : report_.downtime.round_trip) += reporter_.now() - waiting;
    return {};
  }
  /// What is missing cannot be compared.
  bool verifies() const noexcept { return stream_->verifies() && !pages_; }

  [[nodiscard]] Result<void> pause() {
    if (paused_) return {};
    paused_ = true;                                                  // a pause() that fails may have stopped some vCPUs
    if (reconnect_) reconnect_->set_timeout(options_.load_timeout);  // the guest does not stand still for longer
    return guest_.pause();
  }

  [[nodiscard]] Result<void> wait_for_proceed() {
    // Somebody else does what has to be done while the guest stands still; that has no limit.
    std::array<pollfd, 3> events{{{reporter_.proceed().native_handle(), POLLIN, 0},
                                  {reporter_.interrupt().native_handle(), POLLIN, 0},
                                  {stream_->main().native_handle(), POLLIN, 0}}};
    for (;;) {
      events[2].fd = stream_->main().native_handle();  // another one behind a lost connection
      if (::poll(events.data(), events.size(), 1000) < 0 && errno != EINTR)
        return fail_errno(Stage::none, "poll, ahead of the switchover");
      if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::none, "ahead of the switchover");
      if (reporter_.proceed().triggered()) return {};
      MULTIFD_TRY(stream_->return_path.poll(&reporter_.interrupt()));
    }
  }

  /// Gives the guest's state to the main stream, and remembers what is in it.
  class DeviceWriter final : public StateWriter {
   public:
    DeviceWriter(qemu::MainStreamWriter<ResumableLink<Link>>& writer, qemu::VmDescription& description)
        : writer_(writer), description_(description) {}

   private:
    [[nodiscard]] Result<void> do_device(const qemu::DeviceSection& device, std::span<const std::byte> state) override {
      MULTIFD_TRY(writer_.device(device, state));
      return description_.add(device, state.size());
    }
    qemu::MainStreamWriter<ResumableLink<Link>>& writer_;
    qemu::VmDescription& description_;
  };

  [[nodiscard]] Result<void> save_devices() {
    DeviceWriter to(stream_->writer, description_);
    return guest_.save(to);
  }

  [[nodiscard]] Result<void> send_digests() {
    const Time began = reporter_.now();
    reporter_.step(MigrationStep::verify);
    const auto& blocks = stream_->blocks();
    // The guest stands still. What it says of its zeros is not asked: this is to find where that was wrong.
    const DirtyBitmaps zeros = options_.find_untouched ? untouched_in(*ram_) : DirtyBitmaps(*ram_);
    for (std::uint32_t i = 0; i < blocks.size(); ++i) {
      MULTIFD_TRY_ASSIGN(const BlockId block, ram_->find(blocks[i].idstr));
      MULTIFD_TRY(stream_->writer.page_digests(i, ram_->block(block).host, zeros[block]));
    }
    MULTIFD_TRY(stream_->writer.push_out());
    report_.verify = reporter_.now() - began;
    return {};
  }

  // ---- Hand-over

  [[nodiscard]] Result<void> hand_over() {
    if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::none, "ahead of the hand-over");
    MULTIFD_TRY_ASSIGN(const std::string description, description_.text());
    const Time began = reporter_.now();
    reporter_.step(MigrationStep::hand_over);
    // From here on nothing is cancelled: the destination may be told to run the guest.
    stream_->writer.set_limits(as_timeout(options_.load_timeout), nullptr);
    if (reconnect_) reconnect_->set_main_timeout(options_.load_timeout);
    ownership_.hand_over();
    reporter_.owner(ownership_);
    const auto heard =
        catch_bad_alloc(Stage::close, "migrate_to", [&] { return give_away(description); });  // on_user_data
    // Without the destination's word it may run the guest all the same, and need its memory.
    if (pages_ && !stream_->return_path.gave_up) {
      if (heard) report_.downtime.round_trip += reporter_.now() - began;
      precopy_->release();
      return PageGiver<Stacks>(*stream_, *pages_, ownership_, options_, reporter_, report_).run(heard);
    }
    MULTIFD_TRY_ASSIGN(const std::uint64_t status, heard);
    if (!report_.own_peer && status != 0) {
      ownership_.refused();
      return fail(Errc::peer_gave_up, Stage::close, "the destination could not load the guest: SHUT", status);
    }
    ownership_.running_there();
    reporter_.owner(ownership_);
    report_.downtime.round_trip += reporter_.now() - began;
    precopy_->release();
    reporter_.step(MigrationStep::farewell);
    // The guest runs there: what goes wrong from here on takes nothing away.
    if (reconnect_) reconnect_->set_main_timeout(options_.farewell_timeout);
    static_cast<void>(stream_->sender().close_channels());
    report_.stats = stream_->stats();
    if (report_.own_peer)
      static_cast<void>(
          stream_->return_path.await(std::nullopt, as_timeout(options_.farewell_timeout), &reporter_.interrupt()));
    static_cast<void>(stream_->main().finish());
    return {};
  }

  /// Lets the destination run the guest, and waits for its word. Behind an error it may run it all the same: also a write
  /// that fails may have arrived.
  [[nodiscard]] Result<std::uint64_t> give_away(const std::string& description) {
    if (report_.own_peer) {
      MULTIFD_TRY(stream_->writer.hand_over());
    }
    MULTIFD_TRY(stream_->writer.end_stream(description));
    MULTIFD_TRY(stream_->writer.push_out());
    const auto wanted = report_.own_peer ? std::optional(wire::ExtensionKind::running) : std::nullopt;
    return stream_->return_path.await(wanted, as_timeout(options_.load_timeout), nullptr);
  }

  // ---- The end without a migration

  /// Everything is as before, unless the guest has been handed over. Returns the reason: the destination's own, if it has
  /// said one.
  [[nodiscard]] Error give_up(Error error) {
    const bool cancelled = error.code == Errc::cancelled;
    if (cancelled) reporter_.end_status(MigrationStatus::cancelling);
    pages_.reset();
    if (stream_) stream_->end_return();
    if (precopy_) precopy_->release();
    resume();  // first, because the reason may take a moment to arrive
    if (!cancelled && stream_) ignore_bad_alloc([&] { error = reason(error); });
    resume();
    if (stream_) {
      if (stream_->own_peer() && ownership_.may_run()) {
        stream_->writer.set_limits(farewell, nullptr);
        say_reason(error, options_.reason,
                   [&](std::string_view text) { static_cast<void>(stream_->writer.failed(error, text)); });
      }
      ignore_bad_alloc([&] { reporter_.peer_gave_up(stream_->return_path.failure.text()); });
      stream_->cancel();
    }
    reporter_.owner(ownership_);
    reporter_.end_status(cancelled ? MigrationStatus::cancelled : MigrationStatus::failed);
    return error;
  }

  /// The guest goes on, if it may.
  void resume() {
    if (!ownership_.may_run() || !std::exchange(paused_, false)) return;
    const auto resumed = catch_bad_alloc(Stage::none, "SourceGuest::resume", [&] { return guest_.resume(); });
    if (!resumed) reporter_.not_resumed(resumed.error());
  }

  /// A destination that gives up says why, and then breaks everything: whatever was noticed first, that is the reason.
  Error reason(const Error& error) {
    if (error.code != Condition::peer_gone) return error;
    // Channels are told as well, but only the main connection has the text.
    Error cause = error;
    auto& from = stream_->return_path;
    if (!from.gave_up) {
      const auto said = from.await(wire::ExtensionKind::failed, farewell, nullptr);
      if (said || !from.gave_up) return error;
      cause = said.error();
    }
    ownership_.refused();
    return cause;
  }

  G& guest_;
  const SourceOptions& options_;
  PathSet<Link>& paths_;
  const Dial<Link> dial_page_ = [this](const Interrupt& interrupt) { return paths_.dial_any(interrupt); };
  const ThreadHook no_hook_{};  ///< SourceOptions::thread_hook is for the channels
  MigrationReporter reporter_;
  MigrationReport report_{};
  SourceOwnership ownership_{};
  bool paused_ = false;
  qemu::VmDescription description_{};
  std::optional<RamMap> ram_;
  std::optional<SourceReconnect<Link>> reconnect_;  ///< where lost connections return
  std::optional<SourceStream<Stacks>> stream_;
  std::optional<Precopy<Stacks, G>> precopy_;
  std::unique_ptr<PageConnections<Link>> pages_;  ///< where the memory follows
};

}  // namespace multifd::migrate::detail
