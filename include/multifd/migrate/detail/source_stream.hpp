// SPDX-License-Identifier: MIT
//
// A source's connections: the channels behind their hellos, and the main stream up to the destination's ACCEPTED.
#pragma once

#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/migrate/base_report.hpp"
#include "multifd/migrate/detail/base_comparison.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/path_set.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/resumable_link.hpp"
#include "multifd/migrate/detail/return_path.hpp"
#include "multifd/migrate/detail/source_reconnect.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/peer_handshake.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/stack.hpp"

namespace multifd::migrate::detail {

/// Threads: one. For one migration.
template <class Stacks>
class SourceStream {
 public:
  using Link = Capped<typename Stacks::Link>;
  using Main = ResumableLink<Link>;

  /// Params: all outlive this object. `reconnect`: null: no connection returns.
  SourceStream(const RamMap& ram, Link main, const SourceOptions& options, MigrationReporter& reporter,
               PathSet<Link>& paths, SourceReconnect<Link>* reconnect)
      : ram_(ram),
        options_(options),
        reporter_(reporter),
        paths_(paths),
        reconnect_(reconnect),
        main_(std::move(main)),
        writer(main_, qemu::style_of(options.machine_type, options.peer, ram.page_bytes())),
        return_path(main_, options.on_user_data) {
    writer.set_limits(as_timeout(options_.progress_timeout), &reporter_.interrupt());
  }
  ~SourceStream() {
    reporter_.channels({}, {});
    reporter_.steer_paths({});
  }
  SourceStream(const SourceStream&) = delete;
  SourceStream& operator=(const SourceStream&) = delete;

  /// Says all that comes before pages, and waits for an own peer's ACCEPTED.
  /// Errors: those of Sender::open() and of the connections; setting_mismatch and its like; Errc::peer_gave_up with the
  ///   destination's reason; peer_lacks_confirmation.
  [[nodiscard]] Result<void> open(std::vector<Link> channels) {
    const auto count = channel_count_ = static_cast<std::uint32_t>(channels.size());
    MULTIFD_TRY_ASSIGN(uuid_, uuid_of_try());
    MULTIFD_TRY_ASSIGN(session_, random_uuid());
    MULTIFD_TRY(writer.begin_stream({.machine_type = options_.machine_type}));
    MULTIFD_TRY(writer.open_return_path());
    if (may_be_ours()) {
      // Ahead of the channels' hellos, so that a destination sees that another try begins, and takes them for that one's.
      MULTIFD_TRY(writer.push_out());
    }
    MULTIFD_TRY(open_sender(std::move(channels)));
    MULTIFD_TRY_ASSIGN(blocks_, qemu::announced_blocks(ram_));
    wire::PeerSettings settings;
    if (may_be_ours()) {
      const Time asked = reporter_.now();
      const auto version =
          qemu::ask_peer(writer, return_path.reader, as_timeout(options_.answer_timeout), &reporter_.interrupt());
      // Before its answer a QEMU may be there, which is shown nothing of the extension; no reason either.
      own_peer_ = version ? version->has_value() : version.error().code == Errc::extension_version_mismatch;
      if (!version) return std::unexpected(unanswered(version.error()));
      round_trip_ = reporter_.now() - asked;
      if (own_peer_) settings = own_settings(**version, count);
    }
    if (!own_peer_ && options_.verify == Verify::required)
      return fail(Errc::peer_lacks_confirmation, Stage::setup, "SourceOptions::verify: the destination is no multifd");
    if (!own_peer_ && options_.postcopy.strategy == Postcopy::at_once)
      return fail(Errc::missing_feature, Stage::setup, "SourceOptions::postcopy: the destination is no multifd", 0, 0,
                  wire::feature_postcopy);
    if (own_peer_) {
      MULTIFD_TRY(writer.settings(settings));
    }
    MULTIFD_TRY(writer.start_ram(blocks_));
    MULTIFD_TRY(close_epoch());
    if (!own_peer_) return {};
    MULTIFD_TRY_ASSIGN(const wire::FeatureList features,
                       qemu::await_accepted(return_path.reader, settings, return_path.failure,
                                            as_timeout(options_.answer_timeout), &reporter_.interrupt()));
    verifies_ = features.has(wire::feature_page_digests);
    memory_may_follow_ = features.has(wire::feature_postcopy);
    takes_known_zeros_ = features.has(wire::feature_known_zeros);
    has_base_ = features.has(wire::feature_base);
    if (reconnect_ != nullptr && features.has(wire::feature_resume)) let_connections_return(*settings.session);
    return {};
  }

