// SPDX-License-Identifier: MIT
//
// The commands of a main stream (format/main_stream.md section 9.7), and in them the messages of an own source, which
// must come in their order (format/extension.md section 19.3).
//
//   off  size  field    refused
//     0     1  0x08
//     1     2  command  4 to 10 (postcopy, COLO), unknown ones; 0x6d66 where nobody has asked for the extension
//     3     2  length   other than the command's
//     5     n  data     ADVISE: another page size than this side's; extension: a message malformed or out of order
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "multifd/format/extension.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/qemu/detail/cursor.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/limits.hpp"

namespace multifd::qemu {

/// How far RAM has come.
enum class RamStage : std::uint8_t { ahead, inside, whole };

/// Parses commands, and knows what they have said so far. Threads: one, the parser's.
class Commands {
 public:
  explicit Commands(const MainStreamLimits& limits) : limits_(limits) {}

  /// Whether the source reads a return path.
  bool return_path_open() const noexcept { return return_path_open_; }
  /// Whether POSTCOPY_ADVISE announced other page sizes than the guest's.
  bool larger_pages() const noexcept { return larger_pages_; }
  /// The newest version of the extension that the source understands; none: it has not asked, or it is a QEMU.
  std::optional<std::uint8_t> asked() const noexcept { return asked_; }
  /// The value of the PONG that answers a PING: its own, or, where the extension is taken and the source asks for it,
  /// this side's version.
  std::uint32_t answer(std::uint32_t ping) const noexcept {
    const bool asks = limits_.extension && return_path_open_ && wire::version_in_ping(ping).has_value();
    return asks ? wire::extension_pong() : ping;
  }
  /// Whether the source has shown that it is ours, by its SETTINGS.
  bool own_source() const noexcept { return own_source_; }

  /// Parses one command; `in` is at its 0x08.
  /// Errors: Errc::postcopy_refused, colo_refused, unknown_command, bad_command_length, page_size_mismatch; those of
  ///   wire::parse_extension().
  [[nodiscard]] Result<Parsed> parse(detail::Cursor& in, Element& out, RamStage ram) noexcept {
    if (!in.has(command_header_bytes)) return Parsed::more;
    in.u8();
    const auto command = in.be<std::uint16_t>();
    const auto length = in.be<std::uint16_t>();
    const std::string_view name = command_name(command);
    bool length_fits = false;
    switch (command) {
      case command_open_return_path:
      case command_switchover_start: length_fits = length == 0; break;
      case command_ping: length_fits = length == 4; break;
      case command_postcopy_advise: length_fits = length == 0 || length == 16; break;
      case command_postcopy_listen:
      case command_postcopy_run:
      case command_postcopy_ram_discard:
      case command_packaged:
      case command_postcopy_resume:
      case command_recv_bitmap: return in.refuse(Errc::postcopy_refused, "command", command, name);
      case command_enable_colo: return in.refuse(Errc::colo_refused, "command", command, name);
      case wire::extension_number:
        if (asked_) return parse_message(in, out, length, ram);
        [[fallthrough]];
      default: return in.refuse(Errc::unknown_command, "command", command);
    }
    if (!length_fits) return in.refuse(Errc::bad_command_length, "command", length, name);
    if (!in.has(length)) return Parsed::more;
    out.data = in.take(length);
    if (command == command_postcopy_advise && length != 0) {
      const auto backing_pages = wire::load_be<std::uint64_t>(&out.data[0]);
      const auto target_page = wire::load_be<std::uint64_t>(&out.data[8]);
      if (target_page != limits_.page_bytes)
        return in.refuse(Errc::page_size_mismatch, "command", target_page, name, limits_.page_bytes);
      larger_pages_ = backing_pages != limits_.page_bytes;
    }
    if (command == command_open_return_path) return_path_open_ = true;
    if (command == command_ping && limits_.extension && return_path_open_ && !asked_)
      asked_ = wire::version_in_ping(wire::load_be<std::uint32_t>(out.data.data()));
    out.kind = ElementKind::command;
    out.command = command;
    return Parsed::whole;
  }

  // ---- What an own source's sections must be, for DeviceSections

