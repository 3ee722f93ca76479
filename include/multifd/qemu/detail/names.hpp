// SPDX-License-Identifier: MIT
//
// Keeps names of a stream in memory that was allocated once, so that views of them are valid as long as
// the parser.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "multifd/config.hpp"

namespace multifd::qemu::detail {

class Names {
 public:
  explicit Names(std::size_t capacity) { text_.reserve(capacity); }

  /// Copies `name`. Contract: all names together fit into the capacity.
  std::string_view keep(std::string_view name) noexcept {
    MULTIFD_ASSERT(name.size() <= text_.capacity() - text_.size());
    const std::size_t at = text_.size();
    text_.insert(text_.end(), name.begin(), name.end());
    return {text_.data() + at, name.size()};
  }

 private:
  std::vector<char> text_;
};

}  // namespace multifd::qemu::detail
