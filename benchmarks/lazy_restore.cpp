// SPDX-License-Identifier: MIT
//
// lazy_restore: brings a guest's memory back from an image once, and prints as JSON when its first page could be read, and
// when all were there: at once, by load_ram(), or on demand, by a LazyMemory. lazy_restore.py runs it.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fmt/format.h>

#include <multifd/image/file.hpp>
#include <multifd/image/load.hpp>
#include <multifd/image/seekable_zstd.hpp>
#include <multifd/postcopy/image_pages.hpp>
#include <multifd/postcopy/lazy_memory.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "memory_and_files.hpp"

using namespace multifd;
using Clock = std::chrono::steady_clock;

namespace {

/// A file and what reads it.
struct Image {
  explicit Image(const std::string& path) : file(open_file(path, O_RDONLY)) {
    if (auto opened = image::SeekableZstd::open(file)) zstd = std::move(*opened);
    reader = need(image::MappedRamReader::open(zstd ? static_cast<const image::RandomAccess&>(*zstd) : file), path);
  }
  image::File file;
  std::optional<image::SeekableZstd> zstd{};
  std::optional<image::MappedRamReader> reader{};
};

/// The guest's memory, which a VMM has ahead of the restore.
struct Guest {
  explicit Guest(const std::string& path) {
    const Image image(path);
    for (const qemu::BlockInfo& block : image.reader->blocks()) {
      blocks.push_back(map(block.used_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE));
      need(ram.add(std::string(block.idstr), {blocks.back().get(), block.used_length}), path);
    }
  }
  std::span<const std::byte> main() const {
    return std::ranges::max(ram.blocks(), {}, [](const RamBlock& block) { return block.bytes; }).host;
  }
  /// Reads a page, as a thread of the guest's would.
  void touch(std::size_t page) const {
    sum += static_cast<const volatile std::byte&>(main()[page * 4096]) != std::byte{};
  }

  std::vector<Memory> blocks;
  RamMap ram;
  mutable std::uint64_t sum = 0;
};

double since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

void load(const std::string& path, const Guest& guest, unsigned threads, std::size_t first) {
  const auto began = Clock::now();
  const Image image(path);
  need(image::load_ram(*image.reader, guest.ram,
                       {.work = {.threads = threads}, .destination = DestinationMemory::zeroed}),
       path);
  guest.touch(first);
  fmt::print("{{\"first\": {:.6f}, \"seconds\": {:.6f}}}\n", since(began), since(began));
}

void restore_lazily(const std::string& path, const Guest& guest, unsigned workers, std::size_t first) {
  const auto began = Clock::now();
  const Image image(path);
  const auto store = need(postcopy::ImagePages::of_image(*image.reader), path);
  auto userfaultfd = need(postcopy::Userfaultfd::create(), "userfaultfd");
  const auto regions = need(postcopy::regions_of(guest.ram), "regions");
  const auto lazy =
      need(postcopy::LazyMemory::open(std::move(userfaultfd), regions, *store, {.workers = workers}), "LazyMemory");
  need(lazy->start(), "LazyMemory");
  guest.touch(first);
  const double first_page = since(began);
  // The guest runs: one thread that reads a page anywhere, again and again.
  std::atomic<bool> over = false;
  std::thread running([&] {
    std::mt19937_64 dice(1);
    while (!over.load(std::memory_order_relaxed)) guest.touch(dice() % (guest.main().size() / 4096));
  });
  const auto done = lazy->wait(std::chrono::minutes(2));
  const double all = since(began);
  over.store(true, std::memory_order_relaxed);
  running.join();
  need(done, "LazyMemory");
  const postcopy::FaultLatency latency = lazy->latency();
  fmt::print("{{\"first\": {:.6f}, \"seconds\": {:.6f}, \"faults\": {}, \"p50_ns\": {}, \"p99_ns\": {}}}\n", first_page,
             all, lazy->stats().faults, latency.p50_ns(), latency.p99_ns());
}

}  // namespace

int main(int argc, char** argv) {
  std::string path, compare;
  unsigned threads = 2;
  bool lazily = false;
  std::size_t first = 12345;
  CLI::App app("Brings a guest's memory back once, and prints when.", "lazy_restore");
  app.add_option("image", path, "A mapped-ram file, as it is or compressed")->required();
  app.add_flag("--lazy", lazily, "On demand, with --threads workers; else at once, by --threads threads");
  app.add_option("--threads", threads, "Threads that read the image")->capture_default_str();
  app.add_option("--first", first, "The page that the guest reads first")->capture_default_str();
  app.add_option("--compare", compare, "Afterwards compare the largest block with this file");
  CLI11_PARSE(app, argc, argv);
  try {
    const Guest guest(path);
    first %= guest.main().size() / 4096;
    if (lazily)
      restore_lazily(path, guest, threads, first);
    else
      load(path, guest, threads, first);
    if (compare.empty()) return 0;
    const image::File wanted = open_file(compare, O_RDONLY);
    const Memory memory = map(wanted.bytes(), PROT_READ, MAP_SHARED, wanted.native_handle());
    if (guest.main().size() != wanted.bytes() || std::memcmp(guest.main().data(), memory.get(), wanted.bytes()) != 0)
      throw std::runtime_error("the memory is not " + compare);
  } catch (const std::exception& error) {
    fmt::print(stderr, "lazy_restore: {}\n", error.what());
    return 1;
  }
  return 0;
}
