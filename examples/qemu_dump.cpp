// SPDX-License-Identifier: MIT
//
// qemu_dump: plays migration destination for a real QEMU and writes every RAM block to a sparse file, with a manifest
// that appears last. format/roles.md section 10, step by step.
#include <fmt/format.h>
#include <multifd/qemu/return_path.hpp>

#include <CLI/CLI.hpp>
#include <deque>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "common/limits.hpp"
#include "common/mapped_file.hpp"
#include "common/mapping.hpp"
#include "common/part_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/qemu_source.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tell.hpp"

namespace {

using namespace multifd;
using namespace std::chrono_literals;
using nlohmann::json;
using program::Failure;
using program::need;
using qemu::ElementKind;

struct Settings {
  program::SourceOptions source;
  std::string output;
  bool switchover_ack = false;
  std::string json_path;
};

constexpr const char* manifest_name = "manifest.json";

/// One RAM block and its file.
struct Block {
  std::string idstr;
  std::string file_name;
  std::unique_ptr<program::NewFile> file;
};

/// A file name for a block: idstrs come from the network and contain '/'. `taken`: the names so far, so that none comes
/// twice.
std::string file_name_of(std::string_view idstr, std::map<std::string, int>& taken) {
  std::string name;
  for (const char c : idstr.substr(0, 100)) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '-' ||
                       c == '_' || (c == '.' && !name.empty());
    name += plain ? c : '_';
  }
  const int before = taken[name]++;
  // '+' is in no name made above, so a number never makes two names one.
  return before == 0 ? name + ".ram" : fmt::format("{}+{}.ram", name, before);
}

class Dump {
 public:
  Dump(const Settings& settings, program::PartFile& manifest, program::QemuSource& source, const Interrupt& interrupt)
      : settings_(settings),
        manifest_file_(manifest),
        source_(source),
        interrupt_(interrupt),
        main_(source.main(), settings.source,
              {.on_silence =
                   [this] {
                     if (!main_.parser().ram_complete()) source_.check_channels(receiver_.get());
                     return false;
                   }}),
        on_signal_(interrupt, [this] { cancel(); }) {}

  /// Receives everything; throws the Failure that came first on any connection, or of a file.
  ///
  /// All steps that can fail come before the source is told that all is well. A failure behind that deletes nothing.
  json run() {
    try {
      return receive();
    } catch (const Failure& failure) {
      throw program::cause_of(failure);
    }
  }

 private:
  json receive() {
    const program::Stopwatch watch;
    try {
      const program::Progress progress([&] { return look(watch.seconds()); }, settings_.source.limits.hint);
      receive_ram();
      drain();
      close_memory();
      finish_files();
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
      throw;
    }
    answer();
    for (const std::string& text : warnings_) program::tell("warning: the dump is whole, but {}\n", text);
    return report(watch.seconds());
  }

  /// Handles a signal. When everything has arrived, cancelling is too late, and the signal only ends the waits.
  void cancel() {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    if (whole_ && !answered_) return;
    source_.main().shutdown();
    if (receiver_) receiver_->cancel();
  }

  void receive_ram() {
    while (!main_.parser().ram_complete()) {
      const auto element = main_.next();
      if (!element) throw Failure("main stream: ended ahead of RAM's end");
      take(*element);
    }
  }

  void take(const qemu::Element& element) {
    switch (element.kind) {
      case ElementKind::command: take_command(element); break;
      case ElementKind::block:
        if (main_.parser().block_list_complete()) open_receiver();
        break;
      case ElementKind::zero_page: take_page(element, {}); break;
      case ElementKind::page: take_page(element, element.data); break;
      default: break;
    }
    if (element.closes_epoch) {
      source_.refuse_more_channels(*receiver_);
      need(receiver_->release_epoch());
      ++epochs_;
    }
  }

  void take_command(const qemu::Element& element) {
    if (!main_.parser().return_path_open()) return;
    if (element.command == qemu::command_open_return_path && settings_.switchover_ack)
      reply(qemu::encode_switchover_ack());
    if (element.command == qemu::command_ping)
      reply(qemu::encode_pong(wire::load_be<std::uint32_t>(element.data.data())));
  }

  void reply(std::span<const std::byte> bytes) { need(write_all(source_.main(), bytes), "source: return path"); }

