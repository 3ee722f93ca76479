// SPDX-License-Identifier: MIT
//
// qemu_dump: plays migration destination for a real QEMU and writes every RAM block to a sparse file, with a manifest
// that appears last. format/roles.md section 10, step by step.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "common/limits.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "qemu_dump/dump.hpp"

namespace {

using namespace multifd;
using nlohmann::json;

int receive(const dump::Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    dump::Output output(settings.output);
    program::need_descriptors(settings.source.channels + 1);
    program::QemuSource source(settings.source, interrupt);
    const json report = dump::Dump(settings, output, source, interrupt).run();
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
  dump::Settings settings;
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
    return receive(settings);
  });
}
