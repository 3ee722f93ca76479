// SPDX-License-Identifier: MIT
//
// The system's limits on a process: raised where the process may do so, named in the error where one is reached.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

namespace program {

/// Raises the soft limit on descriptors to the hard limit. The soft limit exists for programs that use select().
void raise_limits();

/// Throws Failure when this process cannot open that many connections beside its open descriptors. The text names the
/// limit and the number that is needed.
void need_descriptors(std::size_t connections);

/// The text of an errno, with the limit's name and value where the errno means that a limit was reached.
std::string error_text(int error);
/// The part that error_text() adds: "" for an errno that means no limit.
std::string limit_hint(int error);

/// Warns on stderr when sockets get smaller buffers than requested: the kernel gives what it may and reports success.
///
/// Params: `option`: SO_SNDBUF or SO_RCVBUF; `bytes`: 0: nothing was asked for.
void tell_of_smaller_buffers(int option, std::uint64_t bytes);

/// Warns on stderr when the kernel's accept queue is shorter than the number of connections that a source makes at
/// once, although listen() reports success. Connections that find no room come later, with TCP after a second or more.
void tell_of_smaller_backlog(std::size_t connections);

/// An exception's text, with the limit where it stands for one: threads that could not start, no memory.
std::string text_of(const std::exception& error);

}  // namespace program
