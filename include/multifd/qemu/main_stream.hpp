// SPDX-License-Identifier: MIT
//
// Cuts QEMU's main migration stream (format/main_stream.md section 9) into elements, as it arrives. The parser
// understands everything up to the end of RAM; from the first device's state on it passes the stream on in pieces
// (section 9.9).
//
//   header, configuration, commands,
//   START of ram: ram_size, block*, records, footer       (section_start ... end_of_records, footer)
//   PART*, END:   records, footer
//   device_state* up to the end of the connection; of an own source the sections and their ends (device_sections.hpp)
//
// The parser has no transport: the caller reads from the connection into room(), passes the number of bytes to
// commit(), and takes elements from next() until that returns none. The peer is not trusted: each length is compared
// with MainStreamLimits before use, elements that no multifd stream carries are refused by name (section 11, step 13),
// and memory is allocated in create() only.
#pragma once

#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/config.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/qemu/commands.hpp"
#include "multifd/qemu/configuration.hpp"
#include "multifd/qemu/detail/cursor.hpp"
#include "multifd/qemu/device_sections.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/limits.hpp"
#include "multifd/qemu/ram_section.hpp"
#include "multifd/qemu/stream_end.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

/// An incremental parser of one main stream.
///
/// Threads: one at a time.
/// Cost: linear in the bytes; each byte is copied at most once more inside the buffer.
/// Example:
///
///     for (;;) {
///       auto element = parser.next();
///       if (!element) return report(element.error(), parser.subject());
///       if (*element) { handle(**element); continue; }
///       auto got = transport.read_some(parser.room());
///       if (!got) return report(got.error());
///       if (*got == 0) return parser.finish();
///       parser.commit(*got);
///     }
class MainStreamParser {
 public:
  /// Allocates everything that the parser will ever need.
  ///
  /// Params: `limits`: the page size, and bounds on what the source may announce.
  /// Errors: Errc::bad_page_size, bad_option (detail: the value); ENOMEM.
  /// Cost: one buffer of 128 KiB or four of the longest elements; no other call allocates.
  [[nodiscard]] static Result<MainStreamParser> create(const MainStreamLimits& limits) {
    if (auto good = check_limits(limits); !good) return std::unexpected(good.error());
    return catch_bad_alloc(Stage::setup, "main stream",
                           [&]() -> Result<MainStreamParser> { return MainStreamParser(limits); });
  }

