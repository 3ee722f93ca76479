// SPDX-License-Identifier: MIT
#include "common/limits.hpp"

#include <dirent.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <new>

#include "common/part_file.hpp"
#include "common/program.hpp"
#include "common/tell.hpp"

namespace program {
namespace {

std::string limit_of(int resource) {
  rlimit limit{};
  ::getrlimit(static_cast<__rlimit_resource>(resource), &limit);
  return limit.rlim_cur == RLIM_INFINITY ? std::string("unlimited") : std::to_string(limit.rlim_cur);
}

std::string setting(const char* path) {
  std::ifstream file(path);
  std::string value;
  return file >> value ? value : std::string("unknown");
}

std::size_t open_descriptors() {
  DIR* const folder = ::opendir("/proc/self/fd");
  if (folder == nullptr) return 16;
  std::size_t count = 0;
  while (::readdir(folder) != nullptr) ++count;
  ::closedir(folder);
  return count - 3;  // ".", "..", and the folder's own
}

}  // namespace

void raise_limits() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  (void)::setrlimit(RLIMIT_NOFILE, &limit);  // whoever meets the limit is told
}

void need_descriptors(std::size_t connections) {
  constexpr std::size_t others = 16;  // files, what ends waits, what connections are looked at with
  const std::size_t needed = open_descriptors() + connections + others;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || needed <= limit.rlim_cur) return;
  throw Failure(
      fmt::format("{} connections need {} descriptors, and this process may have {} (RLIMIT_NOFILE): raise it with "
                  "ulimit -n, or use "
                  "fewer channels",
                  connections, needed, limit.rlim_cur));
}

std::string limit_hint(int error) {
  switch (error) {
    case EMFILE:
      return fmt::format(": this process may have {} descriptors (RLIMIT_NOFILE): raise it with ulimit -n",
                         limit_of(RLIMIT_NOFILE));
    case ENFILE:
      return fmt::format(": all processes together may have {} (/proc/sys/fs/file-max)",
                         setting("/proc/sys/fs/file-max"));
    case EAGAIN:  // of who cannot wait; else nobody sees it
      return fmt::format(
          ": this user may have {} threads (RLIMIT_NPROC, ulimit -u), the system {} (/proc/sys/kernel/threads-max), "
          "and a "
          "container what its pids.max says",
          limit_of(RLIMIT_NPROC), setting("/proc/sys/kernel/threads-max"));
    case ENOMEM:
      return fmt::format(
          ": this process may have {} bytes of address space (RLIMIT_AS, ulimit -v), {} mappings "
          "(/proc/sys/vm/max_map_count), and what /proc/sys/vm/overcommit_memory allows",
          limit_of(RLIMIT_AS), setting("/proc/sys/vm/max_map_count"));
    case EFBIG:
      return fmt::format(
          ": a file of this process may have {} bytes (RLIMIT_FSIZE, ulimit -f), and no more than its file "
          "system takes",
          limit_of(RLIMIT_FSIZE));
    default: return {};
  }
}

std::string error_text(int error) { return std::strerror(error) + limit_hint(error); }

void tell_of_smaller_buffers(int option, std::uint64_t bytes) {
  // One that is never connected: the limit is the same for all kinds of sockets.
  const Descriptor probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int asked = static_cast<int>(bytes);
  int given = 0;
  socklen_t size = sizeof given;
  if (bytes == 0 || ::setsockopt(probe.get(), SOL_SOCKET, option, &asked, sizeof asked) != 0 ||
      ::getsockopt(probe.get(), SOL_SOCKET, option, &given, &size) != 0)
    return;
  given /= 2;  // the kernel doubles what it grants, for what it keeps beside the bytes
  if (given >= asked) return;
  const bool sends = option == SO_SNDBUF;
  tell("warning: the kernel gives {} of {} instead of --socket-buffer {}: raise net.core.{} (sysctl) to get more\n",
       sends ? "SO_SNDBUF" : "SO_RCVBUF", format_bytes(given), format_bytes(static_cast<double>(bytes)),
       sends ? "wmem_max" : "rmem_max");
}

void tell_of_smaller_backlog(std::size_t connections) {
  std::size_t most = 0;
  if (std::ifstream file("/proc/sys/net/core/somaxconn"); !(file >> most) || most >= connections) return;
  tell(
      "warning: the kernel lets {} connections wait to be accepted (net.core.somaxconn), and the source makes {} at "
      "once: "
      "if they come late, raise it (sysctl), or use fewer channels\n",
      most, connections);
}

std::string text_of(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) return error_text(ENOMEM);
  if (const auto* system = dynamic_cast<const std::system_error*>(&error);
      system != nullptr && system->code().category() == std::generic_category())
    return error_text(system->code().value());
  return error.what();
}

}  // namespace program
