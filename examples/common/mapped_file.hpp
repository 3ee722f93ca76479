// SPDX-License-Identifier: MIT
//
// What can befall a file while it is mapped: it gets shorter, its disk is full or broken. The kernel says so with SIGBUS to
// whoever touches the page, and with EFAULT to a system call: here both become a failure that names the file.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>

#include "common/program.hpp"

namespace program {

/// Registers a mapping of a file while it lives. Who touches a page that the file does not have any more, or cannot get,
/// finds zero memory in the place of all of the mapping, and the Interrupt of catch_signals() is triggered: the run is
/// over, cause_of() says why.
///
/// Threads: any; the memory may be touched by all. A touch of other memory ends the process as ever.
class MappedFile {
 public:
  /// `memory`: the mapping, whole; `bytes`: how much of it the file has; `fd`: open for reading, and for writing where
  /// the mapping is written to; stays open while the object lives.
  MappedFile(std::span<std::byte> memory, std::size_t bytes, int fd, std::string path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  struct Entry;

 private:
  Entry* entry_;
};

/// What has befallen a mapped file of this process: of those that exist, or did when it happened.
std::optional<std::string> mapped_file_failure();

/// Throws the Failure of a mapped file, if there was one: what was read from it since may be zeros.
void check_mapped_files();

/// The failure of a mapped file when there was one, or when `failure` is that of a system call that could not touch one;
/// else `failure`.
Failure cause_of(const Failure& failure);

/// Installs the handler. catch_signals() does. `interrupt` lives as long as the process.
void watch_mapped_files(multifd::Interrupt& interrupt);

}  // namespace program