  /// The buffer for the connection's next bytes. Not empty after next() returned no element; empty after an error.
  /// Invalidates the last element's bytes.
  std::span<std::byte> room() noexcept {
    drop_last_element();
    if (error_) return {};
    if (begin_ == end_) {
      begin_ = end_ = 0;
    } else if (capacity_ - end_ < max_element_bytes(limits_)) {
      // Since the last move at least twice as many bytes have arrived as are moved now.
      std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    return {buffer_.get() + end_, capacity_ - end_};
  }

  /// Says how many bytes have arrived in room(). Contract: not more than it had.
  void commit(std::size_t bytes) noexcept {
    MULTIFD_ASSERT(bytes <= capacity_ - end_);
    end_ += bytes;
    received_ += bytes;
  }

  /// Says that the bytes to come lie elsewhere in a file: drops what has arrived and is not taken yet. With mapped-ram, to
  /// be called behind each block whose pages_offset is not 0; the stream goes on at pages_offset + used_length.
  void seek() noexcept {
    begin_ = end_ = last_bytes_ = 0;
    wanted_ = 1;
  }

  /// Takes the next whole element; none if bytes are missing for it.
  ///
  /// Errors (stage parse; sticky; detail: the refused value, subject(): its name): see the Errc group of the main
  ///   stream in error.hpp; also unknown_block, bad_block_name, offset_past_block.
  [[nodiscard]] Result<std::optional<Element>> next() noexcept {
    drop_last_element();
    if (error_) return std::unexpected(*error_);
    if (end_ - begin_ < wanted_) return std::nullopt;
    detail::Cursor in(std::span<const std::byte>(buffer_.get() + begin_, end_ - begin_));
    Element element;
    const Result<Parsed> parsed = parse(in, element);
    if (!parsed) {
      error_ = parsed.error();
      subject_ = in.subject();
      return std::unexpected(*error_);
    }
    if (*parsed == Parsed::more) {
      wanted_ = in.wanted();
      return std::nullopt;
    }
    wanted_ = 1;
    last_bytes_ = in.used();
    element.bytes = {buffer_.get() + begin_, last_bytes_};
    return element;
  }

  /// Says that the connection is at its end; called after next() returned no element.
  ///
  /// Errors: Errc::truncated_stream (detail: bytes received) if RAM, or the devices' state behind it, is not
  ///   whole (tail() is `inside`).
  [[nodiscard]] Result<void> finish() noexcept {
    if (!error_ && tail() == StreamTail::inside)
      error_ = Error{.code = Errc::truncated_stream,
                     .stage = Stage::parse,
                     .op = ram_complete_ ? "devices' state" : "main stream",
                     .detail = received_};
    if (error_) return std::unexpected(*error_);
    return {};
  }

  /// The name of what the last error is about, if there is one: of a section, capability, block, command or record. The
  /// name comes from the peer and may contain any bytes. Valid as long as the parser.
  std::string_view subject() const noexcept { return subject_; }

  /// When the source's epochs end. Known once START's records have ended.
  std::optional<SyncStyle> sync_style() const noexcept { return ram_.sync_style(); }
  /// The RAM blocks, in the source's order; all of them when block_list_complete().
  std::span<const BlockInfo> blocks() const noexcept { return ram_.list().blocks(); }
  bool block_list_complete() const noexcept { return ram_.list().complete(); }
  /// The sum of all used_lengths; 0 before it is known.
  std::uint64_t ram_bytes() const noexcept { return ram_.list().total_bytes(); }
  std::size_t page_bytes() const noexcept { return limits_.page_bytes; }
  /// Sets another page size than that of the limits, for a destination that takes what an own source's SETTINGS say. To be
  /// called ahead of RAM's START.
  /// Errors: Errc::bad_page_size: no page size, or larger than that of the limits, by which the memory was allocated;
  ///   already_closed: START has come.
  [[nodiscard]] Result<void> set_page_bytes(std::size_t bytes) noexcept {
    if (!valid_page_bytes(bytes) || bytes > limits_.page_bytes)
      return fail(Errc::bad_page_size, Stage::parse, "main stream", bytes, limits_.page_bytes);
    if (ram_.begun()) return fail(Errc::already_closed, Stage::parse, "main stream: the page size, behind RAM's START");
    limits_.page_bytes = bytes;
    ram_.set_page_bytes(bytes);
    return {};
  }

  /// The machine type. Empty if there was no configuration (machine types before 2.4).
  std::string_view machine_type() const noexcept { return configuration_.machine_type(); }
  std::span<const std::string_view> capabilities() const noexcept { return configuration_.capabilities(); }
  const std::optional<Uuid>& uuid() const noexcept { return configuration_.uuid(); }
  /// Whether the stream lies in a file with the pages at their places.
  bool mapped_ram() const noexcept { return configuration_.mapped_ram(); }
  /// Whether sections have footers. Known once START has ended.
  std::optional<bool> footers() const noexcept { return footers_; }
  /// Whether the source reads a return path (return_path.hpp).
  bool return_path_open() const noexcept { return commands_.return_path_open(); }
  /// What the source's commands have said, also whether it is an own one.
  const Commands& commands() const noexcept { return commands_; }
  /// Whether RAM's END is over, and so all records of RAM have come.
  bool ram_complete() const noexcept { return ram_complete_; }
  /// What the elements taken so far end with. A source with a return path does not close the connection at its end, but
  /// waits for the answer: then only tail() shows the end.
  StreamTail tail() const noexcept {
    if (place_ != Place::device_state) return StreamTail::inside;
    return commands_.own_source() ? sections_.tail() : stream_end_.tail(footers_.value_or(false));
  }

 private:
  enum class Place : std::uint8_t { header, first_element, element, payload, footer, device_state };

  explicit MainStreamParser(const MainStreamLimits& limits)
      : limits_(limits),
        capacity_(std::max<std::size_t>(128 * 1024, 4 * max_element_bytes(limits))),
        buffer_(std::make_unique_for_overwrite<std::byte[]>(capacity_)),
        configuration_(limits),
        commands_(limits),
        ram_(limits),
        sections_(limits) {}

  void drop_last_element() noexcept {
    begin_ += last_bytes_;
    last_bytes_ = 0;
  }

  // The parse_...() functions change the parser's state only when the element is whole.

  [[nodiscard]] Result<Parsed> parse(detail::Cursor& in, Element& out) noexcept {
    switch (place_) {
      case Place::header: return parse_header(in, out);
      case Place::first_element:
      case Place::element: return parse_element(in, out);
      case Place::payload: return parse_payload(in, out);
      case Place::footer: return parse_footer(in, out);
      case Place::device_state: break;
    }
    return parse_device_state(in, out);
  }

  [[nodiscard]] Result<Parsed> parse_header(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(4)) return Parsed::more;
    if (const auto magic = in.be<std::uint32_t>(); magic != wire::main_stream_magic)
      return in.refuse(Errc::bad_stream_magic, "main stream's header", magic);
    if (!in.has(4)) return Parsed::more;
    if (const auto version = in.be<std::uint32_t>(); version != stream_version)
      return in.refuse(Errc::bad_stream_version, "main stream's header", version);
    out.kind = ElementKind::header;
    place_ = Place::first_element;
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_element(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(1)) return Parsed::more;
    const std::uint8_t type = in.peek();
    switch (type) {
      case element_configuration:
        if (place_ != Place::first_element) break;
        return parse_configuration(in, out);
      case element_command: return parse_command(in, out);
      case element_section_start: return parse_section_start(in, out);
      case element_section_part: return parse_section_header(in, out, ElementKind::section_part);
      case element_section_end: return parse_section_header(in, out, ElementKind::section_end);
      case element_section_full:
        if (!ram_complete_) return refuse_early_device(in);
        return parse_device_state(in, out);
      case element_eof:
        if (!ram_complete_) return in.refuse(Errc::unexpected_element, "end of the stream ahead of RAM's end");
        return parse_device_state(in, out);
      case element_subsection:
      case element_vm_description:
      case element_footer: break;
      default: return in.refuse(Errc::unknown_element, "element type", type);
    }
    return in.refuse(Errc::unexpected_element, "element type", type);
  }

