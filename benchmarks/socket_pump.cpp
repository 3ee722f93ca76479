// SPDX-License-Identifier: MIT
//
// socket_pump: a file over plain sockets into another process's memory, as ram_send and ram_receive do it, but with no
// protocol. The times are of the pumping alone; "began" and "ended" are CLOCK_MONOTONIC, the same for both processes.
#include "socket_pump.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <multifd/format/constants.hpp>
#include <multifd/transport/socket.hpp>

#include <CLI/CLI.hpp>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace {

using namespace multifd;
static_assert(pump::default_header_bytes == wire::header_bytes(4096));
static_assert(pump::default_packet_bytes == multifd::batch_bytes);

struct Settings {
  std::string listen;
  std::string connect;
  std::string file;
  std::string expect;
  std::uint64_t size = 0;
  unsigned channels = 2;
  int socket_buffer = 0;
  bool populate = false;
  bool huge = false;
  std::string json_path;
};

[[noreturn]] void fail_errno(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

template <class T>
T need(Result<T> result) {
  if (!result) throw std::runtime_error(describe(result.error()));
  return std::move(*result);
}

/// Mapped memory, kept until the process ends.
std::span<std::byte> map(std::size_t bytes, int protection, int flags, int fd, const std::string& what) {
  void* const memory = ::mmap(nullptr, bytes, protection, flags, fd, 0);
  if (memory == MAP_FAILED) fail_errno(what);
  return {static_cast<std::byte*>(memory), bytes};
}

void advise(std::span<std::byte> memory, int advice, const char* what) {
  if (::madvise(memory.data(), memory.size(), advice) != 0) fail_errno(what);
}

std::span<std::byte> map_file(const std::string& path, std::uint64_t size) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (fd < 0 || ::fstat(fd, &status) != 0) fail_errno(path);
  if (size == 0) size = static_cast<std::uint64_t>(status.st_size);
  if (size == 0 || size > static_cast<std::uint64_t>(status.st_size)) throw std::runtime_error(path + ": too small");
  const auto memory = map(size, PROT_READ, MAP_PRIVATE, fd, path);
  ::close(fd);
  return memory;
}

