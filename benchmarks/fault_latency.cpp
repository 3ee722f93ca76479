// SPDX-License-Identifier: MIT
//
// fault_latency: how long a guest's thread waits for a page that is still at the source. A thread touches pages in random
// order while the rest comes in the background; each touch of a page that is not there is timed, from the guest's side. The
// source is another process, over loopback TCP. Prints one JSON object; postcopy.py runs it beside QEMU.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

#include <multifd/multifd.hpp>
#include <multifd/postcopy/guest_pages.hpp>
#include <multifd/postcopy/lazy_memory.hpp>
#include <multifd/postcopy/page_server.hpp>
#include <multifd/postcopy/remote_pages.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "memory_and_files.hpp"

using namespace multifd;

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t page_bytes = 4096;

/// Guest memory that nobody has touched.
Memory fresh(std::uint64_t bytes) {
  Memory memory = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
  ::madvise(memory.get(), bytes, MADV_NOHUGEPAGE);  // a fault is one page's, as under a KVM guest that migrates
  return memory;
}

/// What the first word of a page has to be. No page is zero, and none compresses.
constexpr std::uint64_t word_of(std::uint64_t page) noexcept { return (page + 1) * 0x9e3779b97f4a7c15U; }

void fill(std::span<std::byte> memory) {
  for (std::uint64_t page = 0; page < memory.size() / page_bytes; ++page) {
    std::uint64_t word = word_of(page);
    for (std::size_t at = 0; at < page_bytes; at += 8, word = word * 6364136223846793005U + 1442695040888963407U)
      std::memcpy(&memory[page * page_bytes + at], &word, 8);
  }
}

/// The source: serves its memory at a port of its own, until its parent has gone.
[[noreturn]] void serve(std::uint64_t bytes, int port_pipe) {
  try {
    const Memory memory = fresh(bytes);
    const std::span all(memory.get(), static_cast<std::size_t>(bytes));
    fill(all);
    RamMap ram;
    need(ram.add("ram", all), "RamMap");
    const auto pages = need(postcopy::GuestPages::open(ram), "GuestPages");
    const auto server = need(postcopy::PageServer<FdTransport>::open(*pages), "PageServer");
    Listener listener = need(Listener::listen(need(parse_address("tcp:127.0.0.1:0"), "address")), "listen");
    const std::string address = to_string(listener.local_address());
    if (::write(port_pipe, address.data(), address.size()) < 0) std::_Exit(1);
    ::close(port_pipe);
    for (;;) need(server->add(need(listener.accept(no_timeout), "accept")), "serve");
  } catch (const std::exception& error) {
    fmt::print(stderr, "fault_latency: source: {}\n", error.what());
  }
  std::_Exit(1);
}

std::uint64_t quantile(const std::vector<std::uint64_t>& sorted, double share) {
  if (sorted.empty()) return 0;
  return sorted[std::min(sorted.size() - 1, static_cast<std::size_t>(share * static_cast<double>(sorted.size())))];
}

}  // namespace

int main(int argc, char** argv) try {
  std::uint64_t mib = 2048, most_faults = 1'000'000;
  unsigned workers = 2, fault_threads = 1, window = 4;
  bool lane = true;
  CLI::App app("how long a guest waits for a page that is still at the source");
  app.add_option("--mib", mib, "memory")->capture_default_str();
  app.add_option("--channels", workers, "background connections; 0: nothing but what is touched")
      ->capture_default_str();
  app.add_option("--fault-threads", fault_threads)->capture_default_str();
  app.add_option("--window", window, "requests without an answer on each")->capture_default_str();
  app.add_option("--urgent-lane", lane, "touched pages have a connection of their own")->capture_default_str();
  app.add_option("--faults", most_faults, "the guest stops after so many")->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  const std::uint64_t bytes = mib << 20;
  int port[2];
  if (::pipe(port) != 0) throw std::runtime_error("pipe");
  const pid_t source = ::fork();
  if (source == 0) {
    ::close(port[0]);
    serve(bytes, port[1]);
  }
  ::close(port[1]);
  struct End {
    pid_t pid;
    ~End() {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
    }
  } const end{source};
  char text[128]{};
  if (::read(port[0], text, sizeof text - 1) <= 0) throw std::runtime_error("the source has not come up");
  const Address address = need(parse_address(text), text);

  const Memory memory = fresh(bytes);
  RamMap ram;
  need(ram.add("ram", {memory.get(), static_cast<std::size_t>(bytes)}), "RamMap");
  const auto store = need(postcopy::RemotePages<FdTransport>::open(
                              [&](postcopy::FetchKind, const Interrupt& interrupt) {
                                return connect_to(address, {.interrupt = &interrupt});
                              },
                              {.window = window}),
                          "RemotePages");
  const auto regions = need(postcopy::regions_of(ram), "regions");
  const auto lazy =
      need(postcopy::LazyMemory::open(need(postcopy::Userfaultfd::create(), "userfaultfd"), regions, *store,
                                      {.fault_threads = fault_threads, .workers = workers, .urgent_lane = lane}),
           "LazyMemory");

  std::vector<std::uint64_t> waited;
  waited.reserve(std::min<std::uint64_t>(most_faults, bytes / page_bytes));
  std::atomic<bool> stop = false;
  std::uint64_t wrong = 0, touched = 0;
  const auto begin = Clock::now();
  need(lazy->start(), "start");
  std::thread guest([&] {
    std::mt19937_64 dice(1);
    std::uniform_int_distribution<std::uint64_t> any(0, bytes / page_bytes - 1);
    while (!stop.load(std::memory_order_relaxed) && waited.size() < most_faults) {
      const std::uint64_t page = any(dice);
      std::byte* const at = &memory[page * page_bytes];
      unsigned char there = 0;
      ::mincore(at, page_bytes, &there);
      const auto before = Clock::now();
      std::uint64_t word;
      std::memcpy(&word, const_cast<const std::byte*>(at), 8);
      asm volatile("" ::"r"(word) : "memory");
      const auto after = Clock::now();
      if ((there & 1) == 0) waited.push_back(static_cast<std::uint64_t>((after - before).count()));
      wrong += word != word_of(page);
      ++touched;
    }
  });
  double seconds = 0;
  if (workers > 0) {
    need(lazy->wait(std::chrono::minutes(5)), "wait");
    seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    stop = true;
  }
  guest.join();
  if (workers == 0) seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  const auto stats = lazy->stats();
  lazy->cancel();
  if (wrong != 0) throw std::runtime_error(fmt::format("{} pages were wrong", wrong));

  std::ranges::sort(waited);
  const auto us = [&](double share) { return static_cast<double>(quantile(waited, share)) / 1000; };
  const nlohmann::json report{{"mib", mib},
                              {"channels", workers},
                              {"urgent_lane", lane},
                              {"window", window},
                              {"fault_threads", fault_threads},
                              {"faults", waited.size()},
                              {"touched", touched},
                              {"p50_us", us(0.5)},
                              {"p99_us", us(0.99)},
                              {"p999_us", us(0.999)},
                              {"most_us", us(1)},
                              {"seconds", seconds},
                              {"urgent_pages", stats.urgent_pages},
                              {"background_pages", stats.background_pages},
                              {"own_p50_us", static_cast<double>(lazy->latency().p50_ns()) / 1000},
                              {"own_p99_us", static_cast<double>(lazy->latency().p99_ns()) / 1000},
                              {"own_p999_us", static_cast<double>(lazy->latency().p999_ns()) / 1000}};
  fmt::print("{}\n", report.dump());
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "fault_latency: {}\n", error.what());
  return 1;
}
