// SPDX-License-Identifier: MIT
//
// One migration at its destination, from the settings on (format/extension.md section 19.3).
//
//   open      memory is prepared, the channels' hellos                                  ->  ACCEPTED, or FAILED
//   receive   rounds: the main stream opens the barrier between the channels' epochs
//   load      devices, digests, up to STATE_WHOLE                                       ->  LOADED
//   take over HAND_OVER: the guest runs                                                 ->  RUNNING, SHUT(0)
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/destination_report.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/source_setup.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/qemu/main_stream_reader.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/stack.hpp"

namespace multifd::migrate::detail {

/// Threads: one. For one migration.
template <class Stacks, DestinationGuest G>
class DestinationRun {
 public:
  using Link = typename Stacks::Link;

  DestinationRun(G& guest, const DestinationOptions& options, Migration& migration)
      : guest_(guest), options_(options), reporter_(migration, options.on_event) {}

  template <Acceptor A>
  [[nodiscard]] Result<ArrivalReport> migrate(A& acceptor) {
    reporter_.status(MigrationStatus::setup);
    reporter_.owner(ownership_);
    Result<void> done = accept(acceptor);
    if (done) done = run();
    if (!done) return std::unexpected(give_up(done.error()));
    report_.total = reporter_.now();
    reporter_.status(MigrationStatus::completed);
    return std::move(report_);
  }

 private:
  using Kind = wire::ExtensionKind;

  // ---- Setup

  template <Acceptor A>
  [[nodiscard]] Result<void> accept(A& acceptor) {
    MULTIFD_TRY_ASSIGN(wake_, Interrupt::create());
    MULTIFD_TRY(own_settings<A>());
    SourceSetup<A> setup(acceptor, options_, own_,
                         {.page_bytes = options_.page_bytes.value_or(max_page_bytes),
                          .max_ram_bytes = options_.max_ram_bytes,
                          .extension = true,
                          .max_section_bytes = options_.max_device_bytes},
                         reporter_);
    MULTIFD_TRY_ASSIGN(auto source, setup.run());
    settings_ = source.settings;
    epochs_ahead_ = source.prelude.epochs();
    settings_bytes_ = source.prelude.take_settings();
    main_.emplace(std::move(source.links.main));
    if constexpr (requires { main_->cipher(); }) report_.cipher = main_->cipher();
    reader_.emplace(*main_, std::move(source.prelude.parser));
    writer_.emplace(*main_);
    writer_->set_limits(as_timeout(options_.hand_over_timeout), &reporter_.interrupt());
    channels_.assign(std::make_move_iterator(source.links.channels.begin()),
                     std::make_move_iterator(source.links.channels.end()));
    return {};
  }

  /// What this side insists on. Errors: Errc::unknown_policy.
  template <class A>
  [[nodiscard]] Result<void> own_settings() {
    own_.features.add({.name = wire::feature_page_digests});
    if (options_.page_bytes) own_.page_bytes = static_cast<std::uint32_t>(*options_.page_bytes);
    own_.digest = options_.digest;
    own_.uuid = options_.uuid;
    if (options_.channels) own_.channels = *options_.channels;
    if (options_.compression) {
      MULTIFD_TRY_ASSIGN(own_.compression, with_policy(*options_.compression, typename Stacks::Compressors{},
                                                       []<class C>() -> Result<std::uint32_t> { return C::method; }));
    }
    if (options_.zero_pages) {
      MULTIFD_TRY_ASSIGN(own_.zero_pages, zero_pages_of(*options_.zero_pages));
    }
    return {};
  }

  [[nodiscard]] Result<void> run() {
    MULTIFD_TRY(open());
    reporter_.status(MigrationStatus::active);
    MULTIFD_TRY(receive_ram());
    reporter_.status(MigrationStatus::device);
    MULTIFD_TRY(load());
    return take_over();
  }

