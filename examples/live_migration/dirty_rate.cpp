// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <multifd/migrate/measure_dirty_rate.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

#include "common/report.hpp"
#include "common/tell.hpp"
#include "live_migration/migration.hpp"
#include "live_migration/vm.hpp"

namespace live {

nlohmann::json dirty_rate(const Settings& settings, std::chrono::milliseconds time,
                          const multifd::Interrupt& interrupt) {
  using namespace multifd::migrate;
  using nlohmann::json;
  const bool quiet = settings.json_path == "-";
  std::string note;
  const auto guest = make_guest(settings.backend, settings.guest, &note);
  if (!quiet) program::say("backend: {}\n", note);
  guest->boot();
  guest->run();
  wait_for(settings.run_before_s, interrupt);
  SourceVm vm(*guest);
  const auto period = std::min(time, std::chrono::milliseconds(1000));
  const auto periods =
      program::need(measure_dirty_rate(vm.dirty_source(), program::need(vm.ram()),
                                       {.period = period,
                                        .periods = static_cast<unsigned>(std::max<std::int64_t>(1, time / period)),
                                        .interrupt = &interrupt}),
                    "measure the dirty rate");
  guest->stop();

  json report{{"backend", guest->backend()}, {"page_size", guest_page_size}, {"periods", json::array()}};
  if (!quiet)
    program::say("{:>7} {:>11} {:>11} {:>13} {:>9}\n", "seconds", "dirty pages", "memory", "per second", "sync");
  double sum = 0;
  double most = 0;
  for (const DirtyPeriod& each : periods) {
    const double bytes_per_s = each.pages_per_s() * static_cast<double>(guest_page_size);
    sum += bytes_per_s;
    most = std::max(most, bytes_per_s);
    report["periods"].push_back({{"seconds", seconds(each.time)},
                                 {"dirty_pages", each.pages},
                                 {"dirty_pages_per_s", each.pages_per_s()},
                                 {"sync_s", seconds(each.sync)}});
    if (!quiet)
      program::say("{:>7.3f} {:>11} {:>11} {:>11}/s {:>6.2f} ms\n", seconds(each.time), each.pages,
                   program::format_bytes(static_cast<double>(each.pages * guest_page_size)),
                   program::format_bytes(bytes_per_s), seconds(each.sync) * 1000);
  }
  const double mean = sum / static_cast<double>(periods.size());
  report["dirty_bytes_per_s"] = mean;
  report["most_dirty_bytes_per_s"] = most;
  if (!quiet)
    program::say("dirty rate {}/s, at most {}/s: the migration's link has to carry more\n", program::format_bytes(mean),
                 program::format_bytes(most));
  return report;
}

}  // namespace live
