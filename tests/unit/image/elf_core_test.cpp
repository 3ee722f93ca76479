// SPDX-License-Identifier: MIT
//
// ELF cores, raw memory and LiME of a saved guest, byte by byte, and Linux's note in its memory.
#include "multifd/image/elf_core.hpp"

#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "multifd/image/mapped_ram_writer.hpp"
#include "multifd/image/raw_memory.hpp"
#include "multifd/image/vmcoreinfo.hpp"
#include "support/basics.hpp"
#include "support/image_file.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using image::File;
using image::MappedRamReader;
using image::PhysicalLayout;
using image::VcpuRegisters;

namespace {

constexpr std::uint64_t kib = 1024, mib = 1024 * kib, page = 4096;

void need(const Result<void>& result) { REQUIRE_MESSAGE(result.has_value(), describe(result.error())); }
template <class T>
T need(Result<T> result) {
  REQUIRE_MESSAGE(result.has_value(), describe(result.error()));
  return std::move(*result);
}

/// RAM of a guest, saved when it is filled.
struct Saved {
  explicit Saved(std::size_t ram_bytes, const std::function<void(Block&)>& fill = {}) : ram(ram_bytes), rom(128 * kib) {
    if (fill) fill(ram);
    rom.fill(std::byte{0xee});
    RamMap map;
    need(map.add("pc.ram", ram.bytes()));
    need(map.add("pc.rom", rom.bytes()));
    auto writer = need(image::MappedRamWriter<>::open(file, map, {.machine_type = "pc-q35-10.0"}));
    for (std::uint32_t block = 0; block < map.blocks().size(); ++block)
      need(writer.queue_range(BlockId{block}, 0, map.blocks()[block].bytes));
    need(writer.end_ram());
    need(writer.end(R"({"page_size": 4096, "devices": []})"));
    reader.emplace(need(MappedRamReader::open(file)));
  }

  /// With the rest above 4 GiB, and firmware below 1 MiB.
  PhysicalLayout layout(std::uint64_t below_4g) const {
    return need(image::lay_out_pc(reader->blocks(), page, "pc-q35-10.0",
                                  {.below_4g = below_4g, .shadow = image::ShadowRegisters{}}));
  }
  /// What the guest sees in a range.
  std::span<const std::byte> at(const image::PhysicalRange& range) const {
    const Block& block = reader->blocks()[range.block].idstr == "pc.ram" ? ram : rom;
    return block.bytes().subspan(range.offset, range.bytes);
  }

