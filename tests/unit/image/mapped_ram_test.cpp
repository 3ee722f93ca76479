// SPDX-License-Identifier: MIT
//
// mapped-ram files: what the writer writes is format/mapped_ram.md, what the reader reads is what was written, and nothing
// that a file says is believed.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "multifd/image/load.hpp"
#include "multifd/image/mapped_ram_reader.hpp"
#include "multifd/image/mapped_ram_writer.hpp"
#include "support/basics.hpp"
#include "support/format_vector.hpp"
#include "support/image_file.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using image::MappedRamReader;
using image::MappedRamWriter;

namespace {

constexpr std::string_view machine = "pc-q35-10.0";

void need(const Result<void>& result) { REQUIRE_MESSAGE(result.has_value(), describe(result.error())); }
template <class T>
T need(Result<T> result) {
  REQUIRE_MESSAGE(result.has_value(), describe(result.error()));
  return std::move(*result);
}

/// Blocks of pages of every kind, in an order of their own.
struct Guest {
  explicit Guest(std::size_t page_bytes = 4096, std::uint64_t seed = 1) : map(page_bytes) {
    Rng rng(seed);
    for (const auto& [idstr, pages] : {std::pair{"vga.vram", 65},
                                       {"pc.ram", page_bytes > 4096 ? 200 : 1000},
                                       {"/rom@etc/acpi/tables", 1},
                                       {"pc.bios", 64}}) {
      blocks.emplace_back(static_cast<std::size_t>(pages) * page_bytes);
      need(map.add(idstr, blocks.back().bytes()));
      for (std::size_t page = 0; page < static_cast<std::size_t>(pages); ++page)
        if (below(rng, 3) != 0) fill_page(blocks.back().page(page, page_bytes), static_cast<Fill>(below(rng, 4)), rng);
    }
  }

  std::vector<Block> blocks;
  RamMap map;
};

template <class Writer>
void queue_all(Writer& writer, const RamMap& map) {
  for (std::uint32_t block = 0; block < map.blocks().size(); ++block)
    need(writer.queue_range(BlockId{block}, 0, map.blocks()[block].bytes));
}

template <class Writer>
void end(Writer& writer, std::string_view description = R"({"page_size": 4096, "devices": []})") {
  need(writer.end_ram());
  need(writer.end(description));
}

/// A file with all of a guest.
image::File saved(const Guest& guest, unsigned channels = 2, std::uint64_t offset = 0) {
  image::File file = image_file();
  auto writer = need(
      MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}, {.channels = channels, .offset = offset}));
  queue_all(writer, guest.map);
  end(writer);
  return file;
}

Error refusal_of(const image::File& file, const image::MappedRamLimits& limits = {}) {
  const auto reader = MappedRamReader::open(file, limits);
  REQUIRE_FALSE(reader.has_value());
  return reader.error();
}

/// Where the vector mapped_ram_file has its fields (format/mapped_ram.md section 12.1).
constexpr std::size_t at_version = 108, at_page_size = 112, at_bitmap = 120, at_pages = 128, at_used_length = 100;

image::File changed_vector(std::size_t offset, std::uint64_t value) {
  auto bytes = format_vector("mapped_ram.md", "mapped_ram_file");
  wire::store_be(&bytes[offset], value);
  return image_file(bytes);
}

}  // namespace

TEST_CASE("mapped-ram: what the writer makes of the vector's memory is the vector, byte for byte") {
  const auto vector = format_vector("mapped_ram.md", "mapped_ram_file");
  Block memory(16 * 4096);
  for (const std::uint32_t page : {1u, 9u})
    for (std::size_t at = 0; at < 4096; at += 4) std::memcpy(&memory.page(page, 4096)[at], &page, 4);
  RamMap map;
  need(map.add("ram0", memory.bytes()));
  const image::File file = image_file();
  auto writer = need(MappedRamWriter<>::open(const_cast<image::File&>(file), map, {.machine_type = "pc-q35-9.0"}));
  queue_all(writer, map);
  end(writer);
  CHECK(bytes_of(file) == vector);
  CHECK(writer.pages() == 2);

  const auto reader = need(MappedRamReader::open(file));
  REQUIRE(reader.blocks().size() == 1);
  CHECK(reader.blocks()[0].idstr == "ram0");
  CHECK(reader.blocks()[0].bitmap_offset == 136);
  CHECK(reader.blocks()[0].pages_offset == 1048576);
  CHECK(reader.stream().machine_type() == "pc-q35-9.0");
  CHECK(reader.devices() == image::Extent{1114143, 40});
}

