// SPDX-License-Identifier: MIT
//
// One migration at its source, from the first byte to the last (format/roles.md section 18, format/extension.md section
// 19.3).
//
//   open         the channels' hellos; the question, SETTINGS, RAM's START  ->  ACCEPTED
//   rounds       PART: rearm and queue what is dirty, close the epoch, wait, fetch, decide
//   switchover   the guest stops; END: what is dirty still; devices, digests, STATE_WHOLE  ->  LOADED
//   hand over    HAND_OVER, the stream's end  ->  RUNNING, SHUT(0)
#pragma once

#include <poll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/return_path.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/peer_handshake.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/vm_description.hpp"
#include "multifd/stack.hpp"

namespace multifd::migrate::detail {

/// Threads: one. For one migration.
template <class Stacks, SourceGuest G>
class SourceRun {
 public:
  using Link = typename Stacks::Link;

  SourceRun(G& guest, const SourceOptions& options, Migration& migration)
      : guest_(guest), options_(options), reporter_(migration, options.on_event) {}

  [[nodiscard]] Result<MigrationReport> migrate(SourceLinks<Link> links) {
    reporter_.status(MigrationStatus::setup);
    main_.emplace(std::move(links.main));
    Result<void> done = run(std::move(links.channels));
    if (!done) return std::unexpected(give_up(done.error()));
    report_.total = reporter_.now();
    reporter_.channels({}, {});
    reporter_.status(MigrationStatus::completed);
    return std::move(report_);
  }

 private:
  using Rounds = Convergence<AnySwitchRule, AnyThrottleRule>;

  [[nodiscard]] Result<void> run(std::vector<Link> channels) {
    MULTIFD_TRY(check_options());
    MULTIFD_TRY_ASSIGN(ram_, guest_.ram());
    reporter_.memory(ram_->total_bytes());
    MULTIFD_TRY(open(std::move(channels)));
    reporter_.status(MigrationStatus::active);
    MULTIFD_TRY(rounds());
    MULTIFD_TRY(switch_over());
    return hand_over();
  }

  // ---- Setup

  [[nodiscard]] Result<void> check_options() const noexcept {
    if (options_.user.size() > wire::max_user_setting_bytes)
      return fail(Errc::bad_option, Stage::setup, "SourceOptions::user", options_.user.size(),
                  wire::max_user_setting_bytes);
    if (options_.converge.at_time_limit == Action::memory_on_demand)
      return fail(Errc::not_supported, Stage::setup, "ConvergeOptions::at_time_limit: memory on demand");
    for (const auto& [name, limit] : {std::pair("SourceOptions::answer_timeout", options_.answer_timeout),
                                      std::pair("SourceOptions::load_timeout", options_.load_timeout),
                                      std::pair("SourceOptions::farewell_timeout", options_.farewell_timeout)}) {
      MULTIFD_TRY(check_time_limit(name, limit, Stage::setup));
    }
    return {};
  }

  [[nodiscard]] Result<void> open(std::vector<Link> channels) {
    report_.own_peer = options_.peer.digests;
    const auto count = static_cast<std::uint32_t>(channels.size());
    MULTIFD_TRY(open_sender(std::move(channels)));
    MULTIFD_TRY_ASSIGN(blocks_, qemu::announced_blocks(*ram_));
    writer_.emplace(*main_, qemu::style_of(options_.machine_type, options_.peer, ram_->page_bytes()));
    writer_->set_limits(as_timeout(options_.progress_timeout), &reporter_.interrupt());
    return_path_.emplace(*main_, options_.on_user_data);

    MULTIFD_TRY(writer_->begin_stream({.machine_type = options_.machine_type}));
    MULTIFD_TRY(writer_->open_return_path());
    wire::PeerSettings settings;
    if (report_.own_peer) {
      const Time asked = reporter_.now();
      MULTIFD_TRY_ASSIGN(const auto version, qemu::ask_peer(*writer_, return_path_->reader,
                                                            as_timeout(options_.answer_timeout),
                                                            &reporter_.interrupt()));
      round_trip_ = reporter_.now() - asked;
      report_.own_peer = version.has_value();
      if (version) settings = own_settings(*version, count);
    }
    if (!report_.own_peer && options_.verify)
      return fail(Errc::peer_lacks_confirmation, Stage::setup, "SourceOptions::verify: the destination is no multifd");
    if (report_.own_peer) {
      MULTIFD_TRY(writer_->settings(settings));
    }
    MULTIFD_TRY(writer_->start_ram(blocks_));
    MULTIFD_TRY(close_epoch());
    if (!report_.own_peer) return {};
    MULTIFD_TRY_ASSIGN(const wire::FeatureList features,
                       qemu::await_accepted(return_path_->reader, settings, return_path_->failure,
                                            as_timeout(options_.answer_timeout), &reporter_.interrupt()));
    static_cast<void>(features);
    return {};
  }