  Block ram, rom;
  File file = image_file();
  std::optional<MappedRamReader> reader;
};

/// Every third page, up to 3 MiB.
void some_pages(Block& ram) {
  Rng rng(seed());
  for (std::size_t i = 0; i < 3 * mib / page; i += 3) fill_page(ram.page(i, page), Fill::noise, rng);
}

template <class T>
T le(std::span<const std::byte> bytes, std::size_t at) {
  REQUIRE(at + sizeof(T) <= bytes.size());
  return wire::load_le<T>(&bytes[at]);
}

struct Note {
  std::string name;
  std::uint32_t type;
  std::vector<std::byte> text;
};

struct Load {
  std::uint64_t offset, address, bytes;
};

struct Core {
  explicit Core(std::vector<std::byte> all) : bytes(std::move(all)) {
    REQUIRE(std::memcmp(bytes.data(), "\177ELF\2\1\1", 7) == 0);
    CHECK(le<std::uint16_t>(bytes, 16) == 4);   // ET_CORE
    CHECK(le<std::uint16_t>(bytes, 18) == 62);  // x86-64
    const auto headers = le<std::uint64_t>(bytes, 32);
    CHECK(le<std::uint16_t>(bytes, 52) == 64);
    CHECK(le<std::uint16_t>(bytes, 54) == 56);
    CHECK(le<std::uint16_t>(bytes, 60) == 0);  // no sections
    for (std::size_t i = 0; i < le<std::uint16_t>(bytes, 56); ++i) {
      const std::span<const std::byte> row = std::span(bytes).subspan(headers + 56 * i, 56);
      const Load load{le<std::uint64_t>(row, 8), le<std::uint64_t>(row, 24), le<std::uint64_t>(row, 32)};
      CHECK(le<std::uint64_t>(row, 16) == load.address);
      CHECK(le<std::uint64_t>(row, 40) == load.bytes);
      REQUIRE(load.offset + load.bytes <= bytes.size());
      if (le<std::uint32_t>(row, 0) == 4) {
        for (std::size_t at = load.offset; at < load.offset + load.bytes;) {
          const auto name = le<std::uint32_t>(bytes, at), size = le<std::uint32_t>(bytes, at + 4);
          const auto* text = &bytes[at + 12 + (name + 3) / 4 * 4];
          notes.push_back({std::string(reinterpret_cast<const char*>(&bytes[at + 12]), name - 1),
                           le<std::uint32_t>(bytes, at + 8), std::vector<std::byte>(text, text + size)});
          at += 12 + (name + 3) / 4 * 4 + (size + 3) / 4 * 4;
        }
      } else {
        CHECK(le<std::uint32_t>(row, 0) == 1);
        CHECK(load.offset % 4096 == 0);
        CHECK(le<std::uint64_t>(row, 48) == 0);  // p_align: crash takes a core with one for a netdump
        loads.push_back(load);
      }
    }
  }
  std::vector<std::byte> bytes;
  std::vector<Load> loads;
  std::vector<Note> notes;
};

VcpuRegisters some_registers() {
  VcpuRegisters vcpu;
  for (std::size_t i = 0; i < 16; ++i) vcpu.general[i] = 0x1111 * (i + 1);
  vcpu.rip = 0xffffffff81000000;
  vcpu.rflags = 0x246;
  for (std::uint32_t i = 0; i < 6; ++i) vcpu.segments[i] = {0x10 * (i + 1), 0xffff0000 + i, 0xaf9b00 + i, 0xbb0 + i};
  vcpu.ldt = {1, 2, 3, 4};
  vcpu.tr = {5, 6, 7, 8};
  vcpu.gdt = {0, 0x7f, 0, 0xfffffe0000001000};
  vcpu.idt = {0, 0xfff, 0, 0xfffffe0000000000};
  vcpu.cr = {0x80050033, 0, 0x7ffd, 0x123000, 0x6f0};
  vcpu.kernel_gs_base = 0xffff888003e00000;
  return vcpu;
}

}  // namespace

TEST_CASE("An ELF core has each range at its address, holes for what is zero, and its size") {
  const Saved guest(8 * mib, some_pages);
  const PhysicalLayout layout = guest.layout(6 * mib);
  File out = image_file();
  const auto written = need(image::write_elf_core(*guest.reader, layout, out));
  const Core core(bytes_of(out));
  REQUIRE(core.loads.size() == layout.ranges.size());
  REQUIRE(core.loads.size() == 4);  // up to 640 KiB, ROM, RAM behind it up to 6 MiB, RAM above 4 GiB
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < core.loads.size(); ++i) {
    const Load& load = core.loads[i];
    CHECK(load.address == layout.ranges[i].address);
    CHECK(load.bytes == layout.ranges[i].bytes);
    const auto here = std::span(core.bytes).subspan(load.offset, load.bytes);
    CHECK(std::ranges::equal(here, guest.at(layout.ranges[i])));
    bytes += load.bytes;
  }
  CHECK(core.loads.back().address == std::uint64_t{4} << 30);
  CHECK(core.notes.empty());
  CHECK((written.normal_pages + written.zero_pages) * page == bytes);
  CHECK(disk_bytes(out) <= written.normal_pages * page + 64 * kib);
}

