// SPDX-License-Identifier: MIT
//
// multifd_pager: a daemon that serves the memory of guests on demand. A VMM hands over its userfaultfd, starts its guest at
// once, and the guest's pages come from an image as they are touched, and all others behind them.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <map>
#include <nlohmann/json.hpp>

#include "common/limits.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "common/uuid.hpp"
#include "multifd_pager/pager.hpp"

namespace {

int serve(const pager::Settings& settings, const multifd::Address& address) {
  const multifd::Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    pager::Pager pager(settings, address, interrupt);
    nlohmann::json report = pager.run();
    // A daemon has done its work when it is told to end. One that was to serve a number of guests has to have served them.
    const bool failed = settings.guests != 0 && report["failed"] != 0;
    if (failed) {
      report["ok"] = false;
      report["error"] = fmt::format("{} of the connections failed", report["failed"].get<std::uint64_t>());
    }
    if (settings.json_path != "-")
      program::say(
          "{} guests, {} connections failed, {} faults, {} placed in {:.2f} s\n", report["guests"].get<std::uint64_t>(),
          report["failed"].get<std::uint64_t>(), report["faults"].get<std::uint64_t>(),
          program::format_bytes(report["normal_pages"].get<double>() * static_cast<double>(settings.source.page_bytes)),
          report["seconds"].get<double>());
    json_file.write(report);
    return failed ? program::exit_failed : program::exit_done;
  } catch (const std::exception& error) {
    json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  pager::Settings settings;
  CLI::App app(
      "Serves the memory of running guests on demand, from an image or a page server, to VMMs that hand over their "
      "userfaultfd.",
      "multifd_pager");
  std::string connect, session;
  auto* image =
      app.add_option("--image", settings.source.image,
                     "Where the pages come from: a mapped-ram file of QEMU's or of this library's, as it is or "
                     "compressed");
  app.add_option(
         "--connect", connect,
         "Or a page server (postcopy/page_server.hpp), at tcp:HOST:PORT or unix:PATH; each guest has connections of "
         "its own, and goes on with what it has while they are lost")
      ->excludes(image);
  app.add_option("--session", session, "With --connect: the UUID that the server was given")->needs("--connect");
  app.add_flag("--raw", settings.source.raw,
               "The image is the guest's memory and nothing else, as Firecracker and Cloud Hypervisor save it");
  app.add_option("--base", settings.source.base, "The image that an incremental one was made against");
  program::add_size(app, "--offset", settings.source.offset, "Where the stream begins in a mapped-ram file");
  program::add_size(app, "--page-size", settings.source.page_bytes, "Page size of the guest");
  app.add_option("--listen", settings.listen, "Where VMMs connect: unix:PATH")->required();
  const std::map<std::string, pager::ProtocolName> protocols{
      {"firecracker", pager::ProtocolName::firecracker},
      {"cloud-hypervisor", pager::ProtocolName::cloud_hypervisor},
      {"multifd", pager::ProtocolName::multifd}};
  std::string protocol = "multifd";
  app.add_option("--protocol", protocol, "How VMMs hand over their userfaultfd")
      ->check(CLI::IsMember({"firecracker", "cloud-hypervisor", "multifd"}))
      ->capture_default_str();
  app.add_option(
      "--prefetch", settings.prefetch,
      "A list of pages, as --record writes it, that come first, in that order; with --record of the same name it "
      "need not be there yet");
  app.add_option(
      "--record", settings.record,
      "Write a list of the pages that guests wait for, in that order, behind those of --prefetch; written when a "
      "guest's memory is complete, and when the guest or the pager ends");
  app.add_option("--fault-threads", settings.fault_threads, "Threads for the faults of each guest")
      ->check(CLI::Range(1u, 64u))
      ->capture_default_str();
  app.add_option("--workers", settings.workers,
                 "Threads that fetch the rest of each guest's memory; 0: only what is asked for comes")
      ->check(CLI::Range(0u, 64u))
      ->capture_default_str();
  app.add_option("--max-guests", settings.max_guests, "Guests at once; what connects beyond is refused")
      ->check(CLI::Range(1u, 4096u))
      ->capture_default_str();
  app.add_option("--guests", settings.guests, "End when so many guests have come and gone; 0: at a signal")
      ->capture_default_str();
  program::add_duration(app, "--handshake-timeout", settings.handshake_timeout,
                        "For a VMM's handshake, from its connection on");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  return program::run(app, argc, argv, [&] {
    settings.protocol = protocols.at(protocol);
    const multifd::Address address = program::address_of(settings.listen, "--listen");
    if (address.kind != multifd::AddressKind::unix_socket)
      throw program::Usage("--listen: only a UNIX socket carries descriptors: unix:PATH");
    if (settings.source.image.empty() == connect.empty()) throw program::Usage("--image or --connect");
    if (!connect.empty()) {
      if (settings.source.raw || !settings.source.base.empty() || settings.source.offset != 0)
        throw program::Usage("--connect with --raw, --base or --offset: those are of images");
      settings.source.server = program::address_of(connect, "--connect");
    }
    if (!session.empty()) {
      const auto uuid = program::parse_uuid(session);
      if (!uuid) throw program::Usage("--session: no UUID");
      settings.source.session = *uuid;
    }
    if (settings.source.raw && (!settings.source.base.empty() || settings.source.offset != 0))
      throw program::Usage("--raw with --base or --offset: those are of mapped-ram files");
    return serve(settings, address);
  });
}
