// SPDX-License-Identifier: MIT
//
// Fields of a stream, gathered and written when there are many.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/byte_order.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::qemu::detail {

/// Errors (of each call): the transport's. Sticky: every later call returns the first one, and gathered bytes are lost; but
///   for push_out()'s Errc::cancelled.
/// Threads: one, the transport's writing thread.
/// Cost: one buffer of 64 KiB, allocated at construction.
template <Transport T>
class FieldWriter {
 public:
  explicit FieldWriter(T& link) : link_(&link), buffer_(std::make_unique_for_overwrite<std::byte[]>(capacity)) {}

  void set_limits(std::chrono::milliseconds timeout, const Interrupt* interrupt) noexcept
    requires HasTimeLimits<T>
  {
    timeout_ = timeout;
    interrupt_ = interrupt;
  }

  // Fields, in the order of the arguments: integers big-endian, text and bytes as they are.

  template <class... Fields>
  [[nodiscard]] Result<void> put(const Fields&... fields) noexcept {
    Result<void> result;
    static_cast<void>(((result = put_field(fields)).has_value() && ...));
    return result;
  }
  [[nodiscard]] Result<void> append(std::span<const std::byte> bytes) noexcept {
    if (error_) return std::unexpected(*error_);
    if (bytes.size() > capacity - gathered_) {
      if (auto pushed = push_out(); !pushed) {
        error_ = pushed.error();  // an element's end is missing
        return pushed;
      }
      if (bytes.size() > capacity) return write(bytes);
    }
    std::copy(bytes.begin(), bytes.end(), buffer_.get() + gathered_);
    gathered_ += bytes.size();
    return {};
  }

  [[nodiscard]] Result<void> push_out() noexcept {
    if (error_) return std::unexpected(*error_);
    std::size_t done = 0;
    auto written = limited_write({buffer_.get(), gathered_}, [&](std::size_t bytes) { done += bytes; });
    if (!written && written.error().code != Errc::cancelled) error_ = written.error();
    std::copy(buffer_.get() + done, buffer_.get() + gathered_, buffer_.get());
    gathered_ -= done;
    return written;
  }

 private:
  static constexpr std::size_t capacity = 64 * 1024;

  template <std::unsigned_integral N>
  [[nodiscard]] Result<void> put_field(N number) noexcept {
    std::array<std::byte, sizeof number> bytes;
    wire::store_be(bytes.data(), number);
    return append(bytes);
  }
  [[nodiscard]] Result<void> put_field(std::string_view text) noexcept {
    return append(std::as_bytes(std::span(text)));
  }
  [[nodiscard]] Result<void> put_field(std::span<const std::byte> bytes) noexcept { return append(bytes); }

  [[nodiscard]] Result<void> write(std::span<const std::byte> bytes) noexcept {
    if (bytes.empty()) return {};
    auto written = limited_write(bytes, [](std::size_t) {});
    if (!written) error_ = written.error();
    return written;
  }

  template <class Moved>
  [[nodiscard]] Result<void> limited_write(std::span<const std::byte> bytes, const Moved& moved) noexcept {
    if constexpr (HasTimeLimits<T>)
      return write_all(*link_, bytes, timeout_, interrupt_, moved);
    else
      return write_all(*link_, bytes, moved);
  }

  T* link_;
  std::chrono::milliseconds timeout_ = no_timeout;
  const Interrupt* interrupt_ = nullptr;
  std::unique_ptr<std::byte[]> buffer_;
  std::size_t gathered_ = 0;
  std::optional<Error> error_;
};

}  // namespace multifd::qemu::detail