TEST_CASE("A vCPU's registers stand where Linux and QEMU have them") {
  const Saved guest(2 * mib);
  const VcpuRegisters vcpus[] = {some_registers(), {}};
  File out = image_file();
  need(image::write_elf_core(*guest.reader, guest.layout(2 * mib), out,
                             {.vcpus = vcpus, .vmcoreinfo = "OSRELEASE=6\n"}));
  const Core core(bytes_of(out));
  REQUIRE(core.notes.size() == 5);
  CHECK(core.notes[4].name == "VMCOREINFO");
  CHECK(std::string_view(reinterpret_cast<const char*>(core.notes[4].text.data()), core.notes[4].text.size()) ==
        "OSRELEASE=6\n");
  for (const std::size_t number : {0u, 1u}) {
    CHECK(core.notes[number].name == "CORE");
    CHECK(core.notes[number].type == 1);
    REQUIRE(core.notes[number].text.size() == 336);
    CHECK(le<std::uint32_t>(core.notes[number].text, 32) == number + 1);
    CHECK(core.notes[number + 2].name == "QEMU");
    CHECK(core.notes[number + 2].type == 0);
    REQUIRE(core.notes[number + 2].text.size() == 440);
  }
  // user_regs_struct
  const std::uint64_t prstatus[] = {0x11110,
                                    0xffff,
                                    0xeeee,
                                    0xdddd,
                                    0x6666,
                                    0x4444,
                                    0xcccc,
                                    0xbbbb,
                                    0xaaaa,
                                    0x9999,
                                    0x1111,
                                    0x2222,
                                    0x3333,
                                    0x7777,
                                    0x8888,
                                    ~0ull,
                                    0xffffffff81000000,
                                    0x20,
                                    0x246,
                                    0x5555,
                                    0x30,
                                    0xbb4,
                                    0xbb5,
                                    0x40,
                                    0x10,
                                    0x50,
                                    0x60};
  for (std::size_t i = 0; i < std::size(prstatus); ++i) {
    CAPTURE(i);
    CHECK(le<std::uint64_t>(core.notes[0].text, 112 + 8 * i) == prstatus[i]);
  }
  const auto& note = core.notes[2].text;
  CHECK(le<std::uint32_t>(note, 0) == 1);
  CHECK(le<std::uint32_t>(note, 4) == 440);
  const std::uint64_t general[] = {0x1111, 0x4444, 0x2222, 0x3333, 0x7777, 0x8888, 0x5555, 0x6666, 0x9999, 0xaaaa};
  for (std::size_t i = 0; i < std::size(general); ++i) CHECK(le<std::uint64_t>(note, 8 + 8 * i) == general[i]);
  CHECK(le<std::uint64_t>(note, 136) == 0xffffffff81000000);
  CHECK(le<std::uint64_t>(note, 144) == 0x246);
  const std::uint32_t selectors[] = {0x20, 0x40, 0x10, 0x50, 0x60, 0x30, 1, 5, 0, 0};
  for (std::size_t i = 0; i < std::size(selectors); ++i) CHECK(le<std::uint32_t>(note, 152 + 24 * i) == selectors[i]);
  CHECK(le<std::uint32_t>(note, 152 + 4) == 0xffff0001);
  CHECK(le<std::uint32_t>(note, 152 + 8) == 0xaf9b01);
  CHECK(le<std::uint64_t>(note, 152 + 16) == 0xbb1);
  CHECK(le<std::uint64_t>(note, 152 + 24 * 9 + 16) == 0xfffffe0000000000);
  CHECK(le<std::uint64_t>(note, 392 + 24) == 0x123000);
  CHECK(le<std::uint64_t>(note, 432) == 0xffff888003e00000);
}

