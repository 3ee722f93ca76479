// SPDX-License-Identifier: MIT
//
// A file that a program writes for its user. While it is written it lies beside its final name as NAME.part, locked, so
// that nobody else writes to it; it gets its name when it is whole, and never takes a name that is in use.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "common/program.hpp"

namespace program {

/// A descriptor, closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) noexcept : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();
  int get() const noexcept { return fd_; }

 private:
  int fd_;
};

/// open() that does not wait for the other end of a FIFO, and takes nothing but regular files. Throws Failure.
Descriptor open_regular(const std::string& path, int flags, unsigned mode = 0);

/// Throws the Failure that errno (or `error`) stands for, about `path`.
[[noreturn]] void fail_path(const std::string& path);
[[noreturn]] void fail_path(const std::string& path, int error);

/// Writes all of `text` at the descriptor's position, also where write() takes less at once, and waits for a reader of
/// a FIFO for 10 s at most. Throws Failure about `path`.
void write_text(int fd, std::string_view text, const std::string& path);

/// NAME.part, which becomes NAME. Without release() the destructor removes the file under the name that it has by then,
/// and so does a second signal: a failure leaves no file that looks whole. What SIGKILL leaves is NAME.part, which the
/// next program takes over.
class PartFile {
 public:
  /// Throws Failure: NAME is taken; another program writes to NAME.part; NAME.part is no leftover of such a program; the
  /// folder is missing or cannot be written to.
  explicit PartFile(std::string path);
  ~PartFile();
  PartFile(const PartFile&) = delete;
  PartFile& operator=(const PartFile&) = delete;

  int fd() const noexcept { return file_.get(); }
  const std::string& path() const noexcept { return path_; }
  const std::string& part() const noexcept { return part_; }

  /// Writes something and takes it back: what would fail at the end fails now. Throws Failure.
  void check_writes();

  /// The bytes are on the disk after it: what could fail beside rename() has failed by then. Throws Failure.
  void sync();

  /// Gives the file its name. Throws Failure where somebody has taken the name meanwhile: after sync() NAME.part is left
  /// then, because its bytes are whole.
  void rename();

  /// The file stays.
  void release() noexcept { unfinished_.reset(); }

 private:
  bool is_ours(const std::string& path) const;

  std::string path_;
  std::string part_;
  Descriptor file_;
  bool whole_ = false;
  bool renamed_ = false;
  std::optional<RemovedBySignal> unfinished_;
};

}  // namespace program
