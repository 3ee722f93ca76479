// SPDX-License-Identifier: MIT
//
// Writes a return path (format/main_stream.md section 9.8), for a destination; to an own source also the messages of
// the extension (format/extension.md section 19.3). Every message goes out at once, but those of base_writer.hpp.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/extension.hpp"
#include "multifd/format/fields.hpp"
#include "multifd/format/peer_failure.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/qemu/return_path.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::qemu {

/// The destination's side of the return path.
///
/// Errors (of each call): the transport's. Sticky: every later call returns the first one.
/// Threads: one, the transport's writing thread; another one may read the main stream meanwhile.
/// Cost: one write of at most 516 bytes a message; may block until the source takes them. Nothing is allocated.
template <Transport T>
class ReturnPathWriter {
 public:
  /// Params `link`: the main connection; must outlive this object, and must not be written to elsewhere meanwhile.
  explicit ReturnPathWriter(T& link) : link_(&link) {}

  /// Bounds the writes from now on. Params `timeout`: how long the peer may take no byte; `interrupt`: ends a write; may be
  ///   null, and outlives this object. Default: no limit.
  void set_limits(std::chrono::milliseconds timeout, const Interrupt* interrupt) noexcept
    requires HasTimeLimits<T>
  {
    timeout_ = timeout;
    interrupt_ = interrupt;
  }

  /// Answers a PING. Params `value`: Commands::answer().
  [[nodiscard]] Result<void> pong(std::uint32_t value) noexcept { return write(encode_pong(value)); }
  /// Says that a running source may switch over; only by option (section 9.8).
  [[nodiscard]] Result<void> switchover_ack() noexcept { return write(encode_switchover_ack()); }
  /// Writes the last message. Params `status`: 0: everything is loaded; any other makes the source fail.
  [[nodiscard]] Result<void> shut(std::uint32_t status) noexcept { return write(encode_shut(status)); }

  // ---- To an own source, behind its SETTINGS

  /// Takes the source's settings. Params `own`: this side's versions and features; its settings are not compared there.
  [[nodiscard]] Result<void> accepted(const wire::PeerSettings& own) noexcept {
    return message(wire::encode_settings(own, wire::ExtensionKind::accepted).view());
  }
  /// Says that an epoch is over here, and whose part of it has arrived. Params `whole`: its epochs ascend.
  [[nodiscard]] Result<void> epoch_whole(const wire::EpochWhole& whole) noexcept {
    return message(wire::encode_epoch_whole(whole).view());
  }
  /// Writes messages that BaseWriter has gathered, whole ones.
  [[nodiscard]] Result<void> base(std::span<const std::byte> messages) noexcept { return write(messages); }
  /// Says that memory and devices' state are whole. Params `pages`: whose digests were compared.
  [[nodiscard]] Result<void> loaded(std::uint64_t pages) noexcept {
    return message(wire::encode_extension(wire::ExtensionKind::loaded, pages).view());
  }
  /// Says that the guest runs here.
  [[nodiscard]] Result<void> running() noexcept {
    return message(wire::encode_extension(wire::ExtensionKind::running).view());
  }
  /// Writes bytes of the VMM's own. Params `bytes`: 1 to 510.
  [[nodiscard]] Result<void> user_data(std::span<const std::byte> bytes) noexcept {
    wire::FieldWriter<wire::max_extension_answer_bytes> data;
    data.be(static_cast<std::uint16_t>(wire::ExtensionKind::user_data)).bytes(bytes);
    return message(data.view());
  }
  /// Says why this side gives up. Params `text`: what the source shows, such as describe(error). SHUT may follow.
  [[nodiscard]] Result<void> failed(const Error& error, std::string_view text) noexcept {
    return message(wire::encode_failed(error, text).view());
  }

 private:
  [[nodiscard]] Result<void> message(std::span<const std::byte> data) noexcept {
    MULTIFD_ASSERT(data.size() <= wire::max_extension_answer_bytes);
    wire::FieldWriter<return_header_bytes + wire::max_extension_answer_bytes> bytes;
    bytes.be(wire::extension_number).be(static_cast<std::uint16_t>(data.size())).bytes(data);
    return write(bytes.view());
  }

  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes) noexcept {
    if (error_) return std::unexpected(*error_);
    auto written = limited_write(bytes);
    if (!written) error_ = written.error();
    return written;
  }

  [[nodiscard]] Result<void> limited_write(std::span<const std::byte> bytes) noexcept {
    if constexpr (HasTimeLimits<T>)
      return write_all(*link_, bytes, timeout_, interrupt_);
    else
      return write_all(*link_, bytes);
  }

  T* link_;
  std::chrono::milliseconds timeout_ = no_timeout;
  const Interrupt* interrupt_ = nullptr;
  std::optional<Error> error_;
};

}  // namespace multifd::qemu
