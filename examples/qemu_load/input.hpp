// SPDX-License-Identifier: MIT
//
// What is loaded: an image, or the folder that qemu_dump --format blocks makes.
#pragma once

#include <multifd/image/random_access.hpp>
#include <multifd/options.hpp>
#include <multifd/qemu/element.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "common/program.hpp"

namespace load {

/// Threads: const methods from any.
class Input {
 public:
  /// Opens what `path` is. Throws program::Failure.
  static std::unique_ptr<Input> open(const std::string& path, const std::string& base, std::uint64_t page_bytes,
                                     std::uint64_t offset);
  Input() = default;
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;
  virtual ~Input() = default;

  virtual std::size_t page_bytes() const = 0;
  virtual std::string machine_type() const = 0;
  virtual std::optional<multifd::Uuid> uuid() const = 0;
  virtual std::span<const multifd::qemu::BlockInfo> blocks() const = 0;

  using OnRun = std::function<multifd::Result<void>(std::uint64_t offset, std::uint64_t bytes)>;
  /// Calls `on_run` for the pages of a block that may not be zero, in order; all others are.
  virtual multifd::Result<void> for_each_run(std::size_t block, std::uint64_t first_page, std::uint64_t pages,
                                             const OnRun& on_run) const = 0;
  virtual multifd::Result<void> read(std::size_t block, std::uint64_t offset, std::span<std::byte> to) const = 0;

  /// What stands behind RAM in the stream: devices, end mark, description.
  struct Devices {
    const multifd::image::RandomAccess& file;
    multifd::image::Extent extent;
  };
  virtual Devices devices() const = 0;
};

}  // namespace load
