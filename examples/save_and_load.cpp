// SPDX-License-Identifier: MIT
//
// What include/multifd/README.md shows of images, whole: a VMM saves its guest to a file that QEMU's tools read, and loads it
// again.

// [readme]
#include <multifd/image/load.hpp>
#include <multifd/image/mapped_ram_writer.hpp>

using namespace multifd;

// A VMM's own guest. While it runs, pages are queued as to a Sender: what comes again is written again, to the same place.
Result<void> save_guest(image::File& file, const RamMap& ram, std::span<const std::byte> timer) {
  MULTIFD_TRY_ASSIGN(auto writer,
                     image::MappedRamWriter<>::open(file, ram, {.machine_type = "my-vmm-1.0"}, {.channels = 4}));
  for (const RamBlock& block : ram.blocks()) {
    MULTIFD_TRY_ASSIGN(const BlockId id, ram.find(block.idstr));
    MULTIFD_TRY(writer.queue_range(id, 0, block.bytes));
  }
  MULTIFD_TRY(writer.close_epoch());                               // a round
  MULTIFD_TRY(writer.end_ram());                                   // the guest has stopped
  MULTIFD_TRY(writer.stream().device({.idstr = "timer"}, timer));  // its devices
  return writer.end(R"({"page_size": 4096, "devices": []})");      // then fsync() and rename()
}

// Into memory that is new.
Result<image::Loaded> load_guest(const image::File& file, const RamMap& ram) {
  MULTIFD_TRY_ASSIGN(const auto reader, image::MappedRamReader::open(file));
  return image::load_ram(reader, ram, {.work = {.threads = 4}, .destination = DestinationMemory::zeroed});
}
// [readme end]

#include <fcntl.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main() {
  std::vector<std::byte> memory(64 << 20), loaded(memory.size()), timer(24);
  for (std::size_t at = 0; at < memory.size(); at += 3 * 4096) memory[at] = static_cast<std::byte>(at >> 12 | 1);
  RamMap ram, again;
  const auto added = ram.add("pc.ram", memory), added_again = again.add("pc.ram", loaded);
  char path[] = "/tmp/save_and_load.XXXXXX";
  auto file = image::File::adopt(::mkostemp(path, O_CLOEXEC));
  ::unlink(path);
  const auto done = [&]() -> Result<void> {
    if (!added) return std::unexpected(added.error());
    if (!added_again) return std::unexpected(added_again.error());
    if (!file) return std::unexpected(file.error());
    MULTIFD_TRY(save_guest(*file, ram, timer));
    MULTIFD_TRY_ASSIGN(const image::Loaded pages, load_guest(*file, again));
    std::printf("%llu pages saved and loaded, %llu are zero\n", static_cast<unsigned long long>(pages.normal_pages),
                static_cast<unsigned long long>(pages.zero_pages));
    return {};
  }();
  if (!done) return std::fprintf(stderr, "%s\n", describe(done.error()).c_str()), 1;
  if (memory != loaded) return std::fprintf(stderr, "the memory that was loaded is not the guest's\n"), 1;
  return 0;
}
