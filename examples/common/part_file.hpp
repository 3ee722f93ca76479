// SPDX-License-Identifier: MIT
//
// A file that a program writes for its user. While it is written, the file is NAME.part beside its final name, and
// locked, so that no other program writes to it. It gets its name when it is whole, and never takes a name that is in
// use.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "common/descriptor.hpp"
#include "common/program.hpp"

namespace program {

/// open() that does not wait for the other end of a FIFO, and accepts regular files only. Throws Failure.
Descriptor open_regular(const std::string& path, int flags, unsigned mode = 0);

/// Throws the Failure for errno (or `error`), with `path` in its text.
[[noreturn]] void fail_path(const std::string& path);
[[noreturn]] void fail_path(const std::string& path, int error);

/// Writes all of `text` at the descriptor's position, in several calls of write() if needed, and waits for a reader of
/// a FIFO for 10 s at most. Throws Failure about `path`.
void write_text(int fd, std::string_view text, const std::string& path);

/// NAME.part, which becomes NAME. Without release() the destructor removes the file, whichever name it has by then, and
/// so does a second signal: a failure leaves no file that looks whole. SIGKILL leaves NAME.part, which the next program
/// takes over.
class PartFile {
 public:
  /// Throws Failure: NAME is taken; another program writes to NAME.part; NAME.part is no leftover of such a program;
  /// the folder is missing or cannot be written to.
  explicit PartFile(std::string path);
  ~PartFile();
  PartFile(const PartFile&) = delete;
  PartFile& operator=(const PartFile&) = delete;

  int fd() const noexcept { return file_.get(); }
  const std::string& path() const noexcept { return path_; }
  const std::string& part() const noexcept { return part_; }

  /// Writes a byte and removes it again, so that an error that would come at the end comes now. Throws Failure.
  void check_writes();

  /// Writes the bytes to the disk. Behind it only rename() can still fail. Throws Failure.
  void sync();

  /// Gives the file its name. Throws Failure when another file has taken the name meanwhile. After sync() NAME.part is
  /// kept in that case, because its bytes are whole.
  void rename();

  /// Keeps the file: the destructor no longer removes it.
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
