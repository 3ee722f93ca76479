// SPDX-License-Identifier: MIT
#include "qemu_dump/dump.hpp"

#include <fmt/format.h>
#include <multifd/qemu/return_path.hpp>
#include <multifd/qemu/xbzrle.hpp>

#include "common/mapped_file.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"

namespace dump {

using namespace multifd;
using namespace std::chrono_literals;
using nlohmann::json;
using program::Failure;
using program::need;
using qemu::ElementKind;

namespace {

/// A stream of which the pages are missing must not look whole.
constexpr const char* pages_are_elsewhere =
    "source: it has multifd on, or had it when the stream was saved, and --channels is 0 here: its pages travel on "
    "channels";

}  // namespace

Dump::Dump(const Settings& settings, Output& output, program::QemuSource& source, const Interrupt& interrupt)
    : settings_(settings),
      output_(output),
      source_(source),
      interrupt_(interrupt),
      main_(source.main(), settings.source,
            {.on_silence =
                 [this] {
                   if (!main_.parser().ram_complete() && (receiver_ || !opened_))
                     source_.check_channels(receiver_.get());
                   return false;
                 }}),
      ram_(settings.source.page_size),
      on_signal_(interrupt, [this] { cancel(); }) {}

json Dump::run() {
  try {
    return receive();
  } catch (const Failure& failure) {
    throw program::cause_of(failure);
  }
}

json Dump::receive() {
  const program::Stopwatch watch;
  try {
    const program::Progress progress([&] { return look(watch.seconds()); }, settings_.source.limits.hint);
    receive_ram();
    drain();
    if (const auto late = source_.end_command()) warnings_.push_back(*late);
    close_memory();
    keep_files();
  } catch (const Failure& failure) {
    source_.main().shutdown();  // so that the source fails, too, and soon
    const bool stopped = cancelled_ && !whole_;
    // When a channel failed first, that is the reason; the main connection was only woken by it. Once everything has
    // arrived, what fails is a file.
    if (receiver_ && !stopped && !whole_) {
      receiver_->cancel();
      const auto first = receiver_->release_epoch();
      if (first.error().code != Errc::cancelled) throw source_.failure(first.error());
    }
    if (stopped) throw Failure("cancelled by a signal");
    // A command that has failed is the reason; one that goes on is not.
    if (!whole_) source_.check_command();
    throw;
  }
  answer();
  output_.convert();
  for (const std::string& text : warnings_) program::tell("warning: the dump is whole, but {}\n", text);
  return report(watch.seconds());
}

/// Handles a signal. When everything has arrived, cancelling is too late, and the signal only ends the waits.
void Dump::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  if (whole_ && !answered_) return;
  source_.main().shutdown();
  if (receiver_) receiver_->cancel();
}

void Dump::receive_ram() {
  while (!main_.parser().ram_complete()) {
    const auto element = main_.next();
    if (!element) throw Failure("main stream: ended ahead of RAM's end");
    take(*element);
  }
}

void Dump::take(const qemu::Element& element) {
  switch (element.kind) {
    case ElementKind::command: take_command(element); break;
    case ElementKind::block:
      if (main_.parser().block_list_complete()) open_blocks();
      break;
    case ElementKind::zero_page: take_page(element, {}); break;
    case ElementKind::page: take_page(element, element.data); break;
    case ElementKind::xbzrle_page: take_changes(element); break;
    case ElementKind::flush:
      if (opened_ && !receiver_) throw Failure(pages_are_elsewhere);
      break;
    case ElementKind::section_end: still_since_.emplace(); break;
    case ElementKind::device_state: output_.devices(element.data); break;
    default: break;
  }
  if (element.closes_epoch) close_epoch();
}

void Dump::close_epoch() {
  source_.refuse_more_channels(receiver_.get());
  if (!receiver_) return;  // there is nothing to wait for: everything is on the main stream
  need(receiver_->release_epoch());
  ++epochs_;
}

bool Dump::answers() const noexcept { return main_.parser().return_path_open() && source_.takes_answers(); }

void Dump::take_command(const qemu::Element& element) {
  if (!answers()) return;
  if (element.command == qemu::command_open_return_path && settings_.switchover_ack)
    reply(qemu::encode_switchover_ack());
  if (element.command == qemu::command_ping)
    reply(qemu::encode_pong(wire::load_be<std::uint32_t>(element.data.data())));
}

void Dump::reply(std::span<const std::byte> bytes) { need(write_all(source_.main(), bytes), "source: return path"); }

void Dump::open_blocks() {
  output_.open(main_.parser(), ram_);
  changed_page_.resize(ram_.page_bytes());
  auto receiver = settings_.source.channels == 0 ? nullptr : open_receiver();
  if (const UuidCheck check = settings_.source.uuid_check();
      !receiver && check.kind == UuidCheck::Kind::exact && main_.parser().uuid() != check.uuid)
    throw Failure(
        fmt::format("source: its uuid is {}, this side expects {}: without multifd only the capability "
                    "validate-uuid says it",
                    main_.parser().uuid() ? program::to_string(*main_.parser().uuid()) : "not in the stream",
                    program::to_string(check.uuid)));
  const std::lock_guard lock(mutex_);
  receiver_ = std::move(receiver);
  opened_ = true;
}

