// SPDX-License-Identifier: MIT
//
// One migration at its destination, from the settings on (format/extension.md section 19.3).
//
//   open      memory is prepared, the channels' hellos                                  ->  ACCEPTED, or FAILED
//   receive   rounds: the main stream opens the barrier between the channels' epochs
//   load      devices, digests, up to STATE_WHOLE                                       ->  LOADED
//   take over HAND_OVER: the guest runs                                                 ->  RUNNING, SHUT(0)
//
// Where the memory follows, that begins ahead of "load", and SHUT(0) says that all of it is there (following_memory.hpp).
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/destination_report.hpp"
#include "multifd/migrate/detail/destination_stream.hpp"
#include "multifd/migrate/detail/following_memory.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/late_acceptor.hpp"
#include "multifd/migrate/detail/missing_memory.hpp"
#include "multifd/migrate/detail/page_arrivals.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/source_setup.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/ownership.hpp"
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
    // Without memory, too, the source has to be told.
    std::optional<LateAcceptor<A, Link>> late_acceptor;
    Result<void> done = catch_bad_alloc(Stage::none, "migrate_from", [&]() -> Result<void> {
      reporter_.owner(ownership_);
      reporter_.status(MigrationStatus::setup);
      MULTIFD_TRY(accept(acceptor));
      return run([&]() -> Result<void> {
        late_acceptor.emplace(acceptor, arrivals_, stream_->reconnect(), options_.on_stranger);
        return late_acceptor->start(no_hook_);
      });
    });
    if (!done && ownership_.runs() && done.error().code == Errc::memory_lost)
      return std::unexpected(lose_memory(done.error()));
    if (!done && !ownership_.runs()) return std::unexpected(give_up(done.error()));
    if (!done) report_.late = done.error();  // nothing may look as if the guest did not run, FAILED least of all
    report_.total = reporter_.now();
    reporter_.end_status(MigrationStatus::completed);
    return std::move(report_);
  }

 private:
  using Kind = wire::ExtensionKind;

  // ---- Setup

  template <Acceptor A>
  [[nodiscard]] Result<void> accept(A& acceptor) {
    MULTIFD_TRY_ASSIGN(Interrupt wake, Interrupt::create());
    MULTIFD_TRY(own_settings<A>());
    SourceSetup<A> setup(acceptor, options_, own_,
                         {.page_bytes = options_.page_bytes.value_or(max_page_bytes),
                          .max_ram_bytes = options_.max_ram_bytes,
                          .extension = true,
                          .max_section_bytes = options_.max_device_bytes},
                         reporter_);
    MULTIFD_TRY(check_time_limit("DestinationResumeOptions::timeout", options_.resume.timeout, Stage::setup));
    MULTIFD_TRY_ASSIGN(auto source, setup.run());
    stream_.emplace(std::move(source), std::move(wake), options_, reporter_);
    if constexpr (requires { stream_->main().cipher(); }) report_.cipher = stream_->main().cipher();
    return {};
  }

  /// What this side insists on. Errors: Errc::unknown_policy.
  template <class A>
  [[nodiscard]] Result<void> own_settings() {
    own_.features.add({.name = wire::feature_page_digests}).add({.name = wire::feature_known_zeros});
    MULTIFD_TRY(OlderCopy::offer(options_, own_.features));
    if (options_.resume.accepted) own_.features.add({.name = wire::feature_resume});
    if (options_.postcopy.accepted && can_serve_faults()) own_.features.add({.name = wire::feature_postcopy});
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

  /// Params `accept_more`: begins to accept what the source connects later.
  template <class AcceptMore>
  [[nodiscard]] Result<void> run(AcceptMore accept_more) {
    MULTIFD_TRY(open());
    if (missing_ || stream_->reconnect() != nullptr) {
      MULTIFD_TRY(accept_more());
    }
    MULTIFD_TRY(stream_->accept(own_));
    reporter_.status(MigrationStatus::active);
    MULTIFD_TRY(stream_->receive_ram());
    reporter_.status(MigrationStatus::device);
    MULTIFD_TRY(load());
    return take_over();
  }

  [[nodiscard]] Result<void> open() {
    const qemu::MainStreamParser& parser = stream_->parser();
    MULTIFD_TRY_ASSIGN(ram_, guest_.prepare({.blocks = parser.blocks(),
                                             .machine_type = parser.machine_type(),
                                             .page_bytes = parser.page_bytes(),
                                             .channels = *stream_->settings().channels,
                                             .user = stream_->settings().user,
                                             .uuid = stream_->settings().uuid}));
    report_.ram_bytes = ram_->total_bytes();
    report_.page_bytes = ram_->page_bytes();
    reporter_.memory(report_.ram_bytes);
    MULTIFD_TRY(stream_->open(*ram_));
    return let_memory_follow();
  }

  // ---- Memory that follows

  /// Whether that can be served at all here; of the guest's memory check_faults() knows more.
  static bool can_serve_faults() noexcept {
    return postcopy::Userfaultfd::create(postcopy::Userfaultfd::default_features, postcopy::KernelFaults::required)
        .has_value();
  }

  /// Takes the feature back where this guest's memory is not fit for it. Errors: why, to a source that needs it.
  [[nodiscard]] Result<void> let_memory_follow() {
    const auto& asked = stream_->settings().features.all();
    const auto theirs = std::ranges::find(asked, wire::feature_postcopy, &wire::Feature::name);
    if (theirs == asked.end() || !own_.features.has(wire::feature_postcopy)) return {};
    const auto fit = check_faults(*ram_, options_.postcopy.unit_bytes);
    if (!fit && theirs->needed) return fit;
    if (!fit) {
      own_.features.remove(wire::feature_postcopy);
      return {};
    }
    MULTIFD_TRY_ASSIGN(missing_, MissingMemory::create(*ram_, options_.postcopy.unit_bytes));
    stream_->take_missing_into(*missing_);
    return {};
  }

  /// Reads up to where the devices begin, which may touch what is missing.
  [[nodiscard]] Result<void> receive_missing() {
    for (;;) {
      MULTIFD_TRY_ASSIGN(const qemu::Element element, stream_->next(options_.save_timeout));
      if (element.kind == qemu::ElementKind::command) {
        MULTIFD_TRY(stream_->answer(element));
      }
      if (element.kind != qemu::ElementKind::extension) continue;
      MULTIFD_TRY_ASSIGN(const Kind kind, stream_->take_message(element));
      whole_ = kind == Kind::state_whole;
      if (kind == Kind::memory_follows) break;
      if (kind != Kind::missing_pages && kind != Kind::user_data) return {};
    }
    stream_->end_return();  // page connections return by themselves
    ownership_.memory_follows();
    following_.emplace(*ram_, *missing_, arrivals_, options_, reporter_, stream_->main().native_handle());
    return following_->open(*stream_->memory_follows());
  }

  /// Returns the reason why the guest cannot go on here, nor anywhere else.
  [[nodiscard]] Error lose_memory(const Error& error) {
    ownership_.memory_lost();
    reporter_.owner(ownership_);
    // Without a handle nobody can say when the guest has been ended: until this process does.
    if (options_.migration == nullptr) following_->freeze_for_ever();
    reporter_.freeze(following_->frozen());
    following_.reset();
    stream_->cancel();
    reporter_.end_status(MigrationStatus::failed);
    return error;
  }

  // ---- Devices

  /// Reads the sections behind RAM for the guest, and compares the digests between them.
  class DeviceReader final : public StateReader {
   public:
    explicit DeviceReader(DestinationRun& run) : run_(run) {}
    bool at_end() const noexcept { return at_end_; }

   private:
    [[nodiscard]] Result<std::optional<SavedDevice>> do_next() override {
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
    reporter_.step(MigrationStep::device_state);
    if (missing_) {
      MULTIFD_TRY(receive_missing());
    }
    DeviceReader from(*this);
    MULTIFD_TRY(guest_.load(from));
    if (!from.at_end()) return fail(Errc::bad_option, Stage::none, "DestinationGuest::load() has not read all devices");
    report_.pages_verified = stream_->pages_verified();
    report_.base = stream_->older_copy().report();
    ownership_.loaded();
    reporter_.owner(ownership_);
    reporter_.step(MigrationStep::hand_over);
    return stream_->writer.loaded(report_.pages_verified);
  }

  [[nodiscard]] Result<std::optional<SavedDevice>> next_device() {
    return catch_bad_alloc(Stage::parse, "devices' state", [&]() -> Result<std::optional<SavedDevice>> {
      if (whole_) return std::nullopt;
      for (;;) {
        MULTIFD_TRY_ASSIGN(const qemu::Element element, stream_->next(options_.save_timeout));
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
          case qemu::ElementKind::footer: return SavedDevice{.device = device_, .state = state_};
          case qemu::ElementKind::command: MULTIFD_TRY(stream_->answer(element)); break;
          case qemu::ElementKind::extension: {
            MULTIFD_TRY_ASSIGN(const Kind kind, stream_->take_message(element));
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
      MULTIFD_TRY_ASSIGN(const qemu::Element element, stream_->next(options_.hand_over_timeout));
      if (element.kind != qemu::ElementKind::extension) continue;
      MULTIFD_TRY_ASSIGN(const Kind kind, stream_->take_message(element));
      handed_over = kind == Kind::hand_over;
    }
    if (following_) {
      MULTIFD_TRY(following_->own());
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
    if (following_) return follow();
    const auto ended = catch_bad_alloc(Stage::close, "migrate_from", [&] {
      auto said = say_goodbye();
      report_.stats = stream_->receiver().stats();
      return said;
    });
    if (!ended) report_.late = ended.error();
    report_.zero_on_main = stream_->zero_on_main();
    reporter_.channels({}, {});
    return {};
  }

  /// The guest runs here, and gets the rest of its memory. Errors: Errc::memory_lost.
  [[nodiscard]] Result<void> follow() {
    stream_->writer.set_limits(as_timeout(options_.hand_over_timeout), nullptr);
    // A source that does not hear it gives pages all the same.
    static_cast<void>(stream_->writer.running());
    // Up to wait() nothing may end this call: the guest would go on with empty pages.
    reporter_.end_status(MigrationStatus::postcopy_active);
    static_cast<void>(stream_->receiver().finish(heard_timeout));
    ignore_bad_alloc([&] { report_.stats = stream_->receiver().stats(); });
    report_.zero_on_main = stream_->zero_on_main();
    reporter_.channels({}, {});
    const auto done = following_->wait();
    report_.postcopy = following_->report();
    if (!done) return done;
    ownership_.memory_there();
    reporter_.owner(ownership_);
    // On a connection whose end says that the source has heard it: the end of the main one may be a cut.
    const auto told =
        catch_bad_alloc(Stage::close, "migrate_from", [&] { return following_->tell_source(heard_timeout); });
    const auto ended = catch_bad_alloc(Stage::close, "migrate_from", [&]() -> Result<void> {
      MULTIFD_TRY(say_farewell());
      MULTIFD_TRY(stream_->writer.shut(0));
      return drain(stream_->main(), heard_timeout);
    });
    static_cast<void>(stream_->main().finish());
    if (!told && !ended) report_.late = told.error();
    following_.reset();
    return {};
  }

  [[nodiscard]] Result<void> say_farewell() {
    reporter_.step(MigrationStep::farewell);
    if (!options_.farewell) return {};
    const std::vector<std::byte> words = options_.farewell();
    if (words.empty()) return {};
    return stream_->writer.user_data(std::span(words).first(std::min(words.size(), max_words)));
  }

  /// The guest runs here, whatever happens now, and whoever cancels.
  [[nodiscard]] Result<void> say_goodbye() {
    stream_->writer.set_limits(as_timeout(options_.hand_over_timeout), nullptr);
    const auto limit = stream_->expect_end(heard_timeout);
    MULTIFD_TRY(stream_->writer.running());
    MULTIFD_TRY(say_farewell());
    const auto deadline = deadline_after(limit);
    const auto ended = stream_->receiver().finish(heard_timeout);
    // Whatever became of the channels: the source still has to read RUNNING.
    MULTIFD_TRY(stream_->writer.shut(0));
    // The source ends when it has read that. One that has not ended its channels gets a moment more.
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    MULTIFD_TRY(drain(stream_->main(), std::max(left, farewell)));
    static_cast<void>(stream_->main().finish());
    return ended;
  }
  static constexpr std::size_t max_words = 510;
  static constexpr std::chrono::milliseconds heard_timeout{5000};

  // ---- The end without a guest

  /// Returns the reason: the source's own, if it has said one.
  [[nodiscard]] Error give_up(Error error) {
    following_.reset();
    if (stream_) ignore_bad_alloc([&] { error = stream_->reason(error); });
    const bool cancelled = error.code == Errc::cancelled;
    if (cancelled) reporter_.end_status(MigrationStatus::cancelling);
    // A source that has gone may have handed over: what is whole here is kept for whoever can see both sides.
    if (!DestinationStream<Stacks>::is_cut(error)) ownership_.refuse();
    if (stream_) {
      say_failed(stream_->main(), error, options_.reason);
      stream_->cancel();
    }
    reporter_.owner(ownership_);
    reporter_.end_status(cancelled ? MigrationStatus::cancelled : MigrationStatus::failed);
    return error;
  }

  [[nodiscard]] static Result<wire::ZeroPagesMode> zero_pages_of(std::string_view name) {
    for (const auto mode : {wire::ZeroPagesMode::none, wire::ZeroPagesMode::legacy, wire::ZeroPagesMode::multifd})
      if (wire::zero_pages_name(mode) == name) return mode;
    return fail(Errc::unknown_policy, Stage::setup, "DestinationOptions::zero_pages", 0, 0, name);
  }

  G& guest_;
  const DestinationOptions& options_;
  const ThreadHook no_hook_{};
  MigrationReporter reporter_;
  DestinationOwnership ownership_{Peer::own};
  ArrivalReport report_{};
  wire::PeerSettings own_{};  ///< what this side insists on
  std::optional<RamMap> ram_;
  PageArrivals<Link> arrivals_;
  std::optional<MissingMemory> missing_;  ///< where memory may follow
  std::optional<DestinationStream<Stacks>> stream_;
  std::optional<FollowingMemory<Link>> following_;  ///< from MEMORY_FOLLOWS on

  bool whole_ = false;  ///< STATE_WHOLE was read
  std::string name_;    ///< of the device whose state is read
  qemu::DeviceSection device_{};
  std::vector<std::byte> state_;
};

}  // namespace multifd::migrate::detail
