// SPDX-License-Identifier: MIT
//
// ram_send: the smallest real source. A file's bytes are the only RAM block of a guest that stands still, and migrate to
// ram_receive in another process.
#include <fmt/format.h>

#include <signal.h>
#include <sys/socket.h>
#include <CLI/CLI.hpp>
#include <multifd/migrate/dirty/dirty_hooks.hpp>
#include <multifd/migrate/fixed_downtime.hpp>
#include <multifd/migrate/source.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <optional>
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
  std::string connect;
  std::string file;
  std::uint64_t size = 0;
  std::size_t page_size = 4096;
  std::string peer{peer_multifd.name};
  unsigned rounds = 1;
  bool digest = false;
  bool populate = false;
  std::uint64_t socket_buffer = 0;
  std::string way = "auto";
  bool list_kernels = false;
  std::string json_path;
  program::PathOptions paths;
  program::ResumeOptions resume;
  program::StackOptions stack;
  program::TimeLimits limits;
  program::Tls tls;
};

program::Way way_of(const std::string& name) {
  if (name == "auto") return program::Way::automatic;
  return name == "splice" ? program::Way::spliced : program::Way::copied;
}

/// Sets the bits of adjacent pages.
void set_pages(std::span<std::uint64_t> bitmap, std::uint64_t first, std::uint64_t pages) {
  for (const std::uint64_t end = first + pages; first < end;) {
    const std::uint64_t run = std::min(end - first, 64 - first % 64);
    bitmap[first / 64] |= ~std::uint64_t{0} >> (64 - run) << first % 64;
    first += run;
  }
}

/// A file as a guest that stands still, and dirties all of its memory in each round but the last.
class FileGuest {
 public:
  FileGuest(const Settings& settings, const program::Mapping& file, program::Reasons& reasons)
      : settings_(settings), file_(file), reasons_(reasons), ram_(settings.page_size), rounds_left_(settings.rounds) {
    block_ = need(ram_.add_read_only("ram", file.bytes()));
    dirty_.emplace(need(DirtyFromHooks::create(ram_, {.fetch = [this](BlockId, std::span<std::uint64_t> bitmap) {
                                                 if (rounds_left_ > 1) {
                                                   --rounds_left_;
                                                   set_pages(bitmap, 0, ram_.pages(block_));
                                                 }
                                                 return Result<void>();
                                               }})));
  }

  Result<RamMap> ram() { return ram_; }
  DirtyFromHooks& dirty_source() { return *dirty_; }
  Result<void> pause() { return {}; }
  Result<void> resume() { return {}; }
  Result<void> known_zeros(BlockId, std::span<std::uint64_t> bitmap) {
    return reasons_.in_guest("look for holes", [&] {
      std::uint64_t done = 0;
      const auto zeros_to = [&](std::uint64_t end) {
        set_pages(bitmap, done / ram_.page_bytes(), (end - done) / ram_.page_bytes());
      };
      for (const program::Run& run : file_.data(ram_.page_bytes())) {
        zeros_to(run.offset);
        done = run.offset + run.bytes;
      }
      zeros_to(file_.bytes().size());
    });
  }
  /// What the receiver compares.
  Result<void> save(StateWriter& to) {
    MULTIFD_TRY(reasons_.in_guest("compute the file's digest", [&] {
      progress.reset();
      const program::Step step("all is sent, reading the file again for its digest");
      digest_ = file_.digest();
    }));
    const std::string state =
        json{{"digest", digest_}, {"changed", changed()}, {"checked", settings_.stack.digest == Digest::on}}.dump();
    progress = std::make_unique<program::Progress>(
        "all is sent, waiting for the receiver's verdict",
        "The receiver compares digests and writes its file: is it stopped, or its disk slow? --result-timeout ends the "
        "wait",
        settings_.limits.hint);
    return to.device({.idstr = "ram_send"}, std::as_bytes(std::span(state)));
  }

  const std::string& digest() const { return digest_; }
  /// Whether the file has been written to meanwhile.
  bool changed() const { return file_.changed(); }

