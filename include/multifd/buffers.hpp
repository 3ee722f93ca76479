// SPDX-License-Identifier: MIT
//
// Scattered bytes, as the operating system takes them: arrays of struct iovec. Reading and writing have a name each, so
// that a signature says in which direction the bytes go; iovec itself does not.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <span>

namespace multifd {

/// Bytes to be read by the callee (it must not write through iov_base).
using ConstBuffers = std::span<const iovec>;
/// Bytes to be filled by the callee.
using MutableBuffers = std::span<const iovec>;

/// The most entries that one system call takes (IOV_MAX of Linux).
inline constexpr std::size_t max_iovecs = 1024;

/// One buffer over bytes that will only be read. The cast is needed because iovec has no const form.
inline iovec const_buffer(const void* data, std::size_t size) noexcept { return {const_cast<void*>(data), size}; }

inline iovec const_buffer(std::span<const std::byte> bytes) noexcept {
  return const_buffer(bytes.data(), bytes.size());
}

inline iovec mutable_buffer(std::span<std::byte> bytes) noexcept { return {bytes.data(), bytes.size()}; }

inline std::size_t total_bytes(std::span<const iovec> buffers) noexcept {
  std::size_t sum = 0;
  for (const iovec& buffer : buffers) sum += buffer.iov_len;
  return sum;
}

}  // namespace multifd
