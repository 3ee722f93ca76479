// SPDX-License-Identifier: MIT
#include "advise/output.hpp"

#include <fmt/format.h>
#include <sys/utsname.h>

#include <multifd/multifd.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "common/mapping.hpp"
#include "common/program.hpp"

namespace advise {
namespace {

using nlohmann::json;
using program::format_bytes;

constexpr double mb_per_s(double ns_per_byte) { return ns_per_byte > 0 ? 1e3 / ns_per_byte : 0; }

/// Three digits that count.
std::string format_seconds(double seconds) {
  if (seconds >= 100) return fmt::format("{:.0f}", seconds);
  if (seconds >= 10) return fmt::format("{:.1f}", seconds);
  if (seconds >= 1) return fmt::format("{:.2f}", seconds);
  return fmt::format("{:.3f}", seconds);
}

/// One compressor, level and zero mode: a row, with a column for each number of channels.
struct Row {
  std::vector<const Prediction*> by_channels;
  const Prediction* best = nullptr;
  const Forecast* best_forecast = nullptr;
  double least_seconds = 0;
};

bool same_stack(const Prediction& a, const Prediction& b) {
  return a.compressor == b.compressor && a.level == b.level && a.zero_pages == b.zero_pages;
}

std::vector<Row> rows_of(const Findings& findings) {
  std::vector<Row> rows;
  for (std::size_t i = 0; i < findings.predictions.size(); ++i) {
    const Prediction& each = findings.predictions[i];
    const Forecast* const live = findings.forecasts.empty() ? nullptr : &findings.forecasts[i];
    auto row = std::ranges::find_if(rows, [&](const Row& other) { return same_stack(*other.best, each); });
    if (row == rows.end()) {
      rows.push_back({.by_channels = std::vector<const Prediction*>(findings.channels.size()),
                      .best = &each,
                      .best_forecast = live,
                      .least_seconds = each.seconds});  // predictions are sorted
      row = rows.end() - 1;
    }
    const auto column = std::ranges::find(findings.channels, each.channels) - findings.channels.begin();
    row->by_channels[static_cast<std::size_t>(column)] = &each;
    // Where the guest goes on writing, the quickest is no good unless it converges.
    const bool converges = live == nullptr || live->converges;
    const bool best_converges = live == nullptr || row->best_forecast->converges;
    if (converges != best_converges) {
      if (converges)
        *row = {.by_channels = row->by_channels, .best = &each, .best_forecast = live, .least_seconds = each.seconds};
      continue;
    }
    // More channels that gain nothing are not better.
    if (each.channels < row->best->channels && each.seconds <= row->least_seconds * (1 + tie_of(findings.spread))) {
      row->best = &each;
      row->best_forecast = live;
    }
  }
  return rows;
}

void print_head(const Findings& findings) {
  const Image& image = findings.image;
  const HostCosts& host = findings.host;
  const Link& link = findings.setup.link;
  fmt::print("image  {}: {}, {:.1f} % zero pages", image.name, format_bytes(image.facts.bytes),
             100 * image.facts.zero_share);
  if (image.sample().size() < image.bytes)
    fmt::print(" (from {} in {} window{})", format_bytes(static_cast<double>(image.sample().size())), image.windows,
               image.windows > 1 ? "s" : "");
  fmt::print("\nlink   {}", link.name);
  if (link.bytes_per_s > 0) fmt::print(": {}/s for a stream", format_bytes(link.bytes_per_s));
  if (link.rtt_s > 0) fmt::print(", round trip {:.3g} ms", link.rtt_s * 1e3);
  for (const Link::Measured& each : link.measured)
    fmt::print("{} {}: {}/s", &each == link.measured.data() ? ", connections" : ",", each.connections,
               format_bytes(each.bytes_per_s));
  fmt::print("\ncores  {} at the source, {} at the destination{}; destination memory {}\n", findings.setup.source_cores,
             findings.setup.destination_cores, findings.setup.one_host ? " (the same ones)" : "",
             to_string(findings.setup.destination));
  fmt::print(
      "costs  of this host, CPU time: queue {:.1f} ns and zero check {:.0f} ns a page; a packet {:.1f} us to send, "
      "{:.1f} "
      "to receive;\n       guest memory {:.2f} s/GiB to send, {:.2f} to receive; encoded data {:.2f} and {:.2f}; fresh "
      "memory {:.2f} (4 KiB pages {:.2f});\n       with {} cores busy everything takes {:.2f}x\n\n",
      host.queue_ns, host.check_ns, host.send_packet_ns / 1e3, host.receive_packet_ns / 1e3,
      host.send_page_ns * 1.073741824, host.receive_page_ns * 1.073741824, host.send_payload_ns * 1.073741824,
      host.receive_payload_ns * 1.073741824, host.fault_ns * 1.073741824, host.fault_small_ns * 1.073741824,
      host.busy_cores, host.busy_factor);
}

void print_codecs(const Findings& findings) {
  fmt::print("{:<11} {:>7} {:>13} {:>13}   one core, pages that are not zero\n", "compressor", "ratio", "encode MB/s",
             "decode MB/s");
  for (const CodecCosts& codec : findings.codecs) {
    if (codec.sends_pages) continue;
    fmt::print("{:<11} {:>7.2f} {:>13.0f} {:>13.0f}\n", name_of(codec), codec.ratio, mb_per_s(codec.encode_ns),
               mb_per_s(codec.decode_ns));
  }
}

json stack_json(const Prediction& each) {
  return {{"compressor", each.compressor},
          {"level", each.level ? json(*each.level) : json(nullptr)},
          {"zero_pages", to_string(each.zero_pages)},
          {"channels", each.channels},
          {"seconds", each.seconds},
          {"source_cpu_s", each.source_cpu_s},
          {"destination_cpu_s", each.destination_cpu_s},
          {"wire_bytes", each.wire_bytes},
          {"bounded_by", to_string(each.limit)}};
}

json choice_json(const Choice& choice) {
  if (choice.best == nullptr) return nullptr;
  json object = stack_json(*choice.best);
  object["equals"] = choice.equals;
  return object;
}

/// A finite figure, or null.
json number_or_null(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }

/// The guest writes more than any stack carries.
void print_no_stack(const Findings& findings) {
  fmt::print(
      "no recommendation: with {}/s dirtied, no stack converges to a downtime of {:.0f} ms. What helps, one of:\n",
      format_bytes(findings.writing.bytes_per_s), findings.writing.max_downtime_s * 1e3);
  if (findings.most_dirty_rate > 0)
    fmt::print("  a guest that dirties no more than {}/s (QEMU: auto-converge, dirty-limit)\n",
               format_bytes(findings.most_dirty_rate));
  fmt::print("  a downtime of {} s, in which what it has dirtied is sent (--max-downtime; or pause the guest)\n",
             format_seconds(findings.least_downtime_s));
  fmt::print("  a quicker link or more cores, whichever limits above; or memory on demand (postcopy)\n");
}

std::string first_line_with(const char* path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key)) {
      const std::size_t at = line.find(':');
      return at == line.npos ? line : line.substr(line.find_first_not_of(" \t", at + 1));
    }
  return "unknown";
}

