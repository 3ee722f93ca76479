// SPDX-License-Identifier: MIT
#include "simulate/trace.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>

#include "common/program.hpp"

namespace simulate {
namespace {

using nlohmann::json;
using program::Failure;

constexpr const char* format_name = "multifd-trace";
constexpr int format_version = 1;
constexpr double most_pages = 1e12;   // 4 PiB
constexpr double most_seconds = 1e6;  // 11 days
constexpr double most_rate = 1e15;
constexpr std::size_t most_entries = 1'000'000;
constexpr std::size_t most_sets = 1000;

/// A place in the file, for messages: "sets[3].pages".
double number(const json& value, const std::string& place, double least, double most) {
  if (!value.is_number()) throw Failure(fmt::format("{}: a number is expected", place));
  const double found = value.get<double>();
  if (!(found >= least && found <= most))
    throw Failure(fmt::format("{}: {:g} is not from {:g} to {:g}", place, found, least, most));
  return found;
}

double number_of(const json& object, const char* key, const std::string& place, double least, double most,
                 std::optional<double> otherwise = {}) {
  if (!object.contains(key)) {
    if (otherwise) return *otherwise;
    throw Failure(fmt::format("{}{} is missing", place, key));
  }
  return number(object[key], place + key, least, most);
}

const json& list_of(const json& object, const char* key, const std::string& place, std::size_t most) {
  if (!object.contains(key)) throw Failure(fmt::format("{}{} is missing", place, key));
  const json& list = object[key];
  if (!list.is_array() || list.empty() || list.size() > most)
    throw Failure(fmt::format("{}{}: a list of 1 to {} entries is expected", place, key, most));
  return list;
}

/// [[seconds, value], ...]
std::vector<Step> steps_of(const json& object, const char* key, const std::string& place, double least, double most) {
  const json& list = list_of(object, key, place, most_entries);
  std::vector<Step> steps;
  steps.reserve(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string here = fmt::format("{}{}[{}]", place, key, i);
    if (!list[i].is_array() || list[i].size() != 2) throw Failure(here + ": [seconds, value] is expected");
    const double at = number(list[i][0], here + "[0]", 0, most_seconds);
    if (i > 0 && at <= steps.back().at) throw Failure(here + ": its time is not behind the one before it");
    steps.push_back({at, number(list[i][1], here + "[1]", least, most)});
  }
  return steps;
}

json to_json(std::span<const Step> steps) {
  json list = json::array();
  for (const Step& each : steps) list.push_back({each.at, each.value});
  return list;
}

void read_sets(const json& object, Trace& trace) {
  trace.link = Steps(steps_of(object, "link_pages_per_s", "", 1, most_rate));
  trace.sync = Steps(steps_of(object, "sync_s", "", 0, most_seconds));
  const json& list = list_of(object, "sets", "", most_sets);
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string place = fmt::format("sets[{}].", i);
    if (!list[i].is_object()) throw Failure(fmt::format("sets[{}]: an object is expected", i));
    trace.sets.push_back({.pages = Steps(steps_of(list[i], "pages", place, 1, most_pages)),
                          .writes = Steps(steps_of(list[i], "writes_per_s", place, 0, most_rate))});
  }
}

/// A bitmap that a driver has fetched, and the round behind it.
struct Recorded {
  double begin = 0;    ///< the round's first page
  double fetched = 0;  ///< what was written to until then is in the bitmap
  double sync = 0;
  double send = 0;
  double dirty = 0;
  double again = 0;  ///< of `dirty`, in the next bitmap, too
  bool stopped = false;
};

std::vector<Recorded> recorded_rounds(const json& object, double ram_pages) {
  std::vector<Recorded> rounds;
  const json& list = list_of(object, "rounds", "", most_entries);
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string place = fmt::format("rounds[{}].", i);
    if (!list[i].is_object()) throw Failure(fmt::format("rounds[{}]: an object is expected", i));
    Recorded round{.begin = number_of(list[i], "begin_s", place, 0, most_seconds),
                   .sync = number_of(list[i], "sync_s", place, 0, most_seconds),
                   .send = number_of(list[i], "send_s", place, 0, most_seconds),
                   .dirty = number_of(list[i], "dirty_pages", place, 0, ram_pages)};
    round.again = number_of(list[i], "again_pages", place, 0, round.dirty, round.dirty);
    round.stopped = list[i].contains("stopped") && list[i]["stopped"] == true;
    // A guest that stands still writes nothing while its bitmap is fetched.
    round.fetched = round.stopped ? round.begin : round.begin - round.sync;
    if (!rounds.empty() && round.begin <= rounds.back().begin)
      throw Failure(place + "begin_s: not behind the round before it");
    if (!rounds.empty() && round.fetched <= rounds.back().fetched)
      throw Failure(place + "sync_s: the bitmap is fetched behind the round before it");
    if (round.dirty > 0 && round.send <= 0) throw Failure(place + "send_s: pages take time");
    rounds.push_back(round);
  }
  if (rounds.size() < 2) throw Failure("rounds: the bulk pass alone says nothing of the guest; two are needed");
  // What came ahead of the first page is no matter of the guest's.
  const double origin = rounds.front().begin;
  for (Recorded& round : rounds) round.begin -= origin, round.fetched -= origin;
  return rounds;
}

