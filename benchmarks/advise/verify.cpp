// SPDX-License-Identifier: MIT
#include "advise/verify.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <multifd/multifd.hpp>

#include <algorithm>
#include <cstring>
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
  if (setup.destination == Destination::warm) memory.populate();
  if (setup.destination == Destination::fresh_small)
    (void)::madvise(memory.bytes().data(), memory.bytes().size(), MADV_NOHUGEPAGE);
  return memory;
}

/// One migration of the sample.
Run move_once(const Image& image, const Prediction& stack, const Setup& setup, const Interrupt& interrupt) {
  const std::span<std::byte> from = image.sample();
  const program::Mapping memory = memory_for(setup, from.size());
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

}  // namespace

std::vector<Prediction> worth_verifying(const std::vector<Prediction>& predictions, std::size_t most) {
  // The best of each compressor and zero mode, the two marked ones first; `predictions` has the quickest first.
  std::vector<Prediction> chosen = {quickest(predictions)};
  const auto is_new = [&](const Prediction& each, bool with_level) {
    return std::ranges::none_of(chosen, [&](const Prediction& other) {
      return each.compressor == other.compressor && each.zero_pages == other.zero_pages &&
             (!with_level || (each.level == other.level && each.channels == other.channels));
    });
  };
  if (is_new(cheapest(predictions), true)) chosen.push_back(cheapest(predictions));
  for (const ZeroMode mode : zero_modes)
    for (const Prediction& each : predictions)
      if (chosen.size() < most && each.zero_pages == mode && is_new(each, false)) chosen.push_back(each);
  for (const Prediction& each : predictions)
    if (chosen.size() < most && is_new(each, true)) chosen.push_back(each);
  return chosen;
}

std::vector<Verified> verify(const Image& image, const HostCosts& host, const std::vector<CodecCosts>& codecs,
                             const std::vector<Prediction>& stacks, const Setup& setup, unsigned rounds, Steps& steps) {
  ImageFacts sample = image.facts;
  sample.bytes = static_cast<double>(image.sample().size());
  std::vector<std::vector<Run>> runs(stacks.size());
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < stacks.size(); ++i) {
      steps.next(fmt::format("verifying {}, {} channels", name_of(stacks[i]), stacks[i].channels));
      runs[i].push_back(move_once(image, stacks[i], setup, steps.interrupt()));
    }
  std::vector<Verified> all;
  for (std::size_t i = 0; i < stacks.size(); ++i) {
    const auto codec = std::ranges::find_if(codecs, [&](const CodecCosts& each) {
      return each.compressor == stacks[i].compressor && each.level == stacks[i].level;
    });
    // The quickest: whatever else runs on the machine only adds.
    const Run& run = *std::ranges::min_element(runs[i], {}, &Run::seconds);
    all.push_back({.predicted = predict(sample, host, *codec, stacks[i].zero_pages, stacks[i].channels, setup),
                   .seconds = run.seconds,
                   .source_cpu_s = run.source_cpu_s,
                   .destination_cpu_s = run.destination_cpu_s,
                   .wire_bytes = run.wire_bytes});
  }
  return all;
}

}  // namespace advise