TEST_CASE("mapped-ram: a file that QEMU wrote begins as the reader expects it") {
  // The recorded beginning, made whole: the rest is holes and an end.
  auto bytes = format_vector("mapped_ram.md", "mapped_ram_start");
  const std::size_t list_end = 88;  // the word with the total: only the first block is left of QEMU's list
  wire::store_be(&bytes[list_end], std::uint64_t{0x200000} | 4);
  bytes.resize(0x300000);
  const auto tail = format_vector("mapped_ram.md", "mapped_ram_file");
  bytes.insert(bytes.end(), tail.begin() + 1114112, tail.end());
  const image::File file = image_file(bytes);
  const auto reader = need(MappedRamReader::open(file));
  std::vector<std::pair<std::uint64_t, std::uint64_t>> runs;
  need(reader.for_each_run(0, [&](std::uint64_t offset, std::uint64_t run) -> Result<void> {
    runs.emplace_back(offset, run);
    return {};
  }));
  CHECK(runs == std::vector<std::pair<std::uint64_t, std::uint64_t>>{{3 * 4096, 4096}, {200 * 4096, 4096}});
}

TEST_CASE("mapped-ram: a guest comes back, over 1, 2 and 8 channels, of every page size, from any offset") {
  struct Case {
    std::size_t page_bytes;
    unsigned channels;
    std::uint64_t offset;
  };
  for (const Case& each : {Case{4096, 1, 0}, {4096, 2, 12345}, {4096, 8, 0}, {1024, 2, 0}, {65536, 8, 4096}}) {
    CAPTURE(each.page_bytes);
    CAPTURE(each.channels);
    const Guest guest(each.page_bytes);
    const image::File file = saved(guest, each.channels, each.offset);
    const auto reader =
        need(MappedRamReader::open(file, {.stream = {.page_bytes = each.page_bytes}, .offset = each.offset}));
    CHECK(reader.ram_bytes() == guest.map.total_bytes());
    CHECK(reader.stream().machine_type() == machine);
    Guest fresh(each.page_bytes, 2);
    for (const Block& block : fresh.blocks) block.fill(std::byte{});
    const auto loaded = need(image::load_ram(
        reader, fresh.map, {.work = {.threads = each.channels}, .destination = DestinationMemory::zeroed}));
    CHECK((loaded.normal_pages + loaded.zero_pages) * each.page_bytes == guest.map.total_bytes());
    CHECK(fresh.blocks == guest.blocks);
    // Memory that held something else before.
    Guest used(each.page_bytes, 3);
    need(image::load_ram(reader, used.map, {.destination = DestinationMemory::unknown}));
    CHECK(used.blocks == guest.blocks);
  }
}

TEST_CASE("mapped-ram: pages go through a handle of their own, opened with O_DIRECT, and come back through one") {
  std::string path = "/var/tmp/multifd_direct_XXXXXX";
  const int fd = ::mkostemp(path.data(), O_CLOEXEC);
  REQUIRE(fd >= 0);
  image::File file = need(image::File::adopt(fd));
  const int direct_fd = ::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  const int error = errno;
  ::unlink(path.c_str());
  if (direct_fd < 0) {
    MESSAGE("skipped: no O_DIRECT in /var/tmp: " << std::strerror(error));
    return;
  }
  image::File direct = need(image::File::adopt(direct_fd));
  const Guest guest;
  auto writer =
      need(MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}, {.channels = 2, .pages = &direct}));
  queue_all(writer, guest.map);
  end(writer);
  const auto reader = need(MappedRamReader::open(file));
  Guest loaded(4096, 2);
  need(image::load_ram(reader, loaded.map, {.pages = &direct}));
  CHECK(loaded.blocks == guest.blocks);

  // Through that handle, and no other.
  image::File others = image_file();
  image::File pages = image_file();
  auto split = need(MappedRamWriter<>::open(others, guest.map, {.machine_type = machine}, {.pages = &pages}));
  queue_all(split, guest.map);
  end(split);
  CHECK(disk_bytes(pages) >= 1000 * 4096 / 3);
  CHECK(disk_bytes(others) <= 64 * 4096);
}

