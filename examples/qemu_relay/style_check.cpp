// SPDX-License-Identifier: MIT
#include "qemu_relay/style_check.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace relay {

using namespace multifd;
using namespace std::chrono_literals;
using program::Failure;
using qemu::ElementKind;

namespace {

/// A destination that waits for a SYNC that never comes waits for good. Any other answers within this time and some
/// round trips.
constexpr std::chrono::milliseconds style_limit = 1000ms;

}  // namespace

void StyleCheck::before(const qemu::Element& element) {
  // A machine without section footers: whatever follows is no part of the section.
  if (first_section_ == FirstSection::ended && element.kind != ElementKind::footer) ask();
  if (element.kind == ElementKind::section_start) ram_section_ = element.section_id;
  if (element.kind == ElementKind::end_of_records && first_section_ == FirstSection::open)
    first_section_ = FirstSection::ended;
}

void StyleCheck::behind(const qemu::Element& element) {
  if (element.kind != ElementKind::footer) return;
  footer_sent_ = false;
  if (first_section_ == FirstSection::ended) ask();
}

bool StyleCheck::was_sent(const qemu::Element& element) const noexcept {
  return footer_sent_ && element.kind == ElementKind::footer;
}

/// Looks at what names tell of how both sides end epochs. Returns whether the destination has to be asked before the
/// first epoch ends.
bool StyleCheck::has_to_prove_sections() const {
  const std::string machine = program::printable(stream_.machine_type());
  const SyncStyle style = *stream_.sync_style();
  if (settings_.out_peer && settings_.out_peer->sync_style == SyncStyle::per_section) {
    if (style == SyncStyle::per_section) return false;
    throw Failure(
        fmt::format("the source's machine type {} ends epochs with FLUSH records, which {} does not know: "
                    "another --out-peer, or an older machine type on both sides",
                    machine, settings_.out_peer->name));
  }
  const bool named = version_of_machine_type(stream_.machine_type()).has_value();
  if (named && peer_of_machine_type(stream_.machine_type()).sync_style == style) return false;
  // Set by hand at the source. So it may be at the destination, which only its answers tell.
  if (named && !forwarded_.return_path_open)
    throw styles_differ(style, machine,
                        "which its machine type alone does not, and without a return path nothing shows what the "
                        "destination does; switch the capability return-path on at the source");
  // Machines without a name in the stream have no footers either.
  return forwarded_.return_path_open && style == SyncStyle::per_section && !machine.empty();
}

/// A destination that ends epochs with each section waits behind the first one for a SYNC of each channel. An answer
/// before there was any shows the other kind.
///
/// The section's footer is ours: the source keeps its own back, for channels that nobody reads before these SYNCs.
bool StyleCheck::prove(const qemu::Element& end_of_section) {
  if (!has_to_prove_sections()) return false;
  destination_.wrote(destination_.writer().forward(end_of_section));
  destination_.wrote(destination_.writer().footer(ram_section_));
  footer_sent_ = true;
  ping();
  // The destination takes its main stream in order: before it has answered the source, the question has not been
  // reached.
  const ReturnPath& answers = destination_.return_path();
  answers.wait_for_first_pong(answer_limit());
  if (answers.wait_for_own_pong(std::min(style_limit + 4 * answers.round_trip(), answer_limit())))
    throw styles_differ(SyncStyle::per_section, program::printable(stream_.machine_type()),
                        "the destination goes on behind a section without a SYNC");
  failure_.check();
  return true;
}

/// Behind a FLUSH and its SYNCs, a destination that ends epochs with each section waits at the section's end for SYNCs
/// that nobody sends, and does not answer.
void StyleCheck::ask() {
  first_section_ = FirstSection::over;
  if (!forwarded_.return_path_open || *stream_.sync_style() == SyncStyle::per_section) return;
  ping();
  asked_ = Clock::now();
}

void StyleCheck::ping() {
  destination_.wrote(destination_.writer().ping(own_ping));
  destination_.wrote(destination_.writer().push_out());
}

/// The SYNCs that follow are what a destination of the other kind would go on by. One that answers nothing at all has
/// another reason.
void StyleCheck::wait_for_answer() const {
  if (asked_.load() == Clock::time_point{}) return;
  const auto limit = answer_limit();
  destination_.return_path().wait_for_own_pong(limit == no_timeout ? limit : limit + 1s);
  failure_.check();
}

void StyleCheck::check_answer_in_time() const {
  const ReturnPath& answers = destination_.return_path();
  const Clock::time_point asked = asked_;
  if (asked == Clock::time_point{} || !answers.heard() || answers.wait_for_own_pong(0ms)) return;
  if (std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - asked) < answer_limit()) return;
  throw no_answer(program::printable(stream_.machine_type()), answer_limit());
}

/// Seconds, not minutes: both guests stand still while nobody says that the two sides differ.
std::chrono::milliseconds StyleCheck::answer_limit() const { return settings_.source.at_most(6s); }

}  // namespace relay
