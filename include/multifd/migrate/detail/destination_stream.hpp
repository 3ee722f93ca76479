// SPDX-License-Identifier: MIT
//
// A destination's connections: the channels into guest memory, and the main stream, whose sections open the barrier between
// the channels' epochs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/format/page_bitmap.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/detail/destination_reconnect.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/missing_memory.hpp"
#include "multifd/migrate/detail/older_copy.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/resumable_link.hpp"
#include "multifd/migrate/detail/source_setup.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/qemu/main_stream_reader.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/stack.hpp"

namespace multifd::migrate::detail {

/// Threads: one. For one migration.
template <class Stacks>
class DestinationStream {
 public:
  using Link = typename Stacks::Link;
  using Main = ResumableLink<Link>;
  using Kind = wire::ExtensionKind;

  /// Params `wake`: triggered when a channel fails. The others outlive this object.
  template <class Accepted>
  DestinationStream(ArrivedSource<Accepted> source, Interrupt wake, const DestinationOptions& options,
                    MigrationReporter& reporter)
      : options_(options),
        reporter_(reporter),
        wake_(std::move(wake)),
        settings_(source.settings),
        settings_bytes_(source.prelude.take_settings()),
        epochs_ahead_(source.prelude.epochs()),
        channels_(std::make_move_iterator(source.links.channels.begin()),
                  std::make_move_iterator(source.links.channels.end())),
        main_(std::move(source.links.main)),
        reader_(main_, std::move(source.prelude.parser)),
        writer(main_) {
    writer.set_limits(as_timeout(options_.hand_over_timeout), &reporter_.interrupt());
    if (!options_.resume.accepted || !settings_.session || !settings_.features.has(wire::feature_resume)) return;
    // A source that has not read ACCEPTED gives up where its connection is lost, and does not come back.
    reconnect_.emplace(
        static_cast<unsigned>(channels_.size()), *settings_.session, options_.retry_timeout, path_silence(),
        reporter_.interrupt(),
        [this](unsigned channel, std::uint32_t generation) { receiver_->drop_older(channel, generation); },
        [this](std::uint32_t generation) { main_.drop_older(generation); });
  }
  ~DestinationStream() {
    reporter_.channels({}, {});
    reporter_.steer_paths({});
    if (reconnect_) reconnect_->close();
  }
  DestinationStream(const DestinationStream&) = delete;
  DestinationStream& operator=(const DestinationStream&) = delete;

  const wire::PeerSettings& settings() const noexcept { return settings_; }
  const qemu::MainStreamParser& parser() const noexcept { return reader_.parser(); }
  Main& main() noexcept { return main_; }
  /// Where the source's connections return; null: they do not.
  DestinationReconnect<Link>* reconnect() noexcept { return reconnect_ ? &*reconnect_ : nullptr; }
  /// Behind open().
  AnyReceiver& receiver() noexcept { return *receiver_; }
  std::uint64_t zero_on_main() const noexcept { return zero_on_main_.load(std::memory_order_relaxed); }
  std::uint64_t pages_verified() const noexcept { return pages_verified_; }
  const OlderCopy& older_copy() const noexcept { return older_copy_; }

  /// Lets the channels in. The source's compression is taken as it is, where the program offers it.
  /// Params `ram`: outlives this object. Errors: block_list_mismatch; wrong_compression; those of Receiver::open().
  [[nodiscard]] Result<void> open(const RamMap& ram) {
    ram_ = &ram;
    MULTIFD_TRY(qemu::compare_blocks(parser().blocks(), ram));
    for (const qemu::BlockInfo& block : parser().blocks()) {
      MULTIFD_TRY_ASSIGN(const BlockId id, ram.find(block.idstr));
      ids_.push_back(id);
    }
    AnyReceiverOptions<IntoMemory> options;
    options.barrier = Barrier::manual;
    options.into = options_.into;
    options.hello_timeout = options_.hello_timeout;
    options.interrupt = &reporter_.interrupt();
    options.barrier_timeout = options_.progress_timeout;
    options.progress_timeout = options_.progress_timeout;
    options.thread_hook = options_.thread_hook;
    options.on_error = [this](const Error&) { wake_.trigger(); };
    if (settings_.uuid) options.uuid = {.kind = UuidCheck::Kind::exact, .uuid = *settings_.uuid};
    MULTIFD_TRY_ASSIGN(options.compression,
                       compressor_of(settings_.compression.value_or(0), typename Stacks::Compressors{}));
    for (const Link& channel : channels_) descriptors_.push_back(packets::descriptor_of(channel));
    MULTIFD_TRY_ASSIGN(receiver_, open_any_receiver(typename Stacks::Compressors{}, ram, std::move(channels_),
                                                    std::move(options), reconnect()));
    reporter_.channels([this] { return moved(); }, {});
    return {};
  }