  [[nodiscard]] Result<void> open() {
    const auto& parser = reader_->parser();
    MULTIFD_TRY_ASSIGN(ram_, guest_.prepare({.blocks = parser.blocks(),
                                             .machine_type = parser.machine_type(),
                                             .page_bytes = parser.page_bytes(),
                                             .channels = static_cast<unsigned>(channels_.size()),
                                             .user = settings_.user,
                                             .uuid = settings_.uuid}));
    MULTIFD_TRY(qemu::compare_blocks(parser.blocks(), *ram_));
    for (const qemu::BlockInfo& block : parser.blocks()) {
      MULTIFD_TRY_ASSIGN(const BlockId id, ram_->find(block.idstr));
      ids_.push_back(id);
    }
    report_.ram_bytes = ram_->total_bytes();
    report_.page_bytes = ram_->page_bytes();
    reporter_.memory(report_.ram_bytes);
    MULTIFD_TRY(open_receiver());
    for (; epochs_ahead_ > 0; --epochs_ahead_) {
      MULTIFD_TRY(receiver_->release_epoch());
    }
    return writer_->accepted(own_);
  }

  /// The source's compression is taken as it is, where the program offers it.
  [[nodiscard]] Result<void> open_receiver() {
    AnyReceiverOptions<IntoMemory> options{.barrier = Barrier::manual,
                                           .into = options_.into,
                                           .hello_timeout = options_.hello_timeout,
                                           .interrupt = &reporter_.interrupt(),
                                           .barrier_timeout = options_.progress_timeout,
                                           .progress_timeout = options_.progress_timeout,
                                           .thread_hook = options_.thread_hook,
                                           .on_error = [this](const Error&) { wake_->trigger(); }};
    if (settings_.uuid) options.uuid = {.kind = UuidCheck::Kind::exact, .uuid = *settings_.uuid};
    MULTIFD_TRY_ASSIGN(options.compression, compressor_of(settings_.compression.value_or(0)));
    MULTIFD_TRY_ASSIGN(receiver_, open_any_receiver(typename Stacks::Compressors{}, *ram_, std::move(channels_),
                                                    std::move(options)));
    reporter_.channels([this] { return moved(); }, {});
    return {};
  }

  Moved moved() const {
    const ChannelStats sum = total(receiver_->stats().channels);
    return {.normal_pages = sum.normal_pages,
            .zero_pages = sum.zero_pages + zero_on_main_.load(std::memory_order_relaxed),
            .wire_bytes = sum.wire_bytes};
  }

  // ---- The main stream

  /// The next element. Errors: what a channel failed with, if that came first; timed_out when nothing arrives anywhere.
  [[nodiscard]] Result<qemu::Element> next(std::chrono::milliseconds limit) {
    std::optional<ProgressWatch> standing_still;  // none while elements are there already: its sum allocates
    for (;;) {
      auto element = reader_->arrived();
      if (!element) return std::unexpected(element.error());
      if (*element) return **element;
      if (!standing_still) standing_still.emplace(limit, arrived());
      const auto more = reader_->read(std::chrono::ceil<std::chrono::milliseconds>(standing_still->slice()), &*wake_);
      if (more && *more) continue;
      if (more) return fail(Errc::peer_closed, Stage::read, "main stream");
      if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::read, "main stream");
      if (more.error().code == Errc::cancelled) return std::unexpected(channels_error());
      if (more.error().code != Errc::timed_out) return std::unexpected(more.error());
      if (standing_still->stalled(arrived()))
        return fail(Errc::timed_out, Stage::read, "nothing arrives from the source");
    }
  }
  std::uint64_t arrived() const { return reader_->bytes() + (receiver_ ? moved().wire_bytes : 0); }

  /// What a channel has failed with, which has woken the main connection's reader.
  Error channels_error() {
    // A receiver that is well would wait: cancelled, it returns; one that has failed says why.
    receiver_->cancel();
    return receiver_->release_epoch().error();
  }

  /// A message of the source's, for this side. Returns its kind.
  [[nodiscard]] Result<Kind> take_message(const qemu::Element& element) {
    MULTIFD_TRY_ASSIGN(const auto message, wire::parse_extension(element.data, wire::Towards::destination));
    if (message.kind == Kind::failed) {
      MULTIFD_TRY_ASSIGN(const wire::PeerFailure theirs, wire::parse_failed(message));
      reporter_.peer_gave_up(theirs.text());
      return std::unexpected(theirs.error());
    }
    if (message.kind == Kind::page_digests) {
      MULTIFD_TRY(compare(message));
    }
    return message.kind;
  }

  [[nodiscard]] Result<void> compare(const wire::ExtensionMessage& message) {
    MULTIFD_TRY_ASSIGN(const auto digests, wire::parse_page_digests(message));
    if (digests.block >= ids_.size())
      return fail(Errc::bad_extension_message, Stage::parse, "digests of pages: block", digests.block, ids_.size());
    const RamBlock& block = ram_->block(ids_[digests.block]);
    MULTIFD_TRY(wire::compare_page_digests(digests, block.host, ram_->page_bytes(), block.idstr));
    report_.pages_verified += digests.pages();
    return {};
  }

