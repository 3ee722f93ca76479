// SPDX-License-Identifier: MIT
//
// MainStreamWriter as a source: what it writes is the tables of format/main_stream.md, byte for byte, and our own
// parser takes all of it. (main_stream_io_test.cpp has it as a relay's.)
#include "multifd/qemu/main_stream_writer.hpp"

#include <array>
#include <string>
#include <vector>

#include "multifd/memory/ram_map.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/vm_description.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "support/basics.hpp"
#include "support/format_vector.hpp"
#include "unit/qemu/stream.hpp"

using namespace multifd;
using namespace multifd::qemu;
using test::Bytes;
using test::page;
using test::Stream;

namespace {

using Link = testing::MemoryTransport;
using Writer = MainStreamWriter<Link>;

/// What `write(writer)` makes of a stream of that style.
template <class Write>
Bytes written(const StreamStyle& style, Write&& write) {
  auto [near, far] = testing::memory_transport_pair(1 << 20);
  Writer writer(near, style);
  write(writer);
  REQUIRE(writer.push_out().has_value());
  REQUIRE(near.finish().has_value());
  Bytes bytes;
  for (std::array<std::byte, 4096> part;;) {
    const iovec room = mutable_buffer(std::span(part));
    const auto got = far.read_some(std::span(&room, 1));
    REQUIRE(got.has_value());
    if (*got == 0) return bytes;
    bytes.insert(bytes.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(*got));
  }
}

void need(const Result<void>& result) { REQUIRE_MESSAGE(result.has_value(), describe(result.error())); }

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

constexpr std::array<BlockInfo, 2> two_blocks{BlockInfo{.idstr = "ram.a", .used_length = 8 * page},
                                              BlockInfo{.idstr = "rom/b", .used_length = 2 * page}};

/// A migration of three sections of RAM and two devices.
void write_all_of(Writer& writer, std::string_view machine) {
  need(writer.begin_stream({.machine_type = machine}));
  need(writer.open_return_path());
  need(writer.ping(1));
  need(writer.start_ram(two_blocks));
  need(writer.end_epoch());
  need(writer.end_section());
  need(writer.begin_part());
  need(writer.zero_page("ram.a", 0));
  need(writer.zero_page("ram.a", page));
  need(writer.zero_page("rom/b", page));
  need(writer.end_epoch());
  need(writer.end_section());
  need(writer.switchover_start());
  need(writer.begin_end());
  need(writer.zero_page("rom/b", 0));
  need(writer.end_epoch());
  need(writer.end_section());
  need(writer.device({.idstr = "timer", .instance_id = 0, .version_id = 1}, bytes_of("QEVM")));
  need(writer.device({.idstr = "cpu", .instance_id = 3, .version_id = 12}, {}));
  need(writer.end_stream(Stream::description));
}

/// The same from the tables.
Stream by_the_tables(std::string_view machine, const StreamStyle& style) {
  Stream s;
  const auto epoch = [&] {
    if (style.sync_style == SyncStyle::per_round) s.flush();
    s.eos();
    if (style.footers) s.footer(1);
  };
  s.header();
  if (style.configuration) s.configuration(machine);
  s.command(1).ping(1).start("ram", 1).two_blocks();
  epoch();
  s.part(1).zero(0, "ram.a").zero(page).zero(page, "rom/b");
  epoch();
  if (style.switchover_start) s.command(11);
  s.end(1).zero(0);
  epoch();
  s.be(1, 4).be(4, 2).named("timer").be(4, 0).be(4, 1).text("QEVM");
  if (style.footers) s.footer(2);
  s.be(1, 4).be(4, 3).named("cpu").be(4, 3).be(4, 12);
  if (style.footers) s.footer(3);
  return s.be(1, 0).be(1, 6).be(4, Stream::description.size()).text(Stream::description);
}

}  // namespace

