// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <multifd/migrate/destination.hpp>
#include <nlohmann/json.hpp>

#include <optional>
#include <string>

#include "common/limits.hpp"
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

/// Lets the guest run, and stops it again. Returns what it says then. Throws when it did not do well.
json run_for_a_while(DestinationVm& vm, const GuestReport& before, const Interrupt& interrupt) {
  Guest& guest = vm.guest();
  const program::Step step("the guest runs, for --run-after and two sweeps of its own check");
  // The guest's own check sees every page of its working set within two sweeps; give it those, and a limit.
  const program::Stopwatch running;
  GuestReport now = before;
  while ((running.seconds() < vm.machine().run_after_s || now.sweeps < before.sweeps + 2) &&
         running.seconds() < vm.machine().run_after_s + 30) {
    pollfd event{.fd = interrupt.native_handle(), .events = POLLIN, .revents = 0};
    if (::poll(&event, 1, 20) > 0) throw Failure(Error{.code = Errc::cancelled}, "live migration");
    now = guest.report();
    if (!now.failure.empty()) throw Failure("the guest died at the destination: " + now.failure);
  }
  guest.stop();
  now = guest.report();
  if (now.errors > 0)
    throw Failure(fmt::format("the guest found {} errors in its memory at the destination, the first in page {}",
                              now.errors, now.first_error_page));
  return {{"sweeps", now.sweeps}, {"pages_written", now.pages_written}, {"errors", now.errors}};
}

json json_of(const PostcopyReport& done) {
  const auto micros = [](std::uint64_t ns) { return static_cast<double>(ns) / 1000; };
  return {{"missing_pages", done.missing_pages},
          {"urgent_pages", done.urgent_pages},
          {"background_pages", done.background_pages},
          {"zero_pages", done.zero_pages},
          {"faults", done.faults},
          {"latency_p50_us", micros(done.latency.p50_ns())},
          {"latency_p99_us", micros(done.latency.p99_ns())},
          {"latency_p999_us", micros(done.latency.p999_ns())},
          {"lost_fetchers", done.lost_fetchers},
          {"wire_bytes", done.wire_bytes},
          {"seconds", seconds(done.time)},
          {"paused_s", seconds(done.paused)}};
}

std::vector<std::byte> bytes_of(const json& object) {
  const std::string text = object.dump();
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

}  // namespace

json destination(Listener& listener, const Settings& settings, std::uint64_t memory_limit, const Interrupt& interrupt) {
  Migration migration = need(Migration::create());
  const program::OnInterrupt cancel(interrupt, [&] { migration.cancel(); });
  DestinationVm vm(settings.backend, memory_limit);
  std::optional<Failure> failed;
  std::optional<program::Progress> line;
  const DestinationOptions options{
      .max_ram_bytes = memory_limit,
      .into = {.destination = DestinationMemory::zeroed},
      .resume = {.path_timeout = settings.resume.options().path_timeout, .timeout = settings.resume.options().timeout},
      .accept_timeout = settings.limits.accept,
      .progress_timeout = settings.limits.progress,
      .hand_over_timeout = settings.limits.result,
      .on_event =
          [&](const Event& event) {
            if (event.kind == EventKind::step && line) line->update();
          },
      .farewell =
          [&] {
            line.reset();
            try {
              return bytes_of(run_for_a_while(vm, vm.guest().report(), interrupt));
            } catch (const Failure& failure) {
              failed = failure;
              return bytes_of({{"failure", std::string(failure.what()).substr(0, 400)}});
            }
          },
      .on_stranger = [](const char* why) { program::tell("closed {}\n", why); },
      .migration = &migration};
  const auto taken = [&] {
    line.emplace(
        [&]() -> program::Snapshot {
          const MigrationProgress now = migration.progress();
          return {
              .line =
                  fmt::format("{}: {} on the wire  {:.1f} s", text_of(now, false),
                              program::format_bytes(static_cast<double>(now.moved.wire_bytes)), seconds(now.elapsed)),
              .moved = now.moved.wire_bytes + now.missing_pages + static_cast<std::uint64_t>(now.status) +
                       static_cast<std::uint64_t>(now.step),
              .stalled = now.status == MigrationStatus::setup
                             ? "Has the source been started, with an address that leads here, and does no firewall "
                               "stand between?"
                             : "Is the source stopped (SIGSTOP, a debugger, its host paused), or the network between "
                               "cut? --progress-timeout ends the wait"};
        },
        settings.limits.hint);
    if (settings.tls.on()) {
      program::TlsAcceptor acceptor = settings.tls.acceptor(listener, settings.limits.hello);
      return migrate_from<program::Stacks>(vm, acceptor, options);
    }
    return migrate_from<program::Stacks>(vm, listener, options);
  }();
  line.reset();
  if (!taken) throw Failure(taken.error(), "live migration; " + std::string(migration.owner_text()));
  if (failed) throw Failure(*failed);
  if (taken->late)
    program::tell("the guest runs here, but the source may not have heard it: {}\n", describe(*taken->late));
  const ChannelStats sum = total(taken->stats.channels);
  json report = program::report(seconds(taken->total),
                                (sum.normal_pages + sum.zero_pages + taken->zero_on_main) * guest_page_size,
                                taken->zero_on_main, taken->stats.channels);
  report["backend"] = vm.guest().backend();
  report["pages_verified"] = taken->pages_verified;
  report["postcopy"] = taken->postcopy ? json_of(*taken->postcopy) : json(nullptr);
  return report;
}

}  // namespace live
