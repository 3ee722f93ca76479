// SPDX-License-Identifier: MIT
#include "advise/verify.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <multifd/multifd.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <thread>

#include "advise/transfer.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"

namespace advise {
namespace {

using namespace multifd;
using program::Failure;
using program::need;

/// How much of the machine other processes use, from construction on. No value without /proc/stat.
class OtherLoad {
 public:
  double cores() const {
    const Times now = read();
    const double wall_s = watch_.seconds();
    return wall_s > 0 ? std::max(0.0, (now.all_s - start_.all_s) - (now.own_s - start_.own_s)) / wall_s : 0;
  }

 private:
  struct Times {
    double all_s = 0;
    double own_s = 0;
  };
  static Times read() {
    std::ifstream file("/proc/stat");
    std::string name;
    // user, nice, system, idle, iowait, irq, softirq, steal; the last is what our host's other guests took.
    double ticks[8] = {};
    file >> name;
    for (double& each : ticks) file >> each;
    double busy = 0;
    for (const int i : {0, 1, 2, 5, 6, 7}) busy += ticks[i];
    rusage own{};
    ::getrusage(RUSAGE_SELF, &own);
    const auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
    return {.all_s = busy / static_cast<double>(::sysconf(_SC_CLK_TCK)),
            .own_s = seconds(own.ru_utime) + seconds(own.ru_stime)};
  }
  program::Stopwatch watch_;
  Times start_ = read();
};

}  // namespace

std::vector<Prediction> worth_verifying(const std::vector<Prediction>& predictions, std::size_t most) {
  std::vector<Prediction> chosen;
  const auto add = [&](const Prediction& each) {
    const bool known = std::ranges::any_of(chosen, [&](const Prediction& other) {
      return name_of(each) == name_of(other) && each.channels == other.channels;
    });
    if (!known && chosen.size() < most) chosen.push_back(each);
  };
  const auto add_first = [&](auto&& fits) {
    const auto found = std::ranges::find_if(predictions, fits);
    if (found != predictions.end()) add(*found);
  };
  if (predictions.empty()) return chosen;
  const Prediction& best = *choose(predictions, {}, Goal::time, least_tie).best;
  add(best);
  add(*choose(predictions, {}, Goal::cpu, least_tie).best);
  // The quickest of each compressor, of each zero mode, and of each number of channels.
  std::vector<std::string> compressors;
  for (const Prediction& each : predictions)
    if (std::ranges::find(compressors, each.compressor) == compressors.end()) compressors.push_back(each.compressor);
  const auto is_like_best = [&](const Prediction& each) {
    return each.compressor == best.compressor && each.level == best.level;
  };
  for (const std::string& compressor : compressors)
    add_first([&](const Prediction& each) {
      return each.compressor == compressor && each.channels == best.channels && each.zero_pages == ZeroMode::multifd;
    });
  for (const ZeroMode mode : zero_modes)
    add_first([&](const Prediction& each) {
      return is_like_best(each) && each.zero_pages == mode && each.channels == best.channels;
    });
  for (const Prediction& each : predictions)
    if (is_like_best(each) && each.zero_pages == best.zero_pages) add(each);
  return chosen;
}

Verification verify(const Image& image, const HostCosts& host, const std::vector<CodecCosts>& codecs,
                    const std::vector<Prediction>& stacks, const Setup& setup, unsigned rounds, Steps& steps) {
  ImageFacts sample = image.facts;
  sample.bytes = static_cast<double>(image.sample().size());
  const OtherLoad others;
  const program::Mapping memory = memory_for(setup.destination, image.sample().size(), steps.interrupt());
  std::vector<std::vector<Transfer>> runs(stacks.size());
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < stacks.size(); ++i) {
      steps.next(fmt::format("verifying {}, {} channels", name_of(stacks[i]), stacks[i].channels));
      runs[i].push_back(transfer(image.sample(), memory, setup.destination,
                                 {.compressor = stacks[i].compressor,
                                  .level = stacks[i].level.value_or(1),
                                  .zero_pages = stacks[i].zero_pages,
                                  .channels = stacks[i].channels,
                                  .bandwidth = static_cast<std::uint64_t>(setup.link.bytes_per_s)},
                                 steps.interrupt()));
    }
  Verification result{.other_cores = others.cores()};
  for (std::size_t i = 0; i < stacks.size(); ++i) {
    const auto codec = std::ranges::find_if(codecs, [&](const CodecCosts& each) {
      return each.compressor == stacks[i].compressor && each.level == stacks[i].level;
    });
    // The quickest: whatever else runs on the machine only adds.
    const Transfer& run = *std::ranges::min_element(runs[i], {}, &Transfer::seconds);
    result.stacks.push_back(
        {.predicted = predict(sample, host, *codec, stacks[i].zero_pages, stacks[i].channels, setup),
         .seconds = run.seconds,
         .source_cpu_s = run.source_cpu_s(),
         .destination_cpu_s = run.receivers_cpu_s,
         .wire_bytes = run.wire_bytes});
  }
  return result;
}

}  // namespace advise