TEST_CASE("A whole stream is the tables, byte for byte, in the style of each machine type, and the parser takes it") {
  for (const char* machine : {"pc-i440fx-2.3", "pc-i440fx-7.2", "pc-q35-8.0", "pc-q35-8.1", "pc-q35-9.2", "pc-q35-10.0",
                              "pc-q35-11.1", "microvm", "SS-20"}) {
    CAPTURE(machine);
    const StreamStyle style = style_of(machine);
    const Bytes bytes = written(style, [&](Writer& writer) { write_all_of(writer, machine); });
    CHECK(bytes == by_the_tables(machine, style).bytes);
    const auto outcome = test::parse(bytes);
    CHECK(outcome.code == std::error_code{});
    CHECK(outcome.bytes == bytes);
    CHECK(outcome.ram_complete);
    CHECK(outcome.style == style.sync_style);
    CHECK(outcome.count("zero ram.a#0+0") == 1);
    CHECK(outcome.count("zero continued rom/b#1+0") == 1);
    CHECK(outcome.count("command 11") == (style.switchover_start ? 1u : 0u));
  }
}

TEST_CASE("A machine type's style is the table of format/versions.md section 15") {
  const auto is = [](const StreamStyle& style, SyncStyle sync, bool switchover, bool old) {
    return style.sync_style == sync && style.switchover_start == switchover && style.footers == !old &&
           style.configuration == !old && !style.gpa;
  };
  using enum SyncStyle;
  CHECK(is(style_of("pc-i440fx-2.3"), per_section, false, true));
  CHECK(is(style_of("pc-i440fx-2.4"), per_section, false, false));
  CHECK(is(style_of("pc-q35-8.0"), per_section, false, false));
  CHECK(is(style_of("pc-q35-8.1"), per_round, false, false));
  CHECK(is(style_of("pc-q35-9.2"), per_round, false, false));
  CHECK(is(style_of("virt-10.0"), per_round, true, false));
  CHECK(is(style_of("pc-q35-11.1"), per_round, true, false));
  // Without a version the peer's generation decides, and nothing is sent that an older one refuses.
  CHECK(is(style_of("microvm"), per_round, false, false));
  CHECK(is(style_of("microvm", *find_peer_profile("qemu-7.2")), per_section, false, false));
  CHECK(is(style_of("microvm", *find_peer_profile("qemu-11.0")), per_round, false, false));
  CHECK(style_of("virt-9.0", peer_multifd, 65536).page_bytes == 65536);
}

TEST_CASE("The configuration has its subsections in QEMU's order, and a list with gpas follows where they say so") {
  StreamStyle style = style_of("pc-q35-10.0", peer_multifd, 1024);
  style.gpa = true;
  Uuid uuid;
  for (std::size_t i = 0; i < uuid.size(); ++i) uuid[i] = static_cast<std::byte>(i);
  const std::array<std::string_view, 1> capabilities{"x-ignore-shared"};
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram", .used_length = 1024, .gpa = 0xc0000}};
  const Bytes bytes = written(style, [&](Writer& writer) {
    need(writer.begin_stream(
        {.machine_type = "pc-q35-10.0", .page_bits = 10, .capabilities = capabilities, .uuid = uuid}));
    need(writer.start_ram(blocks));
    need(writer.end_epoch());
    need(writer.end_section());
  });
  Stream expected;
  expected.header().configuration("pc-q35-10.0").subsection("configuration/target-page-bits").be(4, 10);
  expected.capabilities({"x-ignore-shared"}).subsection("configuration/uuid").be(8, 0x0001020304050607);
  expected.be(8, 0x08090a0b0c0d0e0f).start("ram", 1).total(1024).block("ram", 1024).be(8, 0xc0000);
  expected.flush().eos().footer(1);
  CHECK(bytes == expected.bytes);
  const auto outcome = test::parse(bytes, {}, {.page_bytes = 1024});
  CHECK(outcome.bytes == bytes);
  CHECK(outcome.count("block ram#0 1024") == 1);
}

