// SPDX-License-Identifier: MIT
//
// Reads one element from the bytes that have arrived. Call has() before each read. If it returns false, the element is
// not whole yet, and wanted() is the least number of bytes with which another attempt makes sense.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "multifd/config.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

/// What became of an attempt to parse an element, or a part of one.
enum class Parsed : std::uint8_t {
  more,   ///< bytes are missing: try again when Cursor::wanted() bytes have arrived
  whole,  ///< the element, or the part, is parsed
};

namespace detail {

class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) noexcept : bytes_(bytes) {}

  bool has(std::size_t bytes) noexcept {
    if (bytes <= bytes_.size() - at_) return true;
    wanted_ = at_ + bytes;
    return false;
  }

  std::span<const std::byte> take(std::size_t bytes) noexcept {
    MULTIFD_ASSERT(bytes <= bytes_.size() - at_);  // has() comes first
    at_ += bytes;
    return bytes_.subspan(at_ - bytes, bytes);
  }
  template <class T>
  T be() noexcept {
    return wire::load_be<T>(take(sizeof(T)).data());
  }
  std::uint8_t u8() noexcept { return std::to_integer<std::uint8_t>(take(1)[0]); }
  std::string_view text(std::size_t bytes) noexcept {
    const auto taken = take(bytes);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  /// The byte that is `ahead` bytes behind the next one; has(ahead + 1) comes first.
  std::uint8_t peek(std::size_t ahead = 0) const noexcept {
    MULTIFD_ASSERT(ahead < bytes_.size() - at_);
    return std::to_integer<std::uint8_t>(bytes_[at_ + ahead]);
  }
  template <class T>
  T peek_be(std::size_t ahead) const noexcept {
    MULTIFD_ASSERT(ahead + sizeof(T) <= bytes_.size() - at_);
    return wire::load_be<T>(&bytes_[at_ + ahead]);
  }

  std::size_t used() const noexcept { return at_; }
  std::size_t left() const noexcept { return bytes_.size() - at_; }
  std::size_t wanted() const noexcept { return wanted_; }

  /// Makes a failure. `subject`: the name that it is about.
  std::unexpected<Error> refuse(Errc code, const char* op, std::uint64_t detail = 0, std::string_view subject = {},
                                std::uint64_t expected = 0) noexcept {
    subject_ = subject;
    return fail(code, Stage::parse, op, detail, expected);
  }
  std::string_view subject() const noexcept { return subject_; }

 private:
  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  std::size_t wanted_ = 0;
  std::string_view subject_;
};

}  // namespace detail
}  // namespace multifd::qemu