  [[nodiscard]] Result<void> open_sender(std::vector<Link> channels) {
    MULTIFD_TRY_ASSIGN(
        sender_,
        with_policies(options_.compression, typename Stacks::Compressors{}, options_.zero_pages,
                      typename Stacks::ZeroPages{}, [&]<class C, class Z>() -> Result<std::unique_ptr<AnySender>> {
                        method_ = C::method;
                        zero_pages_ = Z::stage == ZeroStage::none       ? wire::ZeroPagesMode::none
                                      : Z::stage == ZeroStage::producer ? wire::ZeroPagesMode::legacy
                                                                        : wire::ZeroPagesMode::multifd;
                        return open_any_sender_of<C>(Z{}, *ram_, std::move(channels),
                                                     {.level = options_.level,
                                                      .uuid = options_.uuid,
                                                      .peer = options_.peer,
                                                      .bandwidth = options_.bandwidth,
                                                      .progress_timeout = options_.progress_timeout,
                                                      .interrupt = &reporter_.interrupt(),
                                                      .digest = options_.digest,
                                                      .thread_hook = options_.thread_hook});
                      }));
    reporter_.channels([this] { return moved(); }, [this](std::uint64_t bytes) { sender_->set_bandwidth(bytes); });
    return {};
  }

  wire::PeerSettings own_settings(std::uint8_t version, std::uint32_t channels) const {
    wire::PeerSettings settings{.channels = channels,
                                .page_bytes = static_cast<std::uint32_t>(ram_->page_bytes()),
                                .compression = method_,
                                .zero_pages = zero_pages_,
                                .digest = options_.digest,
                                .tls = is_secured(*main_),
                                .paths = 1,
                                .user = options_.user};
    settings.versions.spoken = version;
    if (options_.verify) settings.features.add({.name = wire::feature_page_digests, .needed = true});
    if (options_.uuid != Uuid{}) settings.uuid = options_.uuid;
    return settings;
  }
  static bool is_secured(const Link& link) noexcept {
    if constexpr (requires { link.secured(); })
      return link.secured();
    else
      return false;
  }

  // ---- Rounds

  [[nodiscard]] Result<void> rounds() {
    MULTIFD_TRY_ASSIGN(
        Rounds convergence,
        Rounds::create({.time_limit = options_.converge.time_limit,
                        .at_time_limit = options_.converge.at_time_limit,
                        .max_rounds = options_.converge.max_rounds,
                        .round_trip = std::chrono::ceil<std::chrono::microseconds>(2 * round_trip_)},
                       options_.converge.rule.value_or(
                           PricedDowntime({.price = {.max_downtime = options_.converge.max_downtime}})),
                       options_.converge.throttle));
    dirty_.emplace(*ram_);
    DirtyBitmaps before(*ram_);
    MULTIFD_TRY(start_tracking());
    for (Time sync{};;) {
      before = *dirty_;
      MULTIFD_TRY_ASSIGN(Round round, send_round(convergence));
      round.sync = sync;
      const Time fetching = reporter_.now();
      MULTIFD_TRY(fetch_all(guest_.dirty_source(), *dirty_));
      sync = reporter_.now() - fetching;
      const std::uint64_t pages = dirty_->count();
      if (reporter_.switchover_asked()) convergence.ask_for_switchover();
      const Decision decision = convergence.round_ended(round.dirty_pages, round.send, sync, pages, reporter_.now());
      round.pages_per_s = convergence.bandwidth().pages_per_s();
      round.dirty_pages_per_s = convergence.dirty_rate().pages_per_s();
      round.again_pages = dirty_->in_both(before);
      round.predicted_downtime = decision.downtime.total();
      report_.rounds.push_back(round);
      reporter_.round_ended(round, decision);
      throttle(decision.throttle_percent);
      report_.switchover = decision;
      if (decision.action == Action::switch_now) return {};
      if (decision.action != Action::go_on)
        return fail(Errc::did_not_converge, Stage::produce, to_string(decision.reason), pages);
    }
  }