  [[nodiscard]] Result<void> receive_ram() {
    while (!reader_->parser().ram_complete()) {
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
      if (element.closes_epoch) {
        MULTIFD_TRY(receiver_->release_epoch());
      }
    }
    return receiver_->end_epochs();
  }

  [[nodiscard]] Result<void> answer(const qemu::Element& element) {
    if (element.command != qemu::command_ping) return {};
    return writer_->pong(reader_->parser().commands().answer(wire::load_be<std::uint32_t>(element.data.data())));
  }

  // ---- Devices

  /// Reads the sections behind RAM for the guest, and compares the digests between them.
  class DeviceReader final : public StateReader {
   public:
    explicit DeviceReader(DestinationRun& run) : run_(run) {}
    bool at_end() const noexcept { return at_end_; }

   private:
    [[nodiscard]] Result<std::optional<DeviceAndState>> do_next() override {
      auto device = run_.next_device();
      at_end_ = device && !*device;
      return device;
    }
    DestinationRun& run_;
    bool at_end_ = false;
  };

  [[nodiscard]] Result<void> load() {
    // A small guest is here before its channels have heard of it.
    if (reporter_.interrupt().triggered()) return fail(Errc::cancelled, Stage::none, "ahead of the devices' state");
    DeviceReader from(*this);
    MULTIFD_TRY(guest_.load(from));
    if (!from.at_end()) return fail(Errc::bad_option, Stage::none, "DestinationGuest::load() has not read all devices");
    ownership_.loaded();
    reporter_.owner(ownership_);
    return writer_->loaded(report_.pages_verified);
  }

  [[nodiscard]] Result<std::optional<DeviceAndState>> next_device() {
    return catch_bad_alloc(Stage::parse, "devices' state", [&]() -> Result<std::optional<DeviceAndState>> {
      if (whole_) return std::nullopt;
      for (;;) {
        MULTIFD_TRY_ASSIGN(const qemu::Element element, next(options_.save_timeout));
        switch (element.kind) {
          case qemu::ElementKind::device_section:
            name_ = element.name;
            device_ = {.idstr = name_, .instance_id = element.instance_id, .version_id = element.version_id};
            state_.clear();
            break;
          case qemu::ElementKind::device_state:
            // It grows as the bytes come: the size that was announced is only a claim.
            state_.insert(state_.end(), element.data.begin(), element.data.end());
            break;
          case qemu::ElementKind::footer: return DeviceAndState{.device = device_, .state = state_};
          case qemu::ElementKind::command: MULTIFD_TRY(answer(element)); break;
          case qemu::ElementKind::extension: {
            MULTIFD_TRY_ASSIGN(const Kind kind, take_message(element));
            whole_ = kind == Kind::state_whole;
            if (whole_) return std::nullopt;
            break;
          }
          default: break;
        }
      }
    });
  }

  // ---- Hand-over

  [[nodiscard]] Result<void> take_over() {
    for (bool handed_over = false; !handed_over;) {
      MULTIFD_TRY_ASSIGN(const qemu::Element element, next(options_.hand_over_timeout));
      if (element.kind != qemu::ElementKind::extension) continue;
      MULTIFD_TRY_ASSIGN(const Kind kind, take_message(element));
      handed_over = kind == Kind::hand_over;
    }
    // The source never runs it again, unless it hears that this side does not.
    ownership_.run_allowed();
    reporter_.owner(ownership_);
    if (auto running = guest_.resume(); !running) {
      ownership_.refuse();
      return running;
    }
    ownership_.running();
    reporter_.owner(ownership_);
    if (auto ended = say_goodbye(); !ended) report_.late = ended.error();
    report_.stats = receiver_->stats();
    report_.zero_on_main = zero_on_main_.load(std::memory_order_relaxed);
    reporter_.channels({}, {});
    return {};
  }