TEST_CASE("mapped-ram: zero pages are holes, also those that were pages in an earlier epoch") {
  GuestRam guest(2000);  // no page is zero
  image::File file = image_file();
  auto writer = need(MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}));
  queue_all(writer, guest.map);
  need(writer.wait(need(writer.close_epoch())));
  CHECK(writer.pages() == 2000);
  CHECK(disk_bytes(file) >= 2000 * 4096);
  for (std::size_t page = 0; page < 2000; ++page)
    if (page % 100 != 0) std::memset(guest.memory.page(page, 4096).data(), 0, 4096);
  queue_all(writer, guest.map);
  end(writer);
  CHECK(writer.pages() == 20);
  CHECK(disk_bytes(file) <= 64 * 4096);
  Block memory(2000 * 4096);
  RamMap map;
  need(map.add("pc.ram", memory.bytes()));
  const auto reader = need(MappedRamReader::open(file));
  const auto loaded = need(image::load_ram(reader, map));
  CHECK(loaded.normal_pages == 20);
  CHECK(memory == guest.memory);
}

TEST_CASE("mapped-ram: of an older image in the same file nothing is left") {
  constexpr std::size_t pages = 40000;  // a bitmap of more than one piece
  GuestRam guest(pages);
  image::File file = image_file();
  for (const bool again : {false, true}) {
    if (again)
      for (std::size_t page = 1; page < pages; ++page) std::memset(guest.memory.page(page, 4096).data(), 0, 4096);
    auto writer = need(MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}));
    queue_all(writer, guest.map);
    end(writer);
  }
  CHECK(disk_bytes(file) <= 64 * 4096);
  std::uint64_t stored = 0;
  need(need(MappedRamReader::open(file)).for_each_run(0, [&](std::uint64_t, std::uint64_t bytes) -> Result<void> {
    stored += bytes / 4096;
    return {};
  }));
  CHECK(stored == 1);
}

TEST_CASE("mapped-ram: zero pages outside of main memory are in the bitmap, and read as zeros, also from a device") {
  // QEMU 10.0 leaves pages without a bit as they are, and its own ROMs and tables are not zero.
  Block main(1000 * 4096), tables(8 * 4096);
  for (const std::size_t page : {2u, 5u}) tables.page(page, 4096)[0] = std::byte{1};
  RamMap map;
  need(map.add("/rom@etc/acpi/tables", tables.bytes()));
  need(map.add("pc.ram", main.bytes()));
  for (const bool stale : {false, true}) {
    CAPTURE(stale);
    image::File file = image_file();
    auto writer = need(MappedRamWriter<>::open(file, map, {.machine_type = machine}));
    if (stale) {  // what a file without holes, or a device, would still have there
      const auto places = need(qemu::announced_blocks(map));
      auto head = need(image::MappedRamHead::create(file, {.machine_type = machine}, places));
      need(file.write(head.blocks()[1].pages_offset, std::vector(8 * 4096, std::byte{0xee})));
    }
    queue_all(writer, map);
    end(writer);
    CHECK(writer.pages() == 8);
    const auto reader = need(MappedRamReader::open(file));
    REQUIRE(reader.blocks()[1].idstr == "/rom@etc/acpi/tables");
    std::vector<std::byte> bitmap(8);
    need(file.read(reader.blocks()[1].bitmap_offset, bitmap));
    CHECK(bitmap[0] == std::byte{0xff});
    Block loaded(8 * 4096);
    need(file.read(reader.blocks()[1].pages_offset, loaded.bytes()));
    CHECK(loaded == tables);
    if (!stale) CHECK(disk_bytes(file) <= 16 * 4096);
  }
}

TEST_CASE("mapped-ram: bitmaps replace what cannot be cut off, as on a device") {
  GuestRam guest(200000, std::byte{});
  image::File file = image_file();
  image::MappedRamHead head = need(
      image::MappedRamHead::create(file, {.machine_type = machine}, need(qemu::announced_blocks(guest.map)), 4096));
  const qemu::BlockInfo& block = head.blocks()[0];
  const std::vector<std::byte> ones(wire::mapped_ram_bitmap_bytes(200000), std::byte{0xff});
  need(file.write(block.bitmap_offset, ones));
  auto places = need(image::MappedRamPlaces::create(file, head.blocks(), 4096, 1));
  need(places->write_bitmaps());
  std::vector<std::byte> bitmap(ones.size());
  need(file.read(block.bitmap_offset, bitmap));
  CHECK(std::ranges::all_of(bitmap, [](std::byte byte) { return byte == std::byte{}; }));
}