std::unique_ptr<program::AnyReceiver> Dump::open_receiver() {
  auto receiver =
      program::open_receiver(settings_.source.compression, ram_, source_.take_channels(),
                             {.uuid = settings_.source.uuid_check(),
                              .first_packet = FirstPacket::sync,
                              .hello_timeout = 2000ms,  // the first bytes of all channels have come
                              .interrupt = &interrupt_,
                              .on_packet = output_.packets(),
                              // No format of a file has a place for it.
                              .on_device_state = {.take = [](const DeviceState&) { return Result<void>{}; }},
                              // When everything has arrived, the main connection must stay open for the answer.
                              .on_error = [this](const Error&) {
                                if (!whole_) source_.main().shutdown();
                              }});
  if (!receiver) throw source_.failure(receiver.error());
  return std::move(*receiver);
}

/// Takes a page of the main stream: a zero page, or a page's bytes.
void Dump::take_page(const qemu::Element& element, std::span<const std::byte> bytes) {
  const BlockId block{element.block};
  ++main_pages_;
  if (bytes.empty()) ++main_zero_pages_;
  need(output_.page(receiver_.get(), block, element.offset, bytes), "main stream");
}

/// Takes an XBZRLE record: what changes of a page.
void Dump::take_changes(const qemu::Element& element) {
  need(output_.read_page(BlockId{element.block}, element.offset, changed_page_), "main stream");
  need(qemu::apply_xbzrle(element.data, changed_page_),
       fmt::format("source: main stream: \"{}\"", program::printable(element.name)));
  ++xbzrle_pages_;
  take_page(element, changed_page_);
}

/// Takes the devices' state, which this program does not understand, to the stream's end. A source without a return
/// path closes the connection there. A source with one waits for the answer, so the end must be found in the bytes.
void Dump::drain() {
  const bool answers = this->answers();
  while (!main_.ended()) {
    const qemu::StreamTail tail = main_.parser().tail();
    const bool whole = tail == qemu::StreamTail::end_mark || tail == qemu::StreamTail::description;
    // Silence alone never means the end. Behind the end mark a description usually comes at once, and is read before
    // the answer. If the source leaves the description out, this wait is downtime of its guest.
    std::chrono::milliseconds silence = no_timeout;
    if (whole) silence = !answers ? source_.end_limit() : tail == qemu::StreamTail::description ? 20ms : 100ms;
    if (tail == qemu::StreamTail::maybe && answers) silence = source_.end_limit();
    if (const auto element = main_.next(silence)) {
      take(*element);
    } else if (!main_.ended()) {
      if (!whole)
        throw Failure(
            "source: falls silent behind a zero byte, and its stream has no section footers and no VM description, "
            "so that nobody can tell whether that is its end: switch its capability return-path off, which makes it "
            "close the connection there, or set its machine's suppress-vmdesc=off");
      if (!answers) warnings_.push_back(source_.still_open("its main connection"));
      return;
    }
  }
  // Before its answer a source has no reason to close the connection.
  if (answers && main_.parser().tail() != qemu::StreamTail::description)
    throw program::source_lost("main connection: closed ahead of the answer");
}

/// Everything has arrived: from here on no channel changes a page.
void Dump::close_memory() {
  source_.refuse_more_channels(receiver_.get());
  if (!receiver_ && main_pages_ == main_zero_pages_) throw Failure(pages_are_elsewhere);
  if (auto ended = end_epochs(); !ended) throw source_.failure(ended.error());
  // With the capability x-ignore-shared the source leaves shared memory out, and does not say of which blocks. A
  // block of which nothing is in use (virtio-mem) looks the same, so the dump keeps all blocks.
  for (const RamBlock& block : ram_.blocks())
    if (output_.received_pages(receiver_.get(), need(ram_.find(block.idstr))) == 0 &&
        !main_.parser().capabilities().empty())
      warnings_.push_back(
          fmt::format("no page of RAM block {} has come, so that its file holds zeros: if its memory is shared, the "
                      "source has left it out, and only the source's own file has it: switch the capability "
                      "x-ignore-shared off to dump it",
                      program::printable(block.idstr)));
  const std::lock_guard lock(mutex_);
  if (cancelled_) throw Failure("cancelled by a signal");
  whole_ = true;
}

Result<void> Dump::end_epochs() { return receiver_ ? receiver_->end_epochs() : Result<void>{}; }

