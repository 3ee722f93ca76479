// SPDX-License-Identifier: MIT
//
// ram_receive: the smallest real destination. Takes one RAM block from ram_send into a file, or into memory that is
// thrown away, and checks that what arrived is what was sent.
#include <fmt/format.h>

#include <sys/socket.h>
#include <CLI/CLI.hpp>
#include <multifd/migrate/destination.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "common/limits.hpp"
#include "common/mapping.hpp"
#include "common/older_copy.hpp"
#include "common/paths.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/reasons.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tell.hpp"
#include "common/tls.hpp"

namespace {

using namespace multifd;
using namespace multifd::migrate;
using nlohmann::json;
using program::Failure;
using program::need;

struct Settings {
  std::string listen;
  std::string file;
  std::string base;
  bool discard = false;
  bool populate = false;
  bool populate_ahead = false;
  std::uint64_t size = 0;
  std::uint64_t socket_buffer = 0;
  bool mptcp = false;
  unsigned channels = 0;
  std::string compression;
  std::string json_path;
  program::TimeLimits limits;
  program::Tls tls;
  program::ResumeOptions resume;
};

/// The memory to receive into. A file's name is reserved from the start.
struct Target {
  std::optional<program::NewFile> file;
  std::optional<program::FileInPlace> in_place;
  std::optional<program::Mapping> anonymous;

  Target(const Settings& settings, const Interrupt& interrupt) {
    if (!settings.base.empty() && program::same_file(settings.base, settings.file))
      in_place.emplace(settings.file);
    else if (!settings.discard)
      file.emplace(settings.file);
    if (!settings.base.empty() && file) {
      const program::Step step("copying the older file");
      file->copy_of(settings.base, &interrupt);
    }
    if (!settings.populate) return;
    allocate(settings.size);
    const program::Step step("touching the memory to receive into");
    mapping().populate(&interrupt);
  }
  void allocate(std::uint64_t bytes) {
    if (file)
      file->allocate(bytes);
    else
      anonymous = program::Mapping::anonymous(bytes);
  }
  std::string digest(std::size_t page_size) {
    const program::Step step(!anonymous ? "all is here, looking through the file for zeros and for its digest"
                                        : "all is here, reading it again for its digest");
    if (in_place) return in_place->make_sparse(page_size).digest;
    return file ? file->make_sparse(page_size).digest : mapping().digest();
  }
  /// All that can fail but the new name.
  void sync() {
    if (anonymous) return;
    const program::Step step("the digest is right, waiting for the disk to have it all (fsync)");
    file ? file->sync() : in_place->sync();
  }
  void keep() {
    if (!file) return;
    file->rename();
    file->release();
  }
  bool is_file() const { return file || in_place; }
  const program::Mapping& mapping() const {
    return file ? file->mapping() : in_place ? in_place->mapping() : *anonymous;
  }
};

/// What the source says of its file.
struct SourceState {
  std::string digest;
  bool changed = false;  ///< while it was sent
  bool checked = false;  ///< the packets had digests

  /// Throws Failure.
  explicit SourceState(std::span<const std::byte> state) {
    const std::string_view text(reinterpret_cast<const char*>(state.data()), state.size());
    const auto object = json::parse(text, nullptr, /*allow_exceptions=*/false);
    const auto is_set = [&](const char* key) {
      return object.contains(key) && object[key].is_boolean() && object[key].get<bool>();
    };
    if (!object.is_object() || !object.contains("digest") || !object["digest"].is_string())
      throw Failure("the source is no ram_send, or another version of it");
    digest = object["digest"].get<std::string>();
    changed = is_set("changed");
    checked = is_set("checked");
  }
};

/// A file as a guest: where another guest is ready to run, it has its name.
class FileGuest {
 public:
  FileGuest(const Settings& settings, Target& target, program::Reasons& reasons)
      : settings_(settings), target_(target), reasons_(reasons) {}