  /// Whether the destination is migrate_from(), as it has answered; else a QEMU.
  bool own_peer() const noexcept { return own_peer_; }
  /// Whether digests of all pages are sent for the destination to compare.
  bool verifies() const noexcept { return verifies_; }
  /// Whether both sides can do with memory that follows.
  bool memory_may_follow() const noexcept { return memory_may_follow_; }
  /// Whether zero pages may be named by say_zeros().
  bool takes_known_zeros() const noexcept { return takes_known_zeros_; }
  /// Names zero pages of a block: between two sections.
  [[nodiscard]] Result<void> say_zeros(BlockId block, std::span<const std::uint64_t> bitmap) {
    const auto place = std::ranges::find(blocks_, ram_.block(block).idstr, &qemu::BlockInfo::idstr);
    said_zeros_.fetch_add(count_dirty(bitmap), std::memory_order_relaxed);
    return writer.known_zeros(static_cast<std::uint32_t>(place - blocks_.begin()), bitmap);
  }
  /// Whether the destination's memory holds an older copy.
  bool has_base() const noexcept { return has_base_; }
  /// Takes the pages that are as in the older copy out of `dirty`, with tracking on, ahead of the first round. Params `zeros`:
  /// pages that are zero, and are not read. Errors: those of BaseComparison and of the return path.
  [[nodiscard]] Result<BaseReport> compare_with_base(const DirtyBitmaps& zeros, DirtyBitmaps& dirty) {
    const Time began = reporter_.now();
    BaseComparison comparison(ram_, blocks_, zeros, options_.base, compared_pages_);
    MULTIFD_TRY(
        ask_for_base(writer, return_path, comparison, as_timeout(options_.progress_timeout), reporter_.interrupt()));
    MULTIFD_TRY_ASSIGN(const DirtyBitmaps* equal, comparison.finish());
    equal_pages_.store(dirty.in_both(*equal), std::memory_order_relaxed);
    dirty.remove(*equal);
    return BaseReport{.pages = comparison.taken(),
                      .equal_pages = equal_pages_.load(std::memory_order_relaxed),
                      .digest_bytes = comparison.bytes(),
                      .time = reporter_.now() - began};
  }
  /// The sender's, and what has gone over the main connection.
  SenderStats stats() const {
    SenderStats all = sender_->stats();
    all.zero_on_main += said_zeros_.load(std::memory_order_relaxed);
    return all;
  }
  /// Of the connection, as the question took it; zero with a QEMU.
  Time round_trip() const noexcept { return round_trip_; }
  wire::ZeroPagesMode zero_pages() const noexcept { return zero_pages_; }
  /// As they were announced.
  const std::vector<qemu::BlockInfo>& blocks() const noexcept { return blocks_; }
  AnySender& sender() noexcept { return *sender_; }
  unsigned channels() const noexcept { return channel_count_; }
  Main& main() noexcept { return main_; }

  /// Whether lost connections return, and what was lost with them.
  bool resumes() const noexcept { return resumes_; }
  /// Waits until the destination has said of every closed epoch that it is over. What is lost of them is known then.
  /// Errors: those of the return path and of Sender; timed_out.
  [[nodiscard]] Result<void> settle() {
    const auto moved_on = [this] { return settled_ + moved().wire_bytes + main_.mended(); };
    ProgressWatch standing_still(options_.progress_timeout, moved_on());
    while (resumes_ && settled_ < closed_) {
      // The sender's first error may be why nothing comes.
      MULTIFD_TRY(sender_->push_out());
      const auto come =
          return_path.await(wire::ExtensionKind::epoch_whole, std::chrono::milliseconds(250), &reporter_.interrupt());
      if (!come && come.error().code != Errc::timed_out) return std::unexpected(come.error());
      if (standing_still.stalled(moved_on(), reconnect_->lost().paused))
        return fail(Errc::timed_out, Stage::read, "the destination does not say that the epoch is over", settled_);
    }
    return {};
  }
  /// Adds the pages that have to be sent again, and forgets them. Behind ACCEPTED of a destination that resumes().
  void take_lost(DirtyBitmaps& into) { resent_pages_.fetch_add(sender_->take_lost(into), std::memory_order_relaxed); }
  /// From here on a lost connection is not made again: memory follows, or the migration is over.
  void end_return() noexcept {
    if (!resumes_) return;
    main_.disengage();
    reconnect_->stop();
  }

  /// Whether it is time to end an epoch in the middle of a round: what two epochs have carried is what can be lost.
  bool should_close_epoch() const noexcept {
    return resumes_ && settled_ == closed_ && reporter_.now() - closed_at_ >= shortest_epoch;
  }

