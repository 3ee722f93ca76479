// SPDX-License-Identifier: MIT
//
// Memory that the programs send from and receive into: a file mapped read-only, a new file that gets its name only
// when it is whole, or anonymous memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "common/part_file.hpp"
#include "common/program.hpp"

namespace program {

/// A range of mapped memory.
class Mapping {
 public:
  /// Maps a file for reading. `bytes` 0 maps all of it; otherwise that much from its start.
  /// Throws Failure: missing, empty, a directory, smaller than `bytes`, not a multiple of `page_bytes`.
  static Mapping read_file(const std::string& path, std::uint64_t bytes, std::size_t page_bytes);

  /// Fresh zero memory with huge pages asked for.
  static Mapping anonymous(std::uint64_t bytes);

  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::span<std::byte> bytes() const noexcept { return bytes_; }

  /// Touches every page for writing, so that no fault is taken while receiving.
  void populate() const;

  /// Maps every page for reading, so that no fault is taken while sending.
  void populate_for_reading() const;

 private:
  friend class NewFile;
  explicit Mapping(std::span<std::byte> bytes) noexcept : bytes_(bytes) {}
  std::span<std::byte> bytes_;
};

/// A file that is being received: a PartFile that is mapped.
class NewFile {
 public:
  /// The name is reserved from here on. Throws Failure, as PartFile.
  explicit NewFile(std::string path) : file_(std::move(path)), mapping_(std::span<std::byte>{}) {}
  /// The same, and allocate().
  NewFile(std::string path, std::uint64_t bytes) : NewFile(std::move(path)) { allocate(bytes); }

  /// Gives it its size, and maps it. Throws Failure: no room, no permission.
  void allocate(std::uint64_t bytes);

  const Mapping& mapping() const noexcept { return mapping_; }

  struct Summary {
    std::string digest;  ///< XXH3-64 of all bytes, as 16 hexadecimal digits
    std::uint64_t zero_pages = 0;
  };
  /// Gives the room of zero pages back to the file system, where it can; their bytes stay zero. Room that was never
  /// written to is not looked at: reading it would fill it.
  Summary make_sparse(std::size_t page_bytes) const;

  /// PartFile's: everything that can fail beside the last step; the name; that it stays.
  void sync() { file_.sync(); }
  void rename() { file_.rename(); }
  void release() noexcept { file_.release(); }
  /// All three.
  void keep();

 private:
  PartFile file_;
  Mapping mapping_;
};

/// XXH3-64 of a whole range, as 16 hexadecimal digits.
std::string digest_text(std::span<const std::byte> bytes);

/// Bytes of physical memory of this machine.
std::uint64_t physical_memory();

}  // namespace program