  Result<RamMap> prepare(const Announcement& announced) {
    RamMap ram(announced.page_bytes);
    MULTIFD_TRY(reasons_.in_guest("prepare the memory", [&] {
      if (announced.blocks.size() != 1 || announced.blocks[0].idstr != "ram")
        throw Failure("the source's guest is not one RAM block \"ram\": it is no ram_send");
      const std::uint64_t bytes = announced.blocks[0].used_length;
      const std::uint64_t limit = settings_.size != 0 ? settings_.size : program::physical_memory();
      if (bytes > limit)
        throw Failure(fmt::format("the source announces {} bytes; at most {} are taken here (--size)", bytes, limit));
      program::tell_of_smaller_backlog(announced.channels + 1);
      if (!settings_.populate && settings_.base.empty()) target_.allocate(bytes);
      const std::span<std::byte> memory = target_.mapping().bytes();
      if (!settings_.base.empty() && memory.size() != bytes)
        throw Failure(fmt::format("the source announces {} bytes; {}, the older copy, has {}: leave out --base", bytes,
                                  settings_.base, memory.size()));
      if (memory.size() != bytes)
        throw Failure(fmt::format("the source announces {} bytes; {} were populated (--size)", bytes, memory.size()));
      static_cast<void>(need(ram.add("ram", memory)));
      page_bytes_ = announced.page_bytes;
      meter.emplace();
    }));
    return ram;
  }

  /// Returns when what arrived is what was sent, the disk has it, and it has its name.
  Result<void> load(StateReader& from) {
    progress.reset();
    // While the source does the same with its file.
    MULTIFD_TRY(reasons_.in_guest("verify the memory", [&] {
      program::check_mapped_files();  // what has failed looks like zeros, which would be punched out
      digest = target_.digest(page_bytes_);
    }));
    progress = std::make_unique<program::Progress>("all has come, waiting for the digest of the source's file",
                                                   "Is the source stopped (SIGSTOP, a debugger, its host paused), or "
                                                   "its disk slow? --progress-timeout ends the wait",
                                                   settings_.limits.hint);
    std::optional<SourceState> source;
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) break;
      MULTIFD_TRY(reasons_.in_guest("read the source's digest", [&] { source.emplace(section->state); }));
    }
    progress.reset();
    MULTIFD_TRY(reasons_.in_guest("verify the memory", [&] {
      if (!source) throw Failure("the source has not said the digest of its file: it is no ram_send");
      if (digest != source->digest) throw differs(*source);
      target_.sync();
      // A verified copy is not thrown away, whatever becomes of the source.
      target_.keep();
      kept = target_.is_file();
    }));
    progress = std::make_unique<program::Progress>(
        "all is verified, waiting for the source to let go of it",
        "Is the source stopped (SIGSTOP, a debugger, its host paused)? --progress-timeout ends the wait",
        settings_.limits.hint);
    return {};
  }

  Result<void> resume() { return {}; }  // a file does not run

  std::unique_ptr<program::Progress> progress;  ///< of what is done now
  std::optional<program::Meter> meter;          ///< runs from when there is memory
  std::string digest;
  bool kept = false;  ///< the file has its name

 private:
  Failure differs(const SourceState& source) const {
    // Digests or TLS have checked the wire, so this is the only reason left.
    const bool changed = source.changed || source.checked || settings_.tls.on();
    return Failure(fmt::format(
        "what arrived is not what the source's file holds now: digest {}, the source says {}: {}", digest,
        source.digest,
        changed ? "the file was changed while it was being sent"
                : "the file was written to while it was being sent, as a running guest does, or the data was damaged "
                  "on the way (--digest at the source tells which)"));
  }

  const Settings& settings_;
  Target& target_;
  program::Reasons& reasons_;
  std::size_t page_bytes_ = 0;
};

program::Snapshot snapshot_of(const MigrationProgress& now, const std::string& address, double seconds) {
  if (now.status == MigrationStatus::setup && now.channels == 0 && now.connected == 0)
    return {.line = "waiting for a source on " + address,
            .stalled =
                "Nobody has connected: has the source been started, with an address that leads here, and does no "
                "firewall stand between?"};
  if (now.status == MigrationStatus::active && now.moved.compared_pages > 0 && now.moved.wire_bytes == 0)
    return {.line = fmt::format("{} pages of the older copy compared", now.moved.compared_pages),
            .moved = now.moved.compared_pages,
            .stalled =
                "Is the source stopped (SIGSTOP, a debugger, its host paused), or the disk slow? "
                "--progress-timeout ends the wait"};
  if (now.status == MigrationStatus::setup)
    return {.line = fmt::format("waiting for the source's connections: {} of {} channels", now.connected,
                                now.channels == 0 ? "some" : std::to_string(now.channels)),
            .moved = now.channels + now.connected,
            .stalled =
                "Is the source stopped, or does something between (a proxy, a firewall, a full queue) hold its "
                "connections back? --accept-timeout ends the wait"};
  const auto wire = static_cast<double>(now.moved.wire_bytes);
  return {.line = fmt::format("received {} for {} of memory  {:.2f} GiB/s", program::format_bytes(wire),
                              program::format_bytes(static_cast<double>(now.ram_bytes)), program::rate(wire, seconds)),
          .moved = now.moved.wire_bytes + static_cast<std::uint64_t>(now.status),
          .stalled =
              "Is the source stopped (SIGSTOP, a debugger, its host paused), or waiting for memory or a disk, or the "
              "network between cut? --progress-timeout ends the wait"};
}

