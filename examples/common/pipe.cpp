// SPDX-License-Identifier: MIT
#include "common/pipe.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "common/program.hpp"

namespace program {
namespace {

using namespace multifd;
using namespace std::chrono_literals;

[[noreturn]] void fail_with(const std::string& what, int error) {
  throw Failure(fmt::format("{}: {}", what, std::strerror(error)));
}

int descriptor_of(const std::string& text, PipeUse use, const char* option) {
  const auto refuse = [&](const char* why) { throw Usage(fmt::format("{} {}: {}", option, text, why)); };
  int fd = -1;
  const char* const end = text.data() + text.size();
  if (const auto [stop, error] = std::from_chars(text.data() + 3, end, fd);
      error != std::errc{} || stop != end || fd < 0)
    refuse("no number of a descriptor");
  // What this program says on stdout and stderr must not come into the stream.
  if (fd == STDOUT_FILENO || fd == STDERR_FILENO) refuse("stdin, or a descriptor from 3 on");
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0) refuse("this descriptor is not open: whoever starts this program has to open it");
  const int mode = flags & O_ACCMODE;
  if (mode == O_WRONLY && use == PipeUse::read) refuse("this descriptor is open for writing only");
  if (mode == O_RDONLY && use == PipeUse::write) refuse("this descriptor is open for reading only");
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  return fd;
}

}  // namespace

std::optional<PipeAddress> pipe_address_of(const std::string& text, PipeUse use, const char* option) {
  if (text.starts_with("fd:")) return PipeAddress{.command = {}, .fd = descriptor_of(text, use, option)};
  if (!text.starts_with("exec:")) return std::nullopt;
  if (text.size() == 5) throw Usage(fmt::format("{} {}: without a command", option, text));
  return PipeAddress{.command = text.substr(5)};
}

Pipe::Pipe(const PipeAddress& address, PipeUse use) : command_(address.command) {
  if (command_.empty()) {
    link_ = need(FdTransport::adopt(address.fd), fmt::format("fd:{}", address.fd));
    return;
  }
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) fail_with("pipe", errno);
  const bool reads = use == PipeUse::read;
  Descriptor ours(ends[reads ? 0 : 1]);
  const Descriptor theirs(ends[reads ? 1 : 0]);
  link_ = need(FdTransport::adopt(ours.release()), "pipe");
  start(theirs.get(), reads ? STDOUT_FILENO : STDIN_FILENO);
}

void Pipe::start(int theirs, int as) {
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attributes);
  posix_spawn_file_actions_adddup2(&actions, theirs, as);
  // This program's signals are not the command's: it blocks some, and ignores SIGPIPE. A group of its own, so that all
  // commands of a pipeline end with the first.
  sigset_t none, usual;
  sigemptyset(&none);
  sigemptyset(&usual);
  for (const int signal : {SIGPIPE, SIGXFSZ, SIGINT, SIGTERM}) sigaddset(&usual, signal);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &usual);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  char shell[] = "/bin/sh", option[] = "-c";
  char* const arguments[] = {shell, option, command_.data(), nullptr};
  const int error = ::posix_spawn(&child_, shell, &actions, &attributes, arguments, environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    child_ = -1;
    fail_with("exec:" + command_, error);
  }
  watched_ = Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, child_, 0)));
  if (watched_.get() < 0) fail_with("pidfd_open", errno);
}

bool Pipe::wait(std::chrono::milliseconds limit, const Interrupt* interrupt) {
  if (child_ < 0) return true;
  if (!wait_for(watched_.get(), limit, interrupt)) return false;
  int status = 0;
  while (::waitpid(child_, &status, 0) < 0 && errno == EINTR) {
  }
  child_ = -1;
  if (WIFSIGNALED(status)) throw Failure(fmt::format("exec:{}: was ended by signal {}", command_, WTERMSIG(status)));
  if (WEXITSTATUS(status) != 0)
    throw Failure(fmt::format("exec:{}: ended with exit status {}", command_, WEXITSTATUS(status)));
  return true;
}

Pipe::~Pipe() {
  if (child_ < 0) return;
  ::kill(-child_, SIGTERM);
  if (watched_.get() < 0 || !wait_for(watched_.get(), 1s, nullptr)) ::kill(-child_, SIGKILL);
  while (::waitpid(child_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

}  // namespace program
