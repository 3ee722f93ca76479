// SPDX-License-Identifier: MIT
//
// A source's connections: the channels behind their hellos, and the main stream up to the destination's ACCEPTED.
#pragma once

#include <sys/random.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/return_path.hpp"
#include "multifd/migrate/source_options.hpp"
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
  using Link = typename Stacks::Link;

  /// Params: all outlive this object.
  SourceStream(const RamMap& ram, Link main, const SourceOptions& options, MigrationReporter& reporter)
      : ram_(ram),
        options_(options),
        reporter_(reporter),
        main_(std::move(main)),
        writer(main_, qemu::style_of(options.machine_type, options.peer, ram.page_bytes())),
        return_path(main_, options.on_user_data) {
    writer.set_limits(as_timeout(options_.progress_timeout), &reporter_.interrupt());
  }
  ~SourceStream() { reporter_.channels({}, {}); }
  SourceStream(const SourceStream&) = delete;
  SourceStream& operator=(const SourceStream&) = delete;

  /// Says all that comes before pages, and waits for an own peer's ACCEPTED.
  /// Errors: those of Sender::open() and of the connections; setting_mismatch and its like; Errc::peer_gave_up with the
  ///   destination's reason; peer_lacks_confirmation.
  [[nodiscard]] Result<void> open(std::vector<Link> channels) {
    const auto count = static_cast<std::uint32_t>(channels.size());
    MULTIFD_TRY_ASSIGN(uuid_, uuid_of_try());
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
    return {};
  }

  /// Whether the destination is migrate_from(), as it has answered; else a QEMU.
  bool own_peer() const noexcept { return own_peer_; }
  /// Whether digests of all pages are sent for the destination to compare.
  bool verifies() const noexcept { return verifies_; }
  /// Of the connection, as the question took it; zero with a QEMU.
  Time round_trip() const noexcept { return round_trip_; }
  wire::ZeroPagesMode zero_pages() const noexcept { return zero_pages_; }
  /// As they were announced.
  const std::vector<qemu::BlockInfo>& blocks() const noexcept { return blocks_; }
  AnySender& sender() noexcept { return *sender_; }
  Link& main() noexcept { return main_; }

  /// Ends an epoch, and the section that it is in. Returns its number.
  [[nodiscard]] Result<std::uint64_t> close_epoch() {
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, sender_->close_epoch());
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
            .zero_pages = sum.zero_pages,
            .unchanged_pages = unchanged_pages.load(std::memory_order_relaxed),
            .wire_bytes = sum.wire_bytes};
  }

  /// Breaks all connections.
  void cancel() {
    reporter_.channels({}, {});
    if (sender_) sender_->cancel();
    sender_.reset();
    main_.shutdown();
  }

 private:
  const RamMap& ram_;
  const SourceOptions& options_;
  MigrationReporter& reporter_;
  Link main_;

 public:
  /// Pages that were not sent, because they are as they were last sent.
  std::atomic<std::uint64_t> unchanged_pages = 0;
  qemu::MainStreamWriter<Link> writer;
  ReturnPath<Link> return_path;

 private:
  /// A destination under TLS resets who speaks none, and can say nothing to it.
  Error unanswered(Error error) const noexcept {
    if (error.code == Condition::peer_gone && !is_secured(main_))
      error.op = "read the destination's first word (is TLS on there?)";
    return error;
  }
  /// Whether the user has named no QEMU as the peer.
  bool may_be_ours() const noexcept { return options_.peer.digests; }

  /// Of the VM, if the caller has said one; else one that tells this try's channels from another's.
  [[nodiscard]] Result<Uuid> uuid_of_try() const {
    Uuid uuid = options_.uuid;
    if (uuid == Uuid{} && may_be_ours() &&
        ::getrandom(uuid.data(), uuid.size(), 0) != static_cast<ssize_t>(uuid.size()))
      return fail_errno(Stage::setup, "getrandom");
    return uuid;
  }

  [[nodiscard]] Result<void> open_sender(std::vector<Link> channels) {
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
                                .page_bytes = static_cast<std::uint32_t>(ram_.page_bytes()),
                                .compression = method_,
                                .zero_pages = zero_pages_,
                                .digest = options_.digest,
                                .tls = is_secured(main_),
                                .paths = 1,
                                .user = options_.user};
    settings.versions.spoken = version;
    if (options_.verify != Verify::off)
      settings.features.add({.name = wire::feature_page_digests, .needed = options_.verify == Verify::required});
    settings.uuid = uuid_;
    return settings;
  }

  bool own_peer_ = false;
  bool verifies_ = false;
  Time round_trip_{};
  Uuid uuid_{};
  std::uint32_t method_ = 0;
  wire::ZeroPagesMode zero_pages_ = wire::ZeroPagesMode::none;
  std::vector<qemu::BlockInfo> blocks_;
  std::unique_ptr<AnySender> sender_;
};

}  // namespace multifd::migrate::detail