double seconds_of(const timeval& time) {
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

/// Runs `work` and says what it cost this process.
template <class Work>
nlohmann::json measured(std::uint64_t bytes, unsigned channels, Work work) {
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  rusage before{};
  rusage after{};
  ::getrusage(RUSAGE_SELF, &before);
  const double began = now();
  work();
  const double ended = now();
  ::getrusage(RUSAGE_SELF, &after);
  const double user = seconds_of(after.ru_utime) - seconds_of(before.ru_utime);
  const double system = seconds_of(after.ru_stime) - seconds_of(before.ru_stime);
  return {{"ok", true},
          {"seconds", ended - began},
          {"began", began},
          {"ended", ended},
          {"ram_bytes", bytes},
          {"gib_per_s", static_cast<double>(bytes) / double(1 << 30) / (ended - began)},
          {"cpu_seconds", user + system},
          {"user_seconds", user},
          {"system_seconds", system},
          {"minor_faults", after.ru_minflt - before.ru_minflt},
          {"context_switches", after.ru_nvcsw - before.ru_nvcsw + after.ru_nivcsw - before.ru_nivcsw},
          {"channels", channels}};
}

std::vector<int> handles(std::span<FdTransport> links) {
  std::vector<int> fds;
  for (FdTransport& link : links) fds.push_back(link.native_handle());
  return fds;
}

/// In order: a connection that is only closed is reset, and takes with it what the other side has not read.
void finish(std::span<FdTransport> links) {
  for (FdTransport& link : links)
    if (auto finished = link.finish(); !finished) throw std::runtime_error(describe(finished.error()));
}

nlohmann::json receive(const Settings& settings, const Address& address, const SocketOptions& options) {
  const auto memory =
      map(settings.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, "memory");
  if (settings.huge) advise(memory, MADV_HUGEPAGE, "huge pages");
  if (settings.populate) advise(memory, MADV_POPULATE_WRITE, "populate");
  Listener listener = need(Listener::listen(address, settings.channels, options));
  fmt::print(stderr, "listening on {}\n", to_string(listener.local_address()));
  std::vector<FdTransport> links = need(listener.accept_channels(settings.channels, std::chrono::seconds(60)));
  const std::vector<int> fds = handles(links);
  // The clock starts at the first byte, not while the sender still connects.
  std::byte first{};
  ssize_t come;
  do come = ::recv(fds.front(), &first, 1, MSG_PEEK);
  while (come < 0 && (errno == EINTR || errno == EAGAIN));  // FdTransport's sockets have time limits
  if (come != 1) fail_errno("the first byte");
  auto report = measured(memory.size(), settings.channels, [&] { pump::pump_receive(fds, memory); });
  finish(links);
  if (!settings.expect.empty()) {
    const auto expected = map_file(settings.expect, settings.size);
    if (std::memcmp(memory.data(), expected.data(), memory.size()) != 0)
      throw std::runtime_error("what arrived is not what " + settings.expect + " holds");
  }
  return report;
}

nlohmann::json send(const Settings& settings, const Address& address, const SocketOptions& options) {
  const auto memory = map_file(settings.file, settings.size);
  if (settings.populate) advise(memory, MADV_POPULATE_READ, "populate");
  std::vector<FdTransport> links = need(connect_channels(address, settings.channels, options));
  auto report = measured(memory.size(), settings.channels, [&] { pump::pump_send(handles(links), memory); });
  finish(links);
  return report;
}

int run(const Settings& settings) {
  SocketOptions options;
  options.send_buffer_bytes = options.receive_buffer_bytes = settings.socket_buffer;
  const bool receiving = !settings.listen.empty();
  const Address address = need(parse_address(receiving ? settings.listen : settings.connect));
  const nlohmann::json report = receiving ? receive(settings, address, options) : send(settings, address, options);
  if (settings.json_path.empty()) {
    fmt::print("{:.2f} GiB/s, {:.3f} s, CPU {:.3f} s\n", report["gib_per_s"].get<double>(),
               report["seconds"].get<double>(), report["cpu_seconds"].get<double>());
    return 0;
  }
  const std::string text = report.dump(2) + "\n";
  if (settings.json_path == "-") {
    fmt::print("{}", text);
    return 0;
  }
  std::ofstream file(settings.json_path);
  file << text;
  if (!file.flush()) fail_errno(settings.json_path);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Moves a file over plain sockets into another process's memory: no protocol, no checks.", "socket_pump");
  auto* listen = app.add_option("--listen", settings.listen, "Receive: tcp:HOST:PORT (port 0: any) or unix:PATH");
  auto* connect = app.add_option("--connect", settings.connect, "Send: where the other socket_pump listens");
  auto* file = app.add_option("--file", settings.file, "The bytes to send");
  listen->excludes(connect);
  connect->needs(file);
  auto* size = app.add_option("--size", settings.size, "Bytes, as 512M; sending, 0 means the whole file")
                   ->transform(CLI::AsSizeValue(false));
  listen->needs(size);
  app.add_option("--channels", settings.channels, "Connections")
      ->check(CLI::Range(1u, multifd::max_channels))
      ->capture_default_str();
  app.add_option("--socket-buffer", settings.socket_buffer,
                 "SO_SNDBUF and SO_RCVBUF in bytes, as 256K (0: the kernel's)")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  app.add_flag("--populate", settings.populate, "Touch the memory, or map the file's pages, before the clock starts");
  app.add_flag("--huge", settings.huge, "Ask for huge pages to receive into");
  app.add_option("--expect", settings.expect, "After the clock has stopped, compare what arrived with this file");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  CLI11_PARSE(app, argc, argv);
  if (settings.listen.empty() == settings.connect.empty() || settings.size % pump::default_packet_bytes != 0) {
    fmt::print(stderr, "socket_pump: --listen or --connect, and a size that is a multiple of 512K\n");
    return 2;
  }
  try {
    return run(settings);
  } catch (const std::exception& error) {
    fmt::print(stderr, "socket_pump: {}\n", error.what());
    return 1;
  }
}
