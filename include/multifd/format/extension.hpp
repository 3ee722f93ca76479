// SPDX-License-Identifier: MIT
//
// What the two ends of this library say to each other on the main connection, beside QEMU's main stream and return path
// (format/extension.md section 19). A QEMU is never shown a message: a source asks first, by a PING whose value only
// an own destination answers with another one.
//
//   to the destination   COMMAND 0x6d66, at most 16 KiB of data    off  size  field
//   to the source        return path type 0x6d66, at most 512        0     2  kind
//                                                                    2     n  body, by the kind
//
// This file has the numbers, the question, and the messages of fixed fields; peer_settings.hpp, peer_failure.hpp,
// page_digests.hpp, page_bitmap.hpp, missing_pages.hpp, base_digests.hpp and rejoin.hpp have the others.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/fields.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

/// The number of the command and of the return path's message: "mf".
inline constexpr std::uint16_t extension_number = 0x6d66;
inline constexpr std::size_t max_extension_bytes = 16 * 1024;
inline constexpr std::size_t max_extension_answer_bytes = 512;

/// Versions of the extension that this side understands.
inline constexpr std::uint8_t extension_version = 1;
inline constexpr std::uint8_t oldest_extension_version = 1;

// ---- The question (section 19.1): are you ours? It says the newest version that a side understands.

/// The value of the PING by which a source asks. A QEMU answers with PONG of the same value.
constexpr std::uint32_t extension_ping(std::uint8_t newest = extension_version) noexcept {
  return std::uint32_t{extension_number} << 16 | newest;
}
/// The value of the PONG by which an own destination answers.
constexpr std::uint32_t extension_pong(std::uint8_t newest = extension_version) noexcept {
  return std::uint32_t{extension_number} << 16 | 0x8000 | newest;
}
/// The asking source's newest version; none: a PING of a QEMU.
constexpr std::optional<std::uint8_t> version_in_ping(std::uint32_t value) noexcept {
  const auto newest = static_cast<std::uint8_t>(value);
  if (newest == 0 || value != extension_ping(newest)) return std::nullopt;
  return newest;
}
/// The answering destination's newest version; none: a PONG of a QEMU, or of a version of ours without the extension.
constexpr std::optional<std::uint8_t> version_in_pong(std::uint32_t value) noexcept {
  const auto newest = static_cast<std::uint8_t>(value);
  if (newest == 0 || value != extension_pong(newest)) return std::nullopt;
  return newest;
}

// ---- Messages (section 19.3)

enum class ExtensionKind : std::uint16_t {
  settings = 1,    ///< what the source is set to (peer_settings.hpp)
  accepted,        ///< the destination takes it
  failed,          ///< why a side gives up (peer_failure.hpp)
  user_data,       ///< bytes of the VMM's own
  epoch_whole,     ///< an epoch is over at the destination (rejoin.hpp)
  section_size,    ///< bytes of the device's state in the section that follows
  page_digests,    ///< digests of neighbouring pages (page_digests.hpp)
  state_whole,     ///< all sections have been sent
  loaded,          ///< the destination has loaded all, and could run the guest
  hand_over,       ///< the guest is the destination's
  running,         ///< the guest runs at the destination
  missing_pages,   ///< pages that the destination gets when it asks for them (missing_pages.hpp)
  memory_follows,  ///< all of these have been named (missing_pages.hpp)
  known_zeros,     ///< pages that are zero, as the source knows without reading them (page_bitmap.hpp)
  base_wanted,     ///< the source asks what the destination's older copy has
  base_key,        ///< the key of the digests that follow (base_digests.hpp)
  base_digests,    ///< of the older copy's pages (base_digests.hpp)
  base_zeros,      ///< pages of the older copy that are zero (base_digests.hpp)
};

/// Whom a message is for.
enum class Towards : std::uint8_t { destination, source };

