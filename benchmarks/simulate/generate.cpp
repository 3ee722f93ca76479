// SPDX-License-Identifier: MIT
#include "simulate/generate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

namespace simulate {
namespace {

constexpr double horizon_s = 1500;  // behind every time limit
constexpr double page_bytes = 4096;

/// SplitMix64: two lines that every machine agrees on.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15;
    std::uint64_t mixed = state_;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
    return mixed ^ (mixed >> 31);
  }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double between(double low, double high) { return low + (high - low) * unit(); }
  /// Each order of magnitude is as likely as another.
  double scale(double low, double high) { return low * std::exp(unit() * std::log(high / low)); }
  std::uint64_t pick(std::uint64_t count) { return next() % count; }
  bool coin() { return pick(2) == 0; }

 private:
  std::uint64_t state_;
};

const std::vector<Step> always = {{0, 1}};

/// `on` and `off` in turn, each for about its mean time.
std::vector<Step> alternate(Random& random, double on, double off, double mean_on, double mean_off, bool is_on) {
  std::vector<Step> steps;
  for (double at = 0; at < horizon_s; is_on = !is_on) {
    steps.push_back({at, is_on ? on : off});
    at += (is_on ? mean_on : mean_off) * random.between(0.3, 1.7);
  }
  return steps;
}

/// About 1, and another value every so many seconds.
std::vector<Step> jitter(Random& random, double every_s, double spread) {
  std::vector<Step> steps;
  for (double at = 0; at < horizon_s;) {
    const double a = random.unit(), b = random.unit(), c = random.unit();
    steps.push_back({at, 1 + spread * (a + b + c - 1.5) / 0.75});
    at += every_s * random.between(0.5, 1.5);
  }
  return steps;
}

/// A guest under construction. Sizes are seconds that the link needs for them.
class Guest {
 public:
  Guest(Random& random, double pages_per_s, double ram_pages)
      : random_(random), pages_per_s_(pages_per_s), ram_pages_(ram_pages) {}

  /// A set of pages, each of which is written to about once in `once_s` seconds.
  void add(double size_s, double once_s, const std::vector<Step>& load = always) {
    const double pages = std::min(std::max(64.0, std::floor(size_s * pages_per_s_)), ram_pages_);
    const std::vector<Step> writes = {{0, 1 / once_s}};
    sets_.emplace_back(pages, product(writes, load));
  }
  void working_set(double least_s, double most_s, const std::vector<Step>& load = always) {
    const double size = random_.scale(least_s, most_s);
    add(size, size * random_.scale(0.1, 5), load);
  }
  /// Six sets, each larger and colder than the one before it.
  void hot_and_cold(double least_s, double most_s, const std::vector<Step>& load = always) {
    const double size = random_.scale(least_s, most_s);
    const double once = size * random_.scale(0.2, 4);
    const double larger = random_.between(2.0, 4.0);
    const double colder = random_.between(1.2, 2.2);
    for (int i = 0; i < 6; ++i) add(size * std::pow(larger, i), once * std::pow(larger * colder, i), load);
  }
  std::vector<WriteSet> finish() {
    std::vector<WriteSet> result;
    for (const auto& [pages, writes] : sets_)
      result.push_back({.pages = Steps({{0, pages}}), .writes = Steps(product(writes, jitter(random_, 1.5, 0.25)))});
    return result;
  }

 private:
  Random& random_;
  double pages_per_s_;
  double ram_pages_;
  std::vector<std::pair<double, std::vector<Step>>> sets_;
};

}  // namespace

