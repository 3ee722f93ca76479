// SPDX-License-Identifier: MIT
//
// What stands behind RAM's END in the stream of an own source, which announces how long each device's state is
// (format/extension.md section 19.3). A QEMU announces nothing: there MainStreamParser passes all of it on as it lies.
//
//   SECTION_SIZE, then:
//     size  field        refused
//        1  0x04         anything else; behind HAND_OVER: 0x00, the end mark
//        4  section_id
//        1  len          0
//      len  idstr
//        4  instance_id
//        4  version_id
//        -  state        what SECTION_SIZE has announced
//        5  footer       none, or with another id
//   behind the end mark: nothing, or 06, be32 length (over the limit), text; nothing behind that
#pragma once

#include <algorithm>
#include <cstdint>

#include "multifd/format/main_stream.hpp"
#include "multifd/qemu/commands.hpp"
#include "multifd/qemu/detail/cursor.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/limits.hpp"
#include "multifd/qemu/stream_end.hpp"

namespace multifd::qemu {

/// Parses an own source's sections and the stream's end. Threads: one, the parser's.
class DeviceSections {
 public:
  explicit DeviceSections(const MainStreamLimits& limits) : max_description_bytes_(limits.max_description_bytes) {}

  /// Parses the next part. Errors: Errc::unexpected_element, bad_footer, stream_limit_exceeded; those of Commands.
  [[nodiscard]] Result<Parsed> parse(detail::Cursor& in, Element& out, Commands& commands) noexcept {
    switch (place_) {
      case Place::element: return parse_element(in, out, commands);
      case Place::state:
        if (left_ > 0) return parse_piece(in, out, ElementKind::device_state);
        return parse_footer(in, out);
      case Place::end:
        if (auto begun = begin_description(in); !begun || *begun != Parsed::whole) return begun;
        [[fallthrough]];
      case Place::length: return parse_length(in, out);
      case Place::description:
        if (left_ > 0) return parse_piece(in, out, ElementKind::description);
        break;
    }
    return in.has(1) ? Result<Parsed>(in.refuse(Errc::unexpected_element, "byte behind the VM description", in.peek()))
                     : Parsed::more;
  }

  /// What the elements end with so far.
  StreamTail tail() const noexcept {
    if (place_ == Place::end) return StreamTail::end_mark;
    return place_ == Place::description && left_ == 0 ? StreamTail::description : StreamTail::inside;
  }

 private:
  enum class Place : std::uint8_t {
    element,      ///< a section, a command, or the end mark comes next
    state,        ///< in a device's state, or ahead of its footer
    end,          ///< right behind the end mark
    length,       ///< a description has begun
    description,  ///< in its text, or behind it
  };

  [[nodiscard]] Result<Parsed> parse_element(detail::Cursor& in, Element& out, Commands& commands) noexcept {
    if (!in.has(1)) return Parsed::more;
    const std::uint8_t type = in.peek();
    if (type == element_command) return commands.parse(in, out, RamStage::whole);
    if (type == element_section_full) return parse_header(in, out, commands);
    if (type != element_eof) return in.refuse(Errc::unexpected_element, "element type", type);
    if (auto good = commands.check_end(in); !good) return std::unexpected(good.error());
    in.u8();
    out.kind = ElementKind::end_of_stream;
    place_ = Place::end;
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_header(detail::Cursor& in, Element& out, Commands& commands) noexcept {
    if (!in.has(6)) return Parsed::more;
    const std::size_t length = in.peek(5);
    if (length == 0) return in.refuse(Errc::unexpected_element, "device's section without a name");
    if (!in.has(6 + length + 8)) return Parsed::more;
    in.u8();
    section_id_ = out.section_id = in.be<std::uint32_t>();
    in.u8();
    out.name = in.text(length);
    out.instance_id = in.be<std::uint32_t>();
    out.version_id = in.be<std::uint32_t>();
    const auto size = commands.take_section_size(in, out.name);
    if (!size) return std::unexpected(size.error());
    out.kind = ElementKind::device_section;
    out.size = left_ = *size;
    place_ = Place::state;
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_footer(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(footer_bytes)) return Parsed::more;
    if (const auto type = in.u8(); type != element_footer)
      return in.refuse(Errc::bad_footer, "element type after a device's state", type);
    out.section_id = in.be<std::uint32_t>();
    if (out.section_id != section_id_) return in.refuse(Errc::bad_footer, "footer's section id", out.section_id);
    out.kind = ElementKind::footer;
    place_ = Place::element;
    return Parsed::whole;
  }

  /// Sees that nothing but a description follows the end mark. Takes no byte: one of its header is no end any more.
  [[nodiscard]] Result<Parsed> begin_description(detail::Cursor& in) noexcept {
    if (!in.has(1)) return Parsed::more;
    if (const auto type = in.peek(); type != element_vm_description)
      return in.refuse(Errc::unexpected_element, "element type behind the end mark", type);
    place_ = Place::length;
    return Parsed::whole;
  }

  [[nodiscard]] Result<Parsed> parse_length(detail::Cursor& in, Element& out) noexcept {
    if (!in.has(5)) return Parsed::more;
    in.u8();
    const auto length = in.be<std::uint32_t>();
    if (length > max_description_bytes_)
      return in.refuse(Errc::stream_limit_exceeded, "VM description (max_description_bytes)", length, {},
                       max_description_bytes_);
    out.size = left_ = length;
    place_ = Place::description;
    return take_piece(in, out, ElementKind::description);
  }

  [[nodiscard]] Result<Parsed> parse_piece(detail::Cursor& in, Element& out, ElementKind kind) noexcept {
    return in.has(1) ? take_piece(in, out, kind) : Parsed::more;
  }

  Parsed take_piece(detail::Cursor& in, Element& out, ElementKind kind) noexcept {
    out.data = in.take(static_cast<std::size_t>(std::min<std::uint64_t>(left_, in.left())));
    if (out.size == 0) out.size = out.data.size();
    left_ -= out.data.size();
    out.kind = kind;
    return Parsed::whole;
  }

  std::uint64_t max_description_bytes_;
  Place place_ = Place::element;
  std::uint32_t section_id_ = 0;
  std::uint64_t left_ = 0;  ///< of the state, or of the text
};

}  // namespace multifd::qemu