TEST_CASE("Raw memory has a byte at its address, LiME each range behind its header") {
  const Saved guest(4 * mib, some_pages);
  const PhysicalLayout layout = guest.layout(4 * mib);
  File raw = image_file(), lime = image_file();
  need(image::write_raw_memory(*guest.reader, layout, raw, {.threads = 3}));
  need(image::write_lime(*guest.reader, layout, lime, {.threads = 1}));
  const auto bytes = bytes_of(raw);
  REQUIRE(bytes.size() == 4 * mib);
  const auto packed = bytes_of(lime);
  std::size_t at = 0;
  for (const image::PhysicalRange& range : layout.ranges) {
    CHECK(std::ranges::equal(std::span(bytes).subspan(range.address, range.bytes), guest.at(range)));
    CHECK(std::memcmp(&packed[at], "EMiL", 4) == 0);
    CHECK(le<std::uint32_t>(packed, at + 4) == 1);
    CHECK(le<std::uint64_t>(packed, at + 8) == range.address);
    CHECK(le<std::uint64_t>(packed, at + 16) == range.end() - 1);
    CHECK(le<std::uint64_t>(packed, at + 24) == 0);
    CHECK(std::ranges::equal(std::span(packed).subspan(at + 32, range.bytes), guest.at(range)));
    at += 32 + range.bytes;
  }
  CHECK(at == packed.size());
  CHECK(image::detail::check_ranges(*guest.reader, layout.ranges).has_value());
  // What no range has is zero: 640 to 768 KiB.
  CHECK(std::ranges::all_of(std::span(bytes).subspan(0xa0000, 0x20000), [](std::byte b) { return b == std::byte{0}; }));
}

