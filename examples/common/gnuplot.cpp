// SPDX-License-Identifier: MIT
#include "common/gnuplot.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "common/descriptor.hpp"
#include "common/program.hpp"

extern "C" char** environ;

namespace program {
namespace {

constexpr const char* install_hint = "install the package gnuplot-nox (or gnuplot); --plot-data needs none";

/// A file that goes with its owner.
class Scratch {
 public:
  Scratch() : path_(std::string(std::getenv("TMPDIR") != nullptr ? std::getenv("TMPDIR") : "/tmp") + "/multifdXXXXXX") {
    fd_ = Descriptor(::mkostemp(path_.data(), O_CLOEXEC));
    if (fd_.get() < 0) throw Failure(fmt::format("{}: {}", path_, std::strerror(errno)));
  }
  ~Scratch() { ::unlink(path_.c_str()); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
  Descriptor fd_;
};

/// Starts gnuplot and waits, at most 30 seconds; returns its exit status. Its messages go to `messages`.
int run_gnuplot(const char* argument, const std::string& messages) {
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, messages.c_str(), O_WRONLY | O_TRUNC, 0600);
  ::posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  std::string name = "gnuplot";
  std::string text = argument;
  char* const arguments[] = {name.data(), text.data(), nullptr};
  pid_t child = -1;
  const int error = ::posix_spawnp(&child, "gnuplot", &actions, nullptr, arguments, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw Failure(fmt::format("gnuplot: {}: {}", std::strerror(error), install_hint));
  // The bare call: pidfd_open() of glibc 2.36 is declared without C linkage.
  const Descriptor handle(static_cast<int>(::syscall(SYS_pidfd_open, child, 0)));
  pollfd ended{.fd = handle.get(), .events = POLLIN, .revents = 0};
  const bool in_time = ::poll(&ended, 1, 30'000) == 1;
  if (!in_time) ::kill(child, SIGKILL);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!in_time) throw Failure("gnuplot: no picture after 30 seconds");
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  if (!file.flush()) throw Failure(fmt::format("{}: {}", path, std::strerror(errno)));
}

}  // namespace

std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) {
    if (c == '\'') out += '\'';
    out += c == '\n' ? ' ' : c;
  }
  return out + "'";
}

std::string gnuplot_terminal(const PartFile& picture) {
  const char* const terminal =
      picture.path().ends_with(".svg")
          ? "set terminal svg size 1120,640 dynamic enhanced background '#ffffff' font 'Helvetica,Arial,sans-serif,15'"
          : "set terminal pngcairo size 1400,800 enhanced background '#ffffff' font 'Sans,13'";
  return fmt::format("{}\nset output {}\n", terminal, quoted(picture.part()));
}

void need_gnuplot() {
  const Scratch messages;
  if (run_gnuplot("--version", messages.path()) != 0)
    throw Failure(fmt::format("gnuplot does not start: {}", install_hint));
}

void draw_by_gnuplot(const std::string& text, const PartFile& picture) {
  const Scratch script, messages;
  write_file(script.path(), text);
  const int status = run_gnuplot(script.path().c_str(), messages.path());
  std::stringstream said;
  said << std::ifstream(messages.path()).rdbuf();
  struct stat drawn{};
  if (status == 0 && ::fstat(picture.fd(), &drawn) == 0 && drawn.st_size > 0) return;
  std::string reason = said.str();
  std::ranges::replace(reason, '\n', ' ');
  throw Failure(fmt::format("{}: gnuplot could not draw it: {}", picture.path(), reason));
}

}  // namespace program
