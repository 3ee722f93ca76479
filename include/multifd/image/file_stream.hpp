// SPDX-License-Identifier: MIT
//
// A file as a Transport: bytes at a position that moves on, for the main stream that an image consists of.
#pragma once

#include <cstddef>
#include <cstdint>

#include "multifd/buffers.hpp"
#include "multifd/image/file.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::image {

/// A model of Transport. Several may use one file, each with a position of its own. Threads: one.
class FileStream {
 public:
  /// `file`: must outlive this object.
  explicit FileStream(File& file, std::uint64_t position = 0) noexcept : file_(&file), position_(position) {}

  std::uint64_t position() const noexcept { return position_; }
  void seek(std::uint64_t position) noexcept { position_ = position; }

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    for (const iovec& buffer : buffers) {
      if (buffer.iov_len == 0) continue;
      MULTIFD_TRY(file_->write(position_, {static_cast<const std::byte*>(buffer.iov_base), buffer.iov_len}));
      position_ += buffer.iov_len;
      return buffer.iov_len;
    }
    return std::size_t{0};
  }

  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    const std::uint64_t left = file_->bytes() - std::min(position_, file_->bytes());
    for (const iovec& buffer : buffers) {
      const std::size_t bytes = std::min<std::uint64_t>(buffer.iov_len, left);
      if (bytes == 0) continue;
      MULTIFD_TRY(file_->read(position_, {static_cast<std::byte*>(buffer.iov_base), bytes}));
      position_ += bytes;
      return bytes;
    }
    return std::size_t{0};
  }

  [[nodiscard]] Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}

 private:
  File* file_;
  std::uint64_t position_;
};
static_assert(check_transport<FileStream>());

}  // namespace multifd::image
