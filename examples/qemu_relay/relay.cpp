// SPDX-License-Identifier: MIT
#include "qemu_relay/relay.hpp"

#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "common/limits.hpp"
#include "common/tell.hpp"

namespace relay {

using namespace multifd;
using namespace std::chrono_literals;
using nlohmann::json;
using program::Failure;
using program::need;
using qemu::ElementKind;

namespace {

std::uint64_t peak_rss_bytes() {
  // Not getrusage(): its maximum survives exec(), so it may be the parent's.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  return 0;
}

}  // namespace

Relay::Relay(const Settings& settings, program::QemuSource& source, const Interrupt& interrupt)
    : settings_(settings),
      source_(source),
      interrupt_(interrupt),
      failure_(source.main()),
      destination_(settings, source.main(), forwarded_, failure_, interrupt),
      main_(source.main(), settings.source,
            {.before_wait = [this] { destination_.wrote(destination_.writer().push_out()); },
             .on_silence = [this] { return give_up_on_silence(); }}),
      style_(settings, main_.parser(), forwarded_, destination_, failure_),
      ram_(settings.source.page_size),
      on_signal_(interrupt, [this] { failure_.cancel(); }) {}

Relay::~Relay() {
  destination_.return_path().join();
  failure_.retire();
}

json Relay::run() {
  const program::Stopwatch watch;
  ReturnPath& answers = destination_.return_path();
  try {
    const program::Progress progress([&] { return look(watch.seconds()); }, settings_.source.limits.hint);
    destination_.connect([this] { style_.check_answer_in_time(); });
    forward();
    finish();
  } catch (const std::exception& error) {
    // A destination that has everything is about to answer: to know who has the guest is worth a moment.
    if (forwarded_.all && forwarded_.return_path_open && !answers.confirmed()) answers.ends(2000ms, &interrupt_);
    failure_.fail_with(error);
    // Which does nothing any more once the guest has moved; what is left then is a formality.
    if (failure_.guest_moved() && !answers.ends(1000ms, &interrupt_)) destination_.main().shutdown();
  }
  answers.join();
  const Outcome outcome = end();
  if (!outcome.moved) {
    const auto failure = failure_.get();
    throw Unfinished(failure ? failure->what() : "the source closed its connection before it had the answer", outcome);
  }
  json result = report(watch.seconds());
  result["guest"] = to_string(outcome.guest);
  result["outcome"] = outcome.text;
  return result;
}

/// Behind everything, all threads but the workers' have ended.
Outcome Relay::end() const {
  const ReturnPath& answers = destination_.return_path();
  return outcome({.return_path = forwarded_.return_path_open,
                  .answer = answers.answer(),
                  .all_forwarded = forwarded_.all,
                  .destination_ended = answers.destination_ended() && !failure_.get()});
}

void Relay::forward() {
  while (const auto element = main_.next()) {
    silent_seconds_ = 0;
    take(*element);
    failure_.check();
  }
  forwarded_.source_ended = main_.ended();
  failure_.check();
  destination_.wrote(destination_.writer().push_out());
  if (forwarded_.return_path_open && !destination_.return_path().confirmed())
    throw program::source_lost("main connection: closed before the destination had confirmed");
  if (main_.parser().tail() != qemu::StreamTail::description)
    program::tell(
        "the source's stream ends without a VM description: only the destination knows whether it is whole\n");
  forwarded_.all = true;
}

void Relay::take(const qemu::Element& element) {
  MainStreamWriter& out = destination_.writer();
  destination_.wait_for_reason();
  failure_.check();
  style_.before(element);
  switch (element.kind) {
    case ElementKind::zero_page: {
      ++main_pages_;
      const auto as_record = destination_.noted(pages_->take_zero(BlockId{element.block}, element.offset));
      failure_.check();
      if (need(as_record, "destination")) destination_.wrote(out.zero_page(element.name, element.offset));
      return;
    }
    case ElementKind::page: destination_.wrote(out.page(element.name, element.offset, element.data)); return;
    case ElementKind::device_state:
      // The destination may answer, and close, as soon as it has received the last byte.
      forwarded_.all = main_.parser().tail() != qemu::StreamTail::inside;
      break;
    case ElementKind::section_end: last_section_ = true; break;
    default: break;
  }
  if (element.closes_epoch) {
    close_epoch(element);
    return;
  }
  if (element.kind == ElementKind::end_of_records) destination_.wrote(pages_->write_zero_records(out));
  if (!style_.was_sent(element)) destination_.wrote(out.forward(element));
  if (element.kind == ElementKind::command && element.command == qemu::command_ping &&
      destination_.return_path().note_ping(wire::load_be<std::uint32_t>(element.data.data())))
    destination_.wrote(out.push_out());
  style_.behind(element);
  if (main_.parser().return_path_open()) forwarded_.return_path_open = true;
  if (element.kind == ElementKind::block && main_.parser().block_list_complete()) open_channels();
}

/// Once a second while the source is silent: what will never come is not waited for. Returns whether the source need
/// not be waited for any more.
bool Relay::give_up_on_silence() {
  ++silent_seconds_;
  // The source has its answer, and keeps the connection nevertheless.
  if (destination_.return_path().confirmed()) return silent_seconds_ > 10 || interrupt_.triggered();
  if (!forwarded_.all) {
    const std::lock_guard lock(lost_mutex_);
    if (channel_lost_) throw *channel_lost_;
  }
  if (!main_.parser().ram_complete()) {
    source_.check_channels(receiver_.get());
  } else if (const auto limit = settings_.source.at_least(300s);
             forwarded_.all && std::chrono::seconds(silent_seconds_) > limit) {
    throw Failure(fmt::format("destination: has not confirmed {} after the last byte (--timeout, if longer)",
                              program::format_time(limit)));
  }
  return false;
}

/// The blocks are known: the channels on both sides can begin.
void Relay::open_channels() {
  for (const qemu::BlockInfo& block : main_.parser().blocks())
    need(ram_.add_elsewhere(block.idstr, block.used_length), "RAM block " + program::printable(block.idstr));

  const auto take_packet = [this](ReceivedPacket& packet) { return destination_.noted(pages_->take(packet)); };
  const auto take_device = [this](const DeviceState& state) -> Result<void> {
    // These packets need no SYNC before them, but no real source sends them ahead of RAM.
    if (!channels_open_) return multifd::fail(Errc::data_before_sync, Stage::parse, "device-state packet");
    device_packets_ = true;
    return destination_.noted(pages_->take(state));
  };
  auto receiver =
      program::open_receiver(settings_.source.compression, ram_, source_.take_channels(),
                             {.uuid = settings_.source.uuid_check(),
                              .first_packet = FirstPacket::sync,  // so nothing is taken before the sender is there
                              .hello_timeout = 2000ms,            // their first bytes are there
                              .interrupt = &interrupt_,
                              .on_packet = take_packet,
                              // Several wait in the sender at once; VFIO's have 1 MiB.
                              .on_device_state = {.take = take_device, .limit_bytes = 4 * 1024 * 1024},
                              .on_error = [this](const Error& error) { take_channel_error(error); }});
  if (!receiver) throw source_.failure(receiver.error());
  program::StackOptions out = out_options();
  out.uuid = (*receiver)->peer_uuid();
  out.on_error = [this](const Error& error) {
    // A destination that has confirmed may close its channels before we do.
    if (destination_.return_path().confirmed() && error.code == Condition::peer_gone) return;
    destination_.lose(error);
  };
  pages_ = std::make_unique<Pages>(ram_, out, settings_.out_memory, destination_.take_channels());
  receiver_ = std::move(*receiver);
  channels_open_ = true;
  failure_.add(*receiver_, pages_->sender());
  const std::string_view machine = main_.parser().machine_type();
  if (!settings_.out_peer && !version_of_machine_type(machine))
    program::tell(
        "the machine type \"{}\" names no QEMU version, so the destination gets what every generation understands: "
        "zero pages as {}; --out-peer says what it is\n",
        program::printable(machine.substr(0, 64)), out.zero_pages == ZeroPagesNone::name ? "bytes" : "records");
}

program::StackOptions Relay::out_options() const {
  program::StackOptions out = settings_.out;
  const std::string_view machine = main_.parser().machine_type();
  out.peer = settings_.out_peer.value_or(peer_of_machine_type(machine));
  if (settings_.choose_zero_pages)
    out.zero_pages = out.peer.zero_lists ? ZeroPagesMultifd::name : ZeroPagesLegacy::name;
  out.depth = 4;  // each place is a packet of memory
  return out;
}

/// Section 11, step 7: all pages of the epoch have been handed on when the source's channels are held.
void Relay::close_epoch(const qemu::Element& element) {
  bool sent = false;
  if (epochs_ == 0) {
    source_.refuse_more_channels(receiver_.get());
    sent = style_.prove(element);
  } else if (epochs_ == 1) {
    style_.wait_for_answer();
  }
  const auto closed = receiver_->release_epoch([&]() -> Result<void> {
    MainStreamWriter& out = destination_.writer();
    if (auto done = destination_.noted(pages_->close_epoch()); !done) return done;
    destination_.wrote(pages_->write_zero_records(out));
    if (!sent) destination_.wrote(out.forward(element));
    destination_.wrote(out.push_out());
    ram_over_ = last_section_;
    return {};
  });
  if (!closed) throw source_.failure(closed.error());
  ++epochs_;
}

/// Everything is forwarded and the source is content: ends the streams in order, and waits for the destination's end.
void Relay::finish() {
  ReturnPath& answers = destination_.return_path();
  // The destination has everything, so however the source's channels end, it must not be kept from loading that.
  try {
    if (const auto late = source_.finish(receiver_.get()))
      program::tell("warning: everything is forwarded, but {}\n", *late);
  } catch (const Failure& failure) {
    failure_.check();
    if (interrupt_.triggered()) throw;
    program::tell(
        "warning: everything is forwarded, but the source's channels did not end in order; ask the source "
        "whether its migration has completed: {}\n",
        failure.what());
  }
  // A destination that has confirmed may have closed its end already.
  if (auto closed = pages_->sender().close_channels(); !closed && closed.error().code != Condition::peer_gone)
    throw Failure(closed.error(), "destination");
  answers.expect_end();
  if (auto closed = destination_.main().finish(); !closed && closed.error().code != Condition::peer_gone)
    throw Failure(closed.error(), "destination");
  const auto limit = settings_.source.at_least(30s);
  if (!answers.ends(limit, failure_.guest_moved() ? &interrupt_ : nullptr)) {
    // Without a return path this is all that says it has loaded everything.
    if (!answers.confirmed())
      throw Failure(fmt::format(
          "destination: did not end within {} after the last byte (--timeout, if longer; it hangs for good where it "
          "ends epochs in another way than the source: migration.multifd-flush-after-each-section must be alike)",
          program::format_time(limit)));
    destination_.main().shutdown();
  }
  try {
    source_.refuse_more_channels(receiver_.get());  // strangers that came meanwhile are reported, too
  } catch (const Failure& failure) {
    program::tell("warning: everything is forwarded, but another connection came: {}\n", failure.what());
  }
}

/// Once the last epoch is whole, a channel brings nothing more that the destination needs, but devices' state that
/// comes that way. A source that is gone shows it on its main connection, too, by an end or by silence.
void Relay::take_channel_error(const Error& error) noexcept {
  const Failure failure = source_.failure(error);
  if (!forwarded_.all && (!ram_over_ || device_packets_)) {
    failure_.fail(failure);
    return;
  }
  const std::lock_guard lock(lost_mutex_);
  channel_lost_ = failure;
}

program::Snapshot Relay::look(double seconds) const {
  program::Snapshot now{.line = "waiting for the list of RAM blocks", .moved = main_.bytes()};
  now.stalled = program::source_stands_still;
  if (!destination_.connected()) {
    now.line = "waiting for the destination " + settings_.out_paths.text();
    now.stalled =
        "Its connections are not all established: is its QEMU or its host stopped, does the address lead elsewhere, or "
        "is the network between cut";
    return now;
  }
  if (!channels_open_) return now;
  now = program::snapshot_of("relayed", receiver_->stats(), ram_, main_pages_, seconds);
  now.moved += main_.bytes();
  now.stalled =
      forwarded_.all
          ? "The destination has everything and loads its devices: `info migrate` in its monitor says more"
          : fmt::format(
                "{}. Or does the destination take nothing: is it stopped, or does it expect another number of "
                "channels",
                program::source_stands_still);
  now.endless =
      fmt::format("{}. Or the source's capability switchover-ack is on, and the destination does not send one",
                  program::source_goes_on);
  return now;
}

json Relay::report(double seconds) const {
  const ReceiverStats in = receiver_->stats();
  const SenderStats out = pages_->sender().stats();
  const ChannelStats sum = total(out.channels);
  const std::uint64_t pages = sum.normal_pages + sum.zero_pages + pages_->zero_records();
  const std::uint64_t bytes = pages * ram_.page_bytes();
  json report = program::report(seconds, bytes, pages_->zero_records(), out.channels);
  const json source = program::report(seconds, bytes, 0, in.channels);
  report["in_channels"] = source["channels"];
  report["in_wire_bytes"] = source["wire_bytes"];
  report["in_tls_cipher"] = program::text_or_null(source_.main().cipher());
  report["out_tls_cipher"] = program::text_or_null(destination_.main().cipher());
  report["out_peer"] = out_options().peer.name;
  report["out_zero_pages"] = out_options().zero_pages;
  report["out_memory"] = settings_.out_memory == program::OutMemory::fresh ? "fresh" : "unknown";
  report["out_zero_records"] = pages_->zero_records();
  report["machine"] = program::printable(main_.parser().machine_type());
  report["sync_style"] = program::to_string(main_.parser().sync_style().value_or(SyncStyle::per_round));
  report["uuid"] = program::to_string(receiver_->peer_uuid());
  report["epochs"] = epochs_;
  report["return_path"] = main_.parser().return_path_open();
  report["confirmed"] = destination_.return_path().confirmed();
  report["peak_rss_bytes"] = peak_rss_bytes();
  destination_.connections().add_to(report);
  return report;
}

}  // namespace relay
