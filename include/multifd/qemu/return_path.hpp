// SPDX-License-Identifier: MIT
//
// The return path (format/main_stream.md section 9.8): what a destination sends on the main connection. Encoders for a
// destination, a parser for a source or for a relay in between.
//
//   off  size  field    refused
//     0     2  type     0, above 7, postcopy's (3 to 6); 0x6d66 where the source has not asked for the extension
//     2     2  length   over 512, other than the type's: SHUT 4, PONG 4, SWITCHOVER_ACK 0
//     4     n  data     nothing; and nothing comes after SHUT. Extension: a message that is malformed or out of order
//                       (format/extension.md section 19.3)
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <span>

#include "multifd/config.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

namespace detail {

inline std::array<std::byte, 8> encode_return_value(std::uint16_t type, std::uint32_t value) noexcept {
  std::array<std::byte, 8> bytes;
  wire::store_be<std::uint16_t>(&bytes[0], type);
  wire::store_be<std::uint16_t>(&bytes[2], 4);
  wire::store_be<std::uint32_t>(&bytes[4], value);
  return bytes;
}

}  // namespace detail

/// Encodes the answer to PING(`value`).
inline std::array<std::byte, 8> encode_pong(std::uint32_t value) noexcept {
  return detail::encode_return_value(return_pong, value);
}

/// Encodes the last message: `status` 0 says that everything is loaded, any other makes the source fail.
inline std::array<std::byte, 8> encode_shut(std::uint32_t status) noexcept {
  return detail::encode_return_value(return_shut, status);
}

/// Encodes SWITCHOVER_ACK, only for sources with the capability switchover-ack and a machine type up to 11.0 (section
/// 9.8).
inline std::array<std::byte, 4> encode_switchover_ack() noexcept {
  std::array<std::byte, 4> bytes;
  wire::store_be<std::uint16_t>(&bytes[0], return_switchover_ack);
  wire::store_be<std::uint16_t>(&bytes[2], 0);
  return bytes;
}

/// One message. `bytes` are valid until the parser's next call of next() or room().
struct ReturnMessage {
  std::uint16_t type = 0;              ///< return_shut, return_pong, return_switchover_ack, wire::extension_number
  std::uint32_t value = 0;             ///< SHUT's status, PONG's value
  wire::ExtensionMessage message{};    ///< of type wire::extension_number
  std::span<const std::byte> bytes{};  ///< exactly as on the wire
};

/// An incremental parser of the return path, used as MainStreamParser is. Allocates nothing.
///
/// Threads: one at a time.
class ReturnPathParser {
 public:
  /// Takes an own destination's messages from now on: its answer to the question has come (wire::version_in_pong()).
  void take_extension() noexcept { extension_ = true; }

  /// The buffer for the connection's next bytes. Not empty after next() said "more"; empty after an error.
  std::span<std::byte> room() noexcept {
    drop_last_message();
    if (error_) return {};
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
    return std::span(buffer_).subspan(end_);
  }

  /// Says how many bytes have arrived in room(). Contract: not more than it had.
  void commit(std::size_t bytes) noexcept {
    MULTIFD_ASSERT(bytes <= buffer_.size() - end_);
    end_ += bytes;
  }

  /// Takes the next whole message; none if bytes are missing for it.
  ///
  /// Errors (stage parse, sticky, detail: the refused value): Errc::unknown_return_message, bad_return_length,
  ///   postcopy_refused; bad_extension_message, unexpected_extension_message (subject: its name). Cost: no allocation.
  ///   Wire: format/main_stream.md section 9.8, format/extension.md section 19.2.
  [[nodiscard]] Result<std::optional<ReturnMessage>> next() noexcept {
    drop_last_message();
    if (error_) return std::unexpected(*error_);
    if (end_ - begin_ < return_header_bytes) return std::nullopt;
    const std::byte* at = &buffer_[begin_];
    const auto type = wire::load_be<std::uint16_t>(at);
    const auto length = wire::load_be<std::uint16_t>(at + 2);
    if (auto good = check(type, length); !good) {
      error_ = good.error();
      return std::unexpected(*error_);
    }
    if (end_ - begin_ < return_header_bytes + length) return std::nullopt;
    ReturnMessage message{.type = type};
    if (type == wire::extension_number) {
      const auto extension = take_message({at + return_header_bytes, length});
      if (!extension) {
        error_ = extension.error();
        return std::unexpected(*error_);
      }
      message.message = *extension;
    } else if (length == 4) {
      message.value = wire::load_be<std::uint32_t>(at + return_header_bytes);
    }
    last_bytes_ = return_header_bytes + length;
    message.bytes = {at, last_bytes_};
    shut_ = type == return_shut;
    return message;
  }