  /// Takes the source, as open() has it. Params `own`: as ReturnPathWriter::accepted().
  [[nodiscard]] Result<void> accept(const wire::PeerSettings& own) {
    MULTIFD_TRY(writer.accepted(own));
    if (reconnect_) {
      // The older copy's digests, at most 20 bytes a page, are kept, too.
      main_.engage(*reconnect_, 0, most_kept + (options_.base ? 20 * ram_->total_bytes() / ram_->page_bytes() : 0));
      // No channel has another connection yet. Before the source's side sees it: it waits at the barrier meanwhile.
      descriptors_.push_back(packets::descriptor_of(main_));
      for (const int each : descriptors_) packets::limit_silence(each, path_silence());
      reporter_.steer_paths(
          {.progress = {}, .lost = [this] { return reconnect_->lost(); }, .set_bandwidth = {}, .resume = {}});
    }
    for (; epochs_ahead_ > 0; --epochs_ahead_) {
      MULTIFD_TRY(release_epoch());
    }
    return {};
  }

  /// The next element. Errors: what a channel failed with, if that came first; timed_out when nothing arrives anywhere.
  [[nodiscard]] Result<qemu::Element> next(std::chrono::milliseconds limit) {
    std::optional<ProgressWatch> standing_still;  // none while elements are there: its sum goes over all channels
    for (;;) {
      auto element = reader_.arrived();
      if (!element) return std::unexpected(element.error());
      if (*element) {
        if (reconnect_ && !std::exchange(source_goes_on_, true)) reconnect_->set_timeout(options_.resume.timeout);
        if ((**element).kind != qemu::ElementKind::extension) forget_zeros();
        return **element;
      }
      if (!standing_still) standing_still.emplace(limit, arrived());
      const auto more = reader_.read(std::chrono::ceil<std::chrono::milliseconds>(standing_still->slice()), &wake_);
      if (more && *more) continue;
      if (more) return fail(Errc::peer_closed, Stage::read, "main stream");
      if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::read, "main stream");
      if (more.error().code == Errc::cancelled) return std::unexpected(channels_error());
      if (more.error().code != Errc::timed_out) return std::unexpected(more.error());
      if (standing_still->stalled(arrived()))
        return fail(Errc::timed_out, Stage::read, "nothing arrives from the source");
    }
  }

  /// A message of the source's, for this side. Returns its kind.
  [[nodiscard]] Result<Kind> take_message(const qemu::Element& element) {
    MULTIFD_TRY_ASSIGN(const auto message, wire::parse_extension(element.data, wire::Towards::destination));
    if (message.kind == Kind::failed) {
      MULTIFD_TRY_ASSIGN(const wire::PeerFailure theirs, wire::parse_failed(message));
      reporter_.peer_gave_up(theirs.text());
      return std::unexpected(theirs.error());
    }
    if (message.kind != Kind::page_digests) forget_zeros();
    if (message.kind == Kind::page_digests) {
      reporter_.step(MigrationStep::verify);
      MULTIFD_TRY(compare(message));
    }
    if (message.kind == Kind::known_zeros) {
      older_copy_.pages_come();
      MULTIFD_TRY(take_known_zeros(message));
    }
    if (message.kind == Kind::base_wanted) {
      MULTIFD_TRY(older_copy_.say(options_, settings_.features, *ram_, ids_, reporter_, writer));
    }
    if (message.kind == Kind::missing_pages || message.kind == Kind::memory_follows) {
      MULTIFD_TRY(take_missing(message));
    }
    return message.kind;
  }

  /// From here on the source may say that memory follows. Params `missing`: outlives this object; gets the pages.
  void take_missing_into(MissingMemory& missing) noexcept { missing_ = &missing; }
  /// MEMORY_FOLLOWS, once it was read.
  const std::optional<wire::MemoryFollows>& memory_follows() const noexcept { return follows_; }

