// SPDX-License-Identifier: MIT
//
// qemu_load: plays migration source for a real QEMU that was started with -incoming, and gives it a guest that
// qemu_dump, or a QEMU with mapped-ram, has written to a file. format/roles.md section 18, step by step.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "common/images.hpp"
#include "common/limits.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "qemu_load/load.hpp"

namespace {

using namespace multifd;
using nlohmann::json;

int send(const load::Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    program::need_descriptors(settings.out.channels + 1);
    const auto input = load::Input::open(settings.input, settings.base, settings.page_bytes, settings.offset);
    const json report = load::Load(settings, *input, interrupt).run();
    if (settings.json_path != "-")
      program::say("loaded {} of {} from {} in {:.2f} s, {:.2f} GiB/s: the guest is the destination's{}\n",
                   program::format_bytes(report["ram_bytes"].get<double>()), report["machine"].get<std::string>(),
                   settings.input, report["seconds"].get<double>(), report["gib_per_s"].get<double>(),
                   report["tls_cipher"].is_null() ? "" : program::cipher_note(report["tls_cipher"].get<std::string>()));
    json_file.write(report);
    return program::exit_done;
  } catch (const std::exception& error) {
    json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  load::Settings settings;
  settings.out.channels = 2;
  std::string peer = "auto";
  std::string memory = "unknown";
  std::vector<std::string> peers{peer};
  for (const PeerProfile& profile : peer_profiles)
    if (profile.major != 0) peers.emplace_back(profile.name);

  CLI::App app("Restores a guest into a real QEMU that waits for a migration (-incoming).", "qemu_load");
  app.add_option(
         "--input", settings.input,
         "What is restored: a mapped-ram file of QEMU's or of qemu_dump's, as it is or compressed, or the folder of "
         "qemu_dump --format blocks")
      ->required();
  program::add_size(app, "--offset", settings.offset, "Where the stream begins in a mapped-ram file");
  app.add_option("--base", settings.base, "The image that an incremental one was made against");
  app.add_option(
         "--connect", settings.connect,
         "Where the destination listens: tcp:HOST:PORT or unix:PATH; with --channels 0 also exec:COMMAND, which gets "
         "the stream on its stdin, or fd:N, a descriptor that is open")
      ->required();
  settings.out.add_to(app, {}, program::FewestChannels::none);
  settings.tls.add_to(app, program::TlsSide::client, "");
  settings.tls.take_bare_ends();
  app.add_option(
         "--peer", peer,
         "The destination's generation; auto: the oldest one that knows the machine type, or any at all where that "
         "names no version")
      ->check(CLI::IsMember(peers))
      ->capture_default_str();
  program::add_out_memory(app, "--out-memory", memory, "zero pages are not sent at all");
  auto* return_path =
      app.add_option("--return-path", settings.return_path,
                     "Whether the destination is asked to confirm; false: for those that have no return path, as pipes")
          ->capture_default_str();
  app.add_option("--threads", settings.threads, "Threads that read the input")
      ->check(CLI::Range(1u, max_channels))
      ->capture_default_str();
  program::add_size(app, "--page-size", settings.page_bytes, "Page size of the guest in an image");
  program::add_duration(app, "--timeout", settings.timeout, "For connecting, and for each wait for the destination");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  auto* zero_pages = app.get_option("--zero-pages")->default_str("multifd if the peer knows it, else legacy");
  return program::run(app, argc, argv, [&] {
    if (peer != "auto") settings.peer = program::need(find_peer_profile(peer));
    if (settings.peer) settings.out.peer = *settings.peer;
    settings.memory = program::out_memory_of(memory);
    settings.choose_zero_pages = zero_pages->count() == 0;
    if (settings.choose_zero_pages) settings.out.zero_pages = ZeroPagesLegacy::name;
    settings.out.check();
    if (settings.out.channels == 0 && settings.out.bandwidth != 0)
      throw program::Usage("--bandwidth with --channels 0: it is the channels' cap");
    settings.pipe = program::pipe_address_of(settings.connect, program::PipeUse::write, "--connect");
    if (!settings.pipe) {
      settings.tls.prepare(program::address_of(settings.connect, "--connect"));
      return send(settings);
    }
    if (settings.out.channels != 0)
      throw program::Usage("--connect " + settings.connect +
                           " with channels: give --channels 0, and switch multifd off");
    if (settings.tls.on()) throw program::Usage("--connect " + settings.connect + " with TLS: only sockets have it");
    if (!settings.pipe->command.empty() && settings.return_path && return_path->count() > 0)
      throw program::Usage("--connect " + settings.connect + " with --return-path true: a pipe has none");
    return send(settings);
  });
}
