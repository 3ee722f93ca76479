// SPDX-License-Identifier: MIT
//
// How a connection that was lost is made again between own peers (format/extension.md section 19.10): what it begins with,
// and the destination's answer. Which of them are there is said by EPOCH_WHOLE.
//
//   the source says, 40 bytes        the destination answers, 24 bytes
//    off  size  field                 off  size  field
//      0     4  "mfrj"                  0     4  "mfrj"
//      4     1  role                    4     1  verdict
//      5     1  channel                 5     3  0
//      6     2  0                       8     4  generation, as it was said
//      8     4  generation             12     4  0
//     12    16  session                16     8  main: bytes of the main stream that have arrived
//     28     8  main: bytes of the return path that have arrived
//     36     4  0
//
// Behind the answer a channel's source says its first epoch, be64, and goes on with packets.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/extension.hpp"
#include "multifd/format/fields.hpp"
#include "multifd/limits.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

/// "mfrj": what tells such a connection from a channel, a main connection and a page connection.
inline constexpr std::uint32_t rejoin_magic = 0x6d66726a;
inline constexpr std::size_t rejoin_bytes = 40;
inline constexpr std::size_t rejoin_answer_bytes = 24;
inline constexpr std::size_t rejoin_epoch_bytes = 8;

/// Which of a migration's connections it takes the place of.
enum class RejoinRole : std::uint8_t { main = 0, channel = 1 };

/// What the source says.
struct Rejoin {
  RejoinRole role = RejoinRole::main;
  std::uint8_t channel = 0;      ///< its id; 0 with the main connection
  std::uint32_t generation = 1;  ///< how many connections this one had before; higher than any before
  Uuid session{};                ///< of SETTINGS
  std::uint64_t received = 0;    ///< main: bytes of the return path since ACCEPTED
  friend bool operator==(const Rejoin&, const Rejoin&) = default;
};

/// What the destination thinks of it.
enum class RejoinVerdict : std::uint8_t {
  joined = 1,        ///< it takes the place of the lost one
  unknown_session,   ///< no migration of that session is here: the process is another one, or has given it up
  stale_generation,  ///< a newer connection is there already
  unknown_channel,   ///< the migration has no such channel
  over,              ///< the migration needs it no more
};
inline constexpr std::uint8_t last_rejoin_verdict = 5;

constexpr std::string_view to_string(RejoinVerdict verdict) noexcept {
  constexpr std::array<std::string_view, last_rejoin_verdict> names{"joined", "unknown session", "stale generation",
                                                                    "unknown channel", "over"};
  return names[static_cast<std::size_t>(verdict) - 1];
}

struct RejoinAnswer {
  RejoinVerdict verdict = RejoinVerdict::unknown_session;
  std::uint32_t generation = 0;  ///< as it was said
  std::uint64_t received = 0;    ///< main: bytes of the main stream behind SETTINGS' ACCEPTED
  friend bool operator==(const RejoinAnswer&, const RejoinAnswer&) = default;
};

inline FieldWriter<rejoin_bytes> encode_rejoin(const Rejoin& rejoin) noexcept {
  FieldWriter<rejoin_bytes> bytes;
  bytes.be(rejoin_magic).be(static_cast<std::uint8_t>(rejoin.role)).be(rejoin.channel).be(std::uint16_t{0});
  bytes.be(rejoin.generation).bytes(rejoin.session).be(rejoin.received).be(std::uint32_t{0});
  return bytes;
}

/// Errors (stage parse): Errc::bad_extension_message (detail: the refused value).
[[nodiscard]] inline Result<Rejoin> parse_rejoin(std::span<const std::byte, rejoin_bytes> bytes) noexcept {
  const auto refuse = [](const char* what, std::uint64_t value) {
    return fail(Errc::bad_extension_message, Stage::parse, what, value, 0, "REJOIN");
  };
  FieldReader in(bytes);
  if (const auto first = in.be<std::uint32_t>(); first != rejoin_magic) return refuse("magic", first);
  const auto role = in.be<std::uint8_t>();
  Rejoin rejoin{.role = static_cast<RejoinRole>(role), .channel = in.be<std::uint8_t>()};
  std::uint64_t reserved = in.be<std::uint16_t>();
  rejoin.generation = in.be<std::uint32_t>();
  std::ranges::copy(in.take(sizeof(Uuid)), rejoin.session.begin());
  rejoin.received = in.be<std::uint64_t>();
  reserved |= in.be<std::uint32_t>();
  if (role > 1) return refuse("role", role);
  if (rejoin.generation == 0) return refuse("generation", 0);
  const bool main = rejoin.role == RejoinRole::main;
  if (main && rejoin.channel != 0) return refuse("channel of the main connection", rejoin.channel);
  if (!main && rejoin.received != 0) return refuse("bytes that a channel has received", rejoin.received);
  if (reserved != 0) return refuse("reserved field", reserved);
  return rejoin;
}