  std::unique_ptr<program::Progress> progress;  ///< of what is done now

 private:
  const Settings& settings_;
  const program::Mapping& file_;
  program::Reasons& reasons_;
  RamMap ram_;
  BlockId block_{};
  unsigned rounds_left_;
  std::optional<DirtyFromHooks> dirty_;
  std::string digest_;
};

program::Snapshot snapshot_of(const MigrationProgress& now, std::uint64_t all, std::size_t page_size) {
  const MigrationStatus status = now.status;
  const auto compared = static_cast<double>(now.moved.compared_pages * page_size);
  const auto moved =
      static_cast<double>((now.moved.normal_pages + now.moved.zero_pages + now.moved.equal_pages) * page_size);
  if (status == MigrationStatus::active && compared > 0 && moved == 0)
    return {.line = fmt::format("comparing with the receiver's older copy: {} of {}", program::format_bytes(compared),
                                program::format_bytes(static_cast<double>(all))),
            .moved = now.moved.compared_pages,
            .stalled =
                "Is the receiver stopped (SIGSTOP, a debugger, its host paused), or its disk slow, or the network "
                "between cut? --progress-timeout ends the wait"};
  return {
      .line = now.status == MigrationStatus::setup
                  ? std::string("waiting for the receiver to take the file's size and settings")
                  : fmt::format("{:3.0f} %  {} of {}  {:.2f} GiB/s  wire {}", 100 * moved / static_cast<double>(all),
                                program::format_bytes(moved), program::format_bytes(static_cast<double>(all)),
                                program::rate(moved, seconds(now.elapsed)),
                                program::format_bytes(static_cast<double>(now.moved.wire_bytes))),
      .moved = now.moved.wire_bytes + static_cast<std::uint64_t>(now.status),
      .stalled = fmt::format("Is the receiver stopped (SIGSTOP, a debugger, its host paused), or its disk full or "
                             "slow, or the network between cut? {} ends the wait",
                             now.status == MigrationStatus::setup ? "--result-timeout" : "--progress-timeout")};
}

struct Outcome {
  MigrationReport report;
  program::Spent spent;  ///< up to the last page
  std::string cipher;
  std::vector<PathProgress> paths;
  LostConnections lost;
};

/// What migrate_to() has failed with.
Failure failure_of(const Error& error, const FileGuest& guest, const program::Reasons& reasons,
                   const Migration& migration, const Settings& settings) {
  // The return path is what stage read is about.
  const Failure failure =
      error.code == Errc::timed_out && error.stage == Stage::read
          ? Failure(Error{.code = error.code}, "the other side is silent for " + settings.limits.result_limit().text())
          : reasons.failure(error, migration);
  if (migration.owner() == Owner::unknown)
    return Failure(fmt::format("{} (all is verified at the receiver, which may have kept it)", failure.what()));
  if (!guest.digest().empty() && guest.changed())
    return Failure(fmt::format("{}: was changed while it was being sent ({})", settings.file, failure.what()));
  return failure;
}