TEST_CASE("mapped-ram: a guest that writes all the time is saved as it stands at the end") {
  constexpr std::size_t pages = 3000;
  GuestRam guest(pages, std::byte{});
  image::File file = image_file();
  auto writer = need(MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}, {.channels = 8}));
  Rng rng(seed());
  std::vector<std::uint64_t> dirty(bitmap_words(pages));
  for (int round = 0; round < (quick() ? 10 : 40); ++round) {
    std::ranges::fill(dirty, 0);
    for (int i = 0; i < 700; ++i) {
      const std::size_t page = below(rng, pages);
      // A page that is zero in this round, and was not in the one before, and the other way round.
      fill_page(guest.memory.page(page, 4096), static_cast<Fill>(below(rng, 4)), rng);
      dirty[page / 64] |= std::uint64_t{1} << page % 64;
    }
    need(writer.queue_dirty(guest.block, dirty, 0));
    const auto epoch = need(writer.close_epoch());
    need(writer.wait(epoch));  // what comes next changes pages that are being written
  }
  end(writer);
  Block memory(pages * 4096);
  RamMap map;
  need(map.add("pc.ram", memory.bytes()));
  need(image::load_ram(need(MappedRamReader::open(file)), map));
  CHECK(memory == guest.memory);
}

TEST_CASE("mapped-ram: epochs that nobody waits for are written in their order") {
  constexpr std::size_t pages = 300;
  // Copies: what is queued does not change any more, so only the order decides.
  RamMap map;
  const BlockId block = need(map.add_elsewhere("pc.ram", pages * 4096));
  image::File file = image_file();
  auto writer =
      need(MappedRamWriter<ZeroPagesMultifd, FromCopies>::open(file, map, {.machine_type = machine}, {.channels = 8}));
  PageBuffer buffer = need(PageBuffer::create());
  for (unsigned epoch = 0; epoch < 25; ++epoch) {
    for (std::uint64_t page = 0; page < pages; ++page) {
      std::memset(buffer.data(), static_cast<int>(epoch % 5), 4096);  // every fifth epoch has zero pages
      const std::uint64_t offset = page * 4096;
      need(writer.queue_copies(block, std::span(&offset, 1), 1, buffer));
    }
    need(writer.close_epoch());
  }
  end(writer);
  const auto bytes = bytes_of(file);
  const auto reader = need(MappedRamReader::open(file));
  for (std::uint64_t page = 0; page < pages; ++page)
    REQUIRE(bytes[reader.blocks()[0].pages_offset + page * 4096] == std::byte{24 % 5});
}

TEST_CASE("mapped-ram: runs are found in every part of a bitmap") {
  Rng rng(seed());
  GuestRam guest(1000, std::byte{});
  std::vector<bool> there(1000);
  for (int i = 0; i < 12; ++i) {
    const std::size_t first = below(rng, 1000);
    const std::size_t last = std::min<std::size_t>(1000, first + 1 + below(rng, 150));
    for (std::size_t page = first; page < last; ++page) {
      there[page] = true;
      guest.memory.page(page, 4096)[0] = std::byte{1};
    }
  }
  image::File file = image_file();
  auto writer = need(MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}));
  queue_all(writer, guest.map);
  end(writer);
  const auto reader = need(MappedRamReader::open(file));
  for (int i = 0; i < 1000; ++i) {
    const std::uint64_t first = below(rng, 1000);
    const std::uint64_t count = 1 + below(rng, 1000 - first);
    std::vector<bool> found(1000);
    std::optional<std::uint64_t> behind;
    need(reader.for_each_run(0, first, count, [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
      REQUIRE(bytes > 0);
      REQUIRE((!behind || offset > *behind));  // runs are as long as they can be
      for (std::uint64_t at = offset; at < offset + bytes; at += 4096) found[at / 4096] = true;
      behind = offset + bytes;
      return {};
    }));
    std::vector<bool> wanted(1000);
    std::copy_n(there.begin() + static_cast<std::ptrdiff_t>(first), count,
                wanted.begin() + static_cast<std::ptrdiff_t>(first));
    REQUIRE(found == wanted);
  }
}