  void open_receiver() {
    std::map<std::string, int> taken;
    for (const qemu::BlockInfo& info : main_.parser().blocks()) {
      Block block{.idstr = std::string(info.idstr), .file_name = file_name_of(info.idstr, taken), .file = nullptr};
      block.file = std::make_unique<program::NewFile>(settings_.output + "/" + block.file_name, info.used_length);
      ram_pages_ += info.used_length / ram_.page_bytes();
      need(ram_.add(info.idstr, block.file->mapping().bytes()), "RAM block " + program::printable(info.idstr));
      blocks_.push_back(std::move(block));
    }
    auto receiver =
        program::open_receiver(settings_.source.compression, ram_, source_.take_channels(),
                               {.uuid = settings_.source.uuid_check(),
                                .first_packet = FirstPacket::sync,
                                .hello_timeout = 2000ms,  // the first bytes of all channels have come
                                .interrupt = &interrupt_,
                                // A dump holds RAM only, so devices' state is skipped.
                                .on_device_state = {.take = [](const DeviceState&) { return Result<void>{}; }},
                                // When everything has arrived, the main connection must stay open for the answer.
                                .on_error = [this](const Error&) {
                                  if (!whole_) source_.main().shutdown();
                                }});
    if (!receiver) throw source_.failure(receiver.error());
    const std::lock_guard lock(mutex_);
    receiver_ = std::move(*receiver);
  }

  /// Takes a page of the main stream: a zero page, or a page's bytes.
  void take_page(const qemu::Element& element, std::span<const std::byte> bytes) {
    const BlockId block{element.block};
    ++main_pages_;
    if (bytes.empty())
      need(receiver_->apply_zero(block, element.offset), "main stream");
    else
      need(receiver_->apply_page(block, element.offset, bytes), "main stream");
  }