  /// From here on every write is reported, and every page is to be sent but those that are untouched.
  [[nodiscard]] Result<void> start_tracking() {
    auto& source = guest_.dirty_source();
    MULTIFD_TRY(source.start());
    tracking_ = true;
    dirty_->fill(*ram_);
    if (zero_pages_ == wire::ZeroPagesMode::none) return {};
    // What is asked for zeros from here on is watched: a write that comes later is reported.
    if (source.needs_rearm()) {
      for (std::uint32_t b = 0; b < dirty_->blocks(); ++b) {
        MULTIFD_TRY(rearm_chunks(source, BlockId{b}, (*dirty_)[BlockId{b}], options_.rearm_pages,
                                 [](std::uint64_t, auto) -> Result<void> { return {}; }));
      }
    }
    if constexpr (!HasKnownZeros<G>) {
      MULTIFD_TRY_ASSIGN(untouched_, UntouchedPages::snapshot(*ram_));
    }
    return {};
  }

  /// Sends what is dirty with the guest running, and waits until it is written.
  [[nodiscard]] Result<Round> send_round(const Rounds& convergence) {
    Round round{.number = report_.rounds.size(), .begin = reporter_.now(), .dirty_pages = dirty_->count()};
    reporter_.round_begun(round.number, round.dirty_pages);
    const Moved before = moved();
    MULTIFD_TRY(writer_->begin_part());
    if constexpr (HasKnownZeros<G>) {
      MULTIFD_TRY(queue_known_zeros(round.number));
    } else if (round.number == 0) {
      MULTIFD_TRY(queue_untouched());
    }
    const auto late = [&] { return convergence.while_sending(reporter_.now()).action != Action::go_on; };
    for (std::uint32_t b = 0; b < dirty_->blocks() && !late(); ++b) {
      const BlockId block{b};
      const auto on_chunk = [&](std::uint64_t first_page, std::span<const std::uint64_t> chunk) -> Result<void> {
        MULTIFD_TRY(queue(block, first_page, chunk));
        return return_path_->poll();
      };
      MULTIFD_TRY(rearm_chunks(guest_.dirty_source(), block, (*dirty_)[block], options_.rearm_pages, on_chunk));
    }
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, close_epoch());
    MULTIFD_TRY(sender_->wait(epoch));
    untouched_.forget();
    round.send = reporter_.now() - round.begin;
    count_moved(round, before);
    return round;
  }

  /// Queues the pages of a chunk, and takes them out of what is dirty.
  [[nodiscard]] Result<void> queue(BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> chunk) {
    MULTIFD_TRY(sender_->queue_dirty(block, chunk, first_page, zero_record(block)));
    std::ranges::fill((*dirty_)[block].subspan(first_page / 64, chunk.size()), 0);
    return {};
  }

  /// Queues what was never touched as zero pages, without a look at it, and takes it out of what is dirty. Such a page
  /// stays armed since start_tracking(): a write to it is reported.
  [[nodiscard]] Result<void> queue_untouched() {
    if (untouched_.count() == 0) return {};
    for (std::uint32_t b = 0; b < dirty_->blocks(); ++b) {
      const BlockId block{b};
      const std::uint64_t pages = ram_->pages(block);
      for (std::uint64_t page = 0; page < pages;) {
        page += untouched_.other_run(block, page, pages - page);
        const std::uint64_t run = page < pages ? untouched_.take_run(block, page, pages - page) : 0;
        if (run == 0) continue;
        MULTIFD_TRY(sender_->queue_zeros(block, page * ram_->page_bytes(), run * ram_->page_bytes(),
                                         zero_record(block)));
        for (const std::uint64_t end = page + run; page < end; ++page)
          (*dirty_)[block][page / 64] &= ~(std::uint64_t{1} << page % 64);
      }
    }
    return {};
  }

