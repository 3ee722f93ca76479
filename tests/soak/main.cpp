// SPDX-License-Identifier: MIT
//
// Soak: migrations one after the other in one process, of random stacks and sizes, with cancels and faults at random
// moments. Descriptors, threads and memory must be flat after the warm-up.
//
//   soak --minutes 60 --json soak.json
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <fstream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <span>
#include <thread>

#include "soak/migration.hpp"
#include "soak/usage.hpp"

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using nlohmann::json;
using soak::Usage;

constexpr double mib = 1 << 20;
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr double allowed_resident_mib = 256;  // shadow memory and quarantine
#else
constexpr double allowed_resident_mib = 8;
#endif
constexpr double allowed_heap_mib = 1.0 / 64;

/// Ends the program when a migration does not end: prints what it was.
class Watchdog {
 public:
  explicit Watchdog(std::chrono::seconds limit)
      : thread_([this, limit](const std::stop_token& stop) {
          std::unique_lock lock(mutex_);
          while (!stop.stop_requested()) {
            const std::uint64_t number = number_;
            if (changed_.wait_for(lock, stop, limit, [&] { return number_ != number; }) || stop.stop_requested())
              continue;
            fmt::print(stderr, "HANG: migration {} has not ended within {} s: {}\n", number, limit.count(), text_);
            std::abort();
          }
        }) {}
  void next(std::string text) {
    {
      const std::lock_guard lock(mutex_);
      text_ = std::move(text);
      ++number_;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::uint64_t number_ = 0;
  std::string text_;
  std::jthread thread_;
};

struct Tally {
  std::uint64_t migrations = 0;
  std::uint64_t whole = 0;
  std::map<std::string, std::uint64_t> failed_by;
  double longest_cancel_s = 0;
  double longest_join_s = 0;
};

/// The usage between two migrations; threads that have been joined may need a moment to leave /proc.
Usage settled(const Usage& wanted) {
  Usage now = soak::usage_now();
  for (int i = 0; i < 200 && now.threads > wanted.threads; ++i) {
    std::this_thread::sleep_for(5ms);
    now = soak::usage_now();
  }
  return now;
}

struct Sample {
  double seconds;
  Usage usage;
};

json to_json(const Sample& sample) {
  return {{"seconds", sample.seconds},
          {"descriptors", sample.usage.descriptors},
          {"threads", sample.usage.threads},
          {"resident_bytes", sample.usage.resident_bytes},
          {"heap_bytes", sample.usage.heap_bytes}};
}

/// Growth from the first third of the samples to the last, by their medians.
double growth_mib(std::span<const Sample> samples, std::uint64_t Usage::* member) {
  if (samples.empty()) return 0;
  const auto median = [&](std::size_t first, std::size_t last) {
    std::vector<std::uint64_t> values;
    for (std::size_t i = first; i < last; ++i) values.push_back(samples[i].usage.*member);
    std::ranges::sort(values);
    return static_cast<double>(values[values.size() / 2]);
  };
  const std::size_t third = std::max<std::size_t>(1, samples.size() / 3);
  return (median(samples.size() - third, samples.size()) - median(0, third)) / mib;
}

}  // namespace

int main(int argc, char** argv) {
  double minutes = 0;
  double seconds = 8;
  std::uint64_t seed = std::random_device{}();
  unsigned hang_s = 60;
  std::string json_path;
  CLI::App app("Migrations without end in one process, with cancels and faults: nothing may grow.", "soak");
  app.add_option("--seconds", seconds, "How long")->capture_default_str();
  app.add_option("--minutes", minutes, "How long, in place of --seconds");
  app.add_option("--seed", seed,
                 "What chance decides is decided the same for the same seed, as far as it is not timing");
  app.add_option("--hang", hang_s, "Seconds after which a migration counts as hung")->capture_default_str();
  app.add_option("--json", json_path, "Write samples and summary to a file");
  CLI11_PARSE(app, argc, argv);
  if (minutes > 0) seconds = minutes * 60;
  std::signal(SIGPIPE, SIG_DFL);  // a library that leaves it to us would end here
  fmt::print("{:g} s, --seed {}\n", seconds, seed);

  soak::Random random(seed);
  soak::Arena arena;
  arena.refill(random);
  Watchdog watchdog{std::chrono::seconds(hang_s)};
  Tally tally;
  std::vector<Sample> samples;
  std::string failure;
  const auto began = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - began).count(); };
  // A minute's line in a long run, and enough samples in a short one.
  const double interval = std::min(60.0, seconds / 8);
  const double warm_up = std::min(120.0, seconds / 4);
  samples.reserve(static_cast<std::size_t>(seconds / interval) + 1);  // it is not what grows
  double next_line = interval;
  soak::Plan plan = soak::Plan::make(random);
  const Usage before = soak::usage_now();
  try {
    while (elapsed() < seconds) {
      if (tally.migrations % 20 == 0) arena.refill(random);
      plan = soak::Plan::make(random);
      watchdog.next(plan.text());
      const soak::Outcome outcome = soak::migrate(plan, arena);
      ++tally.migrations;
      if (outcome.end == soak::End::whole)
        ++tally.whole;
      else
        ++tally.failed_by[soak::names_of_trouble[static_cast<int>(plan.trouble)]];
      tally.longest_cancel_s = std::max(tally.longest_cancel_s, outcome.cancel_seconds);
      tally.longest_join_s = std::max(tally.longest_join_s, outcome.joined_seconds);
      // Exact after every single migration.
      if (soak::entries_of("/proc/self/fd") - 1 != before.descriptors)
        throw std::runtime_error("a descriptor is left open");
      if (elapsed() < next_line) continue;
      next_line += interval;
      const Usage now = settled(before);
      if (now.threads != before.threads)
        throw std::runtime_error(fmt::format("{} threads, {} before", now.threads, before.threads));
      samples.push_back({elapsed(), now});
      fmt::print(
          "{:6.1f} min: {} migrations, {} whole; {} descriptors, {} threads, {:.1f} MiB resident, {:.3f} MiB heap\n",
          elapsed() / 60, tally.migrations, tally.whole, now.descriptors, now.threads,
          static_cast<double>(now.resident_bytes) / mib, static_cast<double>(now.heap_bytes) / mib);
      std::fflush(stdout);
    }
  } catch (const std::exception& error) {
    failure = fmt::format("{}: migration {}: {}", error.what(), tally.migrations, plan.text());
  }
  const auto warm = std::ranges::find_if(samples, [&](const Sample& each) { return each.seconds > warm_up; });
  const std::span<const Sample> flat(warm, samples.end());
  const double resident = growth_mib(flat, &Usage::resident_bytes);
  const double heap = growth_mib(flat, &Usage::heap_bytes);
  if (failure.empty() && flat.size() < 2) failure = "too short a run to say anything";
  if (failure.empty() && resident > allowed_resident_mib)
    failure = fmt::format("resident memory has grown by {:.1f} MiB", resident);
  if (failure.empty() && heap > allowed_heap_mib) failure = fmt::format("the heap has grown by {:.3f} MiB", heap);

  std::string failed;
  for (const auto& [trouble, count] : tally.failed_by) failed += fmt::format(", {} by {}", count, trouble);
  fmt::print(
      "{} migrations in {:.1f} min: {} whole and verified{}; longest cancel() {:.1f} ms, all joined {:.0f} ms after; "
      "growth after the warm-up: {:.2f} MiB resident, {:.3f} MiB heap\n",
      tally.migrations, elapsed() / 60, tally.whole, failed, 1000 * tally.longest_cancel_s, 1000 * tally.longest_join_s,
      resident, heap);
  json lines = json::array();
  for (const Sample& each : samples) lines.push_back(to_json(each));
  if (!json_path.empty())
    std::ofstream(json_path) << json{{"ok", failure.empty()},
                                     {"error", failure.empty() ? json() : json(failure)},
                                     {"seed", seed},
                                     {"seconds", elapsed()},
                                     {"migrations", tally.migrations},
                                     {"whole", tally.whole},
                                     {"failed_by", tally.failed_by},
                                     {"longest_cancel_s", tally.longest_cancel_s},
                                     {"longest_join_s", tally.longest_join_s},
                                     {"resident_growth_mib", resident},
                                     {"heap_growth_mib", heap},
                                     {"samples", lines}}
                                    .dump(2)
                             << "\n";
  if (!failure.empty()) fmt::print(stderr, "FAILED: {}\n", failure);
  return failure.empty() ? 0 : 1;
}