/// What a driver sees of a guest: the sizes of its dirty bitmaps, and how many pages of each were in the next one, too. Both
/// together say how many pages the guest writes to, as marking and catching fish again says how many are in a pond.
void read_rounds(const json& object, Trace& trace) {
  const std::vector<Recorded> rounds = recorded_rounds(object, trace.ram_pages);
  std::vector<Step> link, sync, pages, writes;
  // With the guest stopped there may be more waiting for the bitmap than sending.
  for (const Recorded& round : rounds)
    if (round.dirty > 0 && !round.stopped) link.push_back({round.begin, std::max(1.0, round.dirty / round.send)});
  if (link.empty()) throw Failure("rounds: none has pages");
  for (std::size_t i = 1; i < rounds.size(); ++i) {
    // The bulk pass is no bitmap. Of the first one nothing is known but its size: it is taken to be of the same pages as
    // the second.
    const std::size_t known = i == 1 && rounds.size() > 2 ? 2 : i;
    const Recorded &marked = rounds[known - 1], &caught = rounds[known];
    const double least = 1.02 * std::max({1.0, caught.dirty, known > 1 ? marked.dirty : 0});
    const double found = marked.again > 0 ? marked.dirty * caught.dirty / marked.again : trace.ram_pages;
    const double set = std::clamp(found, std::min(least, trace.ram_pages), trace.ram_pages);
    const double began = rounds[i - 1].fetched, time = rounds[i].fetched - began;
    // From the middle on, so that the bitmap at the end of this time has this set, and not the next.
    pages.push_back({began + time / 2, set});
    writes.push_back({began, -std::log1p(-std::min(0.98, rounds[i].dirty / set)) / time});
    sync.push_back({rounds[i - 1].begin, rounds[i].sync});
  }
  trace.link = Steps(std::move(link));
  trace.sync = Steps(std::move(sync));
  trace.sets.push_back({.pages = Steps(std::move(pages)), .writes = Steps(std::move(writes))});
}

/// The report of a migration (live_migration --json), which is a trace of its guest.
void read_report(const json& object, Trace& trace) {
  if (object.contains("ok") && object["ok"] == false) throw Failure("a report of a migration that failed");
  json rounds = list_of(object, "rounds", "", most_entries);
  if (!rounds.front().is_object()) throw Failure("rounds[0]: an object is expected");
  // Zero pages of the bulk pass take no time, and what a guest writes to is not zero.
  json& bulk = rounds.front();
  if (number_of(bulk, "normal_pages", "rounds[0].", 0, most_pages, 0) > 0) {
    bulk["dirty_pages"] = bulk["normal_pages"];
    bulk.erase("again_pages");
  }
  trace.ram_pages = number_of(bulk, "dirty_pages", "rounds[0].", 1, most_pages);
  for (const json& round : rounds)
    if (round.is_object())
      trace.ram_pages = std::max(trace.ram_pages, number_of(round, "dirty_pages", "rounds[].", 0, most_pages, 0));
  if (object.contains("downtime_parts_ms")) {
    const json& parts = object["downtime_parts_ms"];
    if (!parts.is_object()) throw Failure("downtime_parts_ms: an object is expected");
    trace.device_state_s = number_of(parts, "device_state", "downtime_parts_ms.", 0, most_seconds * 1e3, 0) / 1e3;
    trace.round_trip_s = number_of(parts, "round_trip", "downtime_parts_ms.", 0, most_seconds * 1e3, 0) / 1e3;
  }
  json report = object;
  report["rounds"] = std::move(rounds);
  read_rounds(report, trace);
}

}  // namespace

json to_json(const Trace& trace) {
  json object = {{"format", format_name},
                 {"version", format_version},
                 {"name", trace.name},
                 {"ram_pages", trace.ram_pages},
                 {"device_state_s", trace.device_state_s},
                 {"round_trip_s", trace.round_trip_s},
                 {"time_limit_s", trace.time_limit_s},
                 {"link_pages_per_s", to_json(trace.link.steps())},
                 {"sync_s", to_json(trace.sync.steps())}};
  for (const WriteSet& each : trace.sets)
    object["sets"].push_back({{"pages", to_json(each.pages.steps())}, {"writes_per_s", to_json(each.writes.steps())}});
  return object;
}

Trace trace_from_json(const json& object, const std::string& name) {
  const bool is_trace = object.is_object() && object.contains("format") && object["format"] == format_name;
  const bool is_report = object.is_object() && !object.contains("format") && object.contains("ok");
  if (!is_trace && !is_report)
    throw Failure(fmt::format("{}: no trace: neither has it \"format\": \"{}\", nor is it live_migration's report",
                              name, format_name));
  try {
    Trace trace{.kind = "recorded", .name = name};
    if (is_report) {
      read_report(object, trace);
      return trace;
    }
    if (!object.contains("version") || object["version"] != format_version)
      throw Failure(fmt::format("a trace of another version than {}", format_version));
    if (object.contains("sets") == object.contains("rounds"))
      throw Failure("a trace has either \"sets\" or \"rounds\"");
    trace.ram_pages = number_of(object, "ram_pages", "", 1, most_pages);
    trace.device_state_s = number_of(object, "device_state_s", "", 0, most_seconds, 0);
    trace.round_trip_s = number_of(object, "round_trip_s", "", 0, most_seconds, 0);
    trace.time_limit_s = number_of(object, "time_limit_s", "", 1, most_seconds, trace.time_limit_s);
    object.contains("sets") ? read_sets(object, trace) : read_rounds(object, trace);
    return trace;
  } catch (const Failure& failure) {
    throw Failure(fmt::format("{}: {}", name, failure.what()));
  }
}

Trace read_trace(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Failure(fmt::format("{}: {}", path, std::strerror(errno)));
  const json object = json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded()) throw Failure(path + ": no JSON");
  return trace_from_json(object, path);
}

}  // namespace simulate
