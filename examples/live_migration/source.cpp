// SPDX-License-Identifier: MIT
#include <fmt/format.h>
#include <signal.h>

#include <multifd/migrate/source.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "common/limits.hpp"
#include "common/mapping.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tell.hpp"
#include "live_migration/migration.hpp"
#include "live_migration/vm.hpp"

namespace live {
namespace {

using namespace multifd;
using namespace multifd::migrate;
using nlohmann::json;
using program::Failure;
using program::need;

double milliseconds(Time time) { return seconds(time) * 1000; }

/// Prints rounds as a table, one line when each ends.
class Table {
 public:
  Table() {
    program::say("{:>5} {:>11} {:>11} {:>7} {:>11} {:>9} {:>8}\n", "round", "dirty pages", "memory", "zero", "wire",
                 "seconds", "GiB/s");
  }
  void add(const Round& round, const std::string& note) const {
    const auto bytes = static_cast<double>(round.dirty_pages * guest_page_size);
    const double zero_share =
        round.dirty_pages == 0 ? 0
                               : 100 * static_cast<double>(round.zero_pages) / static_cast<double>(round.dirty_pages);
    program::say("{:>5} {:>11} {:>11} {:>5.0f} % {:>11} {:>9.3f} {:>8.2f}  {}\n", round.number, round.dirty_pages,
                 program::format_bytes(bytes), zero_share, program::format_bytes(static_cast<double>(round.wire_bytes)),
                 seconds(round.send), program::rate(bytes, seconds(round.send)), note);
  }
};

std::string note_of(const Decision& decision) {
  return fmt::format("{} ({:.3g}), downtime {:.1f} ms", to_string(decision.reason), decision.figure,
                     milliseconds(decision.downtime.total()));
}

json json_of(const Round& round) {
  return {{"dirty_pages", round.dirty_pages},
          {"again_pages", round.again_pages},
          {"normal_pages", round.normal_pages},
          {"zero_pages", round.zero_pages},
          {"unchanged_pages", round.unchanged_pages},
          {"wire_bytes", round.wire_bytes},
          {"begin_s", seconds(round.begin)},
          {"sync_s", seconds(round.sync)},
          {"send_s", seconds(round.send)},
          {"pages_per_s", round.pages_per_s},
          {"dirty_pages_per_s", round.dirty_pages_per_s},
          {"predicted_downtime_ms", milliseconds(round.predicted_downtime)},
          {"bounded_by", to_string(round.bound)},
          {"stopped", false}};
}

/// What the destination says of the guest when it has run there for a while.
struct Verdict {
  std::optional<json> said;

