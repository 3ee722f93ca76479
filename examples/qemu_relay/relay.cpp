// SPDX-License-Identifier: MIT
#include "qemu_relay/relay.hpp"

#include <fmt/format.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <multifd/transport/connect.hpp>

#include <array>
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

/// "MFDR", a value with which no source pings.
constexpr std::uint32_t question = 0x4d46'4452;
/// A destination that waits for a SYNC that never comes waits for good. Any other answers within this time and some
/// round trips.
constexpr auto style_limit = 1000ms;

std::int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// Waits for one of the two, or for the time. Returns whether the first has triggered.
bool wait_for(const Interrupt& wanted, std::chrono::milliseconds limit, const Interrupt* other = nullptr) {
  std::array<pollfd, 2> entries{
      {{.fd = wanted.native_handle(), .events = POLLIN, .revents = 0},
       {.fd = other != nullptr ? other->native_handle() : -1, .events = POLLIN, .revents = 0}}};
  const auto deadline = deadline_after(limit);
  while (::poll(entries.data(), entries.size(), detail::poll_timeout(deadline)) < 0 && errno == EINTR) {
  }
  return wanted.triggered();
}

/// Whether a TCP connection that the other end has closed took the last bytes: false when it was reset, or does not
/// acknowledge them. True for other sockets, where a write without a reader fails at once.
bool took_all(int socket) {
  for (int tries = 0;; ++tries) {
    tcp_info info{};
    socklen_t size = sizeof info;
    if (::getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return true;
    int unsent = 0;
    if (info.tcpi_state == TCP_CLOSE) return false;
    if (::ioctl(socket, SIOCOUTQ, &unsent) != 0 || unsent == 0) return true;
    if (tries == 200) return false;
    std::this_thread::sleep_for(10ms);  // a peer that has gone answers with a reset, in a round trip
  }
}

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
      main_(source.main(), settings.source,
            {.before_wait =
                 [this] {
                   if (writer_) wrote(writer_->push_out());
                 },
             .on_silence = [this] { return give_up_on_silence(); }}),
      ram_(settings.source.page_size),
      interrupt_(interrupt),
      first_ponged_(need(Interrupt::create())),
      ponged_(need(Interrupt::create())),
      return_path_ended_(need(Interrupt::create())),
      on_signal_(interrupt, [this] { take_signal(); }) {}

Relay::~Relay() {
  if (return_path_.joinable()) return_path_.join();
  {
    // A worker that still calls fail() must not use what is about to be destroyed.
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = Failure("the relay has ended");
  }
  const std::lock_guard stopped(stopping_);
}

json Relay::run() {
  const program::Stopwatch watch;
  try {
    const program::Progress progress([&] { return look(watch.seconds()); }, settings_.source.limits.hint);
    connect();
    forward();
    finish();
  } catch (const std::exception& error) {
    // A destination that has everything is about to answer: to know who has the guest is worth a moment.
    if (all_forwarded_ && return_path_open_ && !confirmed_) return_path_ends(2000ms, &interrupt_);
    const auto* failure = dynamic_cast<const Failure*>(&error);
    fail(failure != nullptr ? *failure : Failure(program::text_of(error)));
    // Which does nothing any more once the guest has moved; what is left then is a formality.
    if (passed_on_ && !return_path_ends(1000ms, &interrupt_)) destination_->shutdown();
  }
  if (return_path_.joinable()) return_path_.join();
  const Outcome outcome = end();
  if (!outcome.moved) {
    const std::lock_guard lock(mutex_);
    throw Unfinished(failure_ ? failure_->what() : "the source closed its connection before it had the answer",
                     outcome);
  }
  json result = report(watch.seconds());
  result["guest"] = to_string(outcome.guest);
  result["outcome"] = outcome.text;
  return result;
}

Answer Relay::answer() const {
  if (refused_) return Answer::refused;
  if (!confirmed_) return Answer::none;
  if (!passed_on_ || !took_all(source_.main().native_handle())) return Answer::confirmed;
  return source_ended_ ? Answer::taken : Answer::passed_on;
}

/// Behind everything, all threads but the workers' have ended.
Outcome Relay::end() {
  const bool failed = [this] {
    const std::lock_guard lock(mutex_);
    return failure_.has_value();
  }();
  return outcome({.return_path = return_path_open_,
                  .answer = answer(),
                  .all_forwarded = all_forwarded_,
                  .destination_ended = destination_ended_ && !failed});
}

/// Main first, and established, before the channels: QEMU up to 7.2 tells them apart by that (section 1.2).
void Relay::connect() {
  const Address address = program::address_of(settings_.connect, "--connect");
  const std::chrono::milliseconds limit = settings_.source.timeout;
  SocketOptions options = settings_.source.limits.socket(&interrupt_);
  options.connect_timeout = limit;
  // A peer that takes no byte for so long will not take any.
  const auto limit_writes = [&](const FdTransport& link) {
    const timeval limit_value{.tv_sec = limit.count() / 1000, .tv_usec = limit.count() % 1000 * 1000};  // 0: no limit
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
  connected_ = true;
  return_path_ = std::thread([this] { forward_return_path(); });
}

void Relay::forward() {
  while (const auto element = main_.next()) {
    silent_seconds_ = 0;
    take(*element);
    check();
  }
  source_ended_ = main_.ended();
  check();
  wrote(writer_->push_out());
  if (return_path_open_ && !confirmed_)
    throw program::source_lost("main connection: closed before the destination had confirmed");
  if (main_.parser().tail() != qemu::StreamTail::description)
    program::tell(
        "the source's stream ends without a VM description: only the destination knows whether it is whole\n");
  all_forwarded_ = true;
}

void Relay::take(const qemu::Element& element) {
  losing_.wait(true);
  check();
  // A machine without section footers: whatever follows is no part of the section.
  if (first_section_ == FirstSection::ended && element.kind != ElementKind::footer) ask_destination();
  switch (element.kind) {
    case ElementKind::zero_page: {
      ++main_pages_;
      const auto as_record = at_destination(pages_->take_zero(BlockId{element.block}, element.offset));
      check();
      if (need(as_record, "destination")) wrote(writer_->zero_page(element.name, element.offset));
      return;
    }
    case ElementKind::page: wrote(writer_->page(element.name, element.offset, element.data)); return;
    case ElementKind::device_state:
      // The destination may answer, and close, as soon as it has received the last byte.
      all_forwarded_ = main_.parser().tail() != qemu::StreamTail::inside;
      break;
    default: break;
  }
  if (element.kind == ElementKind::section_end) last_section_ = true;
  if (element.kind == ElementKind::section_start) ram_section_ = element.section_id;
  if (element.kind == ElementKind::end_of_records && first_section_ == FirstSection::open)
    first_section_ = FirstSection::ended;
  if (element.closes_epoch) {
    close_epoch(element);
    return;
  }
  if (element.kind == ElementKind::end_of_records) wrote(pages_->write_zero_records(*writer_));
  if (!(footer_written_ && element.kind == ElementKind::footer)) wrote(writer_->forward(element));
  if (element.kind == ElementKind::command && element.command == qemu::command_ping && pinged_ms_ == 0) {
    ping_value_ = wire::load_be<std::uint32_t>(element.data.data());
    pinged_ms_ = now_ms();
    wrote(writer_->push_out());
  }
  if (element.kind == ElementKind::footer) {
    footer_written_ = false;
    if (first_section_ == FirstSection::ended) ask_destination();
  }
  if (main_.parser().return_path_open()) return_path_open_ = true;
  if (element.kind == ElementKind::block && main_.parser().block_list_complete()) open_channels();
}

/// Once a second while the source is silent: what will never come is not waited for. Returns whether the source need
/// not be waited for any more.
bool Relay::give_up_on_silence() {
  ++silent_seconds_;
  // The source has its answer, and keeps the connection nevertheless.
  if (confirmed_) return silent_seconds_ > 10 || interrupt_.triggered();
  if (!all_forwarded_) {
    const std::lock_guard lock(mutex_);
    if (channel_lost_) throw *channel_lost_;
  }
  if (!main_.parser().ram_complete()) {
    source_.check_channels(receiver_.get());
  } else if (const auto limit = settings_.source.at_least(300s);
             all_forwarded_ && std::chrono::seconds(silent_seconds_) > limit) {
    throw Failure(fmt::format("destination: has not confirmed {} after the last byte (--timeout, if longer)",
                              program::format_time(limit)));
  }
  return false;
}

/// The blocks are known: the channels on both sides can begin.
void Relay::open_channels() {
  for (const qemu::BlockInfo& block : main_.parser().blocks()) {
    need(ram_.add_elsewhere(block.idstr, block.used_length), "RAM block " + program::printable(block.idstr));
    ram_pages_ += block.used_length / ram_.page_bytes();
  }

  const auto take_packet = [this](ReceivedPacket& packet) { return at_destination(pages_->take(packet)); };
  const auto take_device = [this](const DeviceState& state) -> Result<void> {
    Pages* pages = nullptr;
    {
      const std::lock_guard lock(mutex_);
      pages = pages_.get();
    }
    // These packets need no SYNC before them, but no real source sends them ahead of RAM.
    if (pages == nullptr) return multifd::fail(Errc::data_before_sync, Stage::parse, "device-state packet");
    device_packets_ = true;
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
                              .on_error = [this](const Error& error) { take_channel_error(error); }});
  if (!receiver) throw source_.failure(receiver.error());
  program::StackOptions out = out_options();
  out.uuid = (*receiver)->peer_uuid();
  out.on_error = [this](const Error& error) {
    // A destination that has confirmed may close its channels before we do.
    if (confirmed_ && error.code == Condition::peer_gone) return;
    lose_destination(error);
  };
  auto pages = std::make_unique<Pages>(ram_, out, settings_.out_memory, std::move(out_links_));
  {
    const std::lock_guard lock(mutex_);
    receiver_ = std::move(*receiver);
    pages_ = std::move(pages);
  }
  check();  // fail() may have come before these two existed
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
  bool forwarded = false;
  if (epochs_ == 0) {
    source_.refuse_more_channels(*receiver_);
    if (has_to_prove_sections()) {
      forwarded = true;
      prove_sections(element);
    }
  } else if (epochs_ == 1 && asked_ms_ != 0) {
    // The SYNCs that follow are what a destination of the other kind would go on by. One that answers nothing at all
    // has another reason.
    const auto limit = answer_limit();
    wait_for(ponged_, limit == no_timeout ? limit : limit + 1s, &return_path_ended_);
    check();
  }
  const auto closed = receiver_->release_epoch([&]() -> Result<void> {
    if (auto done = at_destination(pages_->close_epoch()); !done) return done;
    wrote(pages_->write_zero_records(*writer_));
    if (!forwarded) wrote(writer_->forward(element));
    wrote(writer_->push_out());
    ram_over_ = last_section_;
    return {};
  });
  if (!closed) throw source_.failure(closed.error());
  ++epochs_;
}

/// Looks at what names tell of how both sides end epochs. Returns whether the destination has to be asked before the
/// first epoch ends.
bool Relay::has_to_prove_sections() const {
  const auto& parser = main_.parser();
  const std::string machine = program::printable(parser.machine_type());
  const SyncStyle style = *parser.sync_style();
  if (settings_.out_peer && settings_.out_peer->sync_style == SyncStyle::per_section) {
    if (style == SyncStyle::per_section) return false;
    throw Failure(
        fmt::format("the source's machine type {} ends epochs with FLUSH records, which {} does not know: "
                    "another --out-peer, or an older machine type on both sides",
                    machine, settings_.out_peer->name));
  }
  const bool named = version_of_machine_type(parser.machine_type()).has_value();
  if (named && peer_of_machine_type(parser.machine_type()).sync_style == style) return false;
  // Set by hand at the source. So it may be at the destination, which only its answers tell.
  if (named && !return_path_open_)
    throw styles_differ(style, machine,
                        "which its machine type alone does not, and without a return path nothing shows what the "
                        "destination does; switch the capability return-path on at the source");
  // Machines without a name in the stream have no footers either.
  return return_path_open_ && style == SyncStyle::per_section && !machine.empty();
}

/// A destination that ends epochs with each section waits behind the first one for a SYNC of each channel. An answer
/// before there was any shows the other kind.
///
/// The section's footer is ours: the source keeps its own back, for channels that nobody reads before these SYNCs.
void Relay::prove_sections(const qemu::Element& end_of_section) {
  wrote(writer_->forward(end_of_section));
  wrote(writer_->footer(ram_section_));
  footer_written_ = true;
  wrote(writer_->ping(question));
  wrote(writer_->push_out());
  // The destination takes its main stream in order: before it has answered the source, the question has not been
  // reached.
  if (pinged_ms_ != 0) wait_for(first_ponged_, answer_limit(), &return_path_ended_);
  if (wait_for(ponged_, question_limit(), &return_path_ended_))
    throw styles_differ(SyncStyle::per_section, program::printable(main_.parser().machine_type()),
                        "the destination goes on behind a section without a SYNC");
  check();
}

/// Behind a FLUSH and its SYNCs, a destination that ends epochs with each section waits at the section's end for SYNCs
/// that nobody sends, and does not answer.
void Relay::ask_destination() {
  first_section_ = FirstSection::over;
  if (!return_path_open_ || *main_.parser().sync_style() == SyncStyle::per_section) return;
  wrote(writer_->ping(question));
  wrote(writer_->push_out());
  asked_ms_ = now_ms();
}

/// Seconds, not minutes: both guests stand still while nobody says that the two sides differ.
std::chrono::milliseconds Relay::answer_limit() const { return settings_.source.at_most(6s); }

std::chrono::milliseconds Relay::question_limit() const {
  return std::min<std::chrono::milliseconds>(style_limit + 4 * std::chrono::milliseconds(round_trip_ms_),
                                             answer_limit());
}

void Relay::check_answer_in_time() const {
  if (asked_ms_ == 0 || !heard_ || ponged_.triggered()) return;
  if (std::chrono::milliseconds(now_ms() - asked_ms_) < answer_limit()) return;
  throw no_answer(program::printable(main_.parser().machine_type()), answer_limit());
}

void Relay::forward_return_path() noexcept {
  try {
    copy_return_path();
  } catch (const std::exception& error) {
    const auto* failure = dynamic_cast<const Failure*>(&error);
    fail(failure != nullptr ? *failure : Failure(program::text_of(error)));
  }
  return_path_ended_.trigger();
}

/// The destination's messages go to the source unchanged, except the answer to the relay's own question.
void Relay::copy_return_path() {
  qemu::ReturnPathParser parser;
  for (;;) {
    const auto message = need(parser.next(), "destination: return path");
    if (message) {
      take_answer(*message);
      continue;
    }
    const auto read = read_destination(parser.room());
    if (!read) {
      check_answer_in_time();
      continue;
    }
    if (!*read && confirmed_) return;
    const bool gone = !*read && read->error().code == Condition::peer_gone;
    // A QEMU leaves the end of our TLS session unread, so its system makes a reset of its end.
    const bool ended = gone && ending_ && destination_->secured() && !return_path_open_;
    if (gone && !ended) throw destination_lost();
    const std::size_t got = ended ? 0 : need(*read, "destination: main connection");
    if (got == 0) {
      destination_ended_ = true;
      // One that is to confirm, and goes without, has failed.
      if (confirmed_ || (all_forwarded_ && !return_path_open_)) return;
      throw destination_lost();
    }
    parser.commit(got);
  }
}

void Relay::take_answer(const qemu::ReturnMessage& message) {
  if (message.type == qemu::return_pong && message.value == question) {
    ponged_.trigger();
    return;
  }
  heard_ = true;
  if (message.type == qemu::return_pong && message.value == ping_value_ && pinged_ms_ != 0 &&
      !first_ponged_.triggered()) {
    round_trip_ms_ = now_ms() - pinged_ms_;
    first_ponged_.trigger();
  }
  if (message.type == qemu::return_shut) {
    // Not sent on: the source learns it from its connections, which are about to be reset.
    if (message.value != 0) {
      refused_ = true;
      throw destination_lost(message.value);
    }
    if (!all_forwarded_) throw Failure("destination: confirmed before it had everything");
    confirmed_ = true;  // before the source gets it, because the source may close its connections at once
  }
  // Under the lock, because a failure meanwhile resets the source's connection and drops the bytes written to it.
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
  if (message.type == qemu::return_shut && source_ended_)
    throw program::source_lost("main connection: closed before the destination had confirmed");
  need(write_all(source_.main(), message.bytes), "source: return path");
  passed_on_ = confirmed_.load();
}

std::optional<Result<std::size_t>> Relay::read_destination(std::span<std::byte> room) {
  constexpr auto slice = 500ms;
  const iovec buffer = mutable_buffer(room);
  auto read = destination_->read_some(std::span(&buffer, 1), slice, nullptr);
  if (!read && read.error().code == Errc::timed_out) return std::nullopt;
  return read;
}

bool Relay::return_path_ends(std::chrono::milliseconds limit, const Interrupt* interrupt) const {
  return wait_for(return_path_ended_, limit, interrupt);
}

/// Everything is forwarded and the source is content: ends the streams in order, and waits for the destination's end.
void Relay::finish() {
  // The destination has everything, so however the source's channels end, it must not be kept from loading that.
  try {
    if (const auto late = source_.finish(*receiver_))
      program::tell("warning: everything is forwarded, but {}\n", *late);
  } catch (const Failure& failure) {
    check();
    if (interrupt_.triggered()) throw;
    program::tell(
        "warning: everything is forwarded, but the source's channels did not end in order; ask the source "
        "whether its migration has completed: {}\n",
        failure.what());
  }
  // A destination that has confirmed may have closed its end already.
  if (auto closed = pages_->sender().close_channels(); !closed && closed.error().code != Condition::peer_gone)
    throw Failure(closed.error(), "destination");
  ending_ = true;
  if (auto closed = destination_->finish(); !closed && closed.error().code != Condition::peer_gone)
    throw Failure(closed.error(), "destination");
  const auto limit = settings_.source.at_least(30s);
  if (!return_path_ends(limit, passed_on_ ? &interrupt_ : nullptr)) {
    // Without a return path this is all that says it has loaded everything.
    if (!confirmed_)
      throw Failure(fmt::format(
          "destination: did not end within {} after the last byte (--timeout, if longer; it hangs for good where it "
          "ends "
          "epochs in another way than the source: migration.multifd-flush-after-each-section must be alike)",
          program::format_time(limit)));
    destination_->shutdown();
  }
  try {
    source_.refuse_more_channels(*receiver_);  // strangers that came meanwhile are reported, too
  } catch (const Failure& failure) {
    program::tell("warning: everything is forwarded, but another connection came: {}\n", failure.what());
  }
}

/// Once the last epoch is whole, a channel brings nothing more that the destination needs, but devices' state that
/// comes that way. A source that is gone shows it on its main connection, too, by an end or by silence.
void Relay::take_channel_error(const Error& error) noexcept {
  const Failure failure = source_.failure(error);
  if (!all_forwarded_ && (!ram_over_ || device_packets_)) {
    fail(failure);
    return;
  }
  const std::lock_guard lock(mutex_);
  channel_lost_ = failure;
}

void Relay::fail(const Failure& failure) noexcept {
  program::AnyReceiver* receiver = nullptr;
  Pages* pages = nullptr;
  std::unique_lock<std::mutex> stopping;
  {
    const std::lock_guard lock(mutex_);
    if (failure_ || passed_on_) return;
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

void Relay::lose_destination(const Error& error) noexcept {
  if (error.code != Condition::peer_gone) {
    fail(destination_failure(error));
    return;
  }
  // The connections of one that dies break one after the other, and what it said is on the main one. Meanwhile it gets
  // nothing more: behind a record that closes an epoch it would wait for a channel that has gone. Without a return path
  // it says nothing, and its source must not come to its end meanwhile.
  losing_ = true;
  if (return_path_open_ || all_forwarded_) return_path_ends(1000ms, &interrupt_);
  const bool over = destination_ended_ && all_forwarded_ && !return_path_open_;  // it has loaded everything and closes
  if (!over) fail(destination_lost());
  losing_ = false;
  losing_.notify_all();
}

void Relay::take_signal() noexcept {
  fail(Failure("cancelled by a signal"));
  program::AnyReceiver* receiver = nullptr;
  std::unique_lock<std::mutex> stopping;
  {
    const std::lock_guard lock(mutex_);
    if (!passed_on_) return;
    stopping = std::unique_lock(stopping_);
    receiver = receiver_.get();
  }
  if (receiver != nullptr) receiver->cancel();  // the receiver waits for the source's channels to close
}

void Relay::check() const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
}

void Relay::wrote(const Result<void>& written) {
  if (written) return;
  lose_destination(written.error());
  check();
}

template <class T>
Result<T> Relay::at_destination(Result<T> result) {
  if (!result) lose_destination(result.error());
  return result;
}

program::Snapshot Relay::look(double seconds) const {
  const std::lock_guard lock(mutex_);
  program::Snapshot now{.line = "waiting for the list of RAM blocks", .moved = main_.bytes()};
  now.stalled = program::source_stands_still;
  if (!connected_) {
    now.line = "waiting for the destination " + settings_.connect;
    now.stalled =
        "Its connections are not all established: is its QEMU or its host stopped, does the address lead elsewhere, or "
        "is the network between cut";
    return now;
  }
  if (!receiver_) return now;
  const auto stats = receiver_->stats();
  const auto sum = total(stats.channels);
  const auto moved = static_cast<double>((sum.normal_pages + sum.zero_pages) * ram_.page_bytes());
  now.line = fmt::format("relayed {}  {:.2f} GiB/s  epoch {}", program::format_bytes(moved),
                         program::rate(moved, seconds), stats.epochs);
  now.moved += sum.wire_bytes;
  now.again = sum.normal_pages + sum.zero_pages + main_pages_ >= ram_pages_;
  if (all_forwarded_)
    now.stalled = "The destination has everything and loads its devices: `info migrate` in its monitor says more";
  else
    now.stalled +=
        ". Or does the destination take nothing: is it stopped, or does it expect another number of channels";
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
