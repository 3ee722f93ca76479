// SPDX-License-Identifier: MIT
//
// Finds the end of a main stream without understanding the devices' state in it (format/main_stream.md sections 9.2 and
// 9.10, format/roles.md section 10 step 10):
//
//   04  <be32 id>  <len> name  ...state...  7e  <be32 id>      per device; the footer repeats the section's id
//   00                                                         the end mark
//   06  <be32 n>  { ... n bytes of text in all ... }           the VM description; a machine can suppress it
//
// Two things mark the end. One is the end mark behind the footer of the open section. The footer repeats the id of that
// section's header, and each header stands directly behind the footer before it, so each section leads to the next. The
// other is a whole description. Its text is JSON and has no NUL: so a NUL ends every candidate, every remaining
// candidate begins at the last NUL, and at most three can (00 06 00 06 00 06 xx '{').
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace multifd::qemu {

/// What the bytes of a main stream so far end with.
enum class StreamTail : std::uint8_t {
  inside,       ///< the stream goes on: in RAM, in a device's state, or in a description that is not whole
  maybe,        ///< a NUL in a stream without footers: an end mark, or any other NUL
  end_mark,     ///< the last device's footer and the end mark: everything that a destination loads is there
  description,  ///< a whole VM description: nothing follows
};

/// Follows the bytes behind RAM's last section, from a section's first byte on, and says what they end with so far.
///
/// Residual risk: a device's state that contains its own section's footer and a NUL, or a whole description, and is cut
/// exactly there, is taken for the end. A state that contains its own footer and another section's header behind it
/// hides the end mark; the description is found nevertheless.
///
/// Threads: one at a time. Cost: linear, no allocation.
class StreamEnd {
 public:
  /// `max_description_bytes`: a longer text is taken for no description; up to 4 GiB. A small VM's has about 44 KiB.
  explicit StreamEnd(std::uint32_t max_description_bytes = 16 * 1024 * 1024) noexcept
      : max_description_bytes_(max_description_bytes) {}

  /// Takes the next piece of the stream, of any size.
  void feed(std::span<const std::byte> bytes) noexcept {
    for (const std::byte byte : bytes) take(std::to_integer<std::uint8_t>(byte));
  }

  /// What the bytes end with so far. `footers`: whether the stream's sections have them; without them an end mark
  /// cannot be told from another NUL.
  StreamTail tail(bool footers) const noexcept {
    if (last_byte_ == '}')
      for (const std::uint64_t end : ends_)
        if (end == position_) return StreamTail::description;
    if (position_ == 0 || last_byte_ != 0) return StreamTail::inside;
    if (!footers) return StreamTail::maybe;
    return place_ == Place::end_mark ? StreamTail::end_mark : StreamTail::inside;
  }

 private:
  enum class Place : std::uint8_t {
    element,   ///< a section's header or the end mark comes next
    header,    ///< in a section's header, up to its name
    state,     ///< in a section's state, or behind bytes that are no header
    end_mark,  ///< right behind an end mark
  };

  void take(std::uint8_t byte) noexcept {
    ++position_;
    last_byte_ = byte;
    window_ = (window_ << 8 | byte) & 0x00ff'ffff'ffff'ffff;  // the last seven bytes
    follow_sections(byte);
    if (byte == 0) ends_ = {};
    if ((window_ & 0x00ff'ff00'0000'00ff) != 0x0000'0600'0000'007b) return;
    const std::uint64_t text_bytes = window_ >> 8 & 0xffff'ffff;
    if (text_bytes < 2 || text_bytes > max_description_bytes_) return;
    ends_[next_end_] = position_ - 1 + text_bytes;
    next_end_ = (next_end_ + 1) % ends_.size();
  }

  void follow_sections(std::uint8_t byte) noexcept {
    switch (place_) {
      case Place::element:
        place_ = byte == 0x04 ? Place::header : byte == 0x00 ? Place::end_mark : Place::state;
        header_bytes_ = 0;
        break;
      case Place::header: take_header(byte); break;
      case Place::end_mark: place_ = Place::state; break;  // a description follows, or this was no end mark
      case Place::state: break;
    }
    // In any place, because apparent headers and end marks may have been state.
    if (open_ && (window_ & 0xff'ffff'ffff) == (std::uint64_t{0x7e} << 32 | id_)) place_ = Place::element;
  }

  /// Takes the header's id, its name's length, and its name. A name that is not text means that this was no header.
  void take_header(std::uint8_t byte) noexcept {
    ++header_bytes_;
    if (header_bytes_ == 5) {
      next_id_ = static_cast<std::uint32_t>(window_ >> 8);
      name_bytes_ = byte;
      if (byte == 0) place_ = Place::state;
    } else if (header_bytes_ > 5) {
      if (byte < ' ' || byte > '~') {
        place_ = Place::state;
      } else if (header_bytes_ == 5u + name_bytes_) {
        id_ = next_id_;
        open_ = true;
        place_ = Place::state;
      }
    }
  }

  std::uint32_t max_description_bytes_;
  std::uint64_t position_ = 0;  ///< bytes so far
  std::uint64_t window_ = 0xff'ffff'ffff'ffff;
  std::uint8_t last_byte_ = 0;
  std::array<std::uint64_t, 3> ends_{};  ///< where each candidate for the description would end; 0: no candidate
  std::size_t next_end_ = 0;

  Place place_ = Place::element;
  bool open_ = false;          ///< a header was seen, whose id is id_
  std::uint32_t id_ = 0;       ///< of the section whose footer is searched for
  std::uint32_t next_id_ = 0;  ///< of the header that is being read
  std::uint32_t header_bytes_ = 0;
  std::uint8_t name_bytes_ = 0;
};

}  // namespace multifd::qemu
