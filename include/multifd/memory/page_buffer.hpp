// SPDX-License-Identifier: MIT
//
// Private memory for the pages of one packet: a relay receives into it and sends from it, where others use guest
// memory. Buffers are swapped, never copied.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// batch_bytes bytes, aligned to 4096.
///
/// Threads: one at a time. The code that passes a buffer to another thread must order that.
class PageBuffer {
 public:
  /// Holds no memory: data() is null.
  PageBuffer() = default;

  /// Errors: ENOMEM. Threads: any. Cost: one allocation of batch_bytes, which becomes resident when it is written.
  [[nodiscard]] static Result<PageBuffer> create() noexcept {
    PageBuffer buffer;
    buffer.bytes_.reset(static_cast<std::byte*>(::operator new(batch_bytes, alignment, std::nothrow)));
    if (!buffer.bytes_) return fail_errno(Stage::setup, "allocate page buffer", ENOMEM);
    return buffer;
  }

  std::byte* data() const noexcept { return bytes_.get(); }

 private:
  static constexpr std::align_val_t alignment{4096};
  struct Free {
    void operator()(std::byte* bytes) const noexcept { ::operator delete(bytes, alignment); }
  };
  std::unique_ptr<std::byte, Free> bytes_;
};

}  // namespace multifd
