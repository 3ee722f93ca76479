// SPDX-License-Identifier: MIT
//
// Where the channels of a receiver report in: each hello's id and uuid are held against the others, and open()
// waits here until all have come.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "multifd/channel/announce.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/wire/init_packet.hpp"

namespace multifd {

/// Which uuid a receiver lets in. A uuid is no secret and no authentication (format/hardening.md section 16, row 23).
struct UuidCheck {
  enum class Kind : std::uint8_t {
    any,
    same_on_all,  ///< whatever it is, all channels must agree
    exact,        ///< `uuid`, byte for byte, as QEMU does
  };
  Kind kind = Kind::same_on_all;
  Uuid uuid{};
};

/// Threads: admit() by the channels' workers, wait() by open(), stop() by any.
class HelloDesk {
 public:
  /// `own`: this side's settings, to compare an announcement with; without, none is looked at.
  HelloDesk(unsigned channels, const UuidCheck& check, const std::optional<wire::Announcement>& own = {})
      : check_(check), own_(own), seen_(channels, false) {}

  /// Errors: those of compare_announcement(); Errc::uuid_mismatch, duplicate_channel_id (detail: the id).
  Result<void> admit(const wire::InitPacket& hello) noexcept {
    const std::lock_guard lock(mutex_);
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
    if (++count_ == seen_.size()) changed_.notify_all();
    return {};
  }

  /// Waits for all hellos. Errors: Errc::timed_out (channel: the lowest id that is missing), cancelled after stop() or by
  /// `interrupt` (may be null), which is looked at every 20 ms.
  Result<void> wait(std::chrono::milliseconds limit, const Interrupt* interrupt = nullptr) noexcept {
    std::unique_lock lock(mutex_);
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (count_ < seen_.size()) {
      if (stopped_ || (interrupt != nullptr && interrupt->triggered()))
        return fail(Errc::cancelled, Stage::hello, "wait for initial packets");
      const auto now = std::chrono::steady_clock::now();
      if (now >= deadline) break;
      const auto look = now + std::chrono::milliseconds(20);
      changed_.wait_until(lock, interrupt != nullptr ? std::min(look, deadline) : deadline);
    }
    if (count_ == seen_.size()) return {};
    Error error{
        .code = Errc::timed_out, .stage = Stage::hello, .op = "no initial packet of this channel within hello_timeout"};
    for (std::uint32_t id = 0; error.channel == no_channel; ++id)
      if (!seen_[id]) error.channel = id;
    return std::unexpected(error);
  }

  /// Whether the peer is a sender of ours, whose settings have been compared; after wait().
  bool announced() const noexcept { return announced_; }

  /// The uuid of the peer; after wait().
  Uuid uuid() const noexcept { return first_uuid_.value_or(Uuid{}); }

  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
  }

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
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> seen_;
  std::size_t count_ = 0;
  std::optional<Uuid> first_uuid_;
  bool announced_ = false;
  bool stopped_ = false;
};

}  // namespace multifd
