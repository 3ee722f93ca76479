// SPDX-License-Identifier: MIT
//
// `Error` is one occurrence of an error with its place: stage, channel, packet, what it is about, and the refused
// value. Nothing here allocates except describe(), which is for the person who reads the message in the end.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "multifd/error.hpp"

namespace multifd {

/// Error::channel when no single channel is to blame.
inline constexpr std::uint32_t no_channel = std::numeric_limits<std::uint32_t>::max();
/// Error::packet when no packet is to blame.
inline constexpr std::uint64_t no_packet = std::numeric_limits<std::uint64_t>::max();

/// The name of what an error is about: a RAM block's idstr, an address, an option. A copy, because the name may be gone
/// when the error is read; in the Error itself, so that nothing is allocated. A long one is cut.
/// Threads: as a plain value.
class Subject {
 public:
  static constexpr std::size_t most = 63;

  constexpr Subject() noexcept = default;
  // A call, not 64 bytes moved inline at each of the places that hand an error on: a fifth of a stack's machine code.
  [[gnu::cold, gnu::noinline]] constexpr Subject(const Subject& other) noexcept { *this = other; }
  [[gnu::cold, gnu::noinline]] constexpr Subject& operator=(const Subject& other) noexcept {
    std::copy_n(other.text_, most, text_);
    length_ = other.length_;
    return *this;
  }
  // Implicit: `.subject = block.idstr` is how it is written.
  template <class Name>
    requires std::convertible_to<const Name&, std::string_view>
  constexpr Subject(const Name& name) noexcept {
    append(name);
  }

  constexpr Subject& append(std::string_view more) noexcept {
    constexpr std::string_view cut = "...";
    const std::size_t room = most - length_;
    std::copy_n(more.data(), std::min(room, more.size()), text_ + length_);
    if (more.size() > room) std::copy_n(cut.data(), cut.size(), text_ + most - cut.size());
    length_ = static_cast<unsigned char>(length_ + std::min(room, more.size()));
    return *this;
  }

  constexpr std::string_view view() const noexcept { return {text_, length_}; }

 private:
  char text_[most] = {};
  unsigned char length_ = 0;
};

/// One error with its place. Copying it allocates nothing; `op` is static text.
struct Error {
  std::error_code code;                ///< Errc, or errno in std::system_category()
  Stage stage = Stage::none;           ///< where in the work
  const char* op = "";                 ///< the failing operation, static text: "connect", "inflate"
  std::uint64_t detail = 0;            ///< the refused value: an offset, a length, an id; 0: none
  std::uint64_t expected = 0;          ///< what this side has, or allows, in its place; 0: nothing to compare with
  std::uint32_t channel = no_channel;  ///< channel id
  std::uint64_t packet = no_packet;    ///< packets of that channel before this one
  Subject subject{};                   ///< what it is about: "pc.ram", "tcp:192.0.2.7:4444"; may be empty
  std::error_code peer_reason{};       ///< with Errc::peer_gave_up: what the peer's own error was; all else is its, too
};

namespace detail {

/// Appends a name that may be the peer's: nothing but printable ASCII reaches a terminal or a log.
inline void append_printable(std::string& text, std::string_view name) {
  constexpr char digits[] = "0123456789abcdef";
  for (const char c : name) {
    if (c >= ' ' && c <= '~') {
      text += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      text += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
    }
  }
}

}  // namespace detail

/// Writes an error as one line for people: "channel 2, packet 17: parse: page offset ... (pc.ram, offset 4097)".
inline std::string describe(const Error& error) {
  std::string text;
  if (error.channel != no_channel) text += "channel " + std::to_string(error.channel);
  if (error.packet != no_packet) text += (text.empty() ? "packet " : ", packet ") + std::to_string(error.packet);
  if (!text.empty()) text += ": ";
  // An operation that begins with its stage's word says where it is by itself: "connect", not "connect: connect".
  const std::string_view stage = error.stage != Stage::none ? to_string(error.stage) : "";
  const std::string_view op = error.op;
  const bool op_says_stage = op.starts_with(stage) && (op.size() == stage.size() || op[stage.size()] == ' ');
  if (!stage.empty() && !op_says_stage) text.append(stage) += ": ";
  if (!op.empty()) text.append(op) += ": ";
  text += error.code.message();
  if (error.peer_reason) text += ": " + error.peer_reason.message();
  const std::error_code& reason = error.peer_reason ? error.peer_reason : error.code;
  const detail::ErrcInfo& names = detail::errc_info(reason.category() == category() ? reason.value() : 0);
  std::string place;
  const auto part = [&place](const char* label, std::uint64_t value) {
    place += (place.empty() ? "" : ", ") + std::string(label) + " " + std::to_string(value);
  };
  detail::append_printable(place, error.subject.view());
  // An offset of 0 is a value as well, beside what it is compared with.
  if (error.detail != 0 || error.expected != 0) part(names.detail, error.detail);
  if (error.expected != 0) part(names.expected, error.expected);
  if (!place.empty()) text += " (" + place + ")";
  return text;
}

}  // namespace multifd