  /// Skips the devices' state, which this program does not understand, to the stream's end. A source without a return
  /// path closes the connection there. A source with one waits for the answer, so the end must be found in the bytes.
  void drain() {
    const bool answers = main_.parser().return_path_open();
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
  void close_memory() {
    source_.refuse_more_channels(*receiver_);
    if (auto ended = receiver_->end_epochs(); !ended) throw source_.failure(ended.error());
    // With the capability x-ignore-shared the source leaves shared memory out, and does not say of which blocks. A
    // block of which nothing is in use (virtio-mem) looks the same, so the dump keeps all blocks.
    for (const Block& block : blocks_)
      if (received_pages(block) == 0 && !main_.parser().capabilities().empty())
        warnings_.push_back(
            fmt::format("no page of RAM block {} has come, so that its file holds zeros: if its memory is shared, the "
                        "source has left it out, and only the source's own file has it: switch the capability "
                        "x-ignore-shared off to dump it",
                        program::printable(block.idstr)));
    const std::lock_guard lock(mutex_);
    if (cancelled_) throw Failure("cancelled by a signal");
    whole_ = true;
  }

  std::uint64_t received_pages(const Block& block) {
    const BlockId id = need(ram_.find(block.idstr));
    std::uint64_t received = 0;
    for (std::uint64_t at = 0; at < block.file->mapping().bytes().size(); at += ram_.page_bytes())
      if (receiver_->received(id, at)) ++received;
    return received;
  }

  void finish_files() {
    for (const Block& block : blocks_) {
      const std::uint64_t bytes = block.file->mapping().bytes().size();
      const auto summary = block.file->make_sparse(ram_.page_bytes());
      ++looked_through_;
      manifest_blocks_.push_back({{"name", block.idstr},
                                  {"file", block.file_name},
                                  {"size", bytes},
                                  {"xxh3", summary.digest},
                                  {"pages", bytes / ram_.page_bytes()},
                                  {"received_pages", received_pages(block)},
                                  {"zero_pages", summary.zero_pages}});
    }
    // Until the manifest has its name, a failure or a second signal removes all files.
    program::write_text(manifest_file_.fd(), program::json_text(manifest()), manifest_file_.part());
    for (const Block& block : blocks_) {
      block.file->sync();
      ++synced_;
    }
    manifest_file_.sync();
    // Packets that came meanwhile have changed no page. But a stream that breaks the protocol is no dump to trust.
    if (auto ended = receiver_->end_epochs(); !ended && ended.error().code == Condition::peer_protocol)
      throw source_.failure(ended.error());
    const auto keep_all = [&] {
      for (const Block& block : blocks_) block.file->release();
      manifest_file_.release();
    };
    try {
      for (const Block& block : blocks_) block.file->rename();
      manifest_file_.rename();
      keep_all();
    } catch (const Failure& failure) {
      keep_all();  // all bytes are on the disk: the user can rename the files
      throw Failure(fmt::format(
          "{}; the rest of the dump is whole, and stays in {}: once that name is free, rename every NAME.part there to "
          "NAME, {} last; the source {}",
          failure.what(), settings_.output, manifest_name,
          main_.parser().return_path_open()
              ? "has not been told, so its guest stays with it"
              : "has no return path and takes no answer: its query-migrate says whether its migration has completed"));
    }
  }

  /// Called when the dump has its name: tells the source, and waits for the end of the channels, which shows that the
  /// source has completed. The dump stays, whatever happens here.
  void answer() {
    try {
      if (main_.parser().return_path_open()) tell_source();
    } catch (const Failure& failure) {
      warnings_.push_back(
          fmt::format("the source could not be told, so its migration fails there and its guest stays with it: {}",
                      failure.what()));
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      answered_ = true;
      if (cancelled_) receiver_->cancel();
    }
    try {
      if (main_.parser().return_path_open()) {
        // A FIN behind the answer: from here on the answer arrives even if this process is killed.
        need(source_.main().finish(), "return path");
        read_description();
      }
      if (const auto late = source_.finish(*receiver_)) warnings_.push_back(*late);
    } catch (const Failure& failure) {
      warnings_.push_back(cancelled_
                              ? std::string("a signal came before the source had closed its connections")
                              : fmt::format("ask the source whether its migration has completed: {}", failure.what()));
    }
  }

  void tell_source() {
    while (main_.next(0ms)) {
    }
    if (main_.ended()) throw Failure("it has closed the connection");
    reply(qemu::encode_shut(0));
  }

  /// The source may send its description late, and the connection must not be closed before that is read.
  void read_description() {
    const auto since = std::chrono::steady_clock::now();
    while (!main_.ended() && main_.parser().tail() != qemu::StreamTail::description) {
      const std::chrono::milliseconds limit = cancelled_ ? 0ms : source_.end_limit();
      const auto passed =
          std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - since);
      if (passed > limit || !main_.next(limit - passed)) return;
    }
  }

  json manifest() const {
    const auto& parser = main_.parser();
    return {{"machine", program::printable(parser.machine_type())},
            {"sync_style", program::to_string(parser.sync_style().value_or(SyncStyle::per_round))},
            {"uuid", program::to_string(receiver_->peer_uuid())},
            {"page_size", ram_.page_bytes()},
            {"epochs", epochs_},
            {"blocks", manifest_blocks_}};
  }

  json report(double seconds) const {
    const ReceiverStats stats = receiver_->stats();
    const ChannelStats sum = total(stats.channels);
    const std::uint64_t pages = sum.normal_pages + sum.zero_pages + main_pages_;
    json report = program::report(seconds, pages * ram_.page_bytes(), main_pages_, stats.channels);
    report.update(manifest());
    report["tls_cipher"] = program::text_or_null(source_.main().cipher());
    report["output"] = settings_.output;
    report["return_path"] = main_.parser().return_path_open();
    report["warnings"] = warnings_;
    return report;
  }