  void take(std::span<const std::byte> bytes) {
    json object =
        json::parse(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()), nullptr, false);
    if (object.is_object()) said = std::move(object);
  }
  std::uint64_t number(const char* key) const {
    if (!said || !said->contains(key) || !said->at(key).is_number_unsigned())
      throw Failure(fmt::format("the destination runs the guest, and has not said its \"{}\"", key));
    return said->at(key).get<std::uint64_t>();
  }
  /// Throws when the guest did not do well there.
  void check() const {
    if (said && said->contains("failure") && said->at("failure").is_string())
      throw Failure("destination: " + said->at("failure").get<std::string>());
  }
};

program::Snapshot snapshot_of(const MigrationProgress& now) {
  return {.line = fmt::format("{}: wire {}  {:.1f} s", text_of(now, true),
                              program::format_bytes(static_cast<double>(now.moved.wire_bytes)), seconds(now.elapsed)),
          .moved = now.moved.wire_bytes + static_cast<std::uint64_t>(now.status) + static_cast<std::uint64_t>(now.step),
          .stalled = now.status == MigrationStatus::device
                         ? "Is the destination stopped (SIGSTOP, a debugger, its host paused)? --result-timeout ends "
                           "the wait"
                         : "Is the destination stopped (SIGSTOP, a debugger, its host paused), or the network between "
                           "cut? --progress-timeout ends the wait"};
}

std::uint64_t pages_of(const MigrationReport& done) {
  std::uint64_t pages = 0;
  for (const Round& round : done.rounds) pages += round.dirty_pages;
  return pages;
}

double sending_seconds(const MigrationReport& done) {
  const Round& last = done.rounds.back();
  return seconds(last.begin + last.send - done.rounds.front().begin);
}

json json_of(const SourcePostcopyReport& done) {
  return {{"missing_pages", done.missing_pages}, {"normal_pages", done.normal_pages},
          {"zero_pages", done.zero_pages},       {"urgent_requests", done.urgent_requests},
          {"wire_bytes", done.wire_bytes},       {"connections_lost", done.connections_lost},
          {"seconds", seconds(done.time)},       {"paused_s", seconds(done.paused)}};
}

json report_of(const MigrationReport& done, const Guest& guest) {
  json report = program::report(sending_seconds(done), pages_of(done) * guest_page_size, done.stats.zero_on_main,
                                done.stats.channels);
  report["backend"] = guest.backend();
  report["bounded_by"] = to_string(bounded_by(done.stats));
  report["downtime_ms"] = milliseconds(done.downtime.total());
  report["downtime_parts_ms"] = {{"sync", milliseconds(done.downtime.sync)},
                                 {"pages", milliseconds(done.downtime.pages)},
                                 {"device_state", milliseconds(done.downtime.device_state)},
                                 {"round_trip", milliseconds(done.downtime.round_trip)}};
  report["promised_downtime_ms"] = milliseconds(done.switchover.downtime.total());
  report["switchover_reason"] = to_string(done.switchover.reason);
  report["pages_verified"] = done.pages_verified;
  report["rounds"] = json::array();
  for (const Round& round : done.rounds) report["rounds"].push_back(json_of(round));
  report["rounds"].back()["stopped"] = !done.postcopy;  // multifd_simulate --trace reads them
  report["postcopy"] = done.postcopy ? json_of(*done.postcopy) : json(nullptr);
  return report;
}

/// Params `connections`: what is to be said of those, at the end of a line.
void say_summary(const MigrationReport& done, const std::string& connections) {
  const auto bytes = static_cast<double>(pages_of(done) * guest_page_size);
  const ChannelStats sum = total(done.stats.channels);
  const std::uint64_t zero_pages = sum.zero_pages + done.stats.zero_on_main;
  program::say(
      "moved {} in {:.2f} s over {} channels: {:.2f} GiB/s, zero pages {:.0f} %, {} on the wire, bounded by {}{}\n",
      program::format_bytes(bytes), sending_seconds(done), done.stats.channels.size(),
      program::rate(bytes, sending_seconds(done)),
      100 * static_cast<double>(zero_pages) /
          static_cast<double>(std::max<std::uint64_t>(sum.normal_pages + zero_pages, 1)),
      program::format_bytes(static_cast<double>(sum.wire_bytes)), to_string(bounded_by(done.stats)), connections);
  program::say("downtime {:.1f} ms (promised {:.1f} ms: {}){}\n", milliseconds(done.downtime.total()),
               milliseconds(done.switchover.downtime.total()), to_string(done.switchover.reason),
               done.verify > Time::zero()
                   ? fmt::format("; the page-by-page comparison, {:.2f} s, is not in it", seconds(done.verify))
                   : "");
  if (!done.postcopy) return;
  const SourcePostcopyReport& followed = *done.postcopy;
  program::say("{} pages followed in {:.2f} s, {} requests for them urgent; {} connections lost{}\n",
               followed.missing_pages, seconds(followed.time), followed.urgent_requests, followed.connections_lost,
               followed.paused > Time::zero() ? fmt::format(", {:.2f} s without any", seconds(followed.paused)) : "");
}

/// The destination speaks QEMU's stream only: it has the guest, and says nothing of how that does.
json gone_elsewhere(const MigrationReport& done, Guest& guest, const std::string& connections, bool quiet) {
  json report = report_of(done, guest);
  report["guest"] = {{"xxh3", program::digest_of_memory(guest.memory())}};  // as qemu_dump's manifest has it
  if (!quiet) {
    say_summary(done, connections);
    program::say("the destination, which is no live_migration, has the whole guest; nothing was compared\n");
  }
  return report;
}

}  // namespace

void wait_for(double seconds, const Interrupt& interrupt) {
  pollfd event{.fd = interrupt.native_handle(), .events = POLLIN, .revents = 0};
  if (::poll(&event, 1, static_cast<int>(seconds * 1000)) > 0)
    throw Failure(Error{.code = Errc::cancelled}, "live migration");
}