  /// Ends an epoch, and the section that it is in. Returns its number.
  [[nodiscard]] Result<std::uint64_t> close_epoch() {
    MULTIFD_TRY(settle());  // pages of two epochs are remembered
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, sender_->close_epoch());
    closed_ = epoch + 1;
    closed_at_ = reporter_.now();
    MULTIFD_TRY(writer.end_epoch());
    MULTIFD_TRY(writer.end_section());
    MULTIFD_TRY(writer.push_out());
    return epoch;
  }

  /// Takes the zero pages that travel on the main stream (ZeroPagesLegacy).
  AnySender::OnZero zero_record(BlockId block) {
    return [this, idstr = std::string_view(ram_.block(block).idstr)](std::uint64_t offset) {
      // An error is sticky: the round's end returns it.
      static_cast<void>(writer.zero_page(idstr, offset));
      return true;
    };
  }

  Moved moved() const {
    if (!sender_) return {};
    const ChannelStats sum = sender_->total();
    return {.normal_pages = sum.normal_pages,
            .zero_pages = sum.zero_pages + said_zeros_.load(std::memory_order_relaxed),
            .unchanged_pages = unchanged_pages.load(std::memory_order_relaxed),
            .compared_pages = compared_pages_.load(std::memory_order_relaxed),
            .equal_pages = equal_pages_.load(std::memory_order_relaxed),
            .wire_bytes = sum.wire_bytes};
  }

  /// Breaks all connections.
  void cancel() {
    reporter_.channels({}, {});
    reporter_.steer_paths({});
    if (sender_) sender_->cancel();
    sender_.reset();
    main_.shutdown();
  }

 private:
  const RamMap& ram_;
  const SourceOptions& options_;
  MigrationReporter& reporter_;
  PathSet<Link>& paths_;
  SourceReconnect<Link>* const reconnect_;
  bool resumes_ = false;
  std::uint64_t closed_ = 0;   ///< epochs
  Time closed_at_{};           ///< the last one
  std::uint64_t settled_ = 0;  ///< of which the destination has said that they are over
  std::atomic<std::uint64_t> resent_pages_ = 0;
  std::atomic<std::uint64_t> said_zeros_ = 0;
  std::atomic<std::uint64_t> compared_pages_ = 0, equal_pages_ = 0;
  Main main_;

 public:
  /// Pages that were not sent, because they are as they were last sent.
  std::atomic<std::uint64_t> unchanged_pages = 0;
  qemu::MainStreamWriter<Main> writer;
  ReturnPath<Main> return_path;

 private:
  /// Channels wait for each other at an epoch's end: rarely enough for that to cost nothing that can be measured.
  static constexpr Time shortest_epoch = std::chrono::milliseconds(500);

  /// A destination under TLS resets who speaks none, and can say nothing to it.
  Error unanswered(Error error) const noexcept {
    if (error.code == Condition::peer_gone && !is_secured(main_))
      error.op = "read the destination's first word (is TLS on there?)";
    return error;
  }
  /// Behind ACCEPTED, with which both byte streams of the main connection begin to be counted.
  void let_connections_return(const Uuid& session) {
    resumes_ = true;
    main_.engage(*reconnect_, return_path.reader.bytes_behind());
    // No channel has another connection yet.
    descriptors_.push_back(main_.native_handle());
    for (const int each : descriptors_) packets::limit_silence(each, options_.resume.path_timeout);
    return_path.on_epoch_whole = [this](const wire::EpochWhole& whole) -> Result<void> {
      if (whole.epoch != settled_ || whole.epoch >= closed_)
        return fail(Errc::unexpected_extension_message, Stage::parse, "EPOCH_WHOLE", whole.epoch, settled_,
                    "EPOCH_WHOLE");
      for (unsigned channel = channel_count_; channel < 8 * whole.channels.size(); ++channel)
        if (whole.has(channel))
          return fail(Errc::bad_extension_message, Stage::parse, "channel", channel, channel_count_, "EPOCH_WHOLE");
      MULTIFD_TRY(main_.confirm(whole.received));
      MULTIFD_TRY(sender_->settle(whole));
      ++settled_;
      return {};
    };
    reconnect_->enable(session, static_cast<unsigned>(paths_.main_path()));
  }

  /// Whether the user has named no QEMU as the peer.
  bool may_be_ours() const noexcept { return options_.peer.digests; }

  /// Of the VM, if the caller has said one; else one that tells this try's channels from another's.
  [[nodiscard]] Result<Uuid> uuid_of_try() const {
    if (options_.uuid != Uuid{} || !may_be_ours()) return options_.uuid;
    return random_uuid();
  }
  [[nodiscard]] static Result<Uuid> random_uuid() {
    Uuid uuid{};
    if (::getrandom(uuid.data(), uuid.size(), 0) != static_cast<ssize_t>(uuid.size()))
      return fail_errno(Stage::setup, "getrandom");
    return uuid;
  }

