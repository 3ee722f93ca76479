// SPDX-License-Identifier: MIT
//
// image_speed: saves memory to a mapped-ram file, or loads one, once, and prints as JSON what that took: images.py runs it
// beside QEMU.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

#include <multifd/image/load.hpp>
#include <multifd/image/mapped_ram_writer.hpp>
#include <multifd/image/seekable_zstd.hpp>

#include <CLI/CLI.hpp>

#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory_and_files.hpp"

using namespace multifd;

namespace {

/// What the measured stretch took.
class Stretch {
 public:
  Stretch() : usage_(now()) {}
  void print(std::uint64_t normal_pages, std::uint64_t zero_pages) const {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    const rusage end = now();
    const auto of = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
    };
    fmt::print(
        "{{\"seconds\": {:.6f}, \"user\": {:.6f}, \"system\": {:.6f}, \"faults\": {}, \"normal_pages\": {}, "
        "\"zero_pages\": {}}}\n",
        seconds, of(end.ru_utime) - of(usage_.ru_utime), of(end.ru_stime) - of(usage_.ru_stime),
        end.ru_minflt - usage_.ru_minflt, normal_pages, zero_pages);
  }

 private:
  static rusage now() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    return usage;
  }
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  rusage usage_;
};

void save(const std::string& from, const std::string& path, unsigned threads) {
  const image::File source = open_file(from, O_RDWR);
  const Memory memory = map(source.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, source.native_handle());
  RamMap ram;
  const BlockId block = need(ram.add("ram0", {memory.get(), source.bytes()}), from);
  const Stretch stretch;
  image::File file = open_file(path, O_RDWR | O_CREAT | O_TRUNC);
  auto writer =
      need(image::MappedRamWriter<>::open(file, ram, {.machine_type = "pc-i440fx-10.0"}, {.channels = threads}), path);
  need(writer.queue_range(block, 0, source.bytes()), "queue");
  need(writer.end_ram(), path);
  need(writer.end("{}"), path);
  stretch.print(writer.pages(), source.bytes() / 4096 - writer.pages());
}

void load(const std::string& path, bool touched, bool clear, unsigned threads, const std::string& compare) {
  struct Block {
    Memory memory;
    std::size_t bytes;
    std::string name;
  };
  // Memory is a VMM's, and there ahead of the restore.
  std::vector<Block> blocks;
  {
    const image::File file = open_file(path, O_RDONLY);
    std::optional<image::SeekableZstd> zstd;
    if (auto opened = image::SeekableZstd::open(file)) zstd = std::move(*opened);
    const image::RandomAccess& bytes = zstd ? static_cast<const image::RandomAccess&>(*zstd) : file;
    const auto reader = need(image::MappedRamReader::open(bytes), path);
    for (const qemu::BlockInfo& block : reader.blocks()) {
      Memory memory = map(block.used_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
      ::madvise(memory.get(), block.used_length, MADV_HUGEPAGE);
      if (touched) std::memset(memory.get(), 0, block.used_length);
      blocks.push_back({std::move(memory), block.used_length, std::string(block.idstr)});
    }
  }

  const Stretch stretch;
  const image::File file = open_file(path, O_RDONLY);
  std::optional<image::SeekableZstd> zstd;
  if (auto opened = image::SeekableZstd::open(file)) zstd = std::move(*opened);
  const image::RandomAccess& bytes = zstd ? static_cast<const image::RandomAccess&>(*zstd) : file;
  const auto reader = need(image::MappedRamReader::open(bytes), path);
  RamMap ram;
  for (const Block& block : blocks) need(ram.add(block.name, {block.memory.get(), block.bytes}), block.name);
  const auto loaded =
      need(image::load_ram(reader, ram,
                           {.work = {.threads = threads},
                            .destination = clear ? DestinationMemory::unknown : DestinationMemory::zeroed}),
           path);
  stretch.print(loaded.normal_pages, loaded.zero_pages);

  if (compare.empty()) return;
  const image::File wanted = open_file(compare, O_RDONLY);
  const Memory memory = map(wanted.bytes(), PROT_READ, MAP_SHARED, wanted.native_handle());
  for (const Block& block : blocks)
    if (block.name == "ram0" &&
        (block.bytes != wanted.bytes() || std::memcmp(block.memory.get(), memory.get(), block.bytes) != 0))
      throw std::runtime_error(path + ": loaded memory is not " + compare);
}

}  // namespace

int main(int argc, char** argv) {
  std::string from;
  std::string path;
  std::string compare;
  unsigned threads = 2;
  bool touched = false;
  bool clear = false;
  CLI::App app("Saves or loads a mapped-ram file once, and prints what it took.", "image_speed");
  app.require_subcommand(1);
  CLI::App* const saving = app.add_subcommand("save", "Writes the memory of a file, mapped and touched, as block ram0");
  saving->add_option("memory", from, "The file that is the memory")->required();
  CLI::App* const loading = app.add_subcommand("load", "Reads a file, compressed or not, into anonymous memory");
  loading->add_flag("--touched", touched, "The memory is resident");
  loading->add_flag("--clear", clear,
                    "Nothing is known of the memory: pages that are zero in the file are looked at, too");
  loading->add_option("--compare", compare, "Afterwards compare block ram0 with this file");
  for (CLI::App* const command : {saving, loading}) {
    command->add_option("image", path, "The mapped-ram file")->required();
    command->add_option("--threads", threads, "Threads that write or read")->capture_default_str();
  }
  CLI11_PARSE(app, argc, argv);
  try {
    if (*saving) save(from, path, threads);
    if (*loading) load(path, touched, clear, threads, compare);
  } catch (const std::exception& error) {
    fmt::print(stderr, "image_speed: {}\n", error.what());
    return 1;
  }
  return 0;
}