Outcome send(const Settings& settings, program::PathLog& log, FileGuest& guest, program::Reasons& reasons,
             std::uint64_t ram_bytes, const Interrupt& interrupt) {
  Migration migration = need(Migration::create());
  const program::OnInterrupt cancel(interrupt, [&] { migration.cancel(); });
  const program::OnSignal resume(SIGUSR1, [&] { migration.resume(); });

  const program::Meter meter;
  Outcome outcome;
  program::Securing securing(settings.tls, settings.limits.connect, way_of(settings.way));
  guest.progress = std::make_unique<program::Progress>(
      [&] { return snapshot_of(migration.progress(), ram_bytes, settings.page_size); }, settings.limits.hint);
  SourceOptions options = settings.stack.for_migration();
  options.converge.rule = FixedRounds(settings.rounds);  // ends when nothing is dirty any more
  options.answer_timeout = options.load_timeout = settings.limits.result;
  options.progress_timeout = settings.limits.progress;
  options.connect_timeout = settings.limits.connect;
  options.sockets = settings.limits.socket();
  options.sockets.send_buffer_bytes = options.sockets.receive_buffer_bytes = static_cast<int>(settings.socket_buffer);
  options.insist_on_paths = settings.paths.insist();
  options.resume = settings.resume.options();
  options.base = program::page_digests();  // where the receiver holds an older copy
  options.on_path = log.hook();
  options.on_event = [&](const Event& event) {
    if (event.kind == EventKind::status && event.progress.status == MigrationStatus::device)
      outcome.spent = meter.spent();
  };
  options.reason = [&](const Error& error) { return reasons.text(error); };
  options.migration = &migration;
  auto done = migrate_to<program::Stacks>(guest, settings.paths.paths(), options, securing.function());
  guest.progress.reset();
  if (!done && (done.error().stage == Stage::connect || done.error().stage == Stage::handshake) &&
      done.error().code != Errc::session_lost)
    throw Failure(done.error(), settings.paths.given() ? settings.paths.name() : "connect to " + settings.paths.text());
  if (!done) throw failure_of(done.error(), guest, reasons, migration, settings);
  outcome.report = std::move(*done);
  outcome.cipher = securing.cipher();
  outcome.paths = migration.paths();
  outcome.lost = migration.progress().lost;
  return outcome;
}

int run(const Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    if (!multifd::valid_page_bytes(settings.page_size))
      throw program::Usage("--page-size: a power of two from 1024 to 65536");
    const auto file = program::Mapping::read_file(settings.file, settings.size, settings.page_size);
    program::need_descriptors(settings.stack.channels + 1);
    program::tell_of_smaller_buffers(SO_SNDBUF, settings.socket_buffer);
    if (settings.populate) {
      const program::Step step("mapping every page of the file");
      file.populate_for_reading(&interrupt);
    }
    program::Reasons reasons;
    FileGuest guest(settings, file, reasons);
    const std::uint64_t ram_bytes = file.bytes().size() * settings.rounds;
    program::PathLog log(settings.paths, "receiver");
    const Outcome outcome = send(settings, log, guest, reasons, ram_bytes, interrupt);

    const SenderStats& stats = outcome.report.stats;
    json report = program::report(outcome.spent.seconds, ram_bytes, stats.zero_on_main, stats.channels);
    program::add_spent(report, outcome.spent);
    report["digest"] = guest.digest();
    // Of the last round that had pages; behind it the channels wait for the digest.
    report["bounded_by"] = to_string(outcome.report.rounds.at(settings.rounds - 1).bound);
    report["tls_cipher"] = program::text_or_null(outcome.cipher);
    report["producer_waits"] = stats.producer_waits;
    report["base"] = program::base_report(outcome.report.base);
    if (outcome.report.base) report["base"]["equal_pages"] = outcome.report.base->equal_pages;
    log.add_to(report, outcome.paths, outcome.lost);
    if (settings.json_path != "-") {
      const ChannelStats sum = total(stats.channels);
      program::say(
          "sent {} in {:.2f} s over {} channels: {:.2f} GiB/s, {} normal and {} zero pages, {} on the wire, "
          "bounded by {}{}; digest {} verified{}{}\n",
          program::format_bytes(static_cast<double>(ram_bytes)), outcome.spent.seconds, stats.channels.size(),
          report["gib_per_s"].get<double>(), sum.normal_pages, sum.zero_pages + stats.zero_on_main,
          program::format_bytes(static_cast<double>(sum.wire_bytes)), report["bounded_by"].get<std::string>(),
          program::base_note(outcome.report.base), guest.digest(), program::cipher_note(outcome.cipher),
          log.note(outcome.paths, outcome.lost));
    }
    json_file.write(report);
    return program::exit_done;
  } catch (const std::exception& error) {
    json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
    throw;
  }
}

