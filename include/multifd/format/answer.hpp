// SPDX-License-Identifier: MIT
//
// A receiver's answer, the only bytes that go from destination to source on a channel. Only senders of ours get one, if
// they have announced that they read it (announcement.hpp); it comes once per channel, as the last bytes. The answer
// says that everything has arrived, or why the receiver gives up: format/packets.md section 2.1.
//
//   off  size  field
//     0     4  magic      "mfAW"
//     4     4  version    1
//     8     4  kind       0: everything has arrived; 1: `code` is an Errc; 2: an errno; 3: neither
//    12     4  code
//    16     4  last       the receiver's last_errc: if it differs, the lists of codes do, and `code` means nothing
//    20     4  channel    Error::channel
//    24     8  detail     Error::detail
//    32     8  expected   Error::expected
//    40     8  packet     Error::packet
//    48    16  zero
//    64    64  subject    Error::subject, else Error::op, NUL padded
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <system_error>

#include "multifd/format/byte_order.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t answer_bytes = 128;
inline constexpr std::uint32_t answer_magic = 0x6d664157;  // "mfAW"
inline constexpr std::uint32_t answer_version = 1;

using AnswerBytes = std::array<std::byte, answer_bytes>;

/// Encodes an answer: everything has arrived (an Error without a code), or the receiver gives up because of `error`.
inline AnswerBytes encode_answer(const Error& error = {}) noexcept {
  AnswerBytes bytes{};
  const bool ours = error.code.category() == category();
  const bool of_the_system = error.code.category() == std::system_category();
  store_be<std::uint32_t>(&bytes[0], answer_magic);
  store_be<std::uint32_t>(&bytes[4], answer_version);
  store_be<std::uint32_t>(&bytes[8], !error.code ? 0 : ours ? 1 : of_the_system ? 2 : 3);
  store_be<std::uint32_t>(&bytes[12], static_cast<std::uint32_t>(error.code.value()));
  store_be<std::uint32_t>(&bytes[16], static_cast<std::uint32_t>(last_errc));
  store_be<std::uint32_t>(&bytes[20], error.channel);
  store_be<std::uint64_t>(&bytes[24], error.detail);
  store_be<std::uint64_t>(&bytes[32], error.expected);
  store_be<std::uint64_t>(&bytes[40], error.packet);
  static_assert(Subject::most < 64);
  // Without a subject the place holds the operation, which is text of this process.
  const Subject about = error.subject.view().empty() ? Subject(error.op) : error.subject;
  const std::string_view subject = about.view();
  std::memcpy(&bytes[64], subject.data(), subject.size());
  return bytes;
}

/// Parses an answer. Success: everything has arrived.
/// Errors: Errc::peer_gave_up with the receiver's place and reason; bad_magic, bad_version for bytes that are no
///   answer.
[[nodiscard]] inline Result<void> parse_answer(std::span<const std::byte, answer_bytes> bytes) noexcept {
  const auto word = [&](std::size_t at) { return load_be<std::uint32_t>(&bytes[at]); };
  if (word(0) != answer_magic) return fail(Errc::bad_magic, Stage::close, "receiver's answer", word(0));
  if (word(4) != answer_version) return fail(Errc::bad_version, Stage::close, "receiver's answer", word(4));
  const std::uint32_t kind = word(8);
  if (kind == 0) return {};
  Error error{.code = Errc::peer_gave_up,
              .detail = load_be<std::uint64_t>(&bytes[24]),
              .expected = load_be<std::uint64_t>(&bytes[32]),
              .channel = word(20),
              .packet = load_be<std::uint64_t>(&bytes[40])};
  const char* const subject = reinterpret_cast<const char*>(&bytes[64]);
  error.subject = std::string_view(subject, ::strnlen(subject, Subject::most));
  const auto code = static_cast<int>(word(12));
  if (kind == 1 && word(16) == static_cast<std::uint32_t>(last_errc)) error.peer_reason = static_cast<Errc>(code);
  if (kind == 2) error.peer_reason = {code, std::system_category()};
  return std::unexpected(error);
}

}  // namespace multifd::wire
