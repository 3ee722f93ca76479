// SPDX-License-Identifier: MIT
//
// Memory that the programs send from and receive into: a file mapped read-only, a new file that gets its name only when
// it is whole, or anonymous memory. Memory that was never written is known to be zero without reading it, because a
// read would allocate it.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/mapped_file.hpp"
#include "common/part_file.hpp"
#include "common/program.hpp"

namespace program {

/// A run of adjacent pages.
struct Run {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// A range of mapped memory.
class Mapping {
 public:
  Mapping() = default;

  /// Maps a file for reading. `bytes` 0 maps all of it; otherwise that much from its start.
  /// Throws Failure: missing, empty, a directory, smaller than `bytes`, not a multiple of `page_bytes`.
  static Mapping read_file(const std::string& path, std::uint64_t bytes, std::size_t page_bytes);

  /// Maps a file for writing, all of it. Throws Failure, whose text has `what`.
  static Mapping write_file(int fd, std::uint64_t bytes, const std::string& what);

  /// Fresh zero memory with huge pages asked for.
  static Mapping anonymous(std::uint64_t bytes);

  std::span<std::byte> bytes() const noexcept { return bytes_; }

  /// The pages that may hold data, in order; all others are zero. As the file, or the page tables, show it now.
  ///
  /// Cost: system calls per run, not per page; nothing becomes resident. Where the system does not
  /// tell, all pages.
  std::vector<Run> data(std::size_t page_bytes) const;

  /// XXH3-64 of all bytes, as 16 hexadecimal digits. Reads data() alone.
  std::string digest() const;

  /// Whether the file has been written to, or changed its size, since it was mapped, as far as its times tell: writes
  /// through another mapping need not change them.
  bool changed() const;

  /// Touches every page for writing, so that no fault is taken while receiving. Throws Failure, also of a signal.
  void populate(const multifd::Interrupt* interrupt = nullptr) const;

  /// Maps every page of data() for reading, so that no fault is taken while sending. Throws Failure, also of a signal.
  void populate_for_reading(const multifd::Interrupt* interrupt = nullptr) const;

 private:
  friend class NewFile;

  struct Unmap {
    std::size_t length;
    void operator()(std::byte* memory) const noexcept;
  };
  /// The file behind it, if there is one.
  struct Source {
    Descriptor file;
    struct stat then;
    std::unique_ptr<MappedFile> watched;
  };

  static Mapping map(std::uint64_t bytes, int protection, int flags, Descriptor file, const std::string& what);

  std::unique_ptr<std::byte, Unmap> memory_;
  std::span<std::byte> bytes_;
  Source source_{};  // goes first
};

/// The runs of a file's data, outside its holes, up to `bytes`, a multiple of `page_bytes`. As Mapping::data().
std::vector<Run> data_of_file(int fd, std::uint64_t bytes, std::size_t page_bytes);

struct Summary {
  std::string digest;  ///< XXH3-64 of all bytes, as 16 hexadecimal digits
  std::uint64_t zero_pages = 0;
};
/// Punches holes into a mapped file where pages are zero, if the file system can; the bytes stay zero. Parts that were never
/// written are not read, because a read would allocate them.
Summary make_sparse(const Mapping& mapping, int fd, std::size_t page_bytes);

/// Throws Failure where a mapped file has another size by now, or could not be read or written.
void check_size(int fd, const Mapping& mapping, const std::string& path);

/// A file that is being received: a PartFile that is mapped.
class NewFile {
 public:
  /// The name is reserved from here on. Throws Failure, as PartFile.
  explicit NewFile(std::string path) : file_(std::move(path)) {}
  /// The same, and allocate().
  NewFile(std::string path, std::uint64_t bytes) : NewFile(std::move(path)) { allocate(bytes); }

  /// Sets the file's size, and maps the file. Room on the disk is taken as pages arrive, so that zero pages take none.
  /// Throws Failure: larger than a file may be, not whole huge pages on hugetlbfs, or more than there are.
  void allocate(std::uint64_t bytes);

  /// Makes it a copy of another file instead (older_copy.hpp). Throws Failure, also of a signal.
  void copy_of(const std::string& older, const multifd::Interrupt* interrupt);

  const Mapping& mapping() const noexcept { return mapping_; }

  Summary make_sparse(std::size_t page_bytes) const { return program::make_sparse(mapping_, file_.fd(), page_bytes); }

  /// The three steps of PartFile: everything that can fail before the last step; the name; keeping the file. sync()
  /// also throws the failure of the mapped file.
  void sync();
  void rename() { file_.rename(); }
  void release() noexcept { file_.release(); }
  /// All three steps.
  void keep();

 private:
  PartFile file_;
  Mapping mapping_;
};

/// As Mapping::digest(), of private anonymous memory that somebody else has mapped, and that nobody writes.
std::string digest_of_memory(std::span<std::byte> memory);

/// Bytes of physical memory of this machine.
std::uint64_t physical_memory();

}  // namespace program