  [[nodiscard]] Result<void> open_sender(std::vector<Link> channels) {
    for (const Link& channel : channels) descriptors_.push_back(packets::descriptor_of(channel));
    // The lambda has no return type of its own: with one, clang 19 leaves the virtual functions of what it opens undefined.
    MULTIFD_TRY_ASSIGN(sender_, with_policies(options_.compression, typename Stacks::Compressors{}, options_.zero_pages,
                                              typename Stacks::ZeroPages{}, [&]<class C, class Z>() {
                                                method_ = C::method;
                                                zero_pages_ = Z::stage == ZeroStage::none ? wire::ZeroPagesMode::none
                                                              : Z::stage == ZeroStage::producer
                                                                  ? wire::ZeroPagesMode::legacy
                                                                  : wire::ZeroPagesMode::multifd;
                                                return open_any_sender_of<C, FromEither>(
                                                    Z{}, ram_, std::move(channels),
                                                    {.level = options_.level,
                                                     .uuid = uuid_,
                                                     .peer = options_.peer,
                                                     .bandwidth = options_.bandwidth,
                                                     .depth = depth_of(),
                                                     .progress_timeout = options_.progress_timeout,
                                                     .interrupt = &reporter_.interrupt(),
                                                     .digest = options_.digest,
                                                     .while_waiting = [this] { return look_at_main(); },
                                                     .thread_hook = options_.thread_hook},
                                                    reconnect_);
                                              }));
    reporter_.channels([this] { return moved(); }, [this](std::uint64_t bytes) { sender_->set_bandwidth(bytes); });
    PathHooks steering{
        .progress = [this] { return paths_.progress(); },
        .set_bandwidth = [this](std::size_t path, std::uint64_t rate) { paths_.set_bandwidth(path, rate); }};
    if (reconnect_ != nullptr) {
      steering.lost = [this] {
        LostConnections now = reconnect_->lost();
        now.resent_pages = resent_pages_.load(std::memory_order_relaxed);
        return now;
      };
      steering.resume = [this] { reconnect_->resume(); };
    }
    reporter_.steer_paths(std::move(steering));
    return {};
  }

  /// Channels may wait for what the main connection has not brought: so that is looked after while the producer waits for them.
  [[nodiscard]] Result<void> look_at_main() {
    if (!resumes_) return {};
    return catch_bad_alloc(Stage::read, "return path", [this] { return return_path.poll(&reporter_.interrupt()); });
  }

  /// Batches in the queue are part of an epoch, which they make longer: where connections return there are fewer.
  unsigned depth_of() const noexcept {
    constexpr unsigned all = 16, least = 4;
    return reconnect_ != nullptr ? std::max(least, all / channel_count_) : 0;
  }

  wire::PeerSettings own_settings(std::uint8_t version, std::uint32_t channels) const {
    wire::PeerSettings settings{.channels = channels,
                                .page_bytes = static_cast<std::uint32_t>(ram_.page_bytes()),
                                .compression = method_,
                                .zero_pages = zero_pages_,
                                .digest = options_.digest,
                                .tls = is_secured(main_),
                                .paths = static_cast<std::uint32_t>(paths_.count()),
                                .user = options_.user};
    settings.versions.spoken = version;
    if (zero_pages_ != wire::ZeroPagesMode::none) settings.features.add({.name = wire::feature_known_zeros});
    if (options_.base) settings.features.add({.name = wire::feature_base});
    if (options_.verify != Verify::off)
      settings.features.add({.name = wire::feature_page_digests, .needed = options_.verify == Verify::required});
    if (options_.postcopy.strategy != Postcopy::never)
      settings.features.add(
          {.name = wire::feature_postcopy, .needed = options_.postcopy.strategy == Postcopy::at_once});
    settings.uuid = uuid_;
    if (reconnect_ != nullptr) {
      settings.features.add({.name = wire::feature_resume});
      settings.session = session_;
    }
    return settings;
  }

  std::uint32_t channel_count_ = 0;
  std::vector<int> descriptors_;  ///< of the first connections
  bool own_peer_ = false;
  bool verifies_ = false;
  bool memory_may_follow_ = false;
  bool takes_known_zeros_ = false;
  bool has_base_ = false;
  Time round_trip_{};
  Uuid uuid_{};
  Uuid session_{};
  std::uint32_t method_ = 0;
  wire::ZeroPagesMode zero_pages_ = wire::ZeroPagesMode::none;
  std::vector<qemu::BlockInfo> blocks_;
  std::unique_ptr<AnySender> sender_;
};

}  // namespace multifd::migrate::detail
