// SPDX-License-Identifier: MIT
#include "qemu_relay/relay.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <multifd/qemu/return_path.hpp>
#include <multifd/transport/connect.hpp>

#include <fstream>
#include <nlohmann/json.hpp>

namespace relay {

using namespace multifd;
using namespace std::chrono_literals;
using nlohmann::json;
using program::Failure;
using program::need;
using qemu::ElementKind;

namespace {

/// A destination that refuses just goes; nothing of what it dislikes is negotiated.
Failure destination_failure(const Error& error) {
  if (error.code == Condition::timed_out)
    return Failure(
        error, "destination: takes nothing more. Does it expect more channels than --out-channels? Or does it hang");
  if (error.code == Condition::peer_gone)
    return Failure(error,
                   "destination: has gone; its own message says why. Channels, compression, uuid and machine type must "
                   "be those it expects");
  return Failure(error, "destination");
}

std::uint64_t peak_rss_bytes() {
  // Not getrusage(): what it says outlives exec(), so it may be the parent's.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  return 0;
}

}  // namespace

Relay::Relay(const Settings& settings, program::QemuSource& source, const Interrupt& interrupt)
    : settings_(settings),
      source_(source),
      main_(source.main(), settings.source,
            {.before_wait =
                 [this] {
                   if (writer_) writer_->flush();
                 },
             .on_silence = [this] { return give_up_on_silence(); }}),
      ram_(settings.source.page_size),
      interrupt_(interrupt),
      return_path_ended_(need(Interrupt::create())),
      on_signal_(interrupt, [this] { fail(Failure("cancelled by a signal")); }) {}

Relay::~Relay() {
  if (return_path_.joinable()) return_path_.join();
  const std::lock_guard stopped(stopping_);
}

json Relay::run() {
  const program::Stopwatch watch;
  try {
    const program::Progress progress([&] { return progress_line(watch.seconds()); });
    connect();
    forward();
    finish();
  } catch (const std::exception& error) {
    const auto* failure = dynamic_cast<const Failure*>(&error);
    fail(failure != nullptr ? *failure : Failure(error.what()));
  }
  if (return_path_.joinable()) return_path_.join();
  check();
  return report(watch.seconds());
}

/// Main first, and established, before the channels: QEMU up to 7.2 tells them apart by that (section 1.2).
void Relay::connect() {
  const Address address = program::address_of(settings_.connect, "--connect");
  const std::chrono::seconds limit(settings_.source.timeout_s);
  SocketOptions options = settings_.source.limits.socket(&interrupt_);
  options.connect_timeout = limit;
  // Whoever takes no byte for so long will not take any.
  const auto limit_writes = [&](const FdTransport& link) {
    const timeval limit_value{.tv_sec = limit.count(), .tv_usec = 0};
    ::setsockopt(link.native_handle(), SOL_SOCKET, SO_SNDTIMEO, &limit_value, sizeof limit_value);
  };
  auto main = need(connect_to(address, options), "destination " + settings_.connect);
  limit_writes(main);
  program::Link secured = need(settings_.out_tls.secure(std::move(main), interrupt_, limit), "destination");
  {
    const std::lock_guard lock(mutex_);
    destination_ = std::move(secured);
    writer_.emplace(*destination_);
  }
  check();
  auto links = need(connect_channels(address, settings_.out.channels, options), "destination " + settings_.connect);
  for (const FdTransport& link : links) limit_writes(link);
  out_links_ = need(settings_.out_tls.secure_with_first_write(std::move(links)), "destination");
  return_path_ = std::thread([this] { forward_return_path(); });
}

void Relay::forward() {
  while (const auto element = main_.next()) {
    silent_seconds_ = 0;
    take(*element);
    check();
  }
  check();
  writer_->flush();
  if (main_.parser().return_path_open() && !confirmed_)
    throw program::source_lost("main connection: closed before the destination had confirmed");
  if (main_.parser().tail() != qemu::StreamTail::description)
    fmt::print(stderr,
               "the source's stream ends without a VM description: only the destination knows whether it is whole\n");
  all_forwarded_ = true;
}

void Relay::take(const qemu::Element& element) {
  switch (element.kind) {
    case ElementKind::zero_page: {
      const bool as_record = need(pages_->take_zero(BlockId{element.block}, element.offset), "destination");
      if (as_record) writer_->zero_page(element.name, element.offset);
      return;
    }
    case ElementKind::page: writer_->page(element.name, element.offset, element.data); return;
    case ElementKind::device_state:
      // The destination may answer, and close, as soon as it has the last byte.
      all_forwarded_ = main_.parser().tail() != qemu::StreamTail::inside;
      break;
    default: break;
  }
  if (element.closes_epoch) {
    close_epoch(element);
    return;
  }
  if (element.kind == ElementKind::end_of_records) pages_->write_zero_records(*writer_);
  writer_->forward(element);
  if (element.kind == ElementKind::block && main_.parser().block_list_complete()) open_channels();
}

/// Once a second while the source is silent: what will never come is not waited for. Returns whether the source need not
/// be waited for any more.
bool Relay::give_up_on_silence() {
  ++silent_seconds_;
  if (confirmed_) return silent_seconds_ > 10;  // it has its answer and keeps the connection nevertheless
  if (!main_.parser().ram_complete()) {
    source_.check_channels(receiver_.get());
  } else if (all_forwarded_ && silent_seconds_ > 300) {
    throw Failure("destination: has not confirmed 300 s after the last byte");
  }
  return false;
}

/// The blocks are known: the channels on both sides can begin.
void Relay::open_channels() {
  for (const qemu::BlockInfo& block : main_.parser().blocks())
    need(ram_.add_elsewhere(block.idstr, block.used_length), "RAM block " + program::printable(block.idstr));

  const auto take_packet = [this](ReceivedPacket& packet) { return at_destination(pages_->take(packet)); };
  const auto take_device = [this](const DeviceState& state) -> Result<void> {
    Pages* pages = nullptr;
    {
      const std::lock_guard lock(mutex_);
      pages = pages_.get();
    }
    // These packets need no SYNC before them, but no real source sends them ahead of RAM.
    if (pages == nullptr) return multifd::fail(Errc::data_before_sync, Stage::parse, "device-state packet");
    return at_destination(pages->take(state));
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
                              .on_error = [this](const Error& error) { fail(source_.failure(error)); }});
  if (!receiver) throw source_.failure(receiver.error());
  program::StackOptions out = out_options();
  out.uuid = (*receiver)->peer_uuid();
  out.on_error = [this](const Error& error) {
    // A destination that has confirmed may close its channels before we do.
    if (confirmed_ && error.code == Condition::peer_gone) return;
    fail(destination_failure(error));
  };
  auto pages = std::make_unique<Pages>(ram_, out, settings_.out_memory, std::move(out_links_));
  {
    const std::lock_guard lock(mutex_);
    receiver_ = std::move(*receiver);
    pages_ = std::move(pages);
  }
  check();  // fail() may have come before it could reach these two
  const std::string_view machine = main_.parser().machine_type();
  if (!settings_.out_peer && !version_of_machine_type(machine))
    fmt::print(
        stderr,
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
  out.pages = PageSource::copies;
  out.depth = 4;  // each place is a packet of memory
  return out;
}

/// Section 11, step 7: all pages of the epoch have been handed on when the source's channels are held.
void Relay::close_epoch(const qemu::Element& element) {
  if (epochs_ == 0) {
    source_.refuse_more_channels();
    if (element.kind == ElementKind::flush && settings_.out_peer &&
        settings_.out_peer->sync_style == SyncStyle::per_section)
      throw Failure(
          fmt::format("the source's machine type {} ends epochs with FLUSH records, which {} does not know: "
                      "another --out-peer, or an older machine type on both sides",
                      program::printable(main_.parser().machine_type()), settings_.out_peer->name));
  }
  const auto closed = receiver_->sync([&]() -> Result<void> {
    if (auto done = at_destination(pages_->close_epoch(*writer_)); !done) return done;
    writer_->forward(element);
    writer_->flush();
    return {};
  });
  if (!closed) throw source_.failure(closed.error());
  ++epochs_;
}

void Relay::forward_return_path() noexcept {
  try {
    copy_return_path();
  } catch (const std::exception& error) {
    const auto* failure = dynamic_cast<const Failure*>(&error);
    fail(failure != nullptr ? *failure : Failure(error.what()));
  }
  return_path_ended_.trigger();
}

/// What the destination says goes to the source unchanged.
void Relay::copy_return_path() {
  qemu::ReturnPathParser parser;
  for (;;) {
    const auto message = need(parser.next(), "destination: return path");
    if (message) {
      if (message->type == qemu::return_shut) {
        // Not sent on: the source learns it from its connections, which are about to be reset.
        if (message->value != 0)
          throw Failure(fmt::format("destination: says that it failed (SHUT {})", message->value));
        if (!all_forwarded_) throw Failure("destination: confirmed before it had everything");
        confirmed_ = true;  // before the source has it, which may close its connections at once
      }
      need(write_all(source_.main(), message->bytes), "source: return path");
      continue;
    }
    const iovec room = mutable_buffer(parser.room());
    const auto read = destination_->read_some(std::span(&room, 1));
    if (!read && confirmed_) return;
    const std::size_t got = need(read, "destination: main connection");
    if (got == 0) {
      if (all_forwarded_ || confirmed_) return;
      throw Failure("destination: closed the main connection in the middle of the migration");
    }
    parser.commit(got);
  }
}

/// Everything is forwarded and the source is content: ends the streams in order, and waits for the destination's end.
void Relay::finish() {
  pollfd ended{.fd = return_path_ended_.native_handle(), .events = POLLIN, .revents = 0};
  if (const auto late = source_.finish(*receiver_))
    fmt::print(stderr, "warning: everything is forwarded, but {}\n", *late);
  // A destination that has confirmed may have closed its end already.
  if (auto closed = pages_->sender().close_channels(); !closed && closed.error().code != Condition::peer_gone)
    throw Failure(closed.error(), "destination");
  if (auto closed = destination_->finish(); !closed && closed.error().code != Condition::peer_gone)
    throw Failure(closed.error(), "destination");
  if (::poll(&ended, 1, 30'000) == 0) {
    // Without a return path this is all that says it has loaded everything.
    if (!confirmed_) throw Failure("destination: did not end within 30 s after the last byte");
    destination_->shutdown();
  }
}

void Relay::fail(const Failure& failure) noexcept {
  program::AnyReceiver* receiver = nullptr;
  Pages* pages = nullptr;
  std::unique_lock<std::mutex> stopping;
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return;
    failure_ = failure;
    stopping = std::unique_lock(stopping_);
    source_.main().shutdown();
    if (destination_) destination_->shutdown();
    receiver = receiver_.get();
    pages = pages_.get();
  }
  // Outside the lock: cancelling tells on_error, which comes back here.
  if (receiver != nullptr) receiver->cancel();
  if (pages != nullptr) pages->sender().cancel();
}

void Relay::check() const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
}

