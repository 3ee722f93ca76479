// SPDX-License-Identifier: MIT
//
// What the pages of all guests come from.
#pragma once

#include <multifd/options.hpp>
#include <multifd/postcopy/image_pages.hpp>
#include <multifd/postcopy/page_store.hpp>
#include <multifd/transport/address.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/images.hpp"

namespace pager {

struct SourceSettings {
  std::string image, base;  ///< empty: a page server
  std::optional<multifd::Address> server{};
  multifd::Uuid session{};  ///< that the server has to be of
  bool raw = false;
  std::uint64_t offset = 0;
  std::uint64_t page_bytes = 4096;
};

/// Threads: const methods from any. Throws Failure, in all calls.
class Source {
 public:
  explicit Source(const SourceSettings& settings);
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  std::span<const multifd::postcopy::StoreBlock> blocks() const noexcept { return blocks_; }
  std::uint64_t page_bytes() const noexcept { return page_bytes_; }

  /// For one guest; this outlives it.
  std::unique_ptr<multifd::postcopy::PageStore> for_guest() const;

 private:
  std::unique_ptr<program::ImageFile> image_;
  std::optional<multifd::image::File> raw_;
  std::unique_ptr<multifd::postcopy::ImagePages> pages_;  ///< null: the server's
  std::vector<multifd::postcopy::StoreBlock> blocks_;
  std::uint64_t page_bytes_ = 0;
  const SourceSettings settings_;
};

}  // namespace pager
