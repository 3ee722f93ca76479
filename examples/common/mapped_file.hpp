// SPDX-License-Identifier: MIT
//
// What can happen to a file while it is mapped: the file gets shorter, or its disk is full or broken. The kernel sends
// SIGBUS to the thread that touches the page, and EFAULT to a system call. Here both become a failure that names the
// file.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>

#include "common/program.hpp"

namespace program {

/// Registers a mapping of a file while this object lives. When a thread touches a page that the file has lost or cannot
/// get, zero memory replaces the whole mapping and the Interrupt of catch_signals() is triggered: the run is over, and
/// cause_of() says why.
///
/// Threads: any; the memory may be touched by all. SIGBUS in other memory ends the process, as without this class.
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

/// The failure of a mapped file of this process, of one that exists or existed when the failure came.
std::optional<std::string> mapped_file_failure();

/// Throws the Failure of a mapped file, if there was one, because bytes read since then may be zeros.
void check_mapped_files();

/// The failure of a mapped file when there was one, or when `failure` is that of a system call that could not touch
/// one; else `failure`.
Failure cause_of(const Failure& failure);

/// Installs the handler. catch_signals() does. `interrupt` lives as long as the process.
void watch_mapped_files(multifd::Interrupt& interrupt);

}  // namespace program
