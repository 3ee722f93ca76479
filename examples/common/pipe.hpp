// SPDX-License-Identifier: MIT
//
// A main stream that is no connection: `exec:COMMAND` is the command's stdout or stdin, `fd:N` a descriptor that this
// process was started with. As QEMU's addresses of these names; without channels.
#pragma once

#include <multifd/transport/fd.hpp>

#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>

#include "common/descriptor.hpp"

namespace program {

struct PipeAddress {
  std::string command;  ///< for /bin/sh; empty: a descriptor
  int fd = -1;
};

enum class PipeUse { read, write };

/// None: the text is of another kind. Throws Usage: no command, or a descriptor that is not open for that use. Called before
/// this program opens anything itself.
std::optional<PipeAddress> pipe_address_of(const std::string& text, PipeUse use, const char* option);

/// The stream's end in this process, and the command at the other end.
class Pipe {
 public:
  /// Starts the command. Throws Failure.
  Pipe(const PipeAddress& address, PipeUse use);
  /// Ends a command that still runs, with SIGTERM and, where that does not help within a second, SIGKILL.
  ~Pipe();
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;

  multifd::FdTransport take() noexcept { return std::move(*link_); }

  /// Waits for the command's end. Returns whether it has ended in time, and so before `interrupt` (may be null) triggered;
  /// true also where there is none. Throws Failure: its exit status is not 0, or a signal has ended it.
  bool wait(std::chrono::milliseconds limit, const multifd::Interrupt* interrupt);

 private:
  void start(int theirs, int as);

  std::string command_;
  pid_t child_ = -1;    ///< a group of its own, until it was waited for
  Descriptor watched_;  ///< readable when the command has ended
  std::optional<multifd::FdTransport> link_;
};

}  // namespace program
