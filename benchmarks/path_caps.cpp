// SPDX-License-Identifier: MIT
//
// path_caps: pages over several paths, each under a cap, of which one changes while they go out. Samples what the paths count
// and what their interfaces do, and prints one JSON object; paths.py runs it. With --sink it is the other end, which
// reads and throws away.
#include <fmt/format.h>

#include <multifd/multifd.hpp>
#include <multifd/transport/capped.hpp>
#include <multifd/transport/connect_paths.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "memory_and_files.hpp"

using namespace multifd;

namespace {

using Clock = std::chrono::steady_clock;
using Link = Capped<FdTransport>;

/// Reads until every connection has ended, one thread for each.
int sink(const std::string& address) {
  auto listener = need(Listener::listen(need(parse_address(address), address)), "listen");
  fmt::print("{}\n", to_string(listener.local_address()));
  std::fflush(stdout);
  for (std::vector<std::jthread> readers;;) {
    auto link = need(listener.accept(std::chrono::minutes(1)), "accept");
    readers.emplace_back([link = std::move(link)]() mutable {
      std::vector<std::byte> room(1 << 20);
      const iovec buffer = mutable_buffer(std::span(room));
      while (link.read_some(std::span(&buffer, 1)).value_or(0) > 0) {
      }
    });
  }
}

std::uint64_t counter(const std::string& interface, const char* name) {
  std::ifstream file("/sys/class/net/" + interface + "/statistics/" + name);
  std::uint64_t value = 0;
  if (!(file >> value)) throw std::runtime_error(interface + ": has no counter " + name);
  return value;
}

/// What has gone out by now, by path.
nlohmann::json sample(Clock::time_point began, const std::vector<std::shared_ptr<PathShared>>& shared,
                      const std::vector<std::string>& interfaces) {
  nlohmann::json row{{"seconds", std::chrono::duration<double>(Clock::now() - began).count()}};
  for (const auto& each : shared) row["written"].push_back(each->written_bytes());
  for (const std::string& each : interfaces) {
    row["sent"].push_back(counter(each, "tx_bytes"));
    row["packets"].push_back(counter(each, "tx_packets"));
  }
  return row;
}

int send(const std::vector<std::string>& texts, const std::vector<std::string>& interfaces, double seconds,
         std::size_t changed, std::uint64_t rate) {
  constexpr std::size_t bytes = 64u << 20;
  const Memory memory = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE);
  std::mt19937_64 random(1);
  for (std::size_t at = 0; at < bytes; at += 8) {
    const std::uint64_t word = random();
    std::memcpy(memory.get() + at, &word, sizeof word);
  }
  RamMap ram;
  const BlockId block = need(ram.add("ram", {memory.get(), bytes}), "RamMap");
  std::vector<Path> paths;
  std::vector<std::shared_ptr<PathShared>> shared;
  for (const std::string& text : texts) {
    paths.push_back(need(parse_path(text), text));
    shared.push_back(std::make_shared<PathShared>(paths.back().bandwidth));
  }
  auto connected = need(connect_paths(paths, {}, PathsNeeded::all), "connect");
  std::vector<Link> links;
  for (PathLink& each : connected.links) links.emplace_back(std::move(each.link), shared[each.path]);
  auto sender = need(Sender<Link, NoComp, ZeroPagesNone>::open(ram, std::move(links)), "Sender");
  std::jthread producer([&](const std::stop_token& stop) {
    while (!stop.stop_requested() && sender.queue_range(block, 0, bytes) && sender.close_epoch()) {
    }
  });
  const auto began = Clock::now();
  nlohmann::json rows;
  bool before = true;
  for (auto due = began; due < began + std::chrono::duration<double>(seconds); due += std::chrono::milliseconds(100)) {
    std::this_thread::sleep_until(due);
    if (before && due - began > std::chrono::duration<double>(seconds / 2)) {
      before = false;
      shared.at(changed)->set_rate(rate);
    }
    rows.push_back(sample(began, shared, interfaces));
    rows.back()["before"] = before;
  }
  sender.cancel();
  producer.request_stop();
  producer.join();
  fmt::print("{}\n", nlohmann::json{{"paths", texts}, {"changed", changed}, {"rate", rate}, {"samples", rows}}.dump());
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  std::string address;
  std::vector<std::string> paths, interfaces;
  double seconds = 10;
  std::size_t changed = 0;
  std::uint64_t rate = 0;
  CLI::App app("Samples what paths carry under their caps, one of which changes at half time.", "path_caps");
  app.add_option("--sink", address, "Listen there, read and throw away");
  app.add_option("--path", paths, "As ram_send has it; for each path")->allow_extra_args(false);
  app.add_option("--interface", interfaces, "Whose counters to sample; for each")->allow_extra_args(false);
  app.add_option("--seconds", seconds, "How long")->capture_default_str();
  app.add_option("--change", changed, "The path whose cap changes at half time, from 0")->capture_default_str();
  app.add_option("--to", rate, "Its cap then, in bytes a second")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return address.empty() ? send(paths, interfaces, seconds, changed, rate) : sink(address);
} catch (const std::exception& error) {
  fmt::print(stderr, "path_caps: {}\n", error.what());
  return 1;
}
