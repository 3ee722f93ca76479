// SPDX-License-Identifier: MIT
//
// qemu_dump: plays migration destination for a real QEMU and writes its memory and its devices' state to files, in one of
// several formats. format/roles.md section 10, step by step.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "common/limits.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "qemu_dump/dump.hpp"
#include "qemu_dump/folder_output.hpp"
#include "qemu_dump/image_output.hpp"

namespace {

using namespace multifd;
using nlohmann::json;

std::unique_ptr<dump::Output> output_of(const dump::Settings& settings, const Interrupt& interrupt) {
  if (settings.format == "blocks") return std::make_unique<dump::FolderOutput>(settings.output);
  return std::make_unique<dump::ImageOutput>(settings.output, program::image_format(settings.format), settings.convert,
                                             interrupt);
}

int receive(const dump::Settings& settings) {
  const Interrupt& interrupt = program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    const std::unique_ptr<dump::Output> output = output_of(settings, interrupt);
    program::need_descriptors(settings.source.channels + 1);
    program::QemuSource source(settings.source, interrupt);
    const json report = dump::Dump(settings, *output, source, interrupt).run();
    if (settings.json_path != "-")
      program::say("dumped {} blocks of {} to {}: {} in {:.2f} s, {:.2f} GiB/s, {} epochs{}{}\n",
                   report["blocks"].size(), report["machine"].get<std::string>(), settings.output,
                   program::format_bytes(report["ram_bytes"].get<double>()), report["seconds"].get<double>(),
                   report["gib_per_s"].get<double>(), report["epochs"].get<std::uint64_t>(),
                   report["stood_still"].is_null()
                       ? ""
                       : fmt::format(", the guest stood still for {:.2f} s", report["stood_still"].get<double>()),
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
  CLI::App app("Takes a guest that a real QEMU migrates to it, and writes it to a file, or to a folder of files.",
               "qemu_dump");
  settings.source.add_to(app, "", program::FewestChannels::none);
  app.add_option("--output", settings.output,
                 "The dump's file; with --format blocks a folder, made if missing. Nothing is overwritten")
      ->required();
  app.add_option("--format", settings.format,
                 "blocks: a folder with a file per RAM block, the devices' state, and manifest.json\n"
                 "mapped-ram: a file that QEMU 9.0 and later load (-incoming file:PATH, with the capability)\n"
                 "mapped-ram-zst: the same, compressed and with checksums; zstd -d makes a mapped-ram file of it\n"
                 "elf, raw, lime: memory by guest-physical address, for crash, gdb, drgn and volatility")
      ->check(CLI::IsMember(program::dump_formats()))
      ->capture_default_str();
  settings.convert.add_to(app);
  app.add_flag("--switchover-ack", settings.switchover_ack,
               "The source has the capability switchover-ack and a machine type up to 11.0");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  return program::run(app, argc, argv, [&] {
    settings.source.prepare();
    return receive(settings);
  });
}