TEST_CASE("mapped-ram: a file that is cut anywhere in its stream is refused") {
  const auto whole = format_vector("mapped_ram.md", "mapped_ram_file");
  // Behind the end mark nothing tells that a description should follow: a machine with suppress-vmdesc writes none.
  constexpr std::size_t end_mark = 1114143;
  const auto check = [&](std::size_t bytes) {
    CAPTURE(bytes);
    const image::File file = image_file(std::span(whole).first(bytes));
    const auto reader = MappedRamReader::open(file);
    REQUIRE(reader.has_value() == (bytes == end_mark + 1 || bytes == whole.size()));
    if (!reader) {
      const bool cut = reader.error().code == Errc::truncated_stream || reader.error().code == Errc::truncated_image ||
                       reader.error().code == Errc::bad_image_layout;
      REQUIRE(cut);
    }
  };
  for (std::size_t bytes = 0; bytes < 140; ++bytes) check(bytes);
  for (const std::size_t bytes : {4096u, 1048575u, 1048576u, 1052672u, 1114111u}) check(bytes);
  for (std::size_t bytes = 1114112; bytes <= whole.size(); ++bytes) check(bytes);
}

TEST_CASE("mapped-ram: a header that lies is refused by what is wrong with it") {
  constexpr std::uint64_t wrap = ~std::uint64_t{0};
  const std::uint64_t whole = format_vector("mapped_ram.md", "mapped_ram_file").size();
  struct Case {
    const char* what;
    std::size_t offset;
    std::uint64_t value;
    Errc expected;
  };
  const Case cases[] = {
      {"page size 0", at_page_size, 0, Errc::page_size_mismatch},
      {"page size 8192", at_page_size, 8192, Errc::page_size_mismatch},
      {"bitmap at 0", at_bitmap, 0, Errc::bad_image_layout},
      {"bitmap in its own header", at_bitmap, 135, Errc::bad_image_layout},
      {"bitmap in the pages", at_bitmap, 1048576, Errc::bad_image_layout},
      {"bitmap reaches into the pages", at_bitmap, 1048569, Errc::bad_image_layout},
      {"bitmap behind the file", at_bitmap, whole, Errc::bad_image_layout},
      {"bitmap wraps", at_bitmap, wrap, Errc::bad_image_layout},
      {"bitmap wraps at its end", at_bitmap, wrap - 7, Errc::bad_image_layout},
      {"pages at 0", at_pages, 0, Errc::bad_image_layout},
      {"pages not aligned", at_pages, 1048576 + 512, Errc::bad_image_layout},
      {"pages in front of the bitmap", at_pages, 4096 * 0, Errc::bad_image_layout},
      {"pages behind the file", at_pages, whole / 4096 * 4096, Errc::bad_image_layout},
      {"pages wrap", at_pages, wrap - 4095, Errc::bad_image_layout},
      {"pages wrap at their end", at_pages, wrap - 65535, Errc::bad_image_layout},
      {"used_length beyond the total", at_used_length, 0x11000, Errc::bad_used_length},
      {"used_length wraps", at_used_length, wrap - 4095, Errc::bad_used_length},
  };
  for (const Case& each : cases) {
    CAPTURE(each.what);
    const image::File file = changed_vector(each.offset, each.value);
    CHECK(refusal_of(file).code == each.expected);
  }
  auto bytes = format_vector("mapped_ram.md", "mapped_ram_file");
  bytes[at_version + 3] = std::byte{2};
  CHECK(refusal_of(image_file(bytes)).code == Errc::bad_mapped_ram);
}

