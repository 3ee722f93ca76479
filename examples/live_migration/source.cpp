// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <bit>
#include <thread>

#include "common/control.hpp"
#include "common/limits.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tell.hpp"
#include "common/uuid.hpp"
#include "live_migration/migration.hpp"

namespace live {
namespace {

using namespace multifd;
using nlohmann::json;
using program::Control;
using program::Failure;
using program::MessageType;
using program::need;

/// What one round moved.
struct Round {
  std::uint64_t dirty_pages = 0;
  std::uint64_t normal_pages = 0;
  std::uint64_t zero_pages = 0;
  std::uint64_t wire_bytes = 0;
  double seconds = 0;
};

struct Precopy {
  std::vector<Round> rounds;
  SenderStats stats;
  double seconds = 0;   ///< from the first page to the last
  double downtime = 0;  ///< while the guest stood still: last round, registers, the other side's confirmation
};

std::uint64_t count_bits(std::span<const std::uint64_t> bitmap) {
  std::uint64_t sum = 0;
  for (const std::uint64_t word : bitmap) sum += static_cast<unsigned>(std::popcount(word));
  return sum;
}

/// Waits for a time, or for a signal.
void pause(double seconds, const Interrupt& interrupt) {
  pollfd event{.fd = interrupt.native_handle(), .events = POLLIN, .revents = 0};
  if (::poll(&event, 1, static_cast<int>(seconds * 1000)) > 0)
    throw Failure(Error{.code = Errc::cancelled}, "live migration");
}

void check_guest(Guest& guest) {
  const GuestReport report = guest.report();
  if (!report.failure.empty()) throw Failure("the guest died: " + report.failure);
  if (report.errors > 0)
    throw Failure(fmt::format("the guest found {} errors in its own memory at the source", report.errors));
}

/// Prints rounds as a table; nothing when JSON goes to stdout.
class Table {
 public:
  explicit Table(bool quiet) : quiet_(quiet) {
    if (!quiet_)
      program::say("{:>5} {:>11} {:>11} {:>7} {:>11} {:>9} {:>8}\n", "round", "dirty pages", "memory", "zero", "wire",
                   "seconds", "GiB/s");
  }
  void add(std::size_t number, const Round& round, bool last) const {
    if (quiet_) return;
    const auto bytes = static_cast<double>(round.dirty_pages * guest_page_size);
    const double zero_share =
        round.dirty_pages == 0 ? 0
                               : 100 * static_cast<double>(round.zero_pages) / static_cast<double>(round.dirty_pages);
    program::say("{:>5} {:>11} {:>11} {:>5.0f} % {:>11} {:>9.3f} {:>8.2f}{}\n", number, round.dirty_pages,
                 program::format_bytes(bytes), zero_share, program::format_bytes(static_cast<double>(round.wire_bytes)),
                 round.seconds, program::rate(bytes, round.seconds), last ? "  guest stopped" : "");
  }