Trace generate(std::string_view kind, std::uint64_t seed) {
  const auto number = static_cast<std::uint64_t>(std::ranges::find(kinds, kind) - kinds.begin());
  Random random(seed * 1000003 + number * 7919 + 17);
  for (int i = 0; i < 4; ++i) random.next();

  // 1, 2.5, 10, 25, 40 and 100 Gbit/s, less what Ethernet and TCP take.
  constexpr std::array links = {0.117e9, 0.29e9, 1.17e9, 2.9e9, 4.7e9, 11.6e9};
  const double pages_per_s = links[random.pick(links.size())] / page_bytes;
  double bulk_s = random.scale(4, 120);
  Trace trace{.kind = std::string(kind), .name = fmt::format("{}/{}", kind, seed)};
  trace.ram_pages = std::max(131072.0, std::floor(bulk_s * pages_per_s));
  bulk_s = trace.ram_pages / pages_per_s;
  trace.device_state_s = random.scale(0.005, 0.05);
  trace.round_trip_s = 3 * random.scale(0.0002, 0.003);
  double sync_s = random.scale(0.002, 0.02);
  std::vector<Step> link = always, share = always;

  Guest guest(random, pages_per_s, trace.ram_pages);
  const double background_s = bulk_s * random.between(0.1, 0.5);
  guest.add(background_s, random.scale(100, 2000));
  if (kind == "working_set") {
    guest.working_set(0.02, 2);
  } else if (kind == "hot_cold") {
    guest.hot_and_cold(0.004, 0.15);
  } else if (kind == "phases") {
    const double quiet = random.scale(0.003, 0.3);
    const double busy_s = random.scale(3, 60);
    const double quiet_s = random.scale(2, 30);
    const bool busy_first = random.coin();
    const std::vector<Step> load = alternate(random, 1, quiet, busy_s, quiet_s, busy_first);
    random.coin() ? guest.working_set(0.3, 4, load) : guest.hot_and_cold(0.02, 0.3, load);
  } else if (kind == "dips") {
    random.coin() ? guest.working_set(0.02, 0.8) : guest.hot_and_cold(0.004, 0.1);
    const double left = random.between(0.03, 0.4);
    const double dip_s = random.scale(1, 10);
    const double full_s = random.scale(8, 60);
    link = alternate(random, left, 1, dip_s, full_s, false);
  } else if (kind == "sync") {
    sync_s = random.scale(0.03, 0.4);
    guest.working_set(0.02, 0.6);
  } else if (kind == "vcpus") {
    const std::uint64_t vcpus = 2 + random.pick(15);
    const double each_s = random.scale(0.05, 2) / static_cast<double>(vcpus);
    for (std::uint64_t i = 0; i < vcpus; ++i) {
      const double size = each_s * random.scale(0.25, 4);
      std::vector<Step> load = always;
      if (random.coin()) {
        const double idle = random.scale(0.01, 0.3);
        const double busy_s = random.scale(2, 40);
        const double idle_s = random.scale(2, 40);
        const bool busy_first = random.coin();
        load = alternate(random, 1, idle, busy_s, idle_s, busy_first);
      }
      guest.add(size, size * static_cast<double>(vcpus) * random.scale(0.1, 5), load);
    }
  } else if (kind == "compressible") {
    const double less = random.between(0.1, 0.5);
    const double more = random.between(0.5, 1.0);
    const double less_s = random.scale(3, 60);
    const double more_s = random.scale(3, 60);
    const bool less_first = random.coin();
    share = alternate(random, less, more, less_s, more_s, less_first);
    random.coin() ? guest.working_set(0.05, 2) : guest.hot_and_cold(0.004, 0.15);
  } else {  // steps
    const double early_s = bulk_s * random.between(0.3, 1.0);
    const double change_s = early_s + random.scale(1, 90);
    const double low = random.scale(0.003, 0.2);
    const std::vector<Step> load =
        random.coin() ? std::vector<Step>{{0, low}, {change_s, 1}} : std::vector<Step>{{0, 1}, {change_s, low}};
    random.coin() ? guest.working_set(0.1, 3, load) : guest.hot_and_cold(0.01, 0.2, load);
  }

  const std::vector<Step> sync = {{0, sync_s}};
  trace.sync = Steps(product(sync, jitter(random, 3, 0.3)));
  for (Step& each : share) each.value = 1 / each.value;
  const std::vector<Step> pages = {{0, pages_per_s}};
  const std::vector<Step> shaky = product(product(pages, link), jitter(random, 0.7, 0.06));
  trace.link = Steps(product(shaky, share));
  trace.sets = guest.finish();
  return trace;
}

}  // namespace simulate
