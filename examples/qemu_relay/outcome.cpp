// SPDX-License-Identifier: MIT
#include "qemu_relay/outcome.hpp"

#include <fmt/format.h>

#include "common/qemu_source.hpp"

namespace relay {

using namespace multifd;
using program::Failure;

namespace {

/// What decides how a side ends epochs, and how that is `on` at the source.
std::string property_text(bool on, const std::string& machine) {
  return fmt::format(
      "The property migration.multifd-flush-after-each-section is {} at the source and must be the same at the "
      "destination (machine type {}; its default is on up to machine types 8.0, off from 8.1 on)",
      on ? "on" : "off", machine);
}

}  // namespace

Outcome outcome(const EndState& end) {
  switch (end.answer) {
    case Answer::taken: return {Guest::at_destination, true, "the destination confirmed"};
    case Answer::passed_on:
      return {
          Guest::at_destination, true,
          "the destination confirmed, so it has the guest; the source was told but keeps its connection: see that it "
          "says completed, and quit it if not"};
    case Answer::confirmed:
      return {Guest::perhaps_at_both, false,
              "the destination confirmed, so it has the guest and may run it; the source was not told and may let its "
              "own run on: quit the source's QEMU (or the destination's), they must not both run"};
    case Answer::refused: break;
    case Answer::none: break;
  }
  // A connection that breaks later is no proof that the other end has not loaded everything.
  const bool cannot_have_it = !end.all_forwarded || end.answer == Answer::refused;
  if (end.return_path) {
    if (cannot_have_it)
      return {Guest::at_source, false,
              "the guest is at the source, whose migration fails; it goes on there, or cont lets it"};
    return {Guest::unknown, false,
            "the destination was sent everything, but its answer did not come: it may run the guest, and the source, "
            "whose migration fails, its own; ask the destination (info status), and quit one of them"};
  }
  if (cannot_have_it)
    return {
        Guest::at_source_completed, false,
        "the guest is at the source; if that says completed all the same, because it has no return path, cont there "
        "lets the guest go on"};
  if (end.destination_ended)
    return {
        Guest::unknown, true,
        "no return path, so nobody confirmed: ask the destination (info status); if the guest is not there, cont at "
        "the source lets it go on"};
  return {Guest::unknown, false,
          "no return path, so nobody confirmed, and the destination was sent everything: ask it (info status); only if "
          "the guest is not there, cont at the source lets it go on"};
}

const char* to_string(Guest guest) {
  switch (guest) {
    case Guest::at_destination: return "destination";
    case Guest::at_source:
    case Guest::at_source_completed: return "source";
    case Guest::perhaps_at_both: return "both";
    case Guest::unknown: break;
  }
  return "unknown";
}

Failure destination_lost(std::uint32_t status) {
  return Failure(fmt::format(
      "destination: {}; its own message says why. Channels, compression, uuid and machine type must be those "
      "it expects",
      status != 0 ? fmt::format("says that it failed (SHUT {})", status) : "has gone in the middle of the migration"));
}

Failure destination_failure(const Error& error) {
  if (error.code != Condition::timed_out) return Failure(error, "destination");
  return Failure(
      error,
      "destination: takes nothing more. Does it expect more channels than --out-channels, does it end epochs "
      "in another way than the source (migration.multifd-flush-after-each-section must be alike), or does it "
      "hang");
}

Failure styles_differ(SyncStyle source, const std::string& machine, const std::string& seen) {
  const bool sections = source == SyncStyle::per_section;
  return Failure(
      fmt::format("source and destination seem to end epochs in different ways: the source with each {}, {}. {}",
                  sections ? "section" : "round", seen, property_text(sections, machine)));
}

Failure no_answer(const std::string& machine, std::chrono::milliseconds limit) {
  return Failure(
      fmt::format("destination: has not answered within {} behind the first section (--timeout 0 waits on): is it "
                  "stopped, or does it end "
                  "epochs in another way than the source, and waits for a SYNC? {}",
                  program::format_time(limit), property_text(false, machine)));
}

}  // namespace relay
