// SPDX-License-Identifier: MIT
//
// The fields of a message that is whole in memory: written into a bounded buffer, and read with every length checked.
// For the messages of format/extension.md section 19.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "multifd/config.hpp"
#include "multifd/format/byte_order.hpp"

namespace multifd::wire {

/// Gathers the fields of one message. Contract: all of them together have at most `most` bytes.
/// Threads: as a plain value.
template <std::size_t most>
class FieldWriter {
 public:
  template <std::unsigned_integral T>
  FieldWriter& be(T value) noexcept {
    MULTIFD_ASSERT(sizeof value <= most - size_);
    store_be(&bytes_[size_], value);
    size_ += sizeof value;
    return *this;
  }
  FieldWriter& bytes(std::span<const std::byte> bytes) noexcept {
    MULTIFD_ASSERT(bytes.size() <= most - size_);
    if (!bytes.empty()) std::memcpy(&bytes_[size_], bytes.data(), bytes.size());
    size_ += bytes.size();
    return *this;
  }
  FieldWriter& text(std::string_view text) noexcept { return bytes(std::as_bytes(std::span(text))); }

  std::span<const std::byte> view() const noexcept { return std::span(bytes_).first(size_); }

 private:
  std::array<std::byte, most> bytes_;
  std::size_t size_ = 0;
};

/// Takes the fields of one message. A field that is not there makes good() false, and reads as zeros, so that a caller
/// may look once, behind the last field. Threads: as a plain value.
class FieldReader {
 public:
  explicit FieldReader(std::span<const std::byte> bytes) noexcept : left_(bytes) {}

  template <std::unsigned_integral T>
  T be() noexcept {
    const auto taken = take(sizeof(T));
    return taken.empty() ? T{0} : load_be<T>(taken.data());
  }
  std::span<const std::byte> take(std::size_t bytes) noexcept {
    good_ = good_ && bytes <= left_.size();
    if (!good_) return {};
    const auto taken = left_.first(bytes);
    left_ = left_.subspan(bytes);
    return taken;
  }
  std::string_view text(std::size_t bytes) noexcept {
    const auto taken = take(bytes);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  std::span<const std::byte> rest() noexcept { return take(left_.size()); }

  bool good() const noexcept { return good_; }
  std::size_t left() const noexcept { return left_.size(); }

 private:
  std::span<const std::byte> left_;
  bool good_ = true;
};

}  // namespace multifd::wire