void Dump::keep_files() {
  manifest_blocks_ = output_.finish(receiver_.get());
  output_.write(manifest());
  // Packets that came meanwhile have changed no page. But a stream that breaks the protocol is no dump to trust.
  if (auto ended = end_epochs(); !ended && ended.error().code == Condition::peer_protocol)
    throw source_.failure(ended.error());
  try {
    output_.keep();
  } catch (const Failure& failure) {
    throw Failure(fmt::format(
        "{}; the source {}", failure.what(),
        answers()
            ? "has not been told, so its guest stays with it"
            : "has no return path and takes no answer: its query-migrate says whether its migration has completed"));
  }
}

/// Called when the dump has its name: tells the source, and waits for the end of the channels, which shows that the
/// source has completed. The dump stays, whatever happens here.
void Dump::answer() {
  try {
    if (answers()) tell_source();
  } catch (const Failure& failure) {
    warnings_.push_back(fmt::format(
        "the source could not be told, so its migration fails there and its guest stays with it: {}", failure.what()));
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    answered_ = true;
    if (cancelled_ && receiver_) receiver_->cancel();
  }
  try {
    if (answers()) {
      // A FIN behind the answer: from here on the answer arrives even if this process is killed.
      need(source_.main().finish(), "return path");
      read_description();
    }
    if (const auto late = source_.finish(receiver_.get())) warnings_.push_back(*late);
  } catch (const Failure& failure) {
    warnings_.push_back(cancelled_
                            ? std::string("a signal came before the source had closed its connections")
                            : fmt::format("ask the source whether its migration has completed: {}", failure.what()));
  }
}

void Dump::tell_source() {
  while (main_.next(0ms)) {
  }
  if (main_.ended()) throw Failure("it has closed the connection");
  reply(qemu::encode_shut(0));
  if (still_since_) stood_still_ = still_since_->seconds();
}

/// The source may send its description late, and the connection must not be closed before that is read.
void Dump::read_description() {
  const auto since = std::chrono::steady_clock::now();
  while (!main_.ended() && main_.parser().tail() != qemu::StreamTail::description) {
    const std::chrono::milliseconds limit = cancelled_ ? 0ms : source_.end_limit();
    const auto passed = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - since);
    if (passed > limit || !main_.next(limit - passed)) return;
  }
}

json Dump::manifest() const {
  const auto& parser = main_.parser();
  return {{"machine", program::printable(parser.machine_type())},
          {"sync_style", program::to_string(parser.sync_style().value_or(SyncStyle::per_round))},
          {"uuid", program::to_string(receiver_ ? receiver_->peer_uuid() : parser.uuid().value_or(Uuid{}))},
          {"page_size", ram_.page_bytes()},
          {"epochs", epochs_},
          {"blocks", manifest_blocks_}};
}

json Dump::report(double seconds) const {
  const ReceiverStats stats = receiver_ ? receiver_->stats() : ReceiverStats{};
  const ChannelStats sum = total(stats.channels);
  const std::uint64_t pages = sum.normal_pages + sum.zero_pages + main_pages_;
  json report = program::report(seconds, pages * ram_.page_bytes(), main_zero_pages_, stats.channels);
  report["normal_pages"] = sum.normal_pages + main_pages_ - main_zero_pages_;
  if (!receiver_) report["wire_bytes"] = main_.bytes();
  report["xbzrle_pages"] = xbzrle_pages_;
  report.update(manifest());
  report["tls_cipher"] = program::text_or_null(source_.main().cipher());
  report["output"] = output_.path();
  report["return_path"] = answers();
  report["stood_still"] = stood_still_ ? json(*stood_still_) : json();
  report["warnings"] = warnings_;
  return report;
}

program::Snapshot Dump::look(double seconds) {
  const std::lock_guard lock(mutex_);
  program::Snapshot now{.line = "waiting for the list of RAM blocks", .moved = main_.bytes()};
  now.stalled = program::source_stands_still;
  if (!opened_) return now;
  if (whole_) {
    const Output::Progress files = output_.progress();
    now.line = fmt::format("everything has arrived, writing files: {} of {} on the disk", files.synced, files.files);
    now.moved += files.looked_through + files.synced + 1;
    now.stalled = fmt::format(
        "The source waits with its guest until the files are on the disk: the disk under {} may be slow, or busy "
        "with others' writes",
        output_.path());
    return now;
  }
  now = program::snapshot_of("received", receiver_ ? receiver_->stats() : ReceiverStats{}, ram_, main_pages_, seconds);
  if (!receiver_)
    now.line = fmt::format("received {} on the main connection",
                           program::format_bytes(static_cast<double>(main_pages_ * ram_.page_bytes())));
  now.moved += main_.bytes();
  now.stalled = program::source_stands_still;
  now.endless =
      fmt::format("{}. {}", program::source_goes_on,
                  settings_.switchover_ack
                      ? "Or its machine type is 11.1 or newer, where --switchover-ack must not be given here: its "
                        "query-migrate says \"pending num underflowed\" then"
                      : "Or its capability switchover-ack is on, with a machine type up to 11.0: then it waits "
                        "for --switchover-ack here");
  return now;
}

}  // namespace dump
