// SPDX-License-Identifier: MIT
//
// A transport that reads an input, and keeps what is written: one end of a page connection, without a thread at the other.
#pragma once

#include <algorithm>

#include "fuzz/fuzz.hpp"
#include "multifd/transport/policy.hpp"

namespace fuzz {

/// Threads: one; shutdown() does nothing, because nothing waits.
class PageScript {
 public:
  /// Params: `piece`: the most that one read gives, at least 1; `written`: null to drop it.
  PageScript(Span input, std::size_t piece, Bytes* written) : left_(input), piece_(piece), written_(written) {}

  multifd::Result<std::size_t> write_some(multifd::ConstBuffers buffers) noexcept {
    for (const iovec& buffer : buffers)
      if (written_ != nullptr) append(*written_, Span(static_cast<const std::byte*>(buffer.iov_base), buffer.iov_len));
    return multifd::total_bytes(buffers);
  }
  multifd::Result<std::size_t> read_some(multifd::MutableBuffers buffers) noexcept {
    std::size_t done = 0;
    for (const iovec& buffer : buffers) {
      const Span now = left_.first(std::min({left_.size(), buffer.iov_len, piece_ - done}));
      std::ranges::copy(now, static_cast<std::byte*>(buffer.iov_base));
      left_ = left_.subspan(now.size());
      done += now.size();
    }
    return done;
  }
  multifd::Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}

 private:
  Span left_;
  std::size_t piece_;
  Bytes* written_;
};

}  // namespace fuzz
