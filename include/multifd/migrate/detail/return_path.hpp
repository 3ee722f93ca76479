// SPDX-License-Identifier: MIT
//
// What a destination says to a migration's source, from the settings' answer to the end.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "multifd/format/extension.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/qemu/return_path.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::migrate::detail {

/// Threads: one.
template <Transport T>
class ReturnPath {
 public:
  using Kind = wire::ExtensionKind;

  /// Params `on_user_data`: may be empty.
  ReturnPath(T& link, const std::function<void(std::span<const std::byte>)>& on_user_data)
      : reader(link), on_user_data_(on_user_data) {}

  /// Takes what has arrived. Params `interrupt`: ends a connection's return; may be null. Errors: as await(), but for its
  /// timed_out.
  [[nodiscard]] Result<void> poll(const Interrupt* interrupt = nullptr) {
    const auto none = await({}, std::chrono::milliseconds(0), interrupt);
    if (none) return fail(Errc::peer_closed, Stage::read, "return path: SHUT", *none);
    if (none.error().code != Errc::timed_out) return std::unexpected(none.error());
    return {};
  }

  /// Waits for a message, and takes all that come before it. Params `wanted`: Kind::epoch_whole, loaded, running, or none for
  /// SHUT.
  /// Returns its number: of LOADED the pages that were compared, of SHUT the status.
  /// Errors: Errc::peer_gave_up with the destination's reason; peer_closed: it has ended; timed_out; cancelled; those of
  ///   ReturnPathReader.
  [[nodiscard]] Result<std::uint64_t> await(std::optional<Kind> wanted, std::chrono::milliseconds timeout,
                                            const Interrupt* interrupt) {
    return take_up_to(wanted, [&](Kind kind) { return wanted && kind == *wanted; }, timeout, interrupt);
  }
  /// The same for the next message of the destination's older copy, which on_base gets. Errors: as await(); on_base's.
  [[nodiscard]] Result<void> await_base(std::chrono::milliseconds timeout, const Interrupt* interrupt) {
    MULTIFD_TRY(take_up_to(Kind::base_key, is_base, timeout, interrupt));
    return {};
  }

  qemu::ReturnPathReader<T> reader;
  wire::PeerFailure failure{};  ///< what the destination's FAILED says, when it was read
  bool gave_up = false;         ///< it was read, behind ACCEPTED
  /// Called for each EPOCH_WHOLE; empty: they are passed over.
  std::function<Result<void>(const wire::EpochWhole&)> on_epoch_whole;
  /// Called for what the destination says of its older copy; empty: that is refused, because nobody has asked.
  std::function<Result<void>(const wire::ExtensionMessage&)> on_base;

 private:
  static bool is_base(Kind kind) noexcept {
    return kind == Kind::base_key || kind == Kind::base_digests || kind == Kind::base_zeros;
  }

  template <class IsWanted>
  [[nodiscard]] Result<std::uint64_t> take_up_to(std::optional<Kind> wanted, const IsWanted& is_wanted,
                                                 std::chrono::milliseconds timeout, const Interrupt* interrupt) {
    const auto deadline = deadline_after(timeout);
    for (;;) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
      const auto wait = timeout == no_timeout ? no_timeout : std::max(left, std::chrono::milliseconds(0));
      MULTIFD_TRY_ASSIGN(const auto message, reader.next(wait, interrupt));
      if (!message) return fail(Errc::peer_closed, Stage::read, "return path");
      if (message->type == qemu::return_shut) {
        if (!wanted) return message->value;
        return fail(Errc::peer_closed, Stage::read, "return path: SHUT", message->value);
      }
      if (message->type != wire::extension_number) continue;
      if (message->message.kind == Kind::failed) {
        MULTIFD_TRY_ASSIGN(failure, wire::parse_failed(message->message));
        gave_up = true;
        return std::unexpected(failure.error());
      }
      if (message->message.kind == Kind::epoch_whole && on_epoch_whole) {
        MULTIFD_TRY(on_epoch_whole(wire::parse_epoch_whole(message->message)));
      }
      if (message->message.kind == Kind::user_data && on_user_data_) on_user_data_(message->message.body);
      if (is_base(message->message.kind)) {
        if (!on_base)
          return fail(Errc::unexpected_extension_message, Stage::parse, "return path",
                      static_cast<std::uint64_t>(message->message.kind), 0,
                      wire::extension_name(message->message.kind));
        MULTIFD_TRY(on_base(message->message));
      }
      if (is_wanted(message->message.kind)) return message->message.number;
    }
  }

  const std::function<void(std::span<const std::byte>)>& on_user_data_;
};

}  // namespace multifd::migrate::detail