int list_peers() {
  fmt::print("| peer | zero lists | device state | digest | an epoch ends |\n| --- | --- | --- | --- | --- |\n");
  const auto yes = [](bool value) { return value ? "yes" : "no"; };
  for (const PeerProfile& peer : peer_profiles)
    fmt::print("| `{}` | {} | {} | {} | {} |\n", peer.name, yes(peer.zero_lists), yes(peer.device_state),
               yes(peer.digests), peer.sync_style == SyncStyle::per_section ? "with each section" : "with each round");
  return program::exit_done;
}

int list_kernels() {
  for (const ZeroKernel& kernel : zero_kernels())
    fmt::print("{:8} {}{}\n", kernel.name, kernel.supported ? "supported" : "not on this machine",
               kernel.name == chosen_zero_kernel().name ? ", chosen" : "");
  return program::exit_done;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Sends a file as one RAM block to ram_receive over many channels.", "ram_send");
  app.add_option("--connect", settings.connect,
                 "Where ram_receive listens: tcp:HOST:PORT or unix:PATH (needed, or --path)");
  app.add_option("--file", settings.file, "The bytes to send (needed)");
  program::add_size(app, "--size", settings.size, "Send only that much from the start of the file (0: all)");
  program::add_size(app, "--page-size", settings.page_size, "Bytes per page, 1024 to 65536");
  settings.stack.add_to(app);
  settings.paths.add_to(app);
  settings.resume.add_to(app);
  std::vector<std::string> peers;
  for (const PeerProfile& profile : peer_profiles) peers.emplace_back(profile.name);
  app.add_option("--peer", settings.peer, "What the receiver can do")
      ->check(CLI::IsMember(peers))
      ->capture_default_str();
  app.add_option("--rounds", settings.rounds, "Send everything that often, one epoch each")
      ->check(CLI::Range(1u, 1'000'000u))
      ->capture_default_str();
  app.add_flag("--digest", settings.digest, "Put an XXH3-64 into every packet, which the receiver checks");
  program::add_size(
      app, "--socket-buffer", settings.socket_buffer,
      "SO_SNDBUF of the channels (0: a packet on one machine, else the kernel's choice); net.core.wmem_max at most")
      ->check(CLI::Range(0u, 1u << 30));
  app.add_option("--way", settings.way,
                 "How pages get into plain connections: copied (sendmsg), or as references that the receiver's reads "
                 "follow (splice); auto: splice over UNIX sockets")
      ->check(CLI::IsMember({"auto", "sendmsg", "splice"}))
      ->capture_default_str();
  app.add_flag("--populate", settings.populate, "Map every page of the file before connecting, as a VMM's memory is");
  settings.limits.add_to_sender(app);
  settings.tls.add_to(app, program::TlsSide::client);
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  app.add_flag("--list-kernels", settings.list_kernels, "List the zero-check kernels of this machine and end");
  bool peers_asked = false;
  app.add_flag("--list-peers", peers_asked, "List what each generation of receivers can do and end");
  return program::run(app, argc, argv, [&] {
    if (settings.list_kernels) return list_kernels();
    if (peers_asked) return list_peers();
    if ((settings.connect.empty() && !settings.paths.given()) || settings.file.empty())
      throw program::Usage("--connect (or --path) and --file are needed");
    settings.paths.read(settings.connect, settings.stack.channels);
    settings.stack.peer = need(find_peer_profile(settings.peer));
    if (settings.digest && !settings.stack.peer.digests)
      throw program::Usage("--digest with --peer " + settings.peer + ": that peer does not verify digests");
    if (way_of(settings.way) == program::Way::spliced && settings.tls.on())
      throw program::Usage("--way splice: TLS encrypts pages, and so copies them");
    settings.stack.progress_timeout = settings.limits.progress;
    settings.stack.digest = settings.digest ? Digest::on : Digest::off;
    settings.stack.check();
    // What the channels carry is what that generation reads; the main connection leads to ram_receive all the same.
    settings.stack.peer.digests = true;
    settings.stack.peer.sync_style = peer_multifd.sync_style;
    settings.tls.prepare(settings.paths.address());
    return run(settings);
  });
}