template <class T>
Result<T> Relay::at_destination(Result<T> result) {
  if (!result) fail(destination_failure(result.error()));
  return result;
}

std::string Relay::progress_line(double seconds) const {
  const std::lock_guard lock(mutex_);
  if (!receiver_) return "waiting for the list of RAM blocks";
  const auto stats = receiver_->stats();
  const auto sum = total(stats.channels);
  const auto moved = static_cast<double>((sum.normal_pages + sum.zero_pages) * ram_.page_bytes());
  return fmt::format("relayed {}  {:.2f} GiB/s  epoch {}", program::format_bytes(moved), program::rate(moved, seconds),
                     stats.epochs);
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
  report["out_tls_cipher"] = program::text_or_null(destination_->cipher());
  report["out_peer"] = out_options().peer.name;
  report["out_zero_pages"] = out_options().zero_pages;
  report["out_memory"] = settings_.out_memory == OutMemory::fresh ? "fresh" : "unknown";
  report["out_zero_records"] = pages_->zero_records();
  report["machine"] = program::printable(main_.parser().machine_type());
  report["sync_style"] = program::to_string(main_.parser().sync_style().value_or(SyncStyle::per_round));
  report["uuid"] = program::to_string(receiver_->peer_uuid());
  report["epochs"] = epochs_;
  report["return_path"] = main_.parser().return_path_open();
  report["confirmed"] = confirmed_.load();
  report["peak_rss_bytes"] = peak_rss_bytes();
  return report;
}

}  // namespace relay
