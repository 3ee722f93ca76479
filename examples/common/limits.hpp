// SPDX-License-Identifier: MIT
//
// The limits that a system sets a process: raised where that is this process's own right, named where one is met.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

namespace program {

/// Raises the soft limit of descriptors to the hard one: a soft one is for programs that use select().
void raise_limits();

/// Throws Failure when that many connections cannot be open beside what this process has open now: it names the limit
/// and what is needed.
void need_descriptors(std::size_t connections);

/// The text of an errno; where it stands for a limit, with that limit's name and value.
std::string error_text(int error);
/// What error_text() adds: "" for what is no limit.
std::string limit_hint(int error);

/// Says on stderr when sockets get smaller buffers than were asked for: the kernel gives what it may, and calls that
/// success.
///
/// Params: `option`: SO_SNDBUF or SO_RCVBUF; `bytes`: 0: nothing was asked for.
void tell_of_smaller_buffers(int option, std::uint64_t bytes);

/// Says on stderr when the kernel lets fewer connections wait to be accepted than a source makes at once: listen() calls
/// that success. Those that find no room come later, by TCP after a second or more.
void tell_of_smaller_backlog(std::size_t connections);

/// An exception's text, with the limit where it stands for one: threads that could not start, no memory.
std::string text_of(const std::exception& error);

}  // namespace program