struct Outcome {
  ArrivalReport report;
  program::Spent spent;  ///< from the first page to the last
  std::string digest;
};

Outcome receive(const Settings& settings, Listener& listener, Target& target, const Interrupt& interrupt) {
  Migration migration = need(Migration::create());
  const program::OnInterrupt cancel(interrupt, [&] { migration.cancel(); });
  program::Reasons reasons;
  FileGuest guest(settings, target, reasons);
  Outcome outcome;
  const DestinationOptions options{
      .channels = settings.channels != 0 ? std::optional(settings.channels) : std::nullopt,
      .compression =
          settings.compression.empty() ? std::nullopt : std::optional<std::string_view>(settings.compression),
      .page_bytes = std::nullopt,
      .max_ram_bytes = std::uint64_t{1} << 62,  // prepare() has a limit of its own, and a text for it
      .into = {.destination = settings.base.empty() ? DestinationMemory::zeroed : DestinationMemory::unknown,
               .populate = settings.populate_ahead ? Populate::ahead : Populate::off},
      .base = settings.base.empty() ? KeyedDigests{} : program::page_digests(),
      .resume = {.path_timeout = settings.resume.options().path_timeout, .timeout = settings.resume.options().timeout},
      .accept_timeout = settings.limits.accept,
      .hello_timeout = settings.limits.hello,
      .progress_timeout = settings.limits.progress,
      // The source reads a large file for its digest: what is whole is not thrown away because that takes long.
      .save_timeout = 12 * settings.limits.progress,
      .hand_over_timeout = settings.limits.progress,
      .on_event =
          [&](const Event& event) {
            if (event.kind == EventKind::status && event.progress.status == MigrationStatus::device && guest.meter)
              outcome.spent = guest.meter->spent();
          },
      .reason = [&](const Error& error) { return reasons.text(error); },
      .on_stranger = [](const char* why) { program::tell("closed {}\n", why); },
      .migration = &migration};
  const program::Stopwatch watch;
  guest.progress = std::make_unique<program::Progress>(
      [&, address = to_string(listener.local_address())] {
        return snapshot_of(migration.progress(), address, watch.seconds());
      },
      settings.limits.hint);
  auto taken = [&] {
    if (!settings.tls.on()) return migrate_from<program::Stacks>(guest, listener, options);
    program::TlsAcceptor acceptor = settings.tls.acceptor(listener, settings.limits.hello);
    return migrate_from<program::Stacks>(guest, acceptor, options);
  }();
  guest.progress.reset();
  if (!taken && target.in_place && !guest.kept)
    program::tell("{} has pages of the older copy and of the new one now, as far as they have come\n", settings.file);
  if (!taken && guest.kept) program::tell("{} is whole and verified, and stays\n", settings.file);
  if (!taken && taken.error().code == Errc::timed_out && taken.error().stage == Stage::read)
    throw Failure(Error{.code = Errc::timed_out}, "nothing has arrived for " + settings.limits.progress_limit().text());
  if (!taken) throw reasons.failure(taken.error(), migration);
  if (taken->late) program::tell("all is verified, but the source may not have heard it: {}\n", describe(*taken->late));
  outcome.report = std::move(*taken);
  if (!settings.base.empty() && !outcome.report.base)
    program::tell("all was sent: the source compares with no older copy (another version, or built without OpenSSL)\n");
  outcome.digest = guest.digest;
  return outcome;
}

