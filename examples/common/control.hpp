// SPDX-License-Identifier: MIT
//
// The programs' own main connection, beside the channels: what QEMU's main stream would carry. It opens with a magic
// number of its own, so that one port serves both kinds; then messages: type (1 byte), length (be32), payload.
//
//   hello       JSON     source -> destination: what is coming (size, page size, channels, compression, ...)
//   zero_runs   binary   source -> destination: (be64 offset, be64 bytes)*, pages that are zero (legacy zero pages)
//   round_end   empty    source -> destination: the epoch's SYNCs are on the channels
//   state       binary   source -> destination: virtual CPU (live_migration)
//   digests     binary   source -> destination: be64 XXH3 per page (live_migration)
//   done        JSON     source -> destination: nothing follows on the channels
//   ready       JSON     destination -> source: everything of the last step is in place
//   result      JSON     destination -> source: verdict and counters
//   failed      text     both directions: why this side gives up
#pragma once

#include <poll.h>
#include <multifd/multifd.hpp>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/link.hpp"
#include "common/program.hpp"
#include "common/time_limits.hpp"
#include "common/tls.hpp"

namespace program {

/// First four bytes of a main connection ("MFDm").
inline constexpr std::uint32_t control_magic = 0x4d46446d;

/// A message's type and length, ahead of its payload.
inline constexpr std::size_t message_header_bytes = 5;

enum class MessageType : std::uint8_t { hello = 1, zero_runs, round_end, state, digests, done, ready, result, failed };

struct Message {
  MessageType type{};
  std::vector<std::byte> payload;

  std::string text() const;
  /// The payload as a JSON object. Throws Failure when it is none.
  nlohmann::json json() const;
  /// The peer's text in a `failed`.
  Failure failure() const;
};

/// A field that the peer's JSON must have. Throws Failure when it is missing or of another type.
template <class T>
T field(const nlohmann::json& object, const char* key) {
  try {
    return object.at(key).get<T>();
  } catch (const nlohmann::json::exception&) {
    throw Failure(std::string("main connection: the peer's message has no usable \"") + key + '"');
  }
}

/// One end of the main connection. Reading and writing throw Failure, also when the peer sends `failed`.
///
/// Threads: one; waits end when `interrupt` triggers.
class Control {
 public:
  static Control connect(const multifd::Address& address, const multifd::Interrupt& interrupt,
                         const TimeLimits& limits = {}, const Tls& tls = {});
  /// Takes over an accepted connection whose magic has been read.
  static Control adopt(Link link, const multifd::Interrupt& interrupt, const TimeLimits& limits);

  /// As Link has it. The channels make their handshakes with the same credentials and preferences.
  std::string cipher() const { return link_.cipher(); }

  /// Sets the Interrupt that ends this side's waits, beside the time limits.
  void set_interrupt(const multifd::Interrupt& interrupt) noexcept { interrupt_ = &interrupt; }

  void send(MessageType type, std::span<const std::byte> payload = {});
  void send_json(MessageType type, const nlohmann::json& object);
  /// Sends the last message, even if the interrupt has triggered. Returns whether it was written; does not wait long.
  bool send_last(MessageType type, std::span<const std::byte> payload) noexcept;
  /// After send_last(): waits until the peer has read that message and called finish(). Returns an empty text then.
  /// Otherwise the text says why that is not known: the connection broke, or the peer was silent for `limit`.
  std::string why_unheard(std::chrono::milliseconds limit = std::chrono::seconds(5)) noexcept;
  /// Called when the peer's last message was read: ends this side in order, which tells the peer so. Without it the
  /// destructor resets the connection.
  void finish() noexcept { (void)link_.finish(); }  // a peer that has gone misses nothing
  /// Sends the peer this side's reason for giving up, as the last message. Never throws, does not wait long.
  void send_failed(const std::string& reason) noexcept;
  /// Ends a migration that failed. When this side's failure may be the consequence of the peer's, throws the peer's
  /// reason; otherwise sends `failure` to the peer and throws it.
  [[noreturn]] void give_up(const Failure& failure);

  /// Waits for the next message to begin. False: it has not begun within `timeout` (0: no limit).
  bool wait_for_message(std::chrono::milliseconds timeout);
  /// Reads the next message. `limit_bytes` bounds its payload, `limit` the wait for its first byte.
  Message receive(std::size_t limit_bytes, const Limit& limit = {});
  /// The same for a message that must have that type.
  Message expect(MessageType type, std::size_t limit_bytes, const Limit& limit = {});

 private:
  Control(Link link, const multifd::Interrupt& interrupt, const TimeLimits& limits)
      : link_(std::move(link)), interrupt_(&interrupt), message_limit_(limits.progress_limit()) {}
  void write(std::span<const std::byte> bytes);
  void read(std::span<std::byte> bytes, const Limit& limit);
  /// The bytes that a call has moved; throws Failure, also for a limit that has passed.
  static std::size_t moved(const multifd::Result<std::size_t>& bytes, const char* too_late_because, const Limit& limit);

  Link link_;
  const multifd::Interrupt* interrupt_;  ///< null: nothing ends a wait but its limit
  Limit message_limit_;                  ///< for the rest of a message that has begun, and for writes
};

/// Bounds of payloads: of JSON, and of every message without a bound of its own.
inline constexpr std::size_t small_message = 64 * 1024;
inline constexpr std::size_t large_message = 1024 * 1024;

/// Collects pages that are zero as runs, for one zero_runs message at a time.
class ZeroRuns {
 public:
  explicit ZeroRuns(Control& control, std::size_t page_bytes) : control_(control), page_bytes_(page_bytes) {}
  void add(std::uint64_t offset);
  void flush();

 private:
  Control& control_;
  std::size_t page_bytes_;
  std::vector<std::byte> payload_;
  std::uint64_t start_ = 0;
  std::uint64_t length_ = 0;
  void append();
};

/// Writes the zeros of a zero_runs message into memory that was fresh; returns the number of pages.
///
/// Params: `apply_zero`: AnyReceiver::apply_zero().
/// Throws Failure, with the block and the offset, for a run outside the block.
std::uint64_t apply_zero_runs(const Message& message, const multifd::RamMap& map, multifd::BlockId block,
                              const std::function<multifd::Result<void>(std::uint64_t offset)>& apply_zero);

}  // namespace program