TEST_CASE("From the header to RAM's START, and at RAM's END, our stream is what QEMU 10.0 wrote, byte for byte") {
  const std::string_view tables = "/rom@etc/acpi/tables", loader = "/rom@etc/table-loader", rsdp = "/rom@etc/acpi/rsdp";
  std::array<BlockInfo, 6> blocks{
      BlockInfo{.idstr = "ram0", .used_length = 0x200000},  BlockInfo{.idstr = tables, .used_length = 0x20000},
      BlockInfo{.idstr = "pc.rom", .used_length = 0x20000}, BlockInfo{.idstr = "pc.bios", .used_length = 0x10000},
      BlockInfo{.idstr = loader, .used_length = 0x1000},    BlockInfo{.idstr = rsdp, .used_length = 0x1000}};
  const auto start = [&](Writer& writer, const StreamConfiguration& configuration) {
    need(writer.begin_stream(configuration));
    need(writer.open_return_path());
    need(writer.ping(1));
    need(writer.start_ram(blocks));
    need(writer.end_epoch());
    need(writer.end_section());
  };
  StreamStyle style = style_of("pc-q35-10.0");
  CHECK(written(style, [&](Writer& writer) { start(writer, {.machine_type = "pc-q35-10.0"}); }) ==
        test::format_vector("main_stream.md", "main_start_per_round"));
  CHECK(written(style, [&](Writer& writer) {
          need(writer.switchover_start());
          need(writer.begin_end());
          need(writer.end_epoch());
          need(writer.end_section());
        }) == test::format_vector("main_stream.md", "ram_end"));
  CHECK(written(style, [&](Writer& writer) { need(writer.end_stream(*VmDescription().text())); }) ==
        test::format_vector("main_stream.md", "main_end"));
  // With both subsections of x86, and a gpa behind every block. That source was without multifd, so without a FLUSH.
  style.gpa = true;
  style.sync_style = SyncStyle::per_section;
  blocks[2].gpa = 0xc0000;
  blocks[3].gpa = 0xffff0000;
  const std::array<std::string_view, 1> capabilities{"x-ignore-shared"};
  Uuid uuid;
  for (std::size_t i = 0; i < uuid.size(); ++i) uuid[i] = static_cast<std::byte>(0x11 * i);
  CHECK(written(style, [&](Writer& writer) {
          start(writer, {.machine_type = "pc-q35-10.0", .capabilities = capabilities, .uuid = uuid});
        }) == test::format_vector("main_stream.md", "main_start_ignore_shared"));
}

TEST_CASE("What a stream cannot say is refused before a byte of it is written") {
  auto [near, far] = testing::memory_transport_pair(1 << 16);
  Writer writer(near);
  const std::string long_name(256, 'n');
  const auto code = [](const Result<void>& result) { return result ? std::error_code{} : result.error().code; };
  CHECK(code(writer.begin_stream({.machine_type = ""})) == Errc::bad_option);
  CHECK(code(writer.begin_stream({.machine_type = std::string(4097, 'm')})) == Errc::bad_option);
  for (const std::string_view name : {std::string_view(), std::string_view(long_name)}) {
    CHECK(code(writer.begin_stream({.machine_type = "m", .capabilities = std::span(&name, 1)})) == Errc::bad_option);
    const BlockInfo block{.idstr = name, .used_length = page};
    CHECK(code(writer.start_ram(std::span(&block, 1))) == Errc::bad_block_idstr);
    CHECK(code(writer.device({.idstr = name}, {})) == Errc::bad_option);
  }
  const BlockInfo with_nul{.idstr = std::string_view("a\0b", 3), .used_length = page};
  CHECK(code(writer.start_ram(std::span(&with_nul, 1))) == Errc::bad_block_idstr);
  for (const std::uint64_t size : {std::uint64_t{0}, page - 1, page + 1024, ~std::uint64_t{0} - page + 1}) {
    const BlockInfo block{.idstr = "ram", .used_length = size};
    CHECK(code(writer.start_ram(std::span(&block, 1))) == Errc::bad_block_size);
  }
  const std::array<BlockInfo, 2> too_much{BlockInfo{.idstr = "a", .used_length = std::uint64_t{1} << 63},
                                          BlockInfo{.idstr = "b", .used_length = std::uint64_t{1} << 63}};
  CHECK(code(writer.start_ram(too_much)) == Errc::bad_block_size);
  need(writer.ping(7));
  need(writer.push_out());
  REQUIRE(near.finish().has_value());
  Bytes bytes(100);
  const iovec room = mutable_buffer(std::span(bytes));
  CHECK(far.read_some(std::span(&room, 1)) == 9u);
}