  /// The size that a SECTION_SIZE has announced for the section that comes now.
  /// Errors: Errc::unexpected_extension_message.
  [[nodiscard]] Result<std::uint64_t> take_section_size(detail::Cursor& in, std::string_view device) noexcept {
    if (!section_size_) return in.refuse(Errc::unexpected_extension_message, "section without SECTION_SIZE", 0, device);
    ++sections_;
    return *std::exchange(section_size_, std::nullopt);
  }
  /// Errors: Errc::unexpected_extension_message, where the end mark may not stand yet.
  [[nodiscard]] Result<void> check_end(detail::Cursor& in) const noexcept {
    if (last_ != wire::ExtensionKind::hand_over)
      return in.refuse(Errc::unexpected_extension_message, "end of the stream without HAND_OVER");
    return {};
  }

 private:
  using Kind = wire::ExtensionKind;

  [[nodiscard]] Result<Parsed> parse_message(detail::Cursor& in, Element& out, std::size_t length,
                                             RamStage ram) noexcept {
    if (length > wire::max_extension_bytes)
      return in.refuse(Errc::bad_extension_message, "extension's length", length, {}, wire::max_extension_bytes);
    if (!in.has(length)) return Parsed::more;
    out.data = in.take(length);
    const auto message = wire::parse_extension(out.data, wire::Towards::destination);
    if (!message) return std::unexpected(message.error());
    const std::string_view name = wire::extension_name(message->kind);
    if (!fits(*message, ram))
      return in.refuse(Errc::unexpected_extension_message, "extension", static_cast<std::uint64_t>(message->kind),
                       name);
    if (message->kind == Kind::section_size) {
      if (message->number > limits_.max_section_bytes)
        return in.refuse(Errc::stream_limit_exceeded, "bytes of a device's state (max_section_bytes)", message->number,
                         {}, limits_.max_section_bytes);
      section_size_ = message->number;
    }
    own_source_ = own_source_ || message->kind == Kind::settings;
    follows_ = follows_ || message->kind == Kind::memory_follows;
    wanted_ = wanted_ || message->kind == Kind::base_wanted;
    const bool in_order = message->kind != Kind::user_data && message->kind != Kind::known_zeros;
    if (in_order && message->kind != Kind::base_wanted) last_ = message->kind;
    out.kind = ElementKind::extension;
    out.command = wire::extension_number;
    return Parsed::whole;
  }

  /// Whether a message may come here.
  bool fits(const wire::ExtensionMessage& message, RamStage ram) const noexcept {
    if (last_ == Kind::failed || section_size_) return false;
    const bool over = last_ == Kind::state_whole || last_ == Kind::hand_over;
    const bool naming = last_ == Kind::missing_pages;  // only what names missing pages may come, up to MEMORY_FOLLOWS
    switch (message.kind) {
      case Kind::failed: return true;
      case Kind::settings: return !own_source_ && ram == RamStage::ahead;
      case Kind::user_data: return own_source_;
      case Kind::known_zeros: return own_source_ && ram == RamStage::inside;
      case Kind::base_wanted: return own_source_ && ram == RamStage::inside && !wanted_;
      case Kind::missing_pages:
      case Kind::memory_follows: return own_source_ && ram == RamStage::whole && (naming || last_ == Kind::settings);
      case Kind::section_size: return own_source_ && ram == RamStage::whole && !over && !naming;
      // What is missing cannot be compared.
      case Kind::page_digests: return own_source_ && ram == RamStage::whole && !over && !naming && !follows_;
      case Kind::state_whole:
        return own_source_ && ram == RamStage::whole && !over && !naming && message.number == sections_;
      case Kind::hand_over: return last_ == Kind::state_whole;
      default: return false;  // those for a source, which the parser of messages has refused
    }
  }

  MainStreamLimits limits_;
  bool return_path_open_ = false;
  bool larger_pages_ = false;
  std::optional<std::uint8_t> asked_;
  bool own_source_ = false;
  bool follows_ = false;                       ///< MEMORY_FOLLOWS was read
  bool wanted_ = false;                        ///< BASE_WANTED was read
  std::optional<Kind> last_;                   ///< the last message that has a place in the order
  std::optional<std::uint64_t> section_size_;  ///< announced, and its section has not come yet
  std::uint64_t sections_ = 0;
};

}  // namespace multifd::qemu
