// SPDX-License-Identifier: MIT
//
// kernel_ways: what the ways of a packet through the kernel cost. Sends memory in packets as a Sender does, a header and
// 128 pages, over connections between threads of this process, by each way in turn, and prints one JSON object: for each
// way and number of connections every run's GiB/s, CPU seconds a GiB of both ends and of the process, system calls a GiB.
// kernel_ways.py runs it on several kinds of connections.
#include "kernel_ways.hpp"

#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <multifd/format/constants.hpp>
#include <multifd/transport/socket.hpp>

#include <CLI/CLI.hpp>
#include <chrono>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "corpus.hpp"
#include "io_ring.hpp"

namespace {

using namespace multifd;

struct Settings {
  std::string listen = "tcp:127.0.0.1:0";
  std::string network_namespace;
  std::string memory = "small";
  std::vector<std::string> ways;
  std::vector<unsigned> connections = {1, 2, 4};
  std::uint64_t size = std::uint64_t{1} << 30;
  unsigned repeat = 5;
};

template <class T>
T need(Result<T> result) {
  if (!result) throw std::runtime_error(describe(result.error()));
  return std::move(*result);
}

struct Memory {
  std::span<std::byte> bytes;
  int file = -1;  ///< that is mapped; -1: none
};

/// Touched, and kept until the process ends.
Memory map(std::uint64_t size, const std::string& kind) {
  Memory made;
  if (kind == "memfd") {
    made.file = ::memfd_create("kernel_ways", MFD_CLOEXEC);
    if (made.file < 0 || ::ftruncate(made.file, static_cast<off_t>(size)) != 0) ways::fail_errno("memfd");
  }
  const int flags = made.file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, made.file, 0);
  if (memory == MAP_FAILED) ways::fail_errno("memory");
  if (kind == "huge" && ::madvise(memory, size, MADV_HUGEPAGE) != 0) ways::fail_errno("huge pages");
  std::memset(memory, 1, size);
  made.bytes = {static_cast<std::byte*>(memory), size};
  return made;
}

/// Connected pairs between this network namespace and the one that is named.
struct Links {
  std::vector<FdTransport> out, in;

  Links(const Settings& settings, unsigned connections) {
    const Address address = need(parse_address(settings.listen));
    std::optional<Listener> listener;
    std::exception_ptr failed;
    // A thread of its own, because it stays in the namespace.
    std::thread([&] {
      try {
        if (!settings.network_namespace.empty()) enter("/run/netns/" + settings.network_namespace);
        listener.emplace(need(Listener::listen(address, connections)));
      } catch (...) {
        failed = std::current_exception();
      }
    }).join();
    if (failed) std::rethrow_exception(failed);
    std::thread accepting([&] {
      if (auto got = listener->accept_channels(connections, std::chrono::seconds(10))) in = std::move(*got);
    });
    auto connected = connect_channels(listener->local_address(), connections, {});
    accepting.join();
    out = need(std::move(connected));
    if (in.size() != out.size()) throw std::runtime_error("no connection");
  }

  static void enter(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0 || ::setns(file, CLONE_NEWNET) != 0) ways::fail_errno(path.c_str());
    ::close(file);
  }
};

std::vector<int> handles(const std::vector<FdTransport>& links) {
  std::vector<int> fds;
  for (const FdTransport& link : links) fds.push_back(link.native_handle());
  return fds;
}

using Send = std::function<pump::Cost(std::span<const int>, const Memory&)>;
using Receive = std::function<pump::Cost(std::span<const int>, std::span<std::byte>)>;
struct Way {
  Send send;
  Receive receive;
};

pump::Cost plain_send(std::span<const int> fds, const Memory& from) { return pump::pump_send(fds, from.bytes); }
pump::Cost plain_receive(std::span<const int> fds, std::span<std::byte> to) { return pump::pump_receive(fds, to); }

/// A way that is made of (fd, arguments...).
template <class W, class... Arguments>
Send by(Arguments... arguments) {
  return [arguments...](std::span<const int> fds, const Memory& from) {
    return pump::pump_send(fds, from.bytes, [&](int fd) { return W(fd, arguments...); });
  };
}

/// By name, in the order in which they are tried.
const std::vector<std::pair<std::string, Way>>& all_ways() {
  constexpr unsigned several = 4;
  static const std::vector<std::pair<std::string, Way>> all = {
      {"sendmsg", {plain_send, plain_receive}},
      {"splice", {by<ways::Splice>(ways::HeaderBy::send), plain_receive}},
      {"splice, header too", {by<ways::Splice>(ways::HeaderBy::vmsplice), plain_receive}},
      {"sendfile",
       {[](std::span<const int> fds, const Memory& from) {
          if (from.file < 0) throw std::runtime_error("needs --memory memfd");
          return pump::pump_send(fds, from.bytes,
                                 [&](int fd) { return ways::Sendfile(fd, from.file, from.bytes.data()); });
        },
        plain_receive}},
      {"MSG_ZEROCOPY", {by<ways::Zerocopy>(), plain_receive}},
      {"io_uring", {by<ways::RingSendmsg>(1U), plain_receive}},
      {"io_uring, 4 packets", {by<ways::RingSendmsg>(several), plain_receive}},
      {"io_uring, bundle of 4", {by<ways::RingBundle>(several), plain_receive}},
      {"io_uring, SEND_ZC",
       {[](std::span<const int> fds, const Memory& from) {
          return pump::pump_send(fds, from.bytes, [&](int fd) { return ways::RingZerocopy(fd, several, from.bytes); });
        },
        plain_receive}},
      {"io_uring receives",
       {plain_send,
        [](std::span<const int> fds, std::span<std::byte> to) {
          return pump::pump_receive(fds, to, pump::Make<ways::RingRecvmsg>{});
        }}},
  };
  return all;
}

