// SPDX-License-Identifier: MIT
//
// ram_image: looks at images of guest memory, checks them, makes one format of another, and compares two.
#include <fmt/format.h>
#include <multifd/image/seekable_zstd_verify.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "common/images.hpp"
#include "common/limits.hpp"
#include "common/qemu_source.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"
#include "common/uuid.hpp"
#include "ram_image/diff.hpp"

namespace {

using namespace multifd;
using nlohmann::json;
using program::Failure;
using program::ImageFile;

struct Settings {
  std::string input, other, base, other_base, output, to, json_path;
  std::uint64_t page_bytes = 4096;
  std::uint64_t offset = 0;
  unsigned threads = 2;
  program::ConvertOptions convert;

  const Interrupt* interrupt = nullptr;

  ImageFile image() const { return ImageFile(input, base, page_bytes, offset); }
};

json info(const Settings& settings) {
  const ImageFile image = settings.image();
  const image::MappedRamReader& ram = image.ram();
  json report{{"format", program::to_string(image.format())},
              {"input", image.path()},
              {"machine", program::printable(ram.stream().machine_type())},
              {"uuid", ram.stream().uuid() ? json(program::to_string(*ram.stream().uuid())) : json()},
              {"page_size", ram.page_bytes()},
              {"ram_bytes", ram.ram_bytes()},
              {"file_bytes", image.file().bytes()},
              {"image_bytes", image.bytes().bytes()},
              {"device_bytes", ram.devices().bytes},
              {"blocks", json::array()}};
  for (std::size_t i = 0; i < ram.blocks().size(); ++i) {
    const qemu::BlockInfo& block = ram.blocks()[i];
    std::uint64_t pages = 0;
    program::need(ram.for_each_run(i,
                                   [&](std::uint64_t, std::uint64_t bytes) -> Result<void> {
                                     pages += bytes / ram.page_bytes();
                                     return {};
                                   }),
                  image.path());
    report["blocks"].push_back({{"name", program::printable(block.idstr)},
                                {"size", block.used_length},
                                {"pages", block.used_length / ram.page_bytes()},
                                {"stored_pages", pages},
                                {"pages_offset", block.pages_offset},
                                {"shared", block.pages_offset == 0}});
  }
  if (const auto* compressed = image.compressed())
    report.update({{"frames", compressed->table().frames()}, {"incremental", !settings.base.empty()}});
  return report;
}

void print_info(const json& report) {
  const auto bytes = [](const json& value) { return program::format_bytes(value.get<double>()); };
  program::say("{}: {}, {} of a {}, {} in the file\n", report["input"].get<std::string>(),
               report["format"].get<std::string>(), bytes(report["ram_bytes"]), report["machine"].get<std::string>(),
               bytes(report["file_bytes"]));
  for (const json& block : report["blocks"])
    program::say("  {:<24} {:>12}  {}\n", block["name"].get<std::string>(), bytes(block["size"]),
                 block["shared"].get<bool>()
                     ? std::string("shared memory, not in the file")
                     : fmt::format("{} of {} pages are not zero", block["stored_pages"].get<std::uint64_t>(),
                                   block["pages"].get<std::uint64_t>()));
  program::say("  devices: {}\n", bytes(report["device_bytes"]));
}

json verify(const Settings& settings) {
  const ImageFile image = settings.image();  // its structure
  json report{{"input", image.path()},
              {"format", program::to_string(image.format())},
              {"checksums", image.compressed() != nullptr}};
  // The bitmaps, too, and that nothing of it lies outside the file.
  for (std::size_t i = 0; i < image.ram().blocks().size(); ++i)
    program::need(image.ram().for_each_run(i, [](std::uint64_t, std::uint64_t) -> Result<void> { return {}; }),
                  image.path());
  if (image.compressed() != nullptr) {
    program::ImageWork work("verifying", image.bytes().bytes(), settings.threads, *settings.interrupt);
    work.need(image::verify(*image.compressed(), work.options()), image.path());
  }
  return report;
}

json convert(const Settings& settings) {
  const ImageFile from = settings.image();
  program::PartFile to(settings.output);
  to.check_writes();
  json report = program::convert(from, program::image_format(settings.to), to, settings.convert, *settings.interrupt);
  to.sync();
  to.rename();
  to.release();
  return report;
}

/// Runs one of the commands. Params `work`: returns what --json says, beside the keys of all programs.
template <class Work, class Tell>
int run(Settings& settings, const Work& work, const Tell& tell) {
  settings.interrupt = &program::catch_signals();
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    json report = work(settings);
    report["ok"] = true;
    report["seconds"] = watch.seconds();
    if (settings.json_path != "-") tell(report);
    json_file.write(report);
    return report.value("differ", false) ? program::exit_failed : program::exit_done;
  } catch (const std::exception& error) {
    json_file.write(program::failure_report(program::text_of(error), watch.seconds()));
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Looks at images of guest memory, checks them, makes one format of another, and compares two.",
               "ram_image");
  app.require_subcommand(1);
  const auto command = [&](const char* name, const char* what) {
    CLI::App* const sub = app.add_subcommand(name, what);
    sub->add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
    program::add_size(*sub, "--page-size", settings.page_bytes, "Page size of the guest");
    program::add_size(*sub, "--offset", settings.offset,
                      "Where the stream begins in a mapped-ram file (QEMU's file:PATH,offset=N)");
    sub->add_option("--base", settings.base, "The image that an incremental one was made against");
    sub->add_option("file", settings.input, "A mapped-ram file, as it is or compressed")->required();
    return sub;
  };
  CLI::App* const info_command = command("info", "Says what an image holds");
  CLI::App* const verify_command = command("verify", "Checks an image, and with a compressed one every byte of it");
  CLI::App* const convert_command = command("convert", "Makes another format of an image");
  CLI::App* const diff_command = command("diff", "Compares the memory of two images; exit status 1: they differ");
  const auto add_threads = [&](CLI::App* sub) {
    sub->add_option("--threads", settings.threads, "Threads that read")
        ->check(CLI::Range(1u, max_channels))
        ->capture_default_str();
  };
  add_threads(verify_command);
  add_threads(diff_command);
  convert_command->add_option("output", settings.output, "The file that is made; nothing is overwritten")->required();
  convert_command
      ->add_option("--to", settings.to,
                   "mapped-ram: as QEMU loads it\n"
                   "mapped-ram-zst: compressed and with checksums\n"
                   "elf, raw, lime: memory by guest-physical address, for crash, gdb, drgn and volatility")
      ->check(CLI::IsMember(program::image_formats()))
      ->required();
  settings.convert.add_to(*convert_command);
  diff_command->add_option("other", settings.other, "The other image")->required();
  diff_command->add_option("--other-base", settings.other_base, "What the other one was made against");
  return program::run(app, argc, argv, [&] {
    if (info_command->parsed()) return run(settings, info, print_info);
    if (verify_command->parsed())
      return run(settings, verify, [](const json& report) {
        program::say(
            "{}: sound{}\n", report["input"].get<std::string>(),
            report["checksums"].get<bool>() ? ", every byte" : " in its structure; this format has no checksums");
      });
    if (convert_command->parsed())
      return run(settings, convert, [](const json& report) {
        program::say("{}: {}, {} on the disk\n", report["output"].get<std::string>(),
                     program::format_bytes(report["bytes"].get<double>()),
                     program::format_bytes(report["disk_bytes"].get<double>()));
      });
    return run(
        settings,
        [](const Settings& given) {
          const ImageFile a = given.image();
          const ImageFile b(given.other, given.other_base, given.page_bytes, given.offset);
          return ram_image::diff(a, b, given.threads, *given.interrupt);
        },
        ram_image::print_diff);
  });
}