  /// The same for what the guest says. Behind the first round a log that is re-armed later would report those pages for ever.
  [[nodiscard]] Result<void> queue_known_zeros(std::uint64_t round) {
    if (zero_pages_ == wire::ZeroPagesMode::none || (round > 0 && guest_.dirty_source().needs_rearm())) return {};
    DirtyBitmaps zeros(*ram_);
    for (std::uint32_t b = 0; b < dirty_->blocks(); ++b) {
      const BlockId block{b};
      MULTIFD_TRY(guest_.known_zeros(block, zeros[block]));
      MULTIFD_TRY(for_each_run_in_both(zeros[block], (*dirty_)[block], [&](std::uint64_t page, std::uint64_t pages) {
        return sender_->queue_zeros(block, page * ram_->page_bytes(), pages * ram_->page_bytes(), zero_record(block));
      }));
    }
    dirty_->remove(zeros);
    return {};
  }

  /// Takes the zero pages that travel on the main stream (ZeroPagesLegacy).
  AnySender::OnZero zero_record(BlockId block) {
    return [this, idstr = std::string_view(ram_->block(block).idstr)](std::uint64_t offset) {
      // An error is sticky: the round's end returns it.
      static_cast<void>(writer_->zero_page(idstr, offset));
      return true;
    };
  }