namespace detail {

struct ExtensionRow {
  std::string_view name;
  bool to_destination, to_source;
  std::size_t least, most;  ///< bytes of the body
};
inline constexpr std::array<ExtensionRow, 18> extension_rows{{
    // name          to destination, source, body
    {"SETTINGS", true, false, 4, 2046},
    {"ACCEPTED", false, true, 4, 510},
    {"FAILED", true, true, 26, 426},
    {"USER_DATA", true, true, 1, 16382},
    {"EPOCH_WHOLE", false, true, 48, 48},
    {"SECTION_SIZE", true, false, 8, 8},
    {"PAGE_DIGESTS", true, false, 20, 16380},
    {"STATE_WHOLE", true, false, 4, 4},
    {"LOADED", false, true, 8, 8},
    {"HAND_OVER", true, false, 0, 0},
    {"RUNNING", false, true, 0, 0},
    {"MISSING_PAGES", true, false, 20, 16380},
    {"MEMORY_FOLLOWS", true, false, 26, 26},
    {"KNOWN_ZEROS", true, false, 20, 16380},
    {"BASE_WANTED", true, false, 0, 0},
    {"BASE_KEY", false, true, 16, 16},
    {"BASE_DIGESTS", false, true, 28, 508},
    {"BASE_ZEROS", false, true, 20, 20},
}};

}  // namespace detail

/// The name of a kind in the format's text. Contract: one of the enum's values.
constexpr std::string_view extension_name(ExtensionKind kind) noexcept {
  return detail::extension_rows[static_cast<std::size_t>(kind) - 1].name;
}

/// One message. `body` is part of the bytes that were parsed.
struct ExtensionMessage {
  ExtensionKind kind{};
  std::uint64_t number = 0;           ///< epoch_whole: the epoch; section_size: bytes; state_whole: sections;
                                      ///< loaded: pages whose digests were compared
  std::span<const std::byte> body{};  ///< what stands behind the kind
};

/// Parses a message: the data of the command, or of the return path's message.
///
/// Errors (stage parse): Errc::bad_extension_message (detail: the kind, or the length of the body; subject: the
///   message's name), unexpected_extension_message (a kind that never comes from there). What is in a body of several
///   fields is checked by its own parser.
/// Threads: any. Wire: format/extension.md section 19.2.
[[nodiscard]] inline Result<ExtensionMessage> parse_extension(std::span<const std::byte> data,
                                                              Towards towards) noexcept {
  FieldReader in(data);
  const auto kind = in.be<std::uint16_t>();
  const std::size_t most = towards == Towards::destination ? max_extension_bytes : max_extension_answer_bytes;
  if (!in.good() || data.size() > most)
    return fail(Errc::bad_extension_message, Stage::parse, "extension's length", data.size(), most);
  if (kind < 1 || kind > detail::extension_rows.size())
    return fail(Errc::bad_extension_message, Stage::parse, "extension's kind of message", kind);
  const detail::ExtensionRow& row = detail::extension_rows[kind - 1];
  if (towards == Towards::destination ? !row.to_destination : !row.to_source)
    return fail(Errc::unexpected_extension_message, Stage::parse, "extension's direction", kind, 0, row.name);
  if (in.left() < row.least || in.left() > row.most)
    return fail(Errc::bad_extension_message, Stage::parse, "extension's body", in.left(), 0, row.name);
  ExtensionMessage message{.kind = static_cast<ExtensionKind>(kind), .number = 0, .body = in.rest()};
  FieldReader fields(message.body);
  if (message.kind == ExtensionKind::state_whole)
    message.number = fields.be<std::uint32_t>();
  else if (row.most == 8 || message.kind == ExtensionKind::epoch_whole)
    message.number = fields.be<std::uint64_t>();
  return message;
}

/// A message of no more than a kind and a number. Contract: a kind that has none, or only that, as its body.
inline FieldWriter<10> encode_extension(ExtensionKind kind, std::uint64_t number = 0) noexcept {
  FieldWriter<10> bytes;
  bytes.be(static_cast<std::uint16_t>(kind));
  const std::size_t size = detail::extension_rows[static_cast<std::size_t>(kind) - 1].most;
  MULTIFD_ASSERT(size == 0 || size == 4 || size == 8);
  if (size == 4) bytes.be(static_cast<std::uint32_t>(number));
  if (size == 8) bytes.be(number);
  return bytes;
}

}  // namespace multifd::wire