TEST_CASE("To an own peer the stream is the vector of format/extension.md section 19.8, byte for byte") {
  const Bytes vector = test::format_vector("extension.md", "extension_stream");
  std::vector<std::byte> memory(2 * page);
  for (std::size_t i = 0; i < page; i += 4) memory[i] = std::byte{0x2a};
  wire::PeerSettings settings;
  settings.features.add({.name = wire::feature_resume}).add({.name = wire::feature_page_digests, .needed = true});
  settings.channels = 2;
  settings.page_bytes = 4096;
  settings.compression = wire::flag_zstd;
  settings.zero_pages = wire::ZeroPagesMode::multifd;
  settings.digest = Digest::off;
  settings.tls = true;
  settings.paths = 1;
  settings.uuid.emplace();
  const std::string_view uuid = "\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
  std::ranges::copy(std::as_bytes(std::span(std::string_view(uuid.data(), 16))), settings.uuid->begin());
  settings.session.emplace();
  for (std::size_t i = 0; i < 16; ++i) (*settings.session)[i] = static_cast<std::byte>(0xa0 + i);
  settings.user = bytes_of("kvm");
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram0", .used_length = 2 * page}};
  const Bytes bytes = written(style_of("microvm"), [&](Writer& writer) {
    need(writer.begin_stream({.machine_type = "microvm"}));
    need(writer.open_return_path());
    need(writer.ask());
    need(writer.settings(settings));
    need(writer.start_ram(blocks));
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.begin_part());
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.begin_end());
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.device({.idstr = "cpu"}, bytes_of("\x0a\x0b\x0c")));
    need(writer.page_digests(0, memory));
    need(writer.state_whole());
    need(writer.hand_over());
    need(writer.end_stream({}));
  });
  CHECK(bytes == vector);
  const auto outcome = test::parse(bytes, {}, {.extension = true});
  CHECK(outcome.code == std::error_code{});
  CHECK(outcome.bytes == bytes);
  for (const char* event :
       {"SETTINGS", "SECTION_SIZE", "device cpu 2 3", "PAGE_DIGESTS", "STATE_WHOLE", "HAND_OVER", "end of stream"})
    CHECK_MESSAGE(outcome.count(event) == 1, event);
  // To a destination that has not asked for it, or a QEMU, that is an unknown command.
  CHECK(test::parse(bytes).code == Errc::unknown_command);
}

TEST_CASE("A stream whose memory follows is the vector of format/extension.md section 19.9, byte for byte") {
  const Bytes vector = test::format_vector("extension.md", "extension_missing_pages");
  wire::PeerSettings settings;
  settings.features.add({.name = wire::feature_postcopy, .needed = true});
  settings.page_bytes = 4096;
  Uuid session;
  for (unsigned i = 0; i < 16; ++i) session[i] = static_cast<std::byte>(0x11 * i);
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram0", .used_length = 128 * page}};
  const std::array<std::uint64_t, 2> missing{2, 0x40};
  const Bytes bytes = written(style_of("microvm"), [&](Writer& writer) {
    need(writer.begin_stream({.machine_type = "microvm"}));
    need(writer.open_return_path());
    need(writer.ask());
    need(writer.settings(settings));
    need(writer.start_ram(blocks));
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.begin_end());
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.missing_pages(0, missing));
    need(writer.memory_follows({.pages = 2, .connections = 3, .session = session}));
    need(writer.device({.idstr = "cpu"}, bytes_of("\x0a\x0b\x0c")));
    need(writer.state_whole());
    need(writer.hand_over());
    need(writer.end_stream({}));
  });
  CHECK(bytes == vector);
}

TEST_CASE("A stream with known zeros is the vector of format/extension.md section 19.11, byte for byte") {
  wire::PeerSettings settings;
  settings.features.add({.name = wire::feature_known_zeros});
  settings.page_bytes = 4096;
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram0", .used_length = 128 * page}};
  const std::array<std::uint64_t, 2> zeros{~std::uint64_t{2}, ~std::uint64_t{0x40}};
  const Bytes bytes = written(style_of("microvm"), [&](Writer& writer) {
    need(writer.begin_stream({.machine_type = "microvm"}));
    need(writer.open_return_path());
    need(writer.ask());
    need(writer.settings(settings));
    need(writer.start_ram(blocks));
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.known_zeros(0, zeros));
    for (const bool end : {false, true}) {
      need(end ? writer.begin_end() : writer.begin_part());
      need(writer.end_epoch());
      need(writer.end_section());
    }
    need(writer.state_whole());
    need(writer.hand_over());
    need(writer.end_stream({}));
  });
  CHECK(bytes == test::format_vector("extension.md", "extension_known_zeros"));
}