json machine_json() {
  utsname system{};
  ::uname(&system);
  return {{"cpu", first_line_with("/proc/cpuinfo", "model name")},
          {"cores", std::thread::hardware_concurrency()},
          {"memory_bytes", program::physical_memory()},
          {"kernel", system.release},
          {"architecture", system.machine},
          {"compiler", __VERSION__},
          {"zero_kernel", multifd::chosen_zero_kernel().name}};
}

}  // namespace

void print_tables(const Findings& findings, std::size_t most_rows) {
  print_head(findings);
  print_codecs(findings);
  const double tie = tie_of(findings.spread);
  const Choice quick = choose(findings.predictions, findings.forecasts, Goal::time, tie);
  const Choice cheap = choose(findings.predictions, findings.forecasts, Goal::cpu, tie);

  fmt::print("\nseconds with so many channels; CPU seconds and what is the limit at the best number of them\n");
  fmt::print("{:<11} {:<8} {:>11}", "compressor", "zeros", "wire");
  for (const unsigned count : findings.channels) fmt::print(" {:>8}", fmt::format("{} ch", count));
  fmt::print("  {:>8} {:>8}  {:<15}", "source", "dest.", "limited by");
  if (!findings.forecasts.empty()) fmt::print("  {:<22}", "guest goes on writing");
  fmt::print("\n");
  std::size_t printed = 0;
  std::size_t left_out = 0;
  for (const Row& row : rows_of(findings)) {
    const bool is_quick = quick.best != nullptr && same_stack(*row.best, *quick.best);
    const bool is_cheap = cheap.best != nullptr && same_stack(*row.best, *cheap.best);
    if (most_rows != 0 && printed >= most_rows && !is_quick && !is_cheap) {
      ++left_out;
      continue;
    }
    ++printed;
    const Prediction& best = *row.best;
    const std::string stack = best.level ? fmt::format("{} {}", best.compressor, *best.level) : best.compressor;
    fmt::print("{:<11} {:<8} {:>11}", stack, to_string(best.zero_pages), format_bytes(best.wire_bytes));
    for (const Prediction* cell : row.by_channels)
      fmt::print(" {:>8}", format_seconds(cell->seconds) + (cell == quick.best ? "*" : cell == cheap.best ? "+" : " "));
    fmt::print("  {:>8} {:>8}  {:<15}", format_seconds(best.source_cpu_s), format_seconds(best.destination_cpu_s),
               to_string(best.limit));
    if (row.best_forecast != nullptr) {
      const Forecast& live = *row.best_forecast;
      fmt::print("  {:<22}", live.converges ? fmt::format("{} s, down {:.0f} ms", format_seconds(live.seconds),
                                                          live.downtime_s * 1e3)
                                            : std::string("does not converge"));
    }
    if (is_quick) fmt::print("  <- shortest time");
    if (is_cheap) fmt::print("  {} least CPU", is_quick ? "and" : "<-");
    fmt::print("\n");
  }
  if (left_out > 0) fmt::print("({} more rows: --rows 0)\n", left_out);
  fmt::print("\n");
  if (quick.best == nullptr) {
    print_no_stack(findings);
    return;
  }
  const auto while_it_writes = [&](const Choice& choice) -> std::string {
    if (findings.forecasts.empty()) return {};
    const Forecast& live = findings.forecasts[static_cast<std::size_t>(choice.best - findings.predictions.data())];
    return fmt::format("; while the guest writes {} s in {} rounds, down {:.0f} ms", format_seconds(live.seconds),
                       live.rounds + 1, live.downtime_s * 1e3);
  };
  const auto line = [&](const char* what, const char* mark, const Choice& choice) {
    const Prediction& each = *choice.best;
    fmt::print("{} {}: {}, {} channel{}: {} s, CPU {} s at the source and {} s at the destination, {} on the wire{}\n",
               mark, what, name_of(each), each.channels, each.channels > 1 ? "s" : "", format_seconds(each.seconds),
               format_seconds(each.source_cpu_s), format_seconds(each.destination_cpu_s), format_bytes(each.wire_bytes),
               while_it_writes(choice));
    if (choice.equals > 0)
      fmt::print("  {} other{} as good within {:.0f} %{}: decided by {}\n", choice.equals,
                 choice.equals > 1 ? "s are" : " is", 100 * tie,
                 tie > least_tie && findings.spread <= most_tie ? ", the measurements' own spread" : "", rule_of_ties);
  };
  line("shortest time", "*", quick);
  line("least CPU", "+", cheap);
  if (findings.spread > most_tie)
    fmt::print(
        "what was measured differs by {:.0f} % from pass to pass, so another run may choose another stack: repeat that "
        "on a quiet machine, or with more --time\n",
        100 * findings.spread);
}