  /// Reads up to the end of RAM. Errors: as next(); those of Receiver.
  [[nodiscard]] Result<void> receive_ram() {
    while (!reader_.parser().ram_complete()) {
      MULTIFD_TRY_ASSIGN(const qemu::Element element, next(options_.progress_timeout));
      switch (element.kind) {
        case qemu::ElementKind::zero_page:
          MULTIFD_TRY(receiver_->apply_zero(ids_[element.block], element.offset));
          zero_on_main_.fetch_add(1, std::memory_order_relaxed);
          break;
        case qemu::ElementKind::page:
          MULTIFD_TRY(receiver_->apply_page(ids_[element.block], element.offset, element.data));
          break;
        case qemu::ElementKind::extension: MULTIFD_TRY(take_message(element)); break;
        case qemu::ElementKind::command: MULTIFD_TRY(answer(element)); break;
        default: break;
      }
      if (element.kind != qemu::ElementKind::extension && element.kind != qemu::ElementKind::command)
        older_copy_.pages_come();
      if (element.closes_epoch) {
        MULTIFD_TRY(release_epoch());
      }
    }
    return receiver_->end_epochs();
  }
  /// A source that has heard RUNNING ends, and comes no more. Params `limit`: for one that has not heard it. Returns how long to
  /// wait for that: a source notices a lost connection after its path_timeout.
  std::chrono::milliseconds expect_end(std::chrono::milliseconds limit) noexcept {
    if (reconnect_) {
      limit = std::max(limit, 2 * options_.resume.path_timeout);
      reconnect_->set_timeout(limit);
    }
    main_.expect_end();
    return limit;
  }
  /// From here on a lost connection does not return: memory follows, or this side gives up.
  void end_return() noexcept {
    if (!reconnect_) return;
    main_.disengage();
    reconnect_->close();
  }

  /// Answers a PING; other commands need nothing.
  [[nodiscard]] Result<void> answer(const qemu::Element& element) {
    if (element.command != qemu::command_ping) return {};
    return writer.pong(reader_.parser().commands().answer(wire::load_be<std::uint32_t>(element.data.data())));
  }

  /// Whether a connection ended under way: what is wrong then is not the source's doing.
  static bool is_cut(const Error& error) noexcept {
    return error.code == Condition::peer_gone || error.code == Errc::truncated_stream ||
           error.code == Errc::unsynced_end || error.code == Errc::truncated_header ||
           error.code == Errc::truncated_payload;
  }

  /// A source that gives up says why, and then breaks its channels: whatever was noticed first, that is the reason.
  Error reason(const Error& error) {
    end_return();
    if (!is_cut(error)) return error;
    const auto deadline = deadline_after(farewell);
    while (std::chrono::steady_clock::now() < deadline) {
      const auto element = reader_.next(farewell);
      if (!element || !*element) break;
      if ((*element)->kind != qemu::ElementKind::extension) continue;
      const auto message = wire::parse_extension((*element)->data, wire::Towards::destination);
      if (!message || message->kind != Kind::failed) continue;
      const auto theirs = wire::parse_failed(*message);
      if (!theirs) continue;
      reporter_.peer_gave_up(theirs->text());
      return theirs->error();
    }
    return error;
  }

  /// Breaks all connections.
  void cancel() {
    reporter_.channels({}, {});
    reporter_.steer_paths({});
    if (reconnect_) reconnect_->close();
    if (receiver_) receiver_->cancel();
    receiver_.reset();
    main_.shutdown();
  }

 private:
  /// Shorter than the source's, so that this side has noticed when that one connects again.
  std::chrono::milliseconds path_silence() const noexcept { return 3 * options_.resume.path_timeout / 4; }

