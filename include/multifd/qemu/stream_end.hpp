// SPDX-License-Identifier: MIT
//
// Finds the end of a main stream whose devices nobody here understands (PROTOCOL.md sections 9.10, 10 step 10). With a
// return path the source keeps the connection open until it is answered, so the end must be seen in the bytes:
//
//   00  06  <be32 n>  { ... n bytes of text in all ... }      and nothing after it
//
// The text is JSON and has no NUL. So a NUL ends every candidate, what is left begins with the last one, and at most
// three can (00 06 00 06 00 06 xx '{').
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace multifd::qemu {

/// Says whether the bytes so far end exactly with a whole VM description.
///
/// A machine can suppress its description; then nothing ever tells but a time limit or the connection's end. Device
/// state that happens to look like a description and to end with the bytes so far is taken for one.
///
/// Threads: one at a time. Cost: linear, no allocation.
class StreamEnd {
 public:
  /// `max_description_bytes`: longer texts are not believed; up to 4 GiB. A small VM's has about 44 KiB.
  explicit StreamEnd(std::uint32_t max_description_bytes = 16 * 1024 * 1024) noexcept
      : max_description_bytes_(max_description_bytes) {}

  /// Takes the next piece of the stream, of any size.
  void feed(std::span<const std::byte> bytes) noexcept {
    for (const std::byte byte : bytes) take(std::to_integer<std::uint8_t>(byte));
  }

  bool complete() const noexcept {
    if (last_byte_ != '}') return false;
    for (const std::uint64_t end : ends_)
      if (end == position_) return true;
    return false;
  }

 private:
  void take(std::uint8_t byte) noexcept {
    ++position_;
    last_byte_ = byte;
    window_ = (window_ << 8 | byte) & 0x00ff'ffff'ffff'ffff;  // the last seven bytes
    if (byte == 0) ends_ = {};
    if ((window_ & 0x00ff'ff00'0000'00ff) != 0x0000'0600'0000'007b) return;
    const std::uint64_t text_bytes = window_ >> 8 & 0xffff'ffff;
    if (text_bytes < 2 || text_bytes > max_description_bytes_) return;
    ends_[next_end_] = position_ - 1 + text_bytes;
    next_end_ = (next_end_ + 1) % ends_.size();
  }

  std::uint32_t max_description_bytes_;
  std::uint64_t position_ = 0;  ///< bytes so far
  std::uint64_t window_ = 0xff'ffff'ffff'ffff;
  std::uint8_t last_byte_ = 0;
  std::array<std::uint64_t, 3> ends_{};  ///< where the texts that may be the description end; 0: none
  std::size_t next_end_ = 0;
};

}  // namespace multifd::qemu