void print_verified(const Verification& verified) {
  fmt::print("\nverified over loopback in this process, both ends on the same cores; predicted / measured\n");
  fmt::print("{:<11} {:<8} {:>3}  {:>17} {:>7}  {:>17} {:>17} {:>7}  {:>21}\n", "compressor", "zeros", "ch", "seconds",
             "error", "CPU source", "CPU destination", "error", "wire MiB");
  for (const Verified& each : verified.stacks) {
    const Prediction& p = each.predicted;
    const std::string stack = p.level ? fmt::format("{} {}", p.compressor, *p.level) : p.compressor;
    const auto pair = [](double a, double b) { return fmt::format("{:.3f} / {:.3f}", a, b); };
    constexpr double mib = 1 << 20;
    fmt::print("{:<11} {:<8} {:>3}  {:>17} {:>+6.0f}%  {:>17} {:>17} {:>+6.0f}%  {:>21}\n", stack,
               to_string(p.zero_pages), p.channels, pair(p.seconds, each.seconds), 100 * each.seconds_error(),
               pair(p.source_cpu_s, each.source_cpu_s), pair(p.destination_cpu_s, each.destination_cpu_s),
               100 * each.cpu_error(), fmt::format("{:.1f} / {:.1f}", p.wire_bytes / mib, each.wire_bytes / mib));
  }
  if (verified.other_cores > 0.2)
    fmt::print("other programs used {:.1f} cores meanwhile: repeat that on a quiet machine\n", verified.other_cores);
}