TEST_CASE(
    "Missing pages of a large block come in as many messages as it takes, without long stretches that are there") {
  using Words = std::vector<std::uint64_t>;
  const auto messages = [](const Words& bitmap) {
    const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram", .used_length = bitmap.size() * 64 * page}};
    const Bytes bytes = written({}, [&](Writer& writer) {
      need(writer.begin_stream({.machine_type = "m"}));
      need(writer.open_return_path());
      need(writer.ask());
      need(writer.settings({}));
      need(writer.start_ram(blocks));
      need(writer.end_section());
      need(writer.begin_end());
      need(writer.end_section());
      need(writer.missing_pages(0, bitmap));
    });
    auto parser = MainStreamParser::create({.extension = true});
    REQUIRE(parser.has_value());
    Words named(bitmap.size());
    std::vector<std::size_t> sizes;
    for (std::size_t at = 0;;) {
      const auto element = parser->next();
      REQUIRE(element.has_value());
      if (!*element) {
        if (at == bytes.size()) break;
        const std::size_t n = std::min(parser->room().size(), bytes.size() - at);
        std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), n, parser->room().begin());
        parser->commit(n);
        at += n;
        continue;
      }
      if ((*element)->kind != ElementKind::extension) continue;
      const auto message = wire::parse_extension((*element)->data, wire::Towards::destination);
      REQUIRE(message.has_value());
      if (message->kind != wire::ExtensionKind::missing_pages) continue;
      const auto pages = wire::parse_page_bitmap(*message);
      REQUIRE(pages.has_value());
      sizes.push_back(pages->words());
      CHECK(wire::add_missing_pages(*pages, named, bitmap.size() * 64 * page, page, "ram").has_value());
    }
    CHECK(named == bitmap);
    return sizes;
  };
  using Sizes = std::vector<std::size_t>;
  CHECK(messages(Words(5)).empty());
  CHECK(messages({0, 0, 1, 0, 0, 2, 0}) == Sizes{4});
  CHECK(messages({1, 0, 0, 0, 1}) == Sizes{1, 1});
  CHECK(messages(Words(wire::max_page_bitmap_words, 1)) == Sizes{wire::max_page_bitmap_words});
  CHECK(messages(Words(wire::max_page_bitmap_words + 1, 1)) == Sizes{wire::max_page_bitmap_words, 1});
  CHECK(messages(Words(2 * wire::max_page_bitmap_words, ~std::uint64_t{0})) ==
        Sizes{wire::max_page_bitmap_words, wire::max_page_bitmap_words});
  test::Rng rng(test::seed());
  Words random(10'000);
  for (auto& word : random) word = rng() % 4 == 0 ? rng() : 0;
  CHECK(messages(random).size() > 4);
}

TEST_CASE("Digests of a large block come in as many messages as it takes, and each fits") {
  const std::size_t pages = 2 * wire::max_page_digests + 5;
  const std::vector<std::byte> memory(pages * 1024);
  const StreamStyle style{.page_bytes = 1024};
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram", .used_length = pages * 1024}};
  const Bytes bytes = written(style, [&](Writer& writer) {
    need(writer.begin_stream({.machine_type = "m"}));
    need(writer.open_return_path());
    need(writer.ask());
    need(writer.settings({}));
    need(writer.start_ram(blocks));
    need(writer.end_section());
    need(writer.begin_end());
    need(writer.end_section());
    need(writer.page_digests(0, memory));
  });
  auto parser = MainStreamParser::create({.page_bytes = 1024, .extension = true});
  REQUIRE(parser.has_value());
  std::size_t compared = 0;
  for (std::size_t at = 0;;) {
    const auto element = parser->next();
    REQUIRE(element.has_value());
    if (*element && (*element)->kind == ElementKind::extension) {
      const auto message = wire::parse_extension((*element)->data, wire::Towards::destination);
      REQUIRE(message.has_value());
      if (message->kind != wire::ExtensionKind::page_digests) continue;
      const auto digests = wire::parse_page_digests(*message);
      REQUIRE(digests.has_value());
      CHECK(digests->offset == compared * 1024);
      CHECK(wire::compare_page_digests(*digests, memory, 1024, "ram").has_value());
      compared += digests->pages();
    } else if (!*element) {
      if (at == bytes.size()) break;
      const auto room = parser->room();
      const std::size_t n = std::min(room.size(), bytes.size() - at);
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), n, room.begin());
      parser->commit(n);
      at += n;
    }
  }
  CHECK(compared == pages);
}