  /// The guest runs here, whatever happens now.
  [[nodiscard]] Result<void> say_goodbye() {
    MULTIFD_TRY(writer_->running());
    if (options_.farewell) {
      const std::vector<std::byte> words = options_.farewell();
      if (!words.empty()) {
        MULTIFD_TRY(writer_->user_data(std::span(words).first(std::min(words.size(), max_words))));
      }
    }
    MULTIFD_TRY(receiver_->finish(heard_timeout));
    MULTIFD_TRY(writer_->shut(0));
    // The source ends when it has read that.
    MULTIFD_TRY(drain(*main_, heard_timeout));
    static_cast<void>(main_->finish());
    return {};
  }
  static constexpr std::size_t max_words = 510;
  static constexpr std::chrono::milliseconds heard_timeout{5000};

  // ---- The end without a guest

  /// Returns the reason: the source's own, if it has said one.
  [[nodiscard]] Error give_up(Error error) {
    if (main_) error = reason(error);
    const bool cancelled = error.code == Errc::cancelled;
    if (cancelled) reporter_.status(MigrationStatus::cancelling);
    // A source that has gone may have handed over: what is whole here is kept for whoever can see both sides.
    if (error.code != Condition::peer_gone) ownership_.refuse();
    if (main_) say_failed(*main_, error, options_.reason ? options_.reason(error) : describe(error));
    reporter_.channels({}, {});
    if (receiver_) receiver_->cancel();
    receiver_.reset();
    if (main_) main_->shutdown();
    reporter_.owner(ownership_);
    reporter_.status(cancelled ? MigrationStatus::cancelled : MigrationStatus::failed);
    return error;
  }

  /// A source that gives up says why, and then breaks its channels: whatever was noticed first, that is the reason.
  Error reason(const Error& error) {
    if (error.code != Condition::peer_gone && error.code != Errc::unsynced_end && error.code != Errc::truncated_header &&
        error.code != Errc::truncated_payload)
      return error;
    const auto deadline = deadline_after(farewell);
    while (std::chrono::steady_clock::now() < deadline) {
      const auto element = reader_->next(farewell);
      if (!element || !*element) break;
      if ((*element)->kind != qemu::ElementKind::extension) continue;
      const auto message = take_message(**element);
      if (!message && message.error().code == Errc::peer_gave_up) return message.error();
    }
    return error;
  }

  /// The name that the program offers a compressor by. Errors: Errc::wrong_compression (detail: the source's bits).
  [[nodiscard]] static Result<std::string_view> compressor_of(std::uint32_t method) {
    return find_method(method, typename Stacks::Compressors{});
  }
  template <class... Cs>
  [[nodiscard]] static Result<std::string_view> find_method(std::uint32_t method, PolicyList<Cs...>) {
    std::string_view name;
    static_cast<void>(((Cs::method == method && (name = Cs::name, true)) || ...));
    if (name.empty()) return fail(Errc::wrong_compression, Stage::hello, "setting: compression", method);
    return name;
  }
  [[nodiscard]] static Result<wire::ZeroPagesMode> zero_pages_of(std::string_view name) {
    for (const auto mode : {wire::ZeroPagesMode::none, wire::ZeroPagesMode::legacy, wire::ZeroPagesMode::multifd})
      if (wire::zero_pages_name(mode) == name) return mode;
    return fail(Errc::unknown_policy, Stage::setup, "DestinationOptions::zero_pages", 0, 0, name);
  }

  G& guest_;
  const DestinationOptions& options_;
  MigrationReporter reporter_;
  DestinationOwnership ownership_{Peer::own};
  ArrivalReport report_{};
  std::atomic<std::uint64_t> zero_on_main_ = 0;

  wire::PeerSettings own_{};
  wire::PeerSettings settings_{};  ///< the source's
  std::vector<std::byte> settings_bytes_;  ///< what it refers to
  unsigned epochs_ahead_ = 0;      ///< of RAM's START
  std::optional<RamMap> ram_;
  std::vector<BlockId> ids_;       ///< of the source's blocks, in its order
  std::optional<Interrupt> wake_;  ///< a channel has failed
  std::vector<Link> channels_;     ///< until the receiver has them
  std::optional<Link> main_;
  std::optional<qemu::MainStreamReader<Link>> reader_;  // behind what it reads from
  std::optional<qemu::ReturnPathWriter<Link>> writer_;
  std::unique_ptr<AnyReceiver> receiver_;

  bool whole_ = false;  ///< STATE_WHOLE was read
  std::string name_;    ///< of the device whose state is read
  qemu::DeviceSection device_{};
  std::vector<std::byte> state_;
};

}  // namespace multifd::migrate::detail