 private:
  bool quiet_;
};

/// Rounds over a running guest, then the switch-over: returns when the destination has all of the stopped guest.
Precopy precopy(const Settings& settings, const Address& address, Guest& guest, Control& control,
                const Interrupt& interrupt) {
  RamMap ram(guest_page_size);
  const BlockId block = need(ram.add("pc.ram", guest.memory()));
  auto plain = need(connect_channels(address, settings.stack.channels, settings.limits.socket(&interrupt)),
                    "connect the channels");
  auto links = need(settings.tls.secure(std::move(plain), interrupt, settings.limits.connect));
  const auto sender = program::open_sender(settings.stack, ram, std::move(links));
  const program::OnInterrupt cancel(interrupt, [&] { sender->cancel(); });

  program::ZeroRuns zeros(control, guest_page_size);
  const auto on_zero = [&](std::uint64_t offset) {
    zeros.add(offset);
    return true;
  };
  std::vector<std::uint64_t> dirty(bitmap_words(guest.memory().size()));
  const std::uint64_t all_pages = guest.memory().size() / guest_page_size;
  const Table table(settings.json_path == "-");
  Precopy result;
  const program::Stopwatch whole;

  // One epoch: queue, close it, and wait until it is written, so that its time says how fast the link is.
  ChannelStats before;
  std::uint64_t main_zeros_before = 0;
  const auto run_round = [&](bool last) {
    Round round;
    const program::Stopwatch watch;
    {
      const program::Progress progress(
          [&]() -> program::Snapshot {
            const ChannelStats now = total(sender->stats().channels);
            return {
                .line = fmt::format("round {}: wire {}  {:.1f} s", result.rounds.size(),
                                    program::format_bytes(static_cast<double>(now.wire_bytes - before.wire_bytes)),
                                    watch.seconds()),
                .moved = now.wire_bytes,
                .stalled =
                    "Is the destination stopped (SIGSTOP, a debugger, its host paused), or the network between cut? "
                    "--progress-timeout ends the wait"};
          },
          settings.limits.hint);
      if (result.rounds.empty()) {
        round.dirty_pages = all_pages;
        need(sender->queue_range(block, 0, guest.memory().size(), on_zero));
      } else {
        round.dirty_pages = count_bits(dirty);
        need(sender->queue_dirty(block, dirty, on_zero));
      }
      const std::uint64_t epoch = need(sender->close_epoch());
      zeros.flush();
      control.send(MessageType::round_end);
      need(sender->wait(epoch));
    }
    round.seconds = watch.seconds();
    const SenderStats stats = sender->stats();
    const ChannelStats now = total(stats.channels);
    round.normal_pages = now.normal_pages - before.normal_pages;
    round.zero_pages = now.zero_pages - before.zero_pages + stats.zero_on_main - main_zeros_before;
    round.wire_bytes = now.wire_bytes - before.wire_bytes;
    before = now;
    main_zeros_before = stats.zero_on_main;
    result.rounds.push_back(round);
    table.add(result.rounds.size() - 1, round, last);
  };

  guest.start_dirty_log();
  run_round(false);
  for (;;) {
    check_guest(guest);
    std::ranges::fill(dirty, 0);
    guest.fetch_dirty(dirty);
    const std::uint64_t pages = count_bits(dirty);
    // Pages per second of the round before: compression and zero pages are in it.
    const Round& last = result.rounds.back();
    const double expected =
        static_cast<double>(pages) * last.seconds / static_cast<double>(std::max<std::uint64_t>(1, last.dirty_pages));
    if (expected <= settings.max_downtime_s) break;
    if (result.rounds.size() >= settings.max_rounds)
      throw Failure(
          fmt::format("does not converge: after {} rounds the rest still takes {:.0f} ms, --max-downtime is "
                      "{:.0f} ms. Raise --max-downtime or --bandwidth, or lower "
                      "--dirty-rate",
                      result.rounds.size(), expected * 1000, settings.max_downtime_s * 1000));
    run_round(false);
  }

  // Switch-over. The pages fetched above are still to be sent, with those dirtied until the stop.
  const program::Stopwatch stopped;
  guest.stop();
  guest.fetch_dirty(dirty);
  run_round(true);
  need(sender->close_channels());
  control.send(MessageType::state, guest.save_state());
  control.send_json(MessageType::done, json::object());
  const program::Progress loading("all is sent, waiting for the destination to load the guest",
                                  "Is the destination stopped (SIGSTOP, a debugger, its host paused)? "
                                  "--result-timeout ends the wait",
                                  settings.limits.hint);
  (void)control.expect(MessageType::ready, program::small_message, settings.limits.result_limit());
  result.downtime = stopped.seconds();
  result.seconds = whole.seconds();
  result.stats = sender->stats();
  return result;
}

}  // namespace

json source(const Settings& settings, const Address& address, const Interrupt& interrupt) {
  std::string note;
  const auto guest = make_guest(settings.backend, settings.guest, &note);
  const bool quiet = settings.json_path == "-";
  if (!quiet) program::say("backend: {}\n", note);
  guest->boot();
  guest->run();
  pause(settings.run_before_s, interrupt);  // before connecting, because a destination does not wait long for a hello
  Control control = Control::connect(address, interrupt, settings.limits, settings.tls);
  try {
    control.send_json(MessageType::hello, {{"size", guest->memory().size()},
                                           {"page_size", guest_page_size},
                                           {"channels", settings.stack.channels},
                                           {"compression", settings.stack.compression},
                                           {"uuid", program::to_string(settings.stack.uuid)},
                                           {"backend", guest->backend()},
                                           {"run_after", settings.run_after_s}});
    const Precopy done = precopy(settings, address, *guest, control, interrupt);

    // The guest stands still on both sides: compare every page, then let the guest go on at the destination.
    const GuestReport here = guest->report();
    const program::Stopwatch verifying;
    {
      const program::Step step("the destination has everything, reading all memory for the pages' digests");
      control.send(MessageType::digests, page_digests(guest->memory()));
    }
    const program::Progress waiting(
        "waiting for the destination's verdict",
        "The destination compares every page and runs the guest for --run-after: is it stopped? "
        "--result-timeout ends the wait",
        settings.limits.hint);
    const json verdict =
        control.expect(MessageType::result, program::small_message, settings.limits.result_limit()).json();
    control.finish();
    const double verify_s = verifying.seconds() - settings.run_after_s;

    const std::uint64_t ram_bytes = [&] {
      std::uint64_t pages = 0;
      for (const Round& round : done.rounds) pages += round.dirty_pages;
      return pages * guest_page_size;
    }();
    const std::uint64_t sweeps = program::field<std::uint64_t>(verdict, "sweeps");
    const std::uint64_t written = program::field<std::uint64_t>(verdict, "pages_written");
    if (written <= here.pages_written)
      throw Failure("the guest does not go on at the destination: its counter stands still");

    json report = program::report(done.seconds, ram_bytes, done.stats.zero_on_main, done.stats.channels);
    report["backend"] = guest->backend();
    report["bounded_by"] = to_string(bounded_by(done.stats));
    report["tls_cipher"] = program::text_or_null(control.cipher());
    report["downtime_ms"] = done.downtime * 1000;
    report["pages_verified"] = program::field<std::uint64_t>(verdict, "pages_verified");
    report["guest"] = {{"sweeps_at_switch_over", here.sweeps},
                       {"sweeps", sweeps},
                       {"pages_written_at_switch_over", here.pages_written},
                       {"pages_written", written},
                       {"errors", program::field<std::uint64_t>(verdict, "errors")}};
    report["rounds"] = json::array();
    for (const Round& round : done.rounds)
      report["rounds"].push_back({{"dirty_pages", round.dirty_pages},
                                  {"normal_pages", round.normal_pages},
                                  {"zero_pages", round.zero_pages},
                                  {"wire_bytes", round.wire_bytes},
                                  {"seconds", round.seconds}});
    if (!quiet) {
      const ChannelStats sum = total(done.stats.channels);
      const std::uint64_t zero_pages = sum.zero_pages + done.stats.zero_on_main;
      program::say(
          "moved {} in {:.2f} s over {} channels: {:.2f} GiB/s, zero pages {:.0f} %, {} on the wire, bounded by "
          "{}{}\n",
          program::format_bytes(static_cast<double>(ram_bytes)), done.seconds, settings.stack.channels,
          program::rate(static_cast<double>(ram_bytes), done.seconds),
          100 * static_cast<double>(zero_pages) / static_cast<double>(sum.normal_pages + zero_pages),
          program::format_bytes(static_cast<double>(sum.wire_bytes)), report["bounded_by"].get<std::string>(),
          program::cipher_note(control.cipher()));
      program::say("downtime {:.1f} ms (limit {:.0f} ms; the page-by-page comparison, {:.2f} s, is not in it)\n",
                   done.downtime * 1000, settings.max_downtime_s * 1000, std::max(0.0, verify_s));
      program::say("guest ({}): {} sweeps here, {} more there, {} pages written in all, {} errors\n", guest->backend(),
                   here.sweeps, sweeps - here.sweeps, written, program::field<std::uint64_t>(verdict, "errors"));
      program::say("{} pages compared: verified\n", program::field<std::uint64_t>(verdict, "pages_verified"));
    }
    return report;
  } catch (const Failure& failure) {
    control.give_up(failure);
  } catch (const std::exception& error) {
    control.give_up(Failure(program::text_of(error)));
  }
}

std::vector<std::byte> page_digests(std::span<const std::byte> memory) {
  std::vector<std::byte> digests(memory.size() / guest_page_size * 8);
  const auto work = [&](std::size_t first, std::size_t last) {
    for (std::size_t page = first; page < last; ++page)
      wire::store_be(&digests[8 * page], digest_of(memory.subspan(page * guest_page_size, guest_page_size)));
  };
  const std::size_t pages = memory.size() / guest_page_size;
  std::thread second_half(work, pages / 2, pages);
  work(0, pages / 2);
  second_half.join();
  return digests;
}

}  // namespace live