TEST_CASE("A source that gives up inside a section of RAM ends the section, and its reason arrives") {
  const Bytes bytes = written({}, [&](Writer& writer) {
    need(writer.begin_stream({.machine_type = "microvm"}));
    need(writer.open_return_path());
    need(writer.ask());
    need(writer.settings({}));
    need(writer.start_ram(two_blocks));
    need(writer.end_epoch());
    need(writer.end_section());
    need(writer.begin_part());
    need(writer.zero_page("ram.a", 0));
    need(writer.failed({.code = Errc::cancelled}, "cancelled by a signal"));
  });
  const auto outcome = test::parse(bytes, {}, {.extension = true});
  REQUIRE(outcome.events.size() > 3);
  CHECK(outcome.events.back() == "FAILED");
  CHECK(outcome.events[outcome.events.size() - 2] == "footer 1");
  CHECK(outcome.code == Errc::truncated_stream);
  CHECK(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()).ends_with("cancelled by a signal"));
}

TEST_CASE("A map's blocks are announced largest first, and compared name by name") {
  std::vector<std::byte> memory(12 * page);
  RamMap ram;
  REQUIRE(ram.add("small", std::span(memory).first(page)).has_value());
  REQUIRE(ram.add("large", std::span(memory).subspan(page, 8 * page)).has_value());
  REQUIRE(ram.add("also small", std::span(memory).subspan(9 * page, page)).has_value());
  auto blocks = announced_blocks(ram);
  REQUIRE(blocks.has_value());
  REQUIRE(blocks->size() == 3);
  CHECK((*blocks)[0].idstr == "large");
  CHECK((*blocks)[0].used_length == 8 * page);
  CHECK((*blocks)[1].idstr == "also small");
  CHECK((*blocks)[2].idstr == "small");
  CHECK(compare_blocks(*blocks, ram).has_value());
  std::ranges::reverse(*blocks);
  CHECK(compare_blocks(*blocks, ram).has_value());

  const auto differs = [&](std::uint64_t theirs, std::uint64_t ours, std::string_view name) {
    const auto compared = compare_blocks(*blocks, ram);
    REQUIRE_FALSE(compared.has_value());
    CHECK(compared.error().code == Errc::block_list_mismatch);
    CHECK(compared.error().detail == theirs);
    CHECK(compared.error().expected == ours);
    CHECK(compared.error().subject.view() == name);
  };
  (*blocks)[0].used_length = 2 * page;
  differs(2 * page, page, "small");
  blocks->erase(blocks->begin());
  differs(0, page, "small");
  blocks->push_back({.idstr = "vga", .used_length = 4 * page});
  differs(4 * page, 0, "vga");
}

TEST_CASE("A small VM description names the devices and how long their states are") {
  VmDescription description(4096);
  REQUIRE(description.text() == std::string(Stream::description));
  REQUIRE(description.add({.idstr = "timer", .instance_id = 0, .version_id = 2}, 24).has_value());
  REQUIRE(description.add({.idstr = "a\"\\\n\xff", .instance_id = 1}, 0).has_value());
  CHECK(description.text() ==
        R"({"page_size": 4096, "devices": [)"
        R"({"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, )"
        R"("fields": [{"name": "state", "type": "buffer", "size": 24}]}, )"
        R"({"name": "a\"\\\u000a\u00ff", "instance_id": 1, "vmsd_name": "a\"\\\u000a\u00ff", "version": 1, )"
        R"("fields": [{"name": "state", "type": "buffer", "size": 0}]}]})");
}