TEST_CASE("mapped-ram: layouts that a writer of other taste chooses are read") {
  auto bytes = format_vector("mapped_ram.md", "mapped_ram_file");
  // A gap ahead of the bitmap, and bits behind the last page.
  wire::store_be(&bytes[at_bitmap], std::uint64_t{500});
  std::memset(&bytes[136], 0xff, 8);
  bytes[500] = std::byte{2}, bytes[501] = std::byte{2};
  std::memset(&bytes[502], 0xff, 6);
  const image::File file = image_file(bytes);
  const auto reader = need(MappedRamReader::open(file));
  Block memory(16 * 4096);
  RamMap map;
  need(map.add("ram0", memory.bytes()));
  CHECK(need(image::load_ram(reader, map)).normal_pages == 2);
  CHECK(memory.page(9, 4096)[0] == std::byte{9});
}

TEST_CASE("mapped-ram: what is no image is refused by name") {
  auto bytes = format_vector("mapped_ram.md", "mapped_ram_file");
  bytes[0] = std::byte{0x7f};
  CHECK(refusal_of(image_file(bytes)).code == Errc::bad_stream_magic);
  CHECK(refusal_of(image_file()).code == Errc::truncated_stream);
  CHECK(refusal_of(image_file(), {.offset = 1 << 20}).code == Errc::truncated_stream);
  // An ordinary stream in a file.
  image::File file = image_file();
  image::FileStream link(file);
  {
    qemu::MainStreamWriter writer(link);
    need(writer.begin_stream({.machine_type = machine}));
    const qemu::BlockInfo block{.idstr = "pc.ram", .used_length = 4096};
    need(writer.start_ram(std::span(&block, 1)));
    need(writer.end_section());
    need(writer.push_out());
  }
  file = need(image::File::adopt(::dup(file.native_handle())));
  CHECK(refusal_of(file).code == Errc::not_mapped_ram);
  CHECK(refusal_of(file, {.stream = {.page_bytes = 4097}}).code == Errc::bad_page_size);
}

TEST_CASE("mapped-ram: page records have no place in a stream with mapped-ram") {
  auto bytes = format_vector("mapped_ram.md", "mapped_ram_file");
  for (const std::uint64_t word :
       {std::uint64_t{0x02}, std::uint64_t{0x08}, std::uint64_t{0x200}, std::uint64_t{0x1010}}) {
    wire::store_be(&bytes[1114112], word);
    CHECK(refusal_of(image_file(bytes)).code == Errc::unknown_ram_record);
  }
}

TEST_CASE("mapped-ram: memory that does not fit is not loaded") {
  const Guest guest;
  const image::File file = saved(guest);
  const auto reader = need(MappedRamReader::open(file));
  RamMap missing;
  need(missing.add("pc.ram", guest.blocks[1].bytes()));
  CHECK(image::load_ram(reader, missing).error().code == Errc::block_list_mismatch);
  RamMap pages(1024);
  CHECK(image::load_ram(reader, pages).error().code == Errc::page_size_mismatch);
  RamMap read_only;
  for (std::size_t i = 0; i < guest.blocks.size(); ++i)
    need(read_only.add_read_only(guest.map.blocks()[i].idstr, guest.blocks[i].bytes()));
  CHECK(image::load_ram(reader, read_only).error().code == Errc::read_only_block);
  CHECK(image::load_ram(reader, guest.map, {.work = {.threads = 0}}).error().code == Errc::bad_channel_count);
  CHECK(image::load_ram(reader, guest.map, {.work = {.interrupted = [] { return true; }}}).error().code ==
        Errc::cancelled);
}

TEST_CASE("mapped-ram: a disk without room ends the save with its errno") {
  const Guest guest;
  const int full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  REQUIRE(full >= 0);
  // No regular file: refused ahead of the first page.
  CHECK(image::File::adopt(full).error().code == Errc::not_supported);
  // A file that may not grow.
  image::File file = image_file();
  auto read_only = need(image::File::adopt(
      ::open(("/proc/self/fd/" + std::to_string(file.native_handle())).c_str(), O_RDONLY | O_CLOEXEC)));
  auto writer = need(MappedRamWriter<>::open(file, guest.map, {.machine_type = machine}, {.pages = &read_only}));
  for (std::uint32_t block = 0; block < 4; ++block)
    static_cast<void>(writer.queue_range(BlockId{block}, 0, guest.map.blocks()[block].bytes));
  const auto ended = writer.end_ram();
  REQUIRE_FALSE(ended.has_value());
  CHECK(ended.error().code == std::error_code(EBADF, std::system_category()));
  CHECK(refusal_of(file).code == Errc::truncated_stream);  // nothing that looks whole
}
