// SPDX-License-Identifier: MIT
//
// The way back: a receiver's answer to a sender of ours (format/answer.hpp), written and read.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "multifd/format/answer.hpp"
#include "multifd/transport/algorithms.hpp"

namespace multifd::packets {

/// Whether this connection can carry an answer.
template <Transport T>
bool carries_answer(const T& link) noexcept {
  if constexpr (HasAnswers<T>) return link.is_two_way();
  return false;
}

/// Writes the answer without waiting. Nothing else is ever sent in that direction, so the socket has room.
template <Transport T>
void give_answer(T& link, const wire::AnswerBytes& answer) noexcept {
  if constexpr (HasAnswers<T>) {
    const iovec buffer = const_buffer(std::span(answer));
    if (link.is_two_way()) (void)link.write_now(ConstBuffers(&buffer, 1));
  }
}

/// The reason that the receiver wrote before it broke the connection, if any. Does not wait: that answer came before
/// the break.
template <Transport T>
std::optional<Error> take_reason(T& link) noexcept {
  if constexpr (HasAnswers<T>) {
    wire::AnswerBytes bytes;
    const iovec buffer = mutable_buffer(std::span<std::byte>(bytes));
    if (!link.is_two_way()) return std::nullopt;
    const auto arrived = link.read_now(MutableBuffers(&buffer, 1));
    if (!arrived || *arrived != bytes.size()) return std::nullopt;
    if (auto answer = wire::parse_answer(bytes); !answer && answer.error().code == Errc::peer_gave_up)
      return answer.error();
  }
  return std::nullopt;
}

/// Waits for the receiver's answer that everything has arrived.
/// Errors: Errc::peer_gave_up with the receiver's reason, unconfirmed, bad_magic, bad_version; the transport's.
template <Transport T>
[[nodiscard]] Result<void> wait_for_confirmation(T& link) noexcept {
  wire::AnswerBytes bytes;
  const auto arrived = read_exact(link, std::span<std::byte>(bytes));
  if (arrived) return wire::parse_answer(bytes);
  Error error = arrived.error();
  error.stage = Stage::close;
  error.op = "wait for the confirmation";
  if (error.code == Condition::peer_gone || error.code == Errc::truncated_payload) error.code = Errc::unconfirmed;
  return std::unexpected(error);
}

}  // namespace multifd::packets
