// SPDX-License-Identifier: MIT
//
// Who has the guest when a relay ends: every combination of what decides it. And which blocks are taken for main
// memory.
#include "qemu_relay/outcome.hpp"

#include <doctest/doctest.h>
#include <string>
#include <utility>
#include <vector>

#include "qemu_relay/pages.hpp"

using relay::Answer;
using relay::Guest;
using relay::Outcome;
using relay::outcome;

namespace {

bool has(const Outcome& outcome, const char* words) { return outcome.text.find(words) != std::string::npos; }

}  // namespace

TEST_CASE("A confirmation that the source has taken is success, whatever comes later") {
  for (const bool all_forwarded : {false, true})
    for (const bool destination_ended : {false, true})
      for (const Answer answer : {Answer::passed_on, Answer::taken}) {
        const Outcome end = outcome({.return_path = true,
                                     .answer = answer,
                                     .all_forwarded = all_forwarded,
                                     .destination_ended = destination_ended});
        CHECK(end.moved);
        CHECK(end.guest == Guest::at_destination);
        CHECK(has(end, "the destination confirmed"));
        CHECK(has(end, "quit") == (answer == Answer::passed_on));
      }
}

TEST_CASE("A confirmation that the source did not get may leave two running guests, and the text says so") {
  const Outcome end = outcome({.return_path = true, .answer = Answer::confirmed, .all_forwarded = true});
  CHECK_FALSE(end.moved);
  CHECK(end.guest == Guest::perhaps_at_both);
  CHECK(has(end, "must not both run"));
}

TEST_CASE("A destination that refused, or was not sent everything, does not have the guest") {
  for (const bool return_path : {false, true})
    for (const bool all_forwarded : {false, true})
      for (const Answer answer : {Answer::none, Answer::refused}) {
        if (answer == Answer::none && all_forwarded) continue;
        const Outcome end = outcome({.return_path = return_path, .answer = answer, .all_forwarded = all_forwarded});
        CHECK_FALSE(end.moved);
        CHECK(end.guest == (return_path ? Guest::at_source : Guest::at_source_completed));
        CHECK(has(end, "the guest is at the source"));
        CHECK(has(end, "cont"));
        CHECK(has(end, "says completed") == !return_path);
      }
}

TEST_CASE("A destination that was sent everything and did not answer has to be asked") {
  for (const bool destination_ended : {false, true}) {
    const Outcome end = outcome({.return_path = true, .all_forwarded = true, .destination_ended = destination_ended});
    CHECK_FALSE(end.moved);
    CHECK(end.guest == Guest::unknown);
    CHECK(has(end, "info status"));
    CHECK(has(end, "quit one of them"));
  }
}

TEST_CASE("Without a return path nobody confirms, and a destination that ended in order is the best there is") {
  for (const bool destination_ended : {false, true}) {
    const Outcome end = outcome({.all_forwarded = true, .destination_ended = destination_ended});
    CHECK(end.moved == destination_ended);
    CHECK(end.guest == Guest::unknown);
    CHECK(has(end, "nobody confirmed"));
    CHECK(has(end, "cont at the source"));
  }
}

TEST_CASE("A lost destination is reported in the same words, with its status if it sent one") {
  const std::string gone = relay::destination_lost().what();
  const std::string said = relay::destination_lost(7).what();
  const auto tail = [](const std::string& text) { return text.substr(text.find(';')); };
  CHECK(tail(gone) == tail(said));
  CHECK(said.find("SHUT 7") != said.npos);
}

TEST_CASE("Epoch styles that differ are named by the property, where it is set, and the machine type") {
  for (const multifd::SyncStyle style : {multifd::SyncStyle::per_section, multifd::SyncStyle::per_round}) {
    const std::string text = relay::styles_differ(style, "pc-q35-9.2", "SEEN").what();
    CHECK(text.find("migration.multifd-flush-after-each-section") != text.npos);
    CHECK(text.find("pc-q35-9.2") != text.npos);
    CHECK(text.find("SEEN") != text.npos);
    CHECK((text.find("is on at the source") != text.npos) == (style == multifd::SyncStyle::per_section));
  }
}

TEST_CASE("A destination that does not answer may be stopped or end epochs in another way: both are said") {
  const std::string text = relay::no_answer("pc-q35-9.2", std::chrono::seconds(17)).what();
  for (const char* words :
       {"17 s", "is it stopped", "migration.multifd-flush-after-each-section is off at", "pc-q35-9.2"})
    CHECK_MESSAGE(text.find(words) != text.npos, words);
}

TEST_CASE("Main memory is what no firmware can be: larger than any, or larger than all others and no flash") {
  constexpr std::uint64_t mib = 1024 * 1024;
  using Blocks = std::vector<std::pair<const char*, std::uint64_t>>;
  const auto fresh = [](const Blocks& blocks, program::OutMemory memory = program::OutMemory::fresh) {
    multifd::RamMap ram(4096);
    for (const auto& [idstr, bytes] : blocks) REQUIRE(ram.add_elsewhere(idstr, bytes).has_value());
    return program::fresh_blocks(ram, memory);
  };
  using Fresh = std::vector<bool>;
  const Blocks pc{{"pc.ram", 16 * mib}, {"pc.bios", mib / 4}, {"vga.vram", 8 * mib}};
  CHECK(fresh(pc) == Fresh{true, false, false});
  CHECK(fresh(pc, program::OutMemory::unknown) == Fresh{false, false, false});
  CHECK(fresh({{"ram0", 128 * mib}, {"ram1", 65 * mib}, {"virt.flash0", 64 * mib}}) == Fresh{true, true, false});
  for (const std::uint64_t main : {32 * mib, 64 * mib})
    CHECK(fresh({{"mach-virt.ram", main}, {"virt.flash0", 64 * mib}, {"virt.flash1", 64 * mib}}) ==
          Fresh{false, false, false});
  CHECK(fresh({{"mach-virt.ram", 128 * mib}, {"virt.flash0", 64 * mib}, {"virt.flash1", 64 * mib}}) ==
        Fresh{true, false, false});
  CHECK(fresh({{"small.ram", 2 * mib}, {"system.flash", 4 * mib}}) == Fresh{false, false});
}
