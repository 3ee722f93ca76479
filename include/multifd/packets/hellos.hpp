// SPDX-License-Identifier: MIT
//
// The hellos of a receiver's channels. Each hello's id, uuid and settings are compared with those of the other channels
// and of this side; open() waits here until all hellos have come.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/init_packet.hpp"
#include "multifd/options.hpp"
#include "multifd/packets/announce.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::packets {

/// Threads: admit() by the channels' workers, wait() by open(), stop() by any.
class Hellos {
 public:
  /// `own`: this side's settings, to compare announcements with; without them no announcement is compared.
  Hellos(unsigned channels, const UuidCheck& check, const std::optional<wire::Announcement>& own = {})
      : check_(check), own_(own), seen_(channels, false) {}

  /// Checks one channel's hello. Errors: those of compare_announcement(); Errc::uuid_mismatch, duplicate_channel_id
  /// (detail: the id).
  [[nodiscard]] Result<void> admit(const wire::InitPacket& hello) noexcept {
    const engine::Monitor::Lock held = monitor_.lock();
    if (own_ && hello.announced) {
      announced_ = true;
      if (auto equal = compare_announcement(*hello.announced, *own_); !equal) return equal;
    }
    if (check_.kind == UuidCheck::Kind::exact && hello.uuid != check_.uuid)
      return fail(Errc::uuid_mismatch, Stage::hello, "initial packet", 0, 0, subject_of(hello.uuid));
    if (check_.kind == UuidCheck::Kind::same_on_all && first_uuid_ && hello.uuid != *first_uuid_)
      return fail(Errc::uuid_mismatch, Stage::hello, "initial packet, other channels had another uuid", 0, 0,
                  subject_of(hello.uuid));
    if (seen_[hello.id]) return fail(Errc::duplicate_channel_id, Stage::hello, "initial packet", hello.id);
    first_uuid_ = hello.uuid;
    seen_[hello.id] = true;
    if (++count_ == seen_.size()) monitor_.notify();
    return {};
  }

  /// Waits for all hellos. Errors: Errc::timed_out (channel: the lowest id that is missing), cancelled after stop() or
  /// once `interrupted()` is true. That is polled every 20 ms, beside the monitor: the channels are never held up by it.
  template <std::predicate Interrupted>
  [[nodiscard]] Result<void> wait(std::chrono::milliseconds limit, Interrupted&& interrupted) noexcept {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    bool cancelled = interrupted();
    engine::Monitor::Lock held = monitor_.lock();
    const auto complete = [&] { return count_ == seen_.size(); };
    if (!cancelled)
      monitor_.wait(held, std::min<std::chrono::milliseconds>(limit, std::chrono::milliseconds(20)), complete, [&] {
        cancelled = interrupted();
        return !cancelled && std::chrono::steady_clock::now() < deadline;
      });
    if (complete()) return {};
    if (cancelled || monitor_.stopped(held)) return fail(Errc::cancelled, Stage::hello, "wait for initial packets");
    Error error{
        .code = Errc::timed_out, .stage = Stage::hello, .op = "no initial packet of this channel within hello_timeout"};
    for (std::uint32_t id = 0; error.channel == no_channel; ++id)
      if (!seen_[id]) error.channel = id;
    return std::unexpected(error);
  }

  /// The same with an Interrupt, which may be null.
  [[nodiscard]] Result<void> wait(std::chrono::milliseconds limit, const Interrupt* interrupt = nullptr) noexcept {
    return wait(limit, [interrupt] { return interrupt != nullptr && interrupt->triggered(); });
  }

  /// Whether the peer is a sender of ours, whose settings have been compared; after wait().
  bool announced() const noexcept { return announced_; }

  /// The uuid of the peer; after wait().
  Uuid uuid() const noexcept { return first_uuid_.value_or(Uuid{}); }

  void stop() noexcept { monitor_.stop(); }

 private:
  /// "uuid 00112233-4455-6677-8899-aabbccddeeff".
  static Subject subject_of(const Uuid& uuid) noexcept {
    constexpr std::string_view digits = "0123456789abcdef";
    Subject text("uuid ");
    for (std::size_t i = 0; i < uuid.size(); ++i) {
      if (i == 4 || i == 6 || i == 8 || i == 10) text.append("-");
      text.append(digits.substr(std::to_integer<unsigned>(uuid[i]) >> 4, 1));
      text.append(digits.substr(std::to_integer<unsigned>(uuid[i]) & 15, 1));
    }
    return text;
  }

  const UuidCheck check_;
  const std::optional<wire::Announcement> own_;
  engine::Monitor monitor_;
  std::vector<bool> seen_;
  std::size_t count_ = 0;
  std::optional<Uuid> first_uuid_;
  bool announced_ = false;
};

}  // namespace multifd::packets
