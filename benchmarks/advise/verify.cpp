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

#include "common/program.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"

namespace advise {
namespace {

using namespace multifd;
using program::Failure;
using program::need;

struct Run {
  double seconds = 0;
  double source_cpu_s = 0;
  double destination_cpu_s = 0;
  double wire_bytes = 0;
};

double channel_cpu_s(const std::vector<ChannelStats>& channels) {
  return static_cast<double>(total(channels).cpu_ns) * 1e-9;
}

program::Mapping memory_for(const Setup& setup, std::size_t bytes) {
  program::Mapping memory = program::Mapping::anonymous(bytes);
  if (setup.destination == Destination::fresh_small)
    (void)::madvise(memory.bytes().data(), memory.bytes().size(), MADV_NOHUGEPAGE);
  memory.populate();
  return memory;
}

/// Back to what the destination's memory is before a migration. Fresh memory is memory given back: in a virtual machine,
/// memory that nobody has used for long may have to come from its host first, which is slow and no two times the same.
void reset(const program::Mapping& memory, const Setup& setup) {
  if (setup.destination == Destination::warm) {
    std::memset(memory.bytes().data(), 0, memory.bytes().size());
  } else if (::madvise(memory.bytes().data(), memory.bytes().size(), MADV_DONTNEED) != 0) {
    throw Failure(fmt::format("MADV_DONTNEED: {}", std::strerror(errno)));
  }
}

/// One migration of the sample.
Run move_once(const Image& image, const program::Mapping& memory, const Prediction& stack, const Setup& setup,
              const Interrupt& interrupt) {
  const std::span<std::byte> from = image.sample();
  reset(memory, setup);
  RamMap source_ram(page_bytes), destination_ram(page_bytes);
  const BlockId block = need(source_ram.add_read_only("ram", from));
  need(destination_ram.add("ram", memory.bytes()));
  auto listener = need(Listener::listen({.host = "127.0.0.1"}, stack.channels), "loopback");
  auto out = need(connect_channels(listener.local_address(), stack.channels), "loopback");
  auto in = need(listener.accept_channels(stack.channels, std::chrono::seconds(5)), "loopback");

  program::StackOptions options;
  options.channels = stack.channels;
  options.compression = stack.compressor;
  options.level = stack.level.value_or(1);
  options.zero_pages = to_string(stack.zero_pages);
  options.bandwidth = static_cast<std::uint64_t>(setup.link.bytes_per_s);
  const program::Stopwatch watch;
  const auto sender = program::open_sender(options, source_ram, std::move(out));

  Run run;
  Result<void> received;
  std::thread destination([&] {
    const auto work = [&]() -> Result<void> {
      auto receiver = program::open_receiver(stack.compressor, destination_ram, std::move(in), {});
      if (!receiver) return std::unexpected(receiver.error());
      const program::OnInterrupt cancel(interrupt, [&] { (*receiver)->cancel(); });
      if (auto synced = (*receiver)->sync(); !synced) return std::unexpected(synced.error());
      if (auto finished = (*receiver)->finish(); !finished) return finished;
      run.destination_cpu_s = channel_cpu_s((*receiver)->stats().channels);
      return {};
    };
    received = work();
    if (!received) sender->cancel();
    run.destination_cpu_s += static_cast<double>(thread_cpu_ns()) * 1e-9;
  });
  const auto work = [&]() -> Result<void> {
    const program::OnInterrupt cancel(interrupt, [&] { sender->cancel(); });
    const std::uint64_t start = thread_cpu_ns();
    std::uint64_t zeros = 0;
    if (auto queued = sender->queue_range(block, 0, from.size(), [&](std::uint64_t) { ++zeros; }); !queued)
      return std::unexpected(queued.error());
    if (auto synced = sender->sync(); !synced) return std::unexpected(synced.error());
    if (auto closed = sender->close(); !closed) return closed;
    run.source_cpu_s = static_cast<double>(thread_cpu_ns() - start) * 1e-9;
    return {};
  };
  const Result<void> sent = work();
  destination.join();
  run.seconds = watch.seconds();
  need(sent);
  need(received);
  const SenderStats stats = sender->stats();
  run.source_cpu_s += channel_cpu_s(stats.channels);
  run.wire_bytes = static_cast<double>(total(stats.channels).wire_bytes);
  if (!std::ranges::equal(from, memory.bytes()))
    throw Failure(fmt::format("{}: what arrived is not what was sent", name_of(stack)));
  return run;
}

/// How much of the machine others use, from construction on. Nothing where /proc/stat says nothing.
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
  const Prediction& best = quickest(predictions);
  add(best);
  add(cheapest(predictions));
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
  const program::Mapping memory = memory_for(setup, image.sample().size());
  std::vector<std::vector<Run>> runs(stacks.size());
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < stacks.size(); ++i) {
      steps.next(fmt::format("verifying {}, {} channels", name_of(stacks[i]), stacks[i].channels));
      runs[i].push_back(move_once(image, memory, stacks[i], setup, steps.interrupt()));
    }
  Verification result{.other_cores = others.cores()};
  for (std::size_t i = 0; i < stacks.size(); ++i) {
    const auto codec = std::ranges::find_if(codecs, [&](const CodecCosts& each) {
      return each.compressor == stacks[i].compressor && each.level == stacks[i].level;
    });
    // The quickest: whatever else runs on the machine only adds.
    const Run& run = *std::ranges::min_element(runs[i], {}, &Run::seconds);
    result.stacks.push_back(
        {.predicted = predict(sample, host, *codec, stacks[i].zero_pages, stacks[i].channels, setup),
         .seconds = run.seconds,
         .source_cpu_s = run.source_cpu_s,
         .destination_cpu_s = run.destination_cpu_s,
         .wire_bytes = run.wire_bytes});
  }
  return result;
}

}  // namespace advise