int run(const Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    Target target(settings, interrupt);
    SocketOptions socket = settings.limits.socket();
    socket.send_buffer_bytes = socket.receive_buffer_bytes = static_cast<int>(settings.socket_buffer);
    socket.mptcp = settings.mptcp;
    program::tell_of_smaller_buffers(SO_RCVBUF, settings.socket_buffer);
    const Address address = program::address_of(settings.listen, "--listen");
    auto listener = need(Listener::listen(address, multifd::max_channels + 1u, socket), "listen on " + settings.listen);
    program::tell("listening on {}\n", to_string(listener.local_address()));
    const Outcome outcome = receive(settings, listener, target, interrupt);

    const ArrivalReport& done = outcome.report;
    const ChannelStats sum = total(done.stats.channels);
    // All of them have the source's page size; the announcement's bytes are one round's.
    const std::uint64_t pages = sum.normal_pages + sum.zero_pages + done.zero_on_main;
    json report =
        program::report(outcome.spent.seconds, pages * done.page_bytes, done.zero_on_main, done.stats.channels);
    program::add_spent(report, outcome.spent);
    report["digest"] = outcome.digest;
    report["tls_cipher"] = program::text_or_null(done.cipher);
    // Those of RAM's START and END have no pages.
    const std::uint64_t epochs = done.stats.epochs - std::min<std::uint64_t>(done.stats.epochs, 2);
    report["epochs"] = epochs;
    report["pages_verified"] = done.stats.pages_verified;
    report["base"] = program::base_report(done.base);
    if (settings.json_path != "-")
      program::say("received {} in {:.2f} s: {:.2f} GiB/s, {} epochs; digest {} verified{}\n",
                   program::format_bytes(static_cast<double>(pages * done.page_bytes)), outcome.spent.seconds,
                   report["gib_per_s"].get<double>(), epochs, outcome.digest, program::cipher_note(done.cipher));
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
  CLI::App app("Receives one RAM block from ram_send into a file or into memory.", "ram_receive");
  app.add_option("--listen", settings.listen, "Where ram_send connects to: tcp:HOST:PORT (port 0: any) or unix:PATH")
      ->required();
  auto* file = app.add_option(
      "--file", settings.file,
      "Where to put the bytes; appears only when all is verified; a name that is taken is refused. Needed without "
      "--discard");
  auto* discard = app.add_flag("--discard", settings.discard, "Receive into memory and keep nothing");
  file->excludes(discard);
  auto* base = app.add_option(
      "--base", settings.base,
      "An older copy of what comes: only what differs is sent. --file becomes a copy of it first (sharing its blocks "
      "where the file system can); or --file is the same file, which is changed in place: the older copy is gone then, "
      "and a failure leaves a mix of both");
  auto* populate =
      app.add_flag("--populate", settings.populate, "Touch the memory before listening; --size says how much");
  base->excludes(discard)->excludes(populate);
  app.add_flag("--populate-ahead", settings.populate_ahead,
               "A helper thread touches memory in front of the data: where cores are idle");
  program::add_size(app, "--size", settings.size, "The most that a sender may announce (0: the machine's memory)");
  program::add_size(app, "--socket-buffer", settings.socket_buffer,
                    "SO_RCVBUF of what connects (0: the kernel's choice); net.core.rmem_max at most")
      ->check(CLI::Range(0u, 1u << 30));
  app.add_flag("--mptcp", settings.mptcp, "Take MPTCP connections as such; plain ones come in all the same");
  app.add_option("--channels", settings.channels, "Insist on that many channels (0: whatever the sender announces)")
      ->check(CLI::Range(0u, multifd::max_channels))
      ->capture_default_str();
  app.add_option("--compression", settings.compression, "Insist on a method (default: whatever the sender announces)")
      ->check(CLI::IsMember(program::compressor_names()));
  settings.limits.add_to_receiver(app);
  settings.resume.add_limits_to(app);
  settings.tls.add_to(app, program::TlsSide::server);
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  return program::run(app, argc, argv, [&] {
    if (settings.file.empty() && !settings.discard) throw program::Usage("--file or --discard is needed");
    if (!settings.base.empty() && !program::page_digests())
      throw program::Usage("--base: this program was built without OpenSSL, by which pages are compared");
    if (settings.populate && (settings.size == 0 || settings.size % multifd::min_page_bytes != 0))
      throw program::Usage("--populate needs --size, the exact size that will be sent");
    settings.tls.prepare(program::address_of(settings.listen, "--listen"));
    return run(settings);
  });
}