  /// Whether a message has begun that is not whole. Called after next() has returned none.
  bool inside() const noexcept { return end_ > begin_; }

  /// Bytes that have arrived behind the message that next() has returned last.
  std::size_t bytes_behind() const noexcept { return end_ - begin_ - last_bytes_; }

  /// Whether SHUT was taken, after which nothing comes.
  bool shut() const noexcept { return shut_; }

 private:
  void drop_last_message() noexcept {
    begin_ += last_bytes_;
    last_bytes_ = 0;
  }

  [[nodiscard]] Result<void> check(std::uint16_t type, std::uint16_t length) const noexcept {
    if (length > max_return_data_bytes) return fail(Errc::bad_return_length, Stage::parse, "return path", length);
    if (shut_) return fail(Errc::unknown_return_message, Stage::parse, "return path after SHUT", type);
    std::uint16_t expected = 0;
    switch (type) {
      case return_shut:
      case return_pong: expected = 4; break;
      case return_switchover_ack: break;
      case wire::extension_number:
        if (extension_) return {};
        return fail(Errc::unknown_return_message, Stage::parse, "return path", type);
      case return_req_pages_id:
      case return_req_pages:
      case return_recv_bitmap:
      case return_resume_ack: return fail(Errc::postcopy_refused, Stage::parse, "return path", type);
      default: return fail(Errc::unknown_return_message, Stage::parse, "return path", type);
    }
    if (length != expected) return fail(Errc::bad_return_length, Stage::parse, "return path", length);
    return {};
  }

  /// Parses a message of an own destination, and sees that it comes in its order.
  [[nodiscard]] Result<wire::ExtensionMessage> take_message(std::span<const std::byte> data) noexcept {
    using Kind = wire::ExtensionKind;
    const auto message = wire::parse_extension(data, wire::Towards::source);
    if (!message) return message;
    const bool in_order = [&] {
      switch (message->kind) {
        case Kind::failed: return last_ != Kind::failed;
        case Kind::accepted: return !last_;
        case Kind::user_data: return last_ && last_ != Kind::failed;
        case Kind::epoch_whole: return last_ == Kind::accepted && (!epoch_ || message->number > *epoch_);
        case Kind::base_key: return last_ == Kind::accepted && !base_;
        case Kind::base_digests:
        case Kind::base_zeros: return last_ == Kind::accepted && base_;
        case Kind::loaded: return last_ == Kind::accepted;
        case Kind::running: return last_ == Kind::loaded;
        default: return false;  // those for a destination, which the parser of messages has refused
      }
    }();
    if (!in_order)
      return fail(Errc::unexpected_extension_message, Stage::parse, "return path",
                  static_cast<std::uint64_t>(message->kind), 0, wire::extension_name(message->kind));
    if (message->kind == Kind::epoch_whole)
      epoch_ = message->number;
    else if (message->kind == Kind::base_key)
      base_ = true;
    else if (message->kind != Kind::user_data && message->kind != Kind::base_digests &&
             message->kind != Kind::base_zeros)
      last_ = message->kind;
    return message;
  }

  /// Of many messages: digests of an older copy come by the thousand.
  static constexpr std::size_t buffer_bytes = 16 * 1024;
  static_assert(buffer_bytes >= return_header_bytes + max_return_data_bytes);

  std::array<std::byte, buffer_bytes> buffer_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::size_t last_bytes_ = 0;
  bool shut_ = false;
  bool extension_ = false;
  std::optional<wire::ExtensionKind> last_;  ///< the last message that has a place in the order
  std::optional<std::uint64_t> epoch_;       ///< of the last EPOCH_WHOLE
  bool base_ = false;                        ///< BASE_KEY was taken
  std::optional<Error> error_;
};

}  // namespace multifd::qemu