double process_cpu() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto s = [](timeval t) { return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec); };
  return s(usage.ru_utime) + s(usage.ru_stime);
}

nlohmann::ordered_json measure(const Settings& settings, const Way& way, unsigned connections, const Memory& from,
                               std::span<std::byte> to) {
  Links links(settings, connections);
  std::memset(to.data(), 0, 1);
  std::exception_ptr failed;
  pump::Cost sent, received;
  const double cpu = process_cpu();
  const auto began = std::chrono::steady_clock::now();
  std::thread receiving([&] {
    try {
      received = way.receive(handles(links.in), to);
    } catch (...) {
      failed = std::current_exception();
    }
  });
  std::exception_ptr send_failed;
  try {
    sent = way.send(handles(links.out), from);
  } catch (...) {
    send_failed = std::current_exception();
    for (FdTransport& link : links.in) link.shutdown();
  }
  receiving.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  const double cpu_s = process_cpu() - cpu;
  if (send_failed || failed) std::rethrow_exception(send_failed ? send_failed : failed);
  if (std::memcmp(from.bytes.data(), to.data(), to.size()) != 0) throw std::runtime_error("other bytes have arrived");
  const double gib = static_cast<double>(to.size()) / double(1 << 30);
  return {{"gib_per_s", gib / seconds},
          {"cpu_s_per_gib", cpu_s / gib},
          {"sender_cpu_s_per_gib", sent.cpu_s / gib},
          {"receiver_cpu_s_per_gib", received.cpu_s / gib},
          {"sender_calls_per_gib", static_cast<double>(sent.calls) / gib},
          {"receiver_calls_per_gib", static_cast<double>(received.calls) / gib}};
}

int run(const Settings& settings) {
  const Memory from = map(settings.size, settings.memory);
  corpus::fill(from.bytes, "random", 1);
  const auto to = map(settings.size, "small").bytes;
  nlohmann::ordered_json runs, refused = nlohmann::ordered_json::object();
  const auto& all = all_ways();
  // The first run is slow wherever memory has just been found.
  static_cast<void>(measure(settings, all.front().second, 2, from, to));
  std::vector<std::size_t> chosen;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (!settings.ways.empty() && std::ranges::find(settings.ways, all[i].first) == settings.ways.end()) continue;
    chosen.push_back(i);
    runs[all[i].first] = nlohmann::ordered_json::object();
  }
  for (unsigned repetition = 0; repetition < settings.repeat; ++repetition) {
    for (const unsigned connections : settings.connections) {
      for (const std::size_t i : chosen) {
        const auto& [name, way] = all[i];
        if (refused.contains(name)) continue;
        try {
          runs[name][std::to_string(connections)].push_back(measure(settings, way, connections, from, to));
        } catch (const std::exception& error) {
          refused[name] = error.what();
          runs.erase(name);
        }
      }
    }
    std::ranges::rotate(chosen, chosen.begin() + 1);  // none is always the first
  }
  const nlohmann::ordered_json report = {{"listen", settings.listen},
                                         {"memory", settings.memory},
                                         {"size", settings.size},
                                         {"runs", runs},
                                         {"refused", refused}};
  fmt::print("{}\n", report.dump(1));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Moves memory over sockets within one process by several ways through the kernel.", "kernel_ways");
  app.add_option("--listen", settings.listen, "tcp:HOST:PORT (port 0: any) or unix:PATH")->capture_default_str();
  app.add_option("--namespace", settings.network_namespace, "Listen in this network namespace, as ip netns knows it");
  app.add_option("--memory", settings.memory, "The source's")
      ->check(CLI::IsMember({"small", "huge", "memfd"}))
      ->capture_default_str();
  std::vector<std::string> names;
  for (const auto& [name, way] : all_ways()) names.push_back(name);
  app.add_option("--way", settings.ways, "One of them, repeatable (default: all)")->check(CLI::IsMember(names));
  app.add_option("--connections", settings.connections, "Numbers of connections")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--size", settings.size, "Bytes, as 512M")->transform(CLI::AsSizeValue(false))->capture_default_str();
  app.add_option("--repeat", settings.repeat, "Rounds of all ways in turn")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (settings.size == 0 || settings.size % pump::default_packet_bytes != 0) {
    fmt::print(stderr, "kernel_ways: a size that is a multiple of 512K\n");
    return 2;
  }
  ::signal(SIGPIPE, SIG_IGN);  // splice() knows no MSG_NOSIGNAL
  try {
    return run(settings);
  } catch (const std::exception& error) {
    fmt::print(stderr, "kernel_ways: {}\n", error.what());
    return 1;
  }
}