  [[nodiscard]] Result<Parsed> parse_configuration(detail::Cursor& in, Element& out) noexcept {
    const auto parsed = configuration_.parse(in, limits_);
    if (parsed != Parsed::whole) return parsed;
    out.kind = ElementKind::configuration;
    out.name = configuration_.machine_type();
    place_ = Place::element;
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_command(detail::Cursor& in, Element& out) noexcept {
    const RamStage ram = ram_complete_ ? RamStage::whole : ram_started_ ? RamStage::inside : RamStage::ahead;
    const auto parsed = commands_.parse(in, out, ram);
    if (parsed && *parsed == Parsed::whole) place_ = Place::element;
    return parsed;
  }

  [[nodiscard]] Result<Parsed> parse_section_start(detail::Cursor& in, Element& out) noexcept {
    const auto parsed = read_long_header(in, out);
    if (parsed != Parsed::whole) return parsed;
    if (!in.has(8)) return Parsed::more;
    const auto instance = in.be<std::uint32_t>();
    const auto version = in.be<std::uint32_t>();
    if (out.name != ram_section_name || instance != ram_instance)
      return in.refuse(Errc::unknown_section, "START of a section", instance, out.name);
    if (ram_started_) return in.refuse(Errc::unexpected_section, "second START", out.section_id, ram_section_name);
    if (version != ram_version) return in.refuse(Errc::bad_ram_version, "START of RAM", version, ram_section_name);
    ram_.start({.gpa = configuration_.ignore_shared(),
                .mapped = configuration_.mapped_ram(),
                .page_size = commands_.larger_pages() && !configuration_.mapped_ram()});
    ram_started_ = true;
    section_id_ = out.section_id;
    return enter_section(out, ElementKind::section_start);
  }

  [[nodiscard]] Result<Parsed> parse_section_header(detail::Cursor& in, Element& out, ElementKind kind) noexcept {
    if (!in.has(5)) return Parsed::more;
    in.u8();
    out.section_id = in.be<std::uint32_t>();
    if (!ram_started_) return in.refuse(Errc::unexpected_section, "section without a START", out.section_id);
    if (out.section_id != section_id_) return in.refuse(Errc::wrong_section_id, "section", out.section_id);
    if (ram_ending_)
      return in.refuse(Errc::unexpected_section, "section after RAM's END", out.section_id, ram_section_name);
    ram_ending_ = kind == ElementKind::section_end;
    return enter_section(out, kind);
  }

  [[nodiscard]] Result<Parsed> enter_section(Element& out, ElementKind kind) noexcept {
    out.kind = kind;
    out.name = ram_section_name;
    place_ = Place::payload;
    return Parsed::whole;
  }

  /// Parses the beginning of START and FULL: type, id, name.
  [[nodiscard]] Result<Parsed> read_long_header(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(6)) return Parsed::more;
    const std::size_t length = in.peek(5);
    if (!in.has(6 + length)) return Parsed::more;
    in.u8();
    out.section_id = in.be<std::uint32_t>();
    in.u8();
    out.name = in.text(length);
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> refuse_early_device(detail::Cursor& in) noexcept {
    Element section;
    const auto parsed = read_long_header(in, section);
    if (parsed != Parsed::whole) return parsed;
    return in.refuse(Errc::early_device_refused, "device section ahead of RAM's end", 0, section.name);
  }

  [[nodiscard]] Result<Parsed> parse_payload(detail::Cursor& in, Element& out) noexcept {
    const auto parsed = ram_.parse(in, out);
    if (parsed != Parsed::whole) return parsed;
    if (out.kind != ElementKind::end_of_records) return Parsed::whole;
    if (footers_.value_or(true)) {
      place_ = Place::footer;
    } else {
      leave_section();
    }
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_footer(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(1)) return Parsed::more;
    // All sections of a stream have footers, or none has: START shows it. No element begins as a footer does (section
    // 9.2).
    const std::uint8_t type = in.peek();
    if (!footers_) footers_ = type == element_footer;
    if (!*footers_) {
      leave_section();
      return parse_element(in, out);
    }
    if (type != element_footer)
      return in.refuse(Errc::bad_footer, "element type after the section", type, ram_section_name);
    if (!in.has(5)) return Parsed::more;
    in.u8();
    out.section_id = in.be<std::uint32_t>();
    if (out.section_id != section_id_)
      return in.refuse(Errc::bad_footer, "footer's section id", out.section_id, ram_section_name);
    out.kind = ElementKind::footer;
    leave_section();
    return Parsed::whole;
  }

  void leave_section() noexcept {
    place_ = Place::element;
    ram_complete_ = ram_ending_;
  }

  [[nodiscard]] Result<Parsed> parse_device_state(detail::Cursor& in, Element& out) noexcept {
    place_ = Place::device_state;
    if (commands_.own_source()) return sections_.parse(in, out, commands_);
    if (!in.has(1)) return Parsed::more;
    out.kind = ElementKind::device_state;
    out.data = in.take(in.left());
    out.size = out.data.size();
    stream_end_.feed(out.data);
    return Parsed::whole;
  }

  MainStreamLimits limits_;
  std::size_t capacity_;
  std::unique_ptr<std::byte[]> buffer_;
  std::size_t begin_ = 0;       ///< where the last element begins, or what is not parsed yet
  std::size_t end_ = 0;         ///< behind the last byte that has arrived
  std::size_t last_bytes_ = 0;  ///< of the last element, which the caller may still use
  std::size_t wanted_ = 1;      ///< bytes that must have arrived before another attempt makes sense
  std::uint64_t received_ = 0;

  Place place_ = Place::header;
  Configuration configuration_;
  Commands commands_;
  RamSection ram_;
  DeviceSections sections_;      ///< behind RAM, of an own source
  StreamEnd stream_end_;         ///< behind RAM, of a QEMU
  std::optional<bool> footers_;  ///< whether sections have them, once START has ended
  std::uint32_t section_id_ = 0;
  bool ram_started_ = false;
  bool ram_ending_ = false;
  bool ram_complete_ = false;
  std::optional<Error> error_;
  std::string_view subject_;
};

}  // namespace multifd::qemu