  /// Ends an epoch, and the section that it is in. Returns its number.
  [[nodiscard]] Result<std::uint64_t> close_epoch() {
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, sender_->close_epoch());
    MULTIFD_TRY(writer_->end_epoch());
    MULTIFD_TRY(writer_->end_section());
    MULTIFD_TRY(writer_->push_out());
    return epoch;
  }

  void throttle(unsigned percent) {
    if (percent == throttled_) return;
    throttled_ = percent;
    if constexpr (HasThrottle<G>) guest_.throttle(percent);
  }

  Moved moved() const {
    if (!sender_) return {};
    const SenderStats stats = sender_->stats();
    const ChannelStats sum = total(stats.channels);
    return {.normal_pages = sum.normal_pages,
            .zero_pages = sum.zero_pages + stats.zero_on_main,
            .wire_bytes = sum.wire_bytes};
  }

  // ---- Switchover

  [[nodiscard]] Result<void> switch_over() {
    if (options_.pause_before_switchover) {
      MULTIFD_TRY(pause());
      reporter_.status(MigrationStatus::pre_switchover);
      MULTIFD_TRY(wait_for_proceed());
    }
    reporter_.status(MigrationStatus::device);
    stopped_ = reporter_.now();
    MULTIFD_TRY(pause());
    MULTIFD_TRY(send_last_round());
    const Time saving = reporter_.now();
    MULTIFD_TRY(save_devices());
    report_.downtime.device_state = reporter_.now() - saving;
    if (!report_.own_peer) return writer_->push_out();
    if (options_.verify) {
      MULTIFD_TRY(send_digests());
    }
    MULTIFD_TRY(writer_->state_whole());
    MULTIFD_TRY(writer_->push_out());
    const Time waiting = reporter_.now();
    MULTIFD_TRY_ASSIGN(report_.pages_verified,
                       return_path_->await(wire::ExtensionKind::loaded, as_timeout(options_.load_timeout),
                                           &reporter_.interrupt()));
    report_.downtime.round_trip = reporter_.now() - waiting;
    return {};
  }

  [[nodiscard]] Result<void> pause() {
    if (paused_) return {};
    paused_ = true;  // a pause() that fails may have stopped some vCPUs
    return guest_.pause();
  }

  [[nodiscard]] Result<void> wait_for_proceed() {
    // Somebody else does what has to be done while the guest stands still; that has no limit.
    std::array<pollfd, 3> events{{{reporter_.proceed().native_handle(), POLLIN, 0},
                                  {reporter_.interrupt().native_handle(), POLLIN, 0},
                                  {main_->native_handle(), POLLIN, 0}}};
    for (;;) {
      if (::poll(events.data(), events.size(), 1000) < 0 && errno != EINTR)
        return fail_errno(Stage::none, "poll, ahead of the switchover");
      if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::none, "ahead of the switchover");
      if (reporter_.proceed().triggered()) return {};
      MULTIFD_TRY(return_path_->poll());
    }
  }

  /// What is known to be dirty goes out while the bitmap is fetched once more: on a guest with much memory or many devices
  /// that takes as long as the pages do.
  [[nodiscard]] Result<void> send_last_round() {
    Round round{.number = report_.rounds.size(), .begin = reporter_.now(), .dirty_pages = dirty_->count()};
    const Moved before = moved();
    DirtyBitmaps found(*ram_);
    DirtyBitmaps known = *dirty_;
    Result<void> fetched;
    MULTIFD_TRY(writer_->switchover_start());
    MULTIFD_TRY(writer_->begin_end());
    {
      std::jthread fetching([&] {
        const Time began = reporter_.now();
        fetched = fetch_all(guest_.dirty_source(), found);
        round.sync = reporter_.now() - began;
      });
      MULTIFD_TRY(queue_all());
    }
    MULTIFD_TRY(fetched);
    // The guest stands still: what has gone out is what it is.
    found.remove(known);
    *dirty_ = std::move(found);
    round.dirty_pages += dirty_->count();
    reporter_.round_begun(round.number, round.dirty_pages);
    MULTIFD_TRY(queue_all());
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, close_epoch());
    MULTIFD_TRY(sender_->wait(epoch));
    round.send = reporter_.now() - round.begin;
    count_moved(round, before);
    report_.downtime.pages = round.send;
    report_.rounds.push_back(round);
    return {};
  }

  /// Queues all that is dirty, of a guest that stands still: nothing is re-armed.
  [[nodiscard]] Result<void> queue_all() {
    for (std::uint32_t b = 0; b < dirty_->blocks(); ++b) {
      MULTIFD_TRY(queue(BlockId{b}, 0, (*dirty_)[BlockId{b}]));
    }
    return {};
  }

  /// Gives the guest's state to the main stream, and remembers what is in it.
  class DeviceWriter final : public StateWriter {
   public:
    DeviceWriter(qemu::MainStreamWriter<Link>& writer, qemu::VmDescription& description)
        : writer_(writer), description_(description) {}

   private:
    [[nodiscard]] Result<void> do_device(const qemu::DeviceSection& device,
                                         std::span<const std::byte> state) override {
      MULTIFD_TRY(writer_.device(device, state));
      return description_.add(device, state.size());
    }
    qemu::MainStreamWriter<Link>& writer_;
    qemu::VmDescription& description_;
  };

  [[nodiscard]] Result<void> save_devices() {
    DeviceWriter to(*writer_, description_);
    return guest_.save(to);
  }

  [[nodiscard]] Result<void> send_digests() {
    const Time began = reporter_.now();
    for (std::uint32_t i = 0; i < blocks_.size(); ++i) {
      MULTIFD_TRY_ASSIGN(const BlockId block, ram_->find(blocks_[i].idstr));
      MULTIFD_TRY(writer_->page_digests(i, ram_->block(block).host));
    }
    MULTIFD_TRY(writer_->push_out());
    report_.verify = reporter_.now() - began;
    return {};
  }

  // ---- Hand-over

  [[nodiscard]] Result<void> hand_over() {
    if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::none, "ahead of the hand-over");
    MULTIFD_TRY_ASSIGN(const std::string description, description_.text());
    const Time began = reporter_.now();
    // From here on nothing is cancelled: the destination may be told to run the guest.
    writer_->set_limits(as_timeout(options_.load_timeout), nullptr);
    ownership_.hand_over();
    reporter_.owner(ownership_);
    if (report_.own_peer) {
      MULTIFD_TRY(writer_->hand_over());
    }
    MULTIFD_TRY(writer_->end_stream(description));
    MULTIFD_TRY(writer_->push_out());
    const auto wanted = report_.own_peer ? std::optional(wire::ExtensionKind::running) : std::nullopt;
    MULTIFD_TRY_ASSIGN(const std::uint64_t status,
                       return_path_->await(wanted, as_timeout(options_.load_timeout), nullptr));
    if (!report_.own_peer && status != 0)
      return fail(Errc::peer_gave_up, Stage::close, "the destination could not load the guest: SHUT", status);
    ownership_.running_there();
    reporter_.owner(ownership_);
    report_.downtime.round_trip += reporter_.now() - began;
    tracking_ = false;
    static_cast<void>(guest_.dirty_source().stop());
    // The guest runs there: what goes wrong from here on takes nothing away.
    static_cast<void>(sender_->close_channels());
    report_.stats = sender_->stats();
    if (report_.own_peer)
      static_cast<void>(return_path_->await(std::nullopt, as_timeout(options_.farewell_timeout), &reporter_.interrupt()));
    static_cast<void>(main_->finish());
    return {};
  }

  // ---- The end without a migration

  /// Everything is as before, unless the guest has been handed over. Returns the reason: the destination's own, if it has
  /// said one.
  [[nodiscard]] Error give_up(Error error) {
    const bool cancelled = error.code == Errc::cancelled;
    if (cancelled) reporter_.status(MigrationStatus::cancelling);
    if (!cancelled && return_path_) error = reason(error);
    if (ownership_.may_run()) release_guest();
    if (writer_ && report_.own_peer && ownership_.may_run()) {
      writer_->set_limits(farewell, nullptr);
      static_cast<void>(writer_->failed(error, options_.reason ? options_.reason(error) : describe(error)));
    }
    if (return_path_) reporter_.peer_gave_up(return_path_->failure.text());
    reporter_.channels({}, {});
    if (sender_) sender_->cancel();
    sender_.reset();
    main_->shutdown();
    reporter_.owner(ownership_);
    reporter_.status(cancelled ? MigrationStatus::cancelled : MigrationStatus::failed);
    return error;
  }

  /// A destination that gives up says why, and then breaks everything: whatever was noticed first, that is the reason.
  Error reason(const Error& error) {
    if (error.code != Condition::peer_gone) return error;
    // Channels are told as well, but only the main connection has the text.
    Error cause = error;
    if (!return_path_->gave_up) {
      const auto said = return_path_->await(wire::ExtensionKind::failed, farewell, nullptr);
      if (said || !return_path_->gave_up) return error;
      cause = said.error();
    }
    ownership_.refused();
    return cause;
  }

  /// The guest runs as before the migration.
  void release_guest() {
    throttle(0);
    if (std::exchange(tracking_, false)) static_cast<void>(guest_.dirty_source().stop());
    if (!std::exchange(paused_, false)) return;
    if (const auto resumed = guest_.resume(); !resumed) reporter_.not_resumed(resumed.error());
  }

  void count_moved(Round& round, const Moved& before) const {
    const Moved now = moved();
    round.normal_pages = now.normal_pages - before.normal_pages;
    round.zero_pages = now.zero_pages - before.zero_pages;
    round.wire_bytes = now.wire_bytes - before.wire_bytes;
    round.bound = bounded_by(sender_->stats());
  }

  static constexpr std::chrono::milliseconds farewell{500};  ///< for a last word, either way

  G& guest_;
  const SourceOptions& options_;
  MigrationReporter reporter_;
  MigrationReport report_{};
  SourceOwnership ownership_{};
  bool tracking_ = false;
  bool paused_ = false;
  unsigned throttled_ = 0;
  Time round_trip_{};
  Time stopped_{};

  std::uint32_t method_ = 0;
  wire::ZeroPagesMode zero_pages_ = wire::ZeroPagesMode::none;
  std::optional<RamMap> ram_;
  std::vector<qemu::BlockInfo> blocks_;  ///< as they were announced
  std::optional<DirtyBitmaps> dirty_;    ///< what is to be sent
  UntouchedPages untouched_{};
  qemu::VmDescription description_{};
  std::optional<Link> main_;
  std::optional<qemu::MainStreamWriter<Link>> writer_;  // behind what it writes to
  std::optional<ReturnPath<Link>> return_path_;
  std::unique_ptr<AnySender> sender_;
};

}  // namespace multifd::migrate::detail