json source(const Settings& settings, const Interrupt& interrupt) {
  std::string note;
  const auto guest = make_guest(settings.backend, settings.guest, &note);
  const bool quiet = settings.json_path == "-";
  if (!quiet) program::say("backend: {}\n", note);
  guest->boot();
  guest->run();
  wait_for(settings.run_before_s,
           interrupt);  // before connecting, because a destination does not wait long for a hello

  Migration migration = need(Migration::create());
  const program::OnInterrupt cancel(interrupt, [&] { migration.cancel(); });
  SourceVm vm(*guest);
  const std::string machine =
      Machine{.backend = *parse_backend(guest->backend()), .run_after_s = settings.run_after_s}.text();
  std::optional<Table> table;
  if (!quiet) table.emplace();
  Verdict verdict;
  std::optional<program::Progress> line;
  const auto on_event = [&](const Event& event) {
    if (event.kind == EventKind::round_end && table) table->add(*event.round, note_of(*event.decision));
    if (event.kind == EventKind::step && line) line->update();
  };

  program::Securing securing(settings.tls, settings.limits.connect);
  program::PathLog log(settings.paths, "destination");
  const program::OnSignal resume(SIGUSR1, [&] { migration.resume(); });
  const auto moved = [&] {
    line.emplace([&] { return snapshot_of(migration.progress()); }, settings.limits.hint);
    SourceOptions options = settings.stack.for_migration();
    options.user = std::as_bytes(std::span(machine));
    options.converge = settings.converge;
    options.postcopy = settings.postcopy;
    options.verify = settings.verify;
    options.skip_unchanged = settings.skip_unchanged;
    options.progress_timeout = settings.limits.progress;
    options.load_timeout = options.farewell_timeout = settings.limits.result;
    options.connect_timeout = settings.limits.connect;
    options.sockets = settings.limits.socket();
    options.insist_on_paths = settings.paths.insist();
    options.resume = settings.resume.options();
    options.on_path = log.hook();
    options.on_event = on_event;
    options.on_user_data = [&](std::span<const std::byte> bytes) { verdict.take(bytes); };
    options.migration = &migration;
    return migrate_to<program::Stacks>(vm, settings.paths.paths(), options, securing.function());
  }();
  line.reset();
  const std::string connections =
      program::cipher_note(securing.cipher()) + log.note(migration.paths(), migration.progress().lost);
  const auto with_connections = [&](json report) {
    report["tls_cipher"] = program::text_or_null(securing.cipher());
    log.add_to(report, migration.paths(), migration.progress().lost);
    return report;
  };
  if (!moved) throw Failure(moved.error(), "live migration; " + std::string(migration.owner_text()));
  if (!moved->own_peer) return with_connections(gone_elsewhere(*moved, *guest, connections, quiet));
  verdict.check();
  if (moved->postcopy && !verdict.said) {
    // It has said on another connection that its guest has all memory.
    if (!quiet) {
      say_summary(*moved, connections);
      program::say("the main connection was lost, and the destination's verdict with it: look there\n");
    }
    return with_connections(report_of(*moved, *guest));
  }
  const GuestReport here = guest->report();
  const std::uint64_t sweeps = verdict.number("sweeps");
  const std::uint64_t written = verdict.number("pages_written");
  if (written <= here.pages_written)
    throw Failure("the guest does not go on at the destination: its counter stands still");
  json report = with_connections(report_of(*moved, *guest));
  report["guest"] = {{"sweeps_at_switch_over", here.sweeps},
                     {"sweeps", sweeps},
                     {"pages_written_at_switch_over", here.pages_written},
                     {"pages_written", written},
                     {"errors", verdict.number("errors")}};
  if (!quiet) {
    say_summary(*moved, connections);
    program::say("guest ({}): {} sweeps here, {} more there, {} pages written in all, {} errors\n", guest->backend(),
                 here.sweeps, sweeps - here.sweeps, written, verdict.number("errors"));
    if (moved->pages_verified > 0) program::say("{} pages compared: verified\n", moved->pages_verified);
  }
  return report;
}

}  // namespace live