  /// Ends an epoch, and says so where connections return.
  [[nodiscard]] Result<void> release_epoch() {
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, receiver_->release_epoch());
    if (!reconnect_) return {};
    return writer.epoch_whole(
        {.epoch = epoch, .received = main_.received(), .channels = receiver_->arrived_channels()});
  }

  /// A source that makes this side say more has other things in mind: it is some weeks of epochs.
  static constexpr std::size_t most_kept = std::size_t{64} << 20;

  std::uint64_t arrived() const { return reader_.bytes() + main_.mended() + (receiver_ ? moved().wire_bytes : 0); }

  /// What a channel has failed with, which has woken the main connection's reader.
  Error channels_error() {
    // A receiver that is well would wait: cancelled, it returns; one that has failed says why.
    receiver_->cancel();
    return receiver_->release_epoch().error();
  }

  /// A source sends all its digests in one go. One that has other messages between them does not get a look at all page tables
  /// for each.
  static constexpr unsigned most_snapshots = 4;

  /// The memory may be written to.
  void forget_zeros() noexcept {
    if (snapshots_ <= most_snapshots) zeros_.reset();  // else they are none
  }

  [[nodiscard]] Result<void> compare(const wire::ExtensionMessage& message) {
    MULTIFD_TRY_ASSIGN(const auto digests, wire::parse_page_digests(message));
    if (digests.block >= ids_.size())
      return fail(Errc::bad_extension_message, Stage::parse, "digests of pages: block", digests.block, ids_.size());
    const RamBlock& block = ram_->block(ids_[digests.block]);
    // Nobody writes to the memory between two such messages.
    if (!zeros_) zeros_ = ++snapshots_ <= most_snapshots ? untouched_in(*ram_) : DirtyBitmaps(*ram_);
    MULTIFD_TRY(wire::compare_page_digests(digests, block.host, ram_->page_bytes(), block.idstr,
                                           (*zeros_)[ids_[digests.block]]));
    pages_verified_ += digests.pages();
    return {};
  }

  [[nodiscard]] Result<void> take_known_zeros(const wire::ExtensionMessage& message) {
    // Each message may be the zeroing of much memory.
    if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::read, "known zeros");
    if (!settings_.features.has(wire::feature_known_zeros))
      return fail(Errc::unexpected_extension_message, Stage::parse, "known zeros, without the feature",
                  static_cast<std::uint64_t>(message.kind), 0, wire::feature_known_zeros);
    MULTIFD_TRY_ASSIGN(const auto pages, wire::parse_page_bitmap(message));
    if (pages.block >= ids_.size() || !receiver_)
      return fail(Errc::bad_extension_message, Stage::parse, "known zeros: block", pages.block, ids_.size());
    const BlockId id = ids_[pages.block];
    const RamBlock& block = ram_->block(id);
    return wire::for_each_run(pages, block.bytes, ram_->page_bytes(), block.idstr,
                              [&](std::uint64_t first, std::uint64_t count) {
                                zero_on_main_.fetch_add(count, std::memory_order_relaxed);
                                return receiver_->apply_zero(id, first * ram_->page_bytes(), count);
                              });
  }

  [[nodiscard]] Result<void> take_missing(const wire::ExtensionMessage& message) {
    if (missing_ == nullptr)
      return fail(Errc::unexpected_extension_message, Stage::parse, "memory that follows, without the feature",
                  static_cast<std::uint64_t>(message.kind), 0, wire::feature_postcopy);
    if (message.kind == Kind::missing_pages) {
      MULTIFD_TRY_ASSIGN(const auto pages, wire::parse_page_bitmap(message));
      if (pages.block >= ids_.size())
        return fail(Errc::bad_extension_message, Stage::parse, "missing pages: block", pages.block, ids_.size());
      return missing_->add(pages, ids_[pages.block]);
    }
    MULTIFD_TRY_ASSIGN(follows_, wire::parse_memory_follows(message));
    if (follows_->pages != missing_->count())
      return fail(Errc::bad_extension_message, Stage::parse, "number of missing pages", follows_->pages,
                  missing_->count(), "MEMORY_FOLLOWS");
    return {};
  }

  Moved moved() const {
    const ChannelStats sum = receiver_->total();
    return {.normal_pages = sum.normal_pages,
            .zero_pages = sum.zero_pages + zero_on_main(),
            .compared_pages = older_copy_.said(),
            .wire_bytes = sum.wire_bytes};
  }

  const DestinationOptions& options_;
  MigrationReporter& reporter_;
  Interrupt wake_;
  wire::PeerSettings settings_;            ///< the source's
  std::vector<std::byte> settings_bytes_;  ///< what it refers to
  unsigned epochs_ahead_;                  ///< of RAM's START
  std::vector<Link> channels_;             ///< until the receiver has them
  std::atomic<std::uint64_t> zero_on_main_ = 0;
  std::uint64_t pages_verified_ = 0;
  OlderCopy older_copy_;
  const RamMap* ram_ = nullptr;
  MissingMemory* missing_ = nullptr;  ///< null: memory may not follow
  std::optional<wire::MemoryFollows> follows_;
  std::optional<DirtyBitmaps> zeros_;  ///< pages that need not be read to be compared
  unsigned snapshots_ = 0;             ///< how often they were looked for
  std::vector<BlockId> ids_;           ///< of the source's blocks, in its order
  std::vector<int> descriptors_;       ///< of the first connections
  bool source_goes_on_ = false;        ///< it has read ACCEPTED
  Main main_;
  qemu::MainStreamReader<Main> reader_;

 public:
  qemu::ReturnPathWriter<Main> writer;

 private:
  std::optional<DestinationReconnect<Link>> reconnect_;
  std::unique_ptr<AnyReceiver> receiver_;
};

}  // namespace multifd::migrate::detail
