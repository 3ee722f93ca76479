// SPDX-License-Identifier: MIT
#include "advise/transfer.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <multifd/multifd.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "advise/image.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"

namespace advise {
namespace {

using namespace multifd;
using program::Failure;
using program::need;

double channel_cpu_s(const std::vector<ChannelStats>& channels) {
  return static_cast<double>(total(channels).cpu_ns) * 1e-9;
}

/// Back to what the destination's memory is before a migration. Fresh memory is memory given back: in a virtual
/// machine, memory that was unused for long may have to come from its host first, which is slow, and differs each time.
void reset(const program::Mapping& memory, Destination destination) {
  if (destination == Destination::warm) {
    std::memset(memory.bytes().data(), 0, memory.bytes().size());
  } else if (::madvise(memory.bytes().data(), memory.bytes().size(), MADV_DONTNEED) != 0) {
    throw Failure(fmt::format("MADV_DONTNEED: {}", std::strerror(errno)));
  }
}

}  // namespace

program::Mapping memory_for(Destination destination, std::size_t bytes, const Interrupt& interrupt) {
  program::Mapping memory = program::Mapping::anonymous(bytes);
  if (destination == Destination::fresh_small)
    (void)::madvise(memory.bytes().data(), memory.bytes().size(), MADV_NOHUGEPAGE);
  memory.populate(&interrupt);
  return memory;
}

Transfer transfer(std::span<std::byte> from, const program::Mapping& to, Destination destination,
                  const TransferOptions& options, const Interrupt& interrupt) {
  reset(to, destination);
  RamMap source_ram(page_bytes), destination_ram(page_bytes);
  const BlockId block = need(source_ram.add_read_only("ram", from));
  need(destination_ram.add("ram", to.bytes()));
  auto listener = need(Listener::listen({.host = "127.0.0.1"}, options.channels), "loopback");
  auto out = need(connect_channels(listener.local_address(), options.channels), "loopback");
  auto in = need(listener.accept_channels(options.channels, std::chrono::seconds(5)), "loopback");

  const program::Stopwatch watch;
  const auto sender = need(open_any_sender(program::Compressors{}, program::ZeroPolicies{}, source_ram,
                                           program::Link::all_of(std::move(out)),
                                           {.compression = options.compressor,
                                            .level = options.level,
                                            .zero_pages = to_string(options.zero_pages),
                                            .bandwidth = options.bandwidth}));

  Transfer run;
  Result<void> received;
  std::thread receiving([&] {
    const auto work = [&]() -> Result<void> {
      auto receiver =
          program::open_receiver(options.compressor, destination_ram, program::Link::all_of(std::move(in)), {});
      if (!receiver) return std::unexpected(receiver.error());
      const program::OnInterrupt cancel(interrupt, [&] { (*receiver)->cancel(); });
      if (auto synced = (*receiver)->release_epoch(); !synced) return std::unexpected(synced.error());
      if (auto finished = (*receiver)->finish(); !finished) return finished;
      run.receivers_cpu_s = channel_cpu_s((*receiver)->stats().channels);
      return {};
    };
    received = work();
    if (!received) sender->cancel();
    run.receivers_cpu_s += static_cast<double>(thread_cpu_ns()) * 1e-9;
  });
  const auto work = [&]() -> Result<void> {
    const program::OnInterrupt cancel(interrupt, [&] { sender->cancel(); });
    const std::uint64_t start = thread_cpu_ns();
    std::uint64_t zeros = 0;
    if (auto queued = sender->queue_range(block, 0, from.size(), [&](std::uint64_t) { return ++zeros != 0; }); !queued)
      return std::unexpected(queued.error());
    if (auto synced = sender->close_epoch(); !synced) return std::unexpected(synced.error());
    if (auto closed = sender->close_channels(); !closed) return closed;
    run.producer_cpu_s = static_cast<double>(thread_cpu_ns() - start) * 1e-9;
    return {};
  };
  const Result<void> sent = work();
  receiving.join();
  run.seconds = watch.seconds();
  need(sent);
  need(received);
  const SenderStats stats = sender->stats();
  run.senders_cpu_s = channel_cpu_s(stats.channels);
  run.packets = static_cast<double>(total(stats.channels).packets);
  run.wire_bytes = static_cast<double>(total(stats.channels).wire_bytes);
  if (!std::ranges::equal(from, to.bytes()))
    throw Failure(fmt::format("{}: what arrived is not what was sent", options.compressor));
  return run;
}

}  // namespace advise