TEST_CASE("Writers refuse layouts of another image, and numbers out of bounds") {
  const Saved guest(2 * mib);
  const PhysicalLayout good = guest.layout(2 * mib);
  struct Row {
    const char* what;
    image::PhysicalRange range;
  };
  for (const Row& row : {Row{"empty", {0, 0, 0, 0}},
                         {"no such block", {0, page, 2, 0}},
                         {"behind the block", {0, page, 0, 2 * mib}},
                         {"over the block's end", {0, 2 * page, 0, 2 * mib - page}},
                         {"offset wraps", {0, page, 0, ~std::uint64_t{page - 1}}},
                         {"size wraps", {0, ~std::uint64_t{page - 1}, 0, page}},
                         {"address wraps", {~std::uint64_t{page - 1}, 2 * page, 0, 0}},
                         {"address unaligned", {1, page, 0, 0}},
                         {"offset unaligned", {0, page, 0, 1}},
                         {"size unaligned", {0, 1, 0, 0}}}) {
    CAPTURE(row.what);
    File out = image_file();
    const PhysicalLayout bad{.ranges = {row.range}};
    CHECK(code_of(image::write_elf_core(*guest.reader, bad, out)) == Errc::bad_range);
    CHECK(code_of(image::write_raw_memory(*guest.reader, bad, out)) == Errc::bad_range);
    CHECK(code_of(image::write_lime(*guest.reader, bad, out)) == Errc::bad_range);
    CHECK(code_of(image::find_vmcoreinfo(*guest.reader, bad)) == Errc::bad_range);
    CHECK(out.bytes() == 0);
  }
  File out = image_file();
  const PhysicalLayout overlapping{.ranges = {{0, 2 * page, 0, 0}, {page, page, 1, 0}}};
  CHECK(code_of(image::write_raw_memory(*guest.reader, overlapping, out)) == Errc::bad_range);
  CHECK(code_of(image::write_raw_memory(*guest.reader, good, out, {.threads = 0})) == Errc::bad_channel_count);
  CHECK(code_of(image::write_lime(*guest.reader, good, out, {.threads = 4'000'000'000})) == Errc::bad_channel_count);
  const std::string long_text(mib + 1, 'x');
  CHECK(code_of(image::write_elf_core(*guest.reader, good, out, {.vmcoreinfo = long_text})) == Errc::bad_option);
  const std::vector<VcpuRegisters> many(65537);
  CHECK(code_of(image::write_elf_core(*guest.reader, good, out, {.vcpus = many})) == Errc::bad_option);
  CHECK(code_of(image::write_raw_memory(*guest.reader, good, out, {.interrupted = [] { return true; }})) ==
        Errc::cancelled);
}

namespace {

constexpr std::string_view linux_text = "OSRELEASE=6.1.0\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a0c6c0\n";

struct Header {
  std::uint32_t name = 11, size = linux_text.size(), type = 0;
};

void plant(Block& ram, std::size_t at, std::string_view what = linux_text, std::optional<Header> header = {},
           std::string_view name = {"VMCOREINFO\0\0", 12}) {
  Header numbers = header.value_or(Header{.size = static_cast<std::uint32_t>(what.size())});
  std::byte bytes[12];
  wire::store_le(bytes, numbers.name);
  wire::store_le(bytes + 4, numbers.size);
  wire::store_le(bytes + 8, numbers.type);
  const auto put = [&](std::size_t to, const void* from, std::size_t size) {
    if (to < ram.size()) std::memcpy(ram.data() + to, from, std::min(size, ram.size() - to));
  };
  put(at, bytes, sizeof bytes);
  put(at + 12, name.data(), name.size());
  put(at + 24, what.data(), what.size());
}

}  // namespace

TEST_CASE("Linux's note is found wherever it lies, also across pages, buffers and pieces") {
  for (const std::uint64_t at :
       {2 * mib, 2 * mib + 4, 2 * mib - 4, 2 * mib - 12, 2 * mib - 20, 2 * mib - 40, 33 * mib - 24, 33 * mib - 4,
        33 * mib, 40 * mib - 24 - linux_text.size() / 4 * 4 - 4}) {
    CAPTURE(at);
    const Saved guest(40 * mib, [&](Block& ram) {
      // Pages on both sides, so that a run crosses what the scan is cut into.
      for (const std::uint64_t near : {at - 2 * mib, at - page, at + page})
        if (near < ram.size()) ram.data()[near] = std::byte{1};
      std::memset(ram.data() + mib, 0x55, 2 * mib);
      plant(ram, at);
    });
    const auto found = need(image::find_vmcoreinfo(*guest.reader, guest.layout(40 * mib)));
    REQUIRE(found.has_value());
    CHECK(found->address == at);
    CHECK(found->text == linux_text);
  }
}

TEST_CASE("Of several notes the first is taken, and none that is not well-formed") {
  const std::string with_nul = std::string(linux_text).replace(20, 1, 1, '\0');
  const std::string no_size = "OSRELEASE=6.1.0\nSYMBOL(init_uts_ns)=ffffffff82a0c6c0\n";
  const std::string long_text = std::string(linux_text) + std::string(64 * kib, 'x');
  std::size_t at = mib;
  const Saved guest(16 * mib, [&](Block& ram) {
    const auto next = [&] { return at += 32 * page; };
    plant(ram, next(), linux_text, Header{.name = 10});
    plant(ram, next(), linux_text, Header{.name = 0xffffffff});
    plant(ram, next(), linux_text, Header{.type = 1});
    plant(ram, next(), linux_text, Header{.size = 0});
    plant(ram, next(), linux_text, Header{.size = 10});
    plant(ram, next(), linux_text, Header{.size = 0xffffffff});
    plant(ram, next(), linux_text, Header{.size = 1000});  // zeros behind the text
    plant(ram, next(), with_nul);
    plant(ram, next(), no_size);
    plant(ram, next(), long_text);
    plant(ram, next(), " OSRELEASE=\nPAGESIZE=");
    plant(ram, next(), linux_text, {}, {"VMCOREINFO!\0", 12});
    plant(ram, next() + 2);  // not where a kernel would have it
    plant(ram, ram.size() - 8);
    plant(ram, ram.size() - 24);
    plant(ram, ram.size() - 40);
  });
  const PhysicalLayout layout = guest.layout(16 * mib);
  CHECK_FALSE(need(image::find_vmcoreinfo(*guest.reader, layout)).has_value());
  const Saved two(16 * mib, [](Block& ram) {
    plant(ram, 9 * mib);
    plant(ram, 5 * mib, "OSRELEASE=5\nPAGESIZE=4096\n");
  });
  const auto found = need(image::find_vmcoreinfo(*two.reader, two.layout(4 * mib)));
  REQUIRE(found.has_value());
  CHECK(found->text == "OSRELEASE=5\nPAGESIZE=4096\n");
  CHECK(found->address == (std::uint64_t{4} << 30) + mib);
}

TEST_CASE("Of several notes that of the kernel which runs is taken") {
  // The kernel that ran before a reboot, and the one that runs, which lies elsewhere and is mapped elsewhere.
  const std::string before = "OSRELEASE=5\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a0c6c0\nNUMBER(phys_base)=0\n";
  const std::string runs =
      "OSRELEASE=6\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff98a0c6c0\nNUMBER(phys_base)=-369098752\n";
  constexpr std::uint64_t wanted = 0x18a0c6c0 - 369098752;
  const auto map = [](Block& ram, std::vector<std::uint64_t> tables, std::uint64_t address, std::uint64_t last) {
    for (std::size_t i = 0; i < tables.size(); ++i) {
      const std::size_t shift = 12 + 9 * (tables.size() + (last & 0x80 ? 1 : 0) - 1 - i);
      wire::store_le(ram.data() + tables[i] + (address >> shift & 511) * 8,
                     i + 1 < tables.size() ? tables[i + 1] | 1 : last);
    }
  };
  constexpr std::uint64_t symbol = 0xffffffff98a0c6c0, large = 0x80, paging = 1ull << 31, pae = 1 << 5, la57 = 1 << 12;
  // Three levels down to a page of 2 MiB; one more down to 4 KiB; from five levels.
  struct Way {
    std::vector<std::uint64_t> tables;
    std::uint64_t last, cr4;
  };
  for (const Way& way : {Way{{mib, mib + 2 * page, mib + 3 * page}, (wanted & ~(2 * mib - 1)) | large | 1, pae},
                         Way{{mib, mib + 2 * page, mib + 3 * page, mib + 4 * page}, (wanted & ~(page - 1)) | 1, pae},
                         Way{{mib, mib + 2 * page, mib + 3 * page, mib + 4 * page},
                             (wanted & ~(2 * mib - 1)) | large | 1,
                             pae | la57}}) {
    CAPTURE(way.tables.size());
    const Saved guest(16 * mib, [&](Block& ram) {
      plant(ram, 5 * mib, before);
      plant(ram, 9 * mib, runs);
      plant(ram, 10 * mib, runs);  // a program has read it
      map(ram, way.tables, symbol, way.last);
    });
    const PhysicalLayout layout = guest.layout(16 * mib);
    VcpuRegisters vcpu;
    vcpu.cr = {paging, 0, 0, mib, way.cr4};
    VcpuRegisters in_program = vcpu;  // by tables without a kernel, right behind those with one
    in_program.cr[3] = mib + page;
    VcpuRegisters starting = vcpu;
    starting.cr[0] = 0;
    VcpuRegisters elsewhere = vcpu;
    elsewhere.cr[3] = 0xfffffffffffff000;
    const auto of = [&](std::vector<VcpuRegisters> vcpus) {
      return need(image::find_vmcoreinfo(*guest.reader, layout, {.vcpus = vcpus})).value();
    };
    CHECK(of({vcpu}).address == 9 * mib);
    CHECK(of({vcpu}).text == runs);
    CHECK(of({starting, elsewhere, vcpu}).text == runs);
    CHECK(of({}).text == before);
    CHECK(of({starting, elsewhere}).text == before);
    CHECK(of({in_program}).text == runs);
  }
}

TEST_CASE("Memory full of headers costs no more than their number") {
  const Saved guest(8 * mib, [](Block& ram) {
    for (std::size_t at = mib; at + 64 < ram.size(); at += 36) plant(ram, at, "OSRELEASE=", Header{.size = 65536});
  });
  const Watchdog watch("find_vmcoreinfo() of hostile memory");
  CHECK_FALSE(need(image::find_vmcoreinfo(*guest.reader, guest.layout(8 * mib))).has_value());
}