  program::Snapshot look(double seconds) {
    const std::lock_guard lock(mutex_);
    program::Snapshot now{.line = "waiting for the list of RAM blocks", .moved = main_.bytes()};
    now.stalled = program::source_stands_still;
    if (!receiver_) return now;
    if (whole_) {
      now.line =
          fmt::format("everything has arrived, writing files: {} of {} on the disk", synced_.load(), blocks_.size());
      now.moved += looked_through_ + synced_ + 1;
      now.stalled = fmt::format(
          "The source waits with its guest until the files are on the disk: the disk under {} may be slow, or busy "
          "with "
          "others' writes",
          settings_.output);
      return now;
    }
    const auto stats = receiver_->stats();
    const auto sum = total(stats.channels);
    const auto moved = static_cast<double>((sum.normal_pages + sum.zero_pages) * ram_.page_bytes());
    now.line = fmt::format("received {}  {:.2f} GiB/s  epoch {}", program::format_bytes(moved),
                           program::rate(moved, seconds), stats.epochs);
    now.moved += sum.wire_bytes;
    now.again = sum.normal_pages + sum.zero_pages + main_pages_ >= ram_pages_;
    now.endless =
        fmt::format("{}. {}", program::source_goes_on,
                    settings_.switchover_ack
                        ? "Or its machine type is 11.1 or newer, where --switchover-ack must not be given here: its "
                          "query-migrate says \"pending num underflowed\" then"
                        : "Or its capability switchover-ack is on, with a machine type up to 11.0: then it waits "
                          "for --switchover-ack here");
    return now;
  }

  const Settings& settings_;
  program::PartFile& manifest_file_;
  program::QemuSource& source_;
  const Interrupt& interrupt_;
  program::MainStream main_;
  RamMap ram_{settings_.source.page_size};
  std::deque<Block> blocks_;
  std::mutex mutex_;  ///< receiver_ is set while the progress line reads it
  std::unique_ptr<program::AnyReceiver> receiver_;
  json manifest_blocks_ = json::array();
  std::uint64_t epochs_ = 0;
  std::atomic<std::uint64_t> main_pages_ = 0;
  std::uint64_t ram_pages_ = 0;  ///< in all blocks; valid once receiver_ is set
  std::atomic<bool> cancelled_ = false;
  std::atomic<bool> whole_ = false;                           ///< everything has arrived, and the dump is kept
  std::atomic<std::size_t> looked_through_ = 0, synced_ = 0;  ///< files, once whole_ is set
  bool answered_ = false;                                     ///< the source has got its answer; under mutex_
  std::vector<std::string> warnings_;
  program::OnInterrupt on_signal_;  // last: its action uses the others
};

/// Opens the folder for the dump: creates it, or takes one that has no dump in it. The returned lock keeps other dumps
/// out, whatever path they use for the folder.
std::unique_ptr<program::PartFile> prepare_output(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) throw Failure(fmt::format("{}: {}", path, error.message()));
  if (std::filesystem::exists(path + "/" + manifest_name, error))
    throw Failure(path + ": holds a dump already; choose another --output or remove it");
  auto manifest = std::make_unique<program::PartFile>(path + "/" + manifest_name);
  for (const auto& entry : std::filesystem::directory_iterator(path, error))
    if (entry.path().extension() == ".ram")
      throw Failure(entry.path().string() + ": is no part of this dump; choose another --output or remove it");
  if (error) throw Failure(fmt::format("{}: {}", path, error.message()));
  manifest->check_writes();
  return manifest;
}

int dump(const Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    const auto manifest = prepare_output(settings.output);
    program::need_descriptors(settings.source.channels + 1);
    program::QemuSource source(settings.source, interrupt);
    const json report = Dump(settings, *manifest, source, interrupt).run();
    if (settings.json_path != "-")
      program::say("dumped {} blocks of {} to {}: {} in {:.2f} s, {:.2f} GiB/s, {} epochs{}\n", report["blocks"].size(),
                   report["machine"].get<std::string>(), settings.output,
                   program::format_bytes(report["ram_bytes"].get<double>()), report["seconds"].get<double>(),
                   report["gib_per_s"].get<double>(), report["epochs"].get<std::uint64_t>(),
                   program::cipher_note(source.main().cipher()));
    json_file.write(report);
    return program::exit_done;
  } catch (const std::exception& error) {
    json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Takes the RAM of a guest that a real QEMU migrates to it, and writes it to files.", "qemu_dump");
  settings.source.add_to(app, "");
  app.add_option("--output", settings.output,
                 "Folder for a file per RAM block and manifest.json; made if missing; one that holds a dump is refused")
      ->required();
  app.add_flag("--switchover-ack", settings.switchover_ack,
               "The source has the capability switchover-ack and a machine type up to 11.0");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  return program::run(app, argc, argv, [&] {
    (void)settings.source.uuid_check();
    settings.source.tls.prepare(program::address_of(settings.source.listen, "--listen"));
    return dump(settings);
  });
}
