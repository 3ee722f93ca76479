// SPDX-License-Identifier: MIT
//
// qemu_relay: stands between a real QEMU source and a real QEMU destination, ends the channels on one side and sends
// again on the other with another number of channels, compression and form of zero pages.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "common/limits.hpp"
#include "common/tell.hpp"
#include "qemu_relay/relay.hpp"

namespace {

using namespace multifd;
using nlohmann::json;

/// "; source TLS1.3 AES-128-GCM, destination plain", or nothing when both sides are plain.
std::string ciphers(const json& report) {
  const json &in = report["in_tls_cipher"], &out = report["out_tls_cipher"];
  if (in.is_null() && out.is_null()) return {};
  const auto name = [](const json& cipher) { return cipher.is_null() ? "plain" : cipher.get<std::string>(); };
  return fmt::format("; source {}, destination {}", name(in), name(out));
}

int pass_on(const relay::Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    program::need_descriptors(settings.source.channels + settings.out.channels + 2);
    program::QemuSource source(settings.source, interrupt);
    relay::Relay relay(settings, source, interrupt);
    const json report = relay.run();
    if (settings.json_path != "-")
      program::say("relayed {} of {} in {:.2f} s: {:.2f} GiB/s, {} epochs; {}{}{}\n",
                   program::format_bytes(report["ram_bytes"].get<double>()), report["machine"].get<std::string>(),
                   report["seconds"].get<double>(), report["gib_per_s"].get<double>(),
                   report["epochs"].get<std::uint64_t>(), report["outcome"].get<std::string>(), ciphers(report),
                   relay.paths_note());
    json_file.write(report);
    return program::exit_done;
  } catch (const std::exception& error) {
    json report = program::failure_report(program::text_of(error), watch.seconds());
    if (const auto* unfinished = dynamic_cast<const relay::Unfinished*>(&error))
      report["guest"] = relay::to_string(unfinished->guest);
    json_file.write(report);
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  relay::Settings settings;
  settings.out.channels = 2;
  std::string peer = relay::peer_auto;
  std::string memory = "unknown";
  std::vector<std::string> peers{relay::peer_auto};
  for (const PeerProfile& profile : peer_profiles) peers.emplace_back(profile.name);

  CLI::App app("Relays a migration between two real QEMUs and changes channels, compression and zero pages on the way.",
               "qemu_relay");
  settings.source.add_to(app, "in-");
  app.add_option("--connect", settings.connect,
                 "Where the destination listens: tcp:HOST:PORT or unix:PATH (needed, or --out-path)");
  settings.out.add_to(app, "out-");
  settings.out_paths.add_to(app, "out-");
  settings.out_tls.add_to(app, program::TlsSide::client, "out-");
  settings.out_tls.take_bare_ends();
  app.add_option(
         "--out-peer", peer,
         "The destination's generation; auto: the oldest one that knows the machine type, or any at all where that "
         "names no version")
      ->check(CLI::IsMember(peers))
      ->capture_default_str();
  program::add_out_memory(app, "--out-memory", memory, "zero lists alone do");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  auto* zero_pages = app.get_option("--out-zero-pages")->default_str("multifd if the peer knows it, else legacy");
  return program::run(app, argc, argv, [&] {
    if (peer != relay::peer_auto) settings.out_peer = program::need(find_peer_profile(peer));
    // The wrong pair is found now where both are given, else when the machine type is known.
    if (settings.out_peer) settings.out.peer = *settings.out_peer;
    settings.out_memory = program::out_memory_of(memory);
    settings.choose_zero_pages = zero_pages->count() == 0;
    if (settings.choose_zero_pages) settings.out.zero_pages = ZeroPagesLegacy::name;
    settings.out.check();
    (void)settings.source.uuid_check();
    settings.out_paths.read(settings.connect, settings.out.channels);
    settings.out_tls.prepare(settings.out_paths.address());
    settings.source.tls.prepare(program::address_of(settings.source.listen, "--listen"));
    return pass_on(settings);
  });
}