inline FieldWriter<rejoin_answer_bytes> encode_rejoin_answer(const RejoinAnswer& answer) noexcept {
  FieldWriter<rejoin_answer_bytes> bytes;
  bytes.be(rejoin_magic).be(static_cast<std::uint8_t>(answer.verdict)).be(std::uint8_t{0}).be(std::uint16_t{0});
  bytes.be(answer.generation).be(std::uint32_t{0}).be(answer.received);
  return bytes;
}

/// Errors (stage parse): Errc::bad_extension_message (detail: the refused value).
[[nodiscard]] inline Result<RejoinAnswer> parse_rejoin_answer(
    std::span<const std::byte, rejoin_answer_bytes> bytes) noexcept {
  const auto refuse = [](const char* what, std::uint64_t value) {
    return fail(Errc::bad_extension_message, Stage::parse, what, value, 0, "answer to REJOIN");
  };
  FieldReader in(bytes);
  if (const auto first = in.be<std::uint32_t>(); first != rejoin_magic) return refuse("magic", first);
  const auto verdict = in.be<std::uint8_t>();
  if (verdict == 0 || verdict > last_rejoin_verdict) return refuse("verdict", verdict);
  std::uint64_t reserved = in.be<std::uint8_t>();
  reserved |= in.be<std::uint16_t>();
  RejoinAnswer answer{.verdict = static_cast<RejoinVerdict>(verdict), .generation = in.be<std::uint32_t>()};
  reserved |= in.be<std::uint32_t>();
  if (reserved != 0) return refuse("reserved field", reserved);
  answer.received = in.be<std::uint64_t>();
  return answer;
}

// ---- EPOCH_WHOLE

/// An epoch is over at the destination: all that the main stream has said of it, and all that the channels have brought of
/// it whose SYNC has arrived, is in memory. What another channel has brought of it may be in memory, or not.
struct EpochWhole {
  std::uint64_t epoch = 0;                  ///< counted from 0, START's
  std::uint64_t received = 0;               ///< bytes of the main stream behind ACCEPTED
  std::array<std::uint8_t, 32> channels{};  ///< bit i % 8 of byte i / 8: channel i's SYNC of that epoch has arrived

  bool has(unsigned channel) const noexcept { return (channels[channel / 8] >> channel % 8 & 1) != 0; }
  void add(unsigned channel) noexcept {
    channels[channel / 8] = static_cast<std::uint8_t>(channels[channel / 8] | 1u << channel % 8);
  }
  friend bool operator==(const EpochWhole&, const EpochWhole&) = default;
};
inline constexpr std::size_t epoch_whole_bytes = 2 + 8 + 8 + 32;

inline FieldWriter<epoch_whole_bytes> encode_epoch_whole(const EpochWhole& whole) noexcept {
  FieldWriter<epoch_whole_bytes> bytes;
  bytes.be(static_cast<std::uint16_t>(ExtensionKind::epoch_whole)).be(whole.epoch).be(whole.received);
  return bytes.bytes(std::as_bytes(std::span(whole.channels)));
}

/// Parses an EPOCH_WHOLE that parse_extension() has returned, whose body has that length.
inline EpochWhole parse_epoch_whole(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  EpochWhole whole{.epoch = in.be<std::uint64_t>(), .received = in.be<std::uint64_t>()};
  for (std::uint8_t& byte : whole.channels) byte = in.be<std::uint8_t>();
  return whole;
}

}  // namespace multifd::wire
