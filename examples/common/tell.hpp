// SPDX-License-Identifier: MIT
//
// A program's texts for its user: warnings, hints and errors on stderr, summaries on stdout. None of them may change
// how the program ends, so a descriptor that takes no bytes (closed, a full disk, a pipe without a reader) is ignored.
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <string_view>

namespace program {

/// Writes a text without a buffer, and drops what the descriptor does not take. Threads: any.
void write_or_drop(int fd, std::string_view text) noexcept;

/// Formats a text, newline included, and writes it to stderr. Never throws. Threads: any.
template <class... Args>
void tell(fmt::format_string<Args...> format, Args&&... args) noexcept {
  try {
    write_or_drop(STDERR_FILENO, fmt::format(format, std::forward<Args>(args)...));
  } catch (...) {  // no memory to format the text: then nothing is printed
  }
}

/// The same to stdout.
template <class... Args>
void say(fmt::format_string<Args...> format, Args&&... args) noexcept {
  try {
    write_or_drop(STDOUT_FILENO, fmt::format(format, std::forward<Args>(args)...));
  } catch (...) {
  }
}

}  // namespace program
