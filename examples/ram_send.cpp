// SPDX-License-Identifier: MIT
//
// ram_send: the smallest real sender. A file's bytes go as one RAM block to ram_receive in another process; a main
// connection of our own beside the channels carries what a VMM's main stream would.
#include <fmt/format.h>

#include <sys/socket.h>
#include <CLI/CLI.hpp>

#include "common/control.hpp"
#include "common/limits.hpp"
#include "common/mapping.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tell.hpp"
#include "common/uuid.hpp"

namespace {

using namespace multifd;
using nlohmann::json;
using program::Control;
using program::Failure;
using program::MessageType;
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
  bool list_kernels = false;
  std::string json_path;
  program::StackOptions stack;
  program::TimeLimits limits;
  program::Tls tls;
};

struct Outcome {
  program::Spent spent;
  SenderStats stats;
  std::uint64_t ram_bytes = 0;
};

Outcome send(const Settings& settings, const program::Mapping& file, Control& control, const Interrupt& interrupt) {
  const std::span<const std::byte> bytes = file.bytes();
  RamMap ram(settings.page_size);
  const BlockId block = need(ram.add_read_only("ram", bytes));
  SocketOptions socket = settings.limits.socket(&interrupt);
  socket.send_buffer_bytes = socket.receive_buffer_bytes = static_cast<int>(settings.socket_buffer);
  const Address address = program::address_of(settings.connect, "--connect");

  const program::Meter meter;
  const program::Stopwatch watch;
  auto plain = need(connect_channels(address, settings.stack.channels, socket), "connect the channels");
  auto links = need(settings.tls.secure(std::move(plain), interrupt, settings.limits.connect));
  const auto sender = program::open_sender(settings.stack, ram, std::move(links));
  const program::OnInterrupt cancel(interrupt, [&] { sender->cancel(); });
  program::ZeroRuns zeros(control, settings.page_size);
  const std::uint64_t all = bytes.size() * settings.rounds;
  {
    const program::Progress progress(
        [&]() -> program::Snapshot {
          const SenderStats stats = sender->stats();
          const ChannelStats sum = total(stats.channels);
          const auto moved =
              static_cast<double>((sum.normal_pages + sum.zero_pages + stats.zero_on_main) * settings.page_size);
          return {
              .line = fmt::format("{:3.0f} %  {} of {}  {:.2f} GiB/s  wire {}", 100 * moved / static_cast<double>(all),
                                  program::format_bytes(moved), program::format_bytes(static_cast<double>(all)),
                                  program::rate(moved, watch.seconds()),
                                  program::format_bytes(static_cast<double>(sum.wire_bytes))),
              .moved = sum.wire_bytes,
              .stalled =
                  "Is the receiver stopped (SIGSTOP, a debugger, its host paused), or its disk full or slow, "
                  "or the network between cut? --progress-timeout ends the wait"};
        },
        settings.limits.hint);
    for (unsigned round = 0; round < settings.rounds; ++round) {
      const auto on_zero = [&](std::uint64_t offset) {
        zeros.add(offset);
        return true;
      };
      std::uint64_t done = 0;
      for (const program::Run& run : file.data(settings.page_size)) {
        need(sender->queue_zeros(block, done, run.offset - done, on_zero));
        need(sender->queue_range(block, run.offset, run.bytes, on_zero));
        done = run.offset + run.bytes;
      }
      need(sender->queue_zeros(block, done, bytes.size() - done, on_zero));
      need(sender->close_epoch());
      zeros.flush();
      control.send(MessageType::round_end);
    }
    need(sender->close_channels());
  }
  return {.spent = meter.spent(), .stats = sender->stats(), .ram_bytes = all};
}

int migrate(const Settings& settings) {
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
    const std::span<const std::byte> bytes = file.bytes();
    Control control =
        Control::connect(program::address_of(settings.connect, "--connect"), interrupt, settings.limits, settings.tls);
    try {
      control.send_json(MessageType::hello, {{"size", bytes.size()},
                                             {"page_size", settings.page_size},
                                             {"channels", settings.stack.channels},
                                             {"compression", settings.stack.compression},
                                             {"uuid", program::to_string(settings.stack.uuid)}});
      const Outcome outcome = send(settings, file, control, interrupt);
      const std::string digest = [&] {
        const program::Step step("all is sent, reading the file again for its digest");
        return file.digest();
      }();
      const bool changed = file.changed();
      control.send_json(MessageType::done, {{"digest", digest}, {"changed", changed}});
      const program::Progress waiting("all is sent, waiting for the receiver's verdict",
                                      "The receiver compares digests and writes its file: is it stopped, or its disk "
                                      "slow? --result-timeout ends the wait",
                                      settings.limits.hint);
      const json result = [&] {
        try {
          return control.expect(MessageType::result, program::small_message, settings.limits.result_limit()).json();
        } catch (const Failure& failure) {
          if (!changed) throw;
          throw Failure(fmt::format("{}: was changed while it was being sent ({})", settings.file, failure.what()));
        }
      }();
      control.finish();

      json report =
          program::report(outcome.spent.seconds, outcome.ram_bytes, outcome.stats.zero_on_main, outcome.stats.channels);
      program::add_spent(report, outcome.spent);
      report["digest"] = program::field<std::string>(result, "digest");
      report["bounded_by"] = to_string(bounded_by(outcome.stats));
      report["tls_cipher"] = program::text_or_null(control.cipher());
      report["producer_waits"] = outcome.stats.producer_waits;
      if (settings.json_path != "-") {
        const ChannelStats sum = total(outcome.stats.channels);
        program::say(
            "sent {} in {:.2f} s over {} channels: {:.2f} GiB/s, {} normal and {} zero pages, {} on the wire, "
            "bounded by {}; digest {} verified{}\n",
            program::format_bytes(static_cast<double>(outcome.ram_bytes)), outcome.spent.seconds,
            settings.stack.channels, report["gib_per_s"].get<double>(), sum.normal_pages,
            sum.zero_pages + outcome.stats.zero_on_main, program::format_bytes(static_cast<double>(sum.wire_bytes)),
            report["bounded_by"].get<std::string>(), report["digest"].get<std::string>(),
            program::cipher_note(control.cipher()));
      }
      json_file.write(report);
      return program::exit_done;
    } catch (const Failure& failure) {
      control.give_up(failure);
    } catch (const std::exception& error) {
      control.give_up(Failure(program::text_of(error)));
    }
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
  app.add_option("--connect", settings.connect, "Where ram_receive listens: tcp:HOST:PORT or unix:PATH (needed)");
  app.add_option("--file", settings.file, "The bytes to send (needed)");
  program::add_size(app, "--size", settings.size, "Send only that much from the start of the file (0: all)");
  program::add_size(app, "--page-size", settings.page_size, "Bytes per page, 1024 to 65536");
  settings.stack.add_to(app);
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
    if (settings.connect.empty() || settings.file.empty()) throw program::Usage("--connect and --file are needed");
    settings.stack.peer = need(find_peer_profile(settings.peer));
    settings.stack.uuid = program::new_uuid();
    settings.stack.progress_timeout = settings.limits.progress;
    settings.stack.digest = settings.digest ? Digest::on : Digest::off;
    settings.stack.check();
    settings.tls.prepare(program::address_of(settings.connect, "--connect"));
    return migrate(settings);
  });
}