json to_json(const Findings& findings) {
  const Image& image = findings.image;
  const Setup& setup = findings.setup;
  const HostCosts& host = findings.host;
  const double tie = tie_of(findings.spread);
  json measured = json::array();
  for (const Link::Measured& each : setup.link.measured)
    measured.push_back({{"connections", each.connections}, {"bytes_per_s", each.bytes_per_s}, {"spread", each.spread}});
  json codecs = json::array();
  for (const CodecCosts& codec : findings.codecs)
    codecs.push_back({{"compressor", codec.compressor},
                      {"level", codec.level ? json(*codec.level) : json(nullptr)},
                      {"ratio", codec.ratio},
                      {"encode_ns_per_byte", codec.encode_ns},
                      {"decode_ns_per_byte", codec.decode_ns},
                      {"zero_ratio", codec.zero_ratio},
                      {"zero_encode_ns_per_byte", codec.zero_encode_ns},
                      {"zero_decode_ns_per_byte", codec.zero_decode_ns}});
  json predictions = json::array();
  for (std::size_t i = 0; i < findings.predictions.size(); ++i) {
    predictions.push_back(stack_json(findings.predictions[i]));
    if (findings.forecasts.empty()) continue;
    const Forecast& live = findings.forecasts[i];
    predictions.back()["live"] = {{"converges", live.converges},
                                  {"rounds", live.rounds},
                                  {"seconds", live.seconds},
                                  {"downtime_s", live.converges ? json(live.downtime_s) : json(nullptr)}};
  }
  json verified = json::array();
  for (const Verified& each : findings.verified.stacks)
    verified.push_back({{"predicted", stack_json(each.predicted)},
                        {"measured",
                         {{"seconds", each.seconds},
                          {"source_cpu_s", each.source_cpu_s},
                          {"destination_cpu_s", each.destination_cpu_s},
                          {"wire_bytes", each.wire_bytes}}},
                        {"seconds_error", each.seconds_error()},
                        {"cpu_error", each.cpu_error()}});
  json object = {{"ok", true},
                 {"error", nullptr},
                 {"seconds", findings.seconds},
                 {"machine", machine_json()},
                 {"image",
                  {{"name", image.name},
                   {"bytes", image.bytes},
                   {"page_bytes", page_bytes},
                   {"sampled_bytes", image.sample().size()},
                   {"windows", image.windows},
                   {"zero_share", image.facts.zero_share},
                   {"touched_share_2m", image.facts.touched_share}}},
                 {"link",
                  {{"name", setup.link.name},
                   {"bits_per_s", setup.link.nominal_bits_per_s},
                   {"bytes_per_s", setup.link.bytes_per_s},
                   {"rtt_s", setup.link.rtt_s},
                   {"window_bytes", setup.link.window_bytes},
                   {"measured", std::move(measured)}}},
                 {"setup",
                  {{"source_cores", setup.source_cores},
                   {"destination_cores", setup.destination_cores},
                   {"one_host", setup.one_host},
                   {"destination_memory", to_string(setup.destination)},
                   {"channels", findings.channels}}},
                 {"costs",
                  {{"queue_ns_per_page", host.queue_ns},
                   {"zero_check_ns_per_page", host.check_ns},
                   {"send_page_ns_per_byte", host.send_page_ns},
                   {"receive_page_ns_per_byte", host.receive_page_ns},
                   {"send_payload_ns_per_byte", host.send_payload_ns},
                   {"receive_payload_ns_per_byte", host.receive_payload_ns},
                   {"send_packet_ns", host.send_packet_ns},
                   {"receive_packet_ns", host.receive_packet_ns},
                   {"fault_huge_ns_per_byte", host.fault_ns},
                   {"fault_4k_ns_per_byte", host.fault_small_ns},
                   {"busy_factor", host.busy_factor},
                   {"busy_cores", host.busy_cores},
                   {"spread", host.spread},
                   {"codecs", std::move(codecs)}}},
                 {"predictions", std::move(predictions)},
                 {"spread", findings.spread},
                 {"tie", tie},
                 {"ties_decided_by", rule_of_ties},
                 {"best",
                  {{"shortest_time", choice_json(choose(findings.predictions, findings.forecasts, Goal::time, tie))},
                   {"least_cpu", choice_json(choose(findings.predictions, findings.forecasts, Goal::cpu, tie))}}}};
  if (!verified.empty()) {
    object["verified"] = std::move(verified);
    object["other_cores"] = findings.verified.other_cores;
  }
  if (!findings.forecasts.empty())
    object["writing"] = {{"bytes_per_s", findings.writing.bytes_per_s},
                         {"working_set_bytes", findings.writing.working_set_bytes},
                         {"max_downtime_s", findings.writing.max_downtime_s},
                         // Of any stack, where none converges.
                         {"most_dirty_rate_bytes_per_s", number_or_null(findings.most_dirty_rate)},
                         {"least_downtime_s", number_or_null(findings.least_downtime_s)}};
  return object;
}

}  // namespace advise
