// SPDX-License-Identifier: MIT
#include "common/receive.hpp"

#include <fmt/format.h>
#include <multifd/progress_watch.hpp>

#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"

namespace program {

Received receive_ram(const std::string& compression, Accepted& source, const multifd::RamMap& ram,
                     multifd::BlockId block, const multifd::Interrupt& interrupt, const TimeLimits& limits,
                     multifd::Populate populate) {
  const Stopwatch watch;
  const std::size_t channels = source.channels.size();
  // What wakes the main connection's reader: the first error of a channel, a signal's included.
  multifd::Interrupt wake = need(multifd::Interrupt::create());
  const auto receiver = need(open_receiver(compression, ram, std::move(source.channels),
                                           {.uuid = source.uuid,
                                            .populate = populate,
                                            .hello_timeout = limits.hello,
                                            .progress_timeout = limits.progress,
                                            .interrupt = &interrupt,
                                            .on_error = [&](const multifd::Error&) { wake.trigger(); }}));
  const OnInterrupt cancel(interrupt, [&] { receiver->cancel(); });
  source.control.set_interrupt(wake);
  Received received;
  try {
    const Progress progress(
        [&]() -> Snapshot {
          Snapshot now = snapshot_of("received", receiver->stats(), ram, 0, watch.seconds());
          now.stalled =
              "Is the source stopped (SIGSTOP, a debugger, its host paused), or waiting for memory or a disk, or the "
              "network between cut? --progress-timeout ends the wait";
          return now;
        },
        limits.hint);
    const auto moved = [&] { return multifd::total(receiver->stats().channels).wire_bytes; };
    for (bool more = true; more;) {
      multifd::ProgressWatch standing_still(limits.progress, moved());
      unsigned silences = 0;
      while (!source.control.wait_for_message(std::chrono::ceil<std::chrono::milliseconds>(standing_still.slice()))) {
        if (!standing_still.stalled(moved())) continue;
        // When all channels have ended, everything is here, and the source reads a large file for its digest: what is
        // whole is not thrown away because that takes long.
        constexpr unsigned patience = 12;
        if (receiver->ended_channels() < channels || ++silences == patience)
          throw Failure(multifd::Error{.code = multifd::Errc::timed_out},
                        "nothing has arrived for " + limits.progress_limit().text());
        standing_still = multifd::ProgressWatch(limits.progress, moved());
      }
      Message message = source.control.receive(large_message);
      switch (message.type) {
        case MessageType::zero_runs:
          received.main_zero_pages += apply_zero_runs(
              message, ram, block, [&](std::uint64_t offset) { return receiver->apply_zero(block, offset); });
          break;
        case MessageType::round_end:
          need(receiver->release_epoch());
          received.memory_seconds = watch.seconds();
          break;
        case MessageType::state: received.state = std::move(message.payload); break;
        case MessageType::done:
          received.done = message.json();
          more = false;
          break;
        default: throw Failure("main connection: a message that does not belong here");
      }
    }
    need(receiver->finish());
  } catch (const Failure& failure) {
    source.control.set_interrupt(interrupt);
    // When a channel failed first, that is the reason, and the main connection was only woken by it. A receiver that
    // is well would wait in sync(), so it is cancelled before it is asked: that changes nothing when it has failed.
    receiver->cancel();
    const auto first = receiver->release_epoch();
    if (!failure.from_peer() && first.error().code != multifd::Errc::cancelled) throw Failure(first.error());
    throw;
  }
  source.control.set_interrupt(interrupt);
  received.seconds = watch.seconds();
  received.stats = receiver->stats();
  return received;
}

}  // namespace program
