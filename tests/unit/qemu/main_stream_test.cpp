// SPDX-License-Identifier: MIT
#include "multifd/qemu/main_stream.hpp"

#include "support/allocation_count.hpp"
#include "support/basics.hpp"
#include "unit/qemu/stream.hpp"

using multifd::Errc;
using multifd::SyncStyle;
using multifd::qemu::ElementKind;
using multifd::qemu::MainStreamLimits;
using multifd::qemu::MainStreamParser;
using test::Outcome;
using test::page;
using test::Stream;

namespace {

using Events = std::vector<std::string>;

/// Parses a stream to its end and keeps the parser, for what it knows afterwards.
MainStreamParser parsed(const Stream& stream, const MainStreamLimits& limits = {}) {
  auto parser = MainStreamParser::create(limits);
  REQUIRE(parser);
  const auto room = parser->room();
  REQUIRE(stream.bytes.size() <= room.size());
  std::ranges::copy(stream.bytes, room.begin());
  parser->commit(stream.bytes.size());
  for (;;) {
    const auto element = parser->next();
    REQUIRE(element);
    if (!*element) return std::move(*parser);
  }
}

}  // namespace

TEST_CASE("A per-section stream, with return path: every EOS closes an epoch, CONTINUE reaches over sections") {
  const Stream stream = test::per_section_stream();
  const Outcome outcome = test::parse(stream.bytes);
  CHECK(outcome.code == std::error_code{});
  CHECK(outcome.style == SyncStyle::per_section);
  CHECK(outcome.ram_complete);
  CHECK(outcome.events == Events{"header",
                                 "configuration pc-i440fx-7.2",
                                 "command 1",
                                 "command 2 0 0 0 1",
                                 "start ram 2",
                                 "ram_size 40960",
                                 "block ram.a#0 32768",
                                 "block rom/b#1 8192",
                                 "eos closes",
                                 "footer 2",
                                 "part ram 2",
                                 "zero ram.a#0+0",
                                 "zero continued ram.a#0+4096",
                                 "zero rom/b#1+0",
                                 "eos closes",
                                 "footer 2",
                                 "part ram 2",
                                 "zero continued rom/b#1+4096",
                                 "zero ram.a#0+28672",
                                 "eos closes",
                                 "footer 2",
                                 "end ram 2",
                                 "zero continued ram.a#0+8192",
                                 "eos closes",
                                 "footer 2",
                                 "devices"});
  CHECK(outcome.bytes == stream.bytes);
}

TEST_CASE("A per-round stream, with switchover: FLUSH closes epochs, EOS does not") {
  const Stream stream = test::per_round_stream();
  const Outcome outcome = test::parse(stream.bytes);
  CHECK(outcome.code == std::error_code{});
  CHECK(outcome.style == SyncStyle::per_round);
  CHECK(outcome.ram_complete);
  CHECK(outcome.events == Events{"header",
                                 "configuration pc-i440fx-10.0",
                                 "command 1",
                                 "command 2 222 173 190 239",
                                 "start ram 2",
                                 "ram_size 40960",
                                 "block ram.a#0 32768",
                                 "block rom/b#1 8192",
                                 "flush closes",
                                 "eos",
                                 "footer 2",
                                 "part ram 2",
                                 "zero ram.a#0+4096",
                                 "eos",
                                 "footer 2",
                                 "part ram 2",
                                 "zero continued ram.a#0+0",
                                 "flush closes",
                                 "zero continued ram.a#0+12288",
                                 "flush closes",
                                 "eos",
                                 "footer 2",
                                 "part ram 2",
                                 "eos",
                                 "footer 2",
                                 "command 11",
                                 "end ram 2",
                                 "page continued ram.a#0+8192 x",
                                 "flush closes",
                                 "flush closes",
                                 "eos",
                                 "footer 2",
                                 "devices"});
  CHECK(outcome.bytes == stream.bytes);
}

TEST_CASE("The shapes of format/packets.md section 6.2 close as many epochs as their sources sent SYNCs") {
  const auto closes = [](std::string_view shape) {
    Stream stream;
    stream.header().configuration();
    for (const char c : shape) {
      if (c == 'S') stream.start().two_blocks();
      if (c == 'P') stream.part();
      if (c == 'E') stream.end();
      if (c == 'f') stream.flush();
      if (c == '.') stream.eos().footer();
    }
    const Outcome outcome = test::parse(stream.devices().bytes);
    CHECK(outcome.code == std::error_code{});
    CHECK(outcome.bytes == stream.bytes);
    return outcome.count("flush closes") + outcome.count("eos closes");
  };
  CHECK(closes("Sf.P.P.Pf.Pf.P.Pf.Pf.Ef.") == 6);  // 11.1
  CHECK(closes("Sf.P.Pf.Pff.Ef.") == 5);           // 11.1, machine 8.1
  CHECK(closes("Sf.P.Pf.Eff.") == 4);              // 10.0
  CHECK(closes("S.P.P.E.") == 4);                  // 10.0, machine 8.0
  CHECK(closes("S.Pf.E.") == 4);                   // a FLUSH counts in per-section style, too
  CHECK(closes("Sf.E.") == 1);
}

TEST_CASE("The same elements and the same bytes, however the stream arrives") {
  test::Rng rng(test::seed());
  CAPTURE(test::seed());
  for (const Stream& stream : {test::per_section_stream(), test::per_round_stream()}) {
    const Outcome whole = test::parse(stream.bytes);
    REQUIRE(whole.code == std::error_code{});
    for (const unsigned most : {1u, 2u, 3u, 7u, 4096u}) {
      CAPTURE(most);
      const Outcome outcome = test::parse(stream.bytes, {.most = most});
      CHECK(outcome.events == whole.events);
      CHECK(outcome.bytes == stream.bytes);
    }
    for (int round = 0; round < 200; ++round) {
      CAPTURE(round);
      const Outcome outcome = test::parse(stream.bytes, {.most = std::size_t{1} << round % 13, .rng = &rng});
      CHECK(outcome.events == whole.events);
      CHECK(outcome.bytes == stream.bytes);
    }
  }
}

TEST_CASE("A stream of many buffers' length passes unchanged, in both record kinds and page sizes") {
  test::Rng rng(test::seed());
  for (const std::size_t page_bytes : {1024u, 4096u, 65536u}) {
    CAPTURE(page_bytes);
    constexpr std::uint64_t pages = 60;
    Stream stream;
    stream.header().configuration().start().total(pages * page_bytes).block("big", pages * page_bytes);
    stream.flush().eos().footer().end();
    stream.zero((pages - 1) * page_bytes, "big");
    for (std::uint64_t i = 0; i < pages; ++i) {
      stream.full_page(i * page_bytes, i % 3 == 0 ? "big" : "", static_cast<char>('a' + i % 26), page_bytes);
      for (int zeros = 0; zeros < 100; ++zeros) stream.zero(i * page_bytes);
    }
    stream.flush().eos().footer().full("disk");
    for (int i = 0; i < 30000; ++i) stream.text("device state ");
    stream.footer(9).devices();
    const MainStreamLimits limits{.page_bytes = page_bytes};
    const Outcome whole = test::parse(stream.bytes, {}, limits);
    CHECK(whole.code == std::error_code{});
    CHECK(whole.bytes == stream.bytes);
    CHECK(whole.events.size() > 101 * pages);
    const Outcome split = test::parse(stream.bytes, {.most = 3000, .rng = &rng}, limits);
    CHECK(split.events == whole.events);
    CHECK(split.bytes == stream.bytes);
  }
}

TEST_CASE("A machine type before 2.4 sends neither configuration nor footers") {
  Stream stream;
  stream.header().command(1).start().two_blocks().eos().part().zero(0, "rom/b").eos().end().zero(page).eos().devices();
  for (const std::size_t most : {SIZE_MAX, std::size_t{1}}) {
    const Outcome outcome = test::parse(stream.bytes, {.most = most});
    CHECK(outcome.code == std::error_code{});
    CHECK(outcome.ram_complete);
    CHECK(outcome.count("footer 2") == 0);
    CHECK(outcome.count("zero continued rom/b#1+4096") == 1);
    CHECK(outcome.bytes == stream.bytes);
  }
  CHECK(parsed(stream).machine_type() == "");
}

TEST_CASE("Footers and configuration can be switched off each by itself: START tells whether there are footers") {
  Stream no_footers;  // send-section-footer=off
  no_footers.header().configuration().start().two_blocks().eos().part().zero(0, "rom/b").eos().end().eos().devices();
  Stream no_configuration;  // send-configuration=off
  no_configuration.header().start().two_blocks().eos().footer().part().eos().footer().end().eos().footer().devices();
  for (const Stream& stream : {no_footers, no_configuration})
    for (const std::size_t most : {SIZE_MAX, std::size_t{1}}) {
      const Outcome outcome = test::parse(stream.bytes, {.most = most});
      CHECK(outcome.code == std::error_code{});
      CHECK(outcome.ram_complete);
      CHECK(outcome.bytes == stream.bytes);
    }
  // Then all sections have them, or none.
  test::check_refused(Stream().up_to_start().part().eos().part(), Errc::bad_footer, 2, "ram");
  Stream late = Stream().header().configuration().start().two_blocks().eos().part().eos().footer();
  test::check_refused(late, Errc::unexpected_element, 0x7e);
}

TEST_CASE("A stream that is cut in the devices' state is not whole, wherever, and with or without a description") {
  using multifd::qemu::StreamTail;
  const Stream devices = Stream().up_to_start().end().eos().footer().full("timer", 1).be(8, 0).footer(1).be(1, 0);
  const std::size_t end_mark = devices.bytes.size();
  const Stream whole = Stream(devices).be(1, 6).be(4, 2).text("{}");
  for (std::size_t size = Stream().up_to_start().end().eos().footer().bytes.size(); size <= whole.bytes.size();
       ++size) {
    CAPTURE(size);
    const test::Bytes part(whole.bytes.begin(), whole.bytes.begin() + static_cast<std::ptrdiff_t>(size));
    const bool ends = size == end_mark || size == whole.bytes.size();
    CHECK(test::parse(part).code == (ends ? std::error_code{} : std::error_code(Errc::truncated_stream)));
  }
}

TEST_CASE("What the parser knows, and when") {
  auto created = MainStreamParser::create({});
  REQUIRE(created);
  MainStreamParser& parser = *created;
  const auto feed = [&](const Stream& more) {
    std::ranges::copy(more.bytes, parser.room().begin());
    parser.commit(more.bytes.size());
    for (;;) {
      const auto element = parser.next();
      REQUIRE(element);
      if (!*element) return;
    }
  };
  CHECK_FALSE(parser.return_path_open());
  CHECK_FALSE(parser.sync_style());
  Stream uuid;
  for (unsigned i = 0; i < 16; ++i) uuid.be(1, 0xa0 + i);
  feed(Stream()
           .header()
           .configuration("pc-i440fx-10.0")
           .subsection("configuration/target-page-bits")
           .be(4, 12)
           .capabilities({"x-ignore-shared"})
           .subsection("configuration/uuid")
           .append(uuid.bytes));
  CHECK(parser.machine_type() == "");  // one more subsection may follow
  feed(Stream().command(1));
  CHECK(parser.machine_type() == "pc-i440fx-10.0");
  REQUIRE(parser.capabilities().size() == 1);
  CHECK(parser.capabilities()[0] == "x-ignore-shared");
  REQUIRE(parser.uuid());
  CHECK(std::ranges::equal(*parser.uuid(), uuid.bytes));
  CHECK(parser.return_path_open());
  CHECK(parser.blocks().empty());

  feed(Stream().start().total(3 * page).block("a", page).be(8, 0x1000));
  CHECK(parser.ram_bytes() == 3 * page);
  CHECK(parser.blocks().size() == 1);
  CHECK_FALSE(parser.block_list_complete());
  feed(Stream().block("/rom@etc/acpi/tables", 2 * page).be(8, 0));
  CHECK(parser.block_list_complete());
  REQUIRE(parser.blocks().size() == 2);
  CHECK(parser.blocks()[0].idstr == "a");
  CHECK(parser.blocks()[0].gpa == 0x1000);
  CHECK(parser.blocks()[1].idstr == "/rom@etc/acpi/tables");
  CHECK(parser.blocks()[1].used_length == 2 * page);
  CHECK(parser.blocks()[1].gpa == 0);
  CHECK(parser.blocks()[1].page_size == 0);

  CHECK_FALSE(parser.sync_style());
  feed(Stream().flush());
  CHECK(parser.sync_style() == SyncStyle::per_round);
  feed(Stream().eos().footer().end().eos());
  CHECK_FALSE(parser.ram_complete());
  feed(Stream().footer());
  CHECK(parser.ram_complete());
  CHECK(parser.finish().error().code == Errc::truncated_stream);  // the devices are missing
}

TEST_CASE("Views of names hold when the parser has moved on, and when it has moved") {
  MainStreamParser parser = parsed(test::per_section_stream());
  const MainStreamParser moved = std::move(parser);
  CHECK(moved.machine_type() == "pc-i440fx-7.2");
  REQUIRE(moved.blocks().size() == 2);
  CHECK(moved.blocks()[0].idstr == "ram.a");
  CHECK(moved.blocks()[1].idstr == "rom/b");
}

TEST_CASE("An element's bytes and data are where the parser says, exactly as on the wire") {
  auto parser = MainStreamParser::create({});
  REQUIRE(parser);
  const Stream stream = Stream().up_to_start().part().full_page(page, "rom/b", 'y');
  std::ranges::copy(stream.bytes, parser->room().begin());
  parser->commit(stream.bytes.size());
  for (;;) {
    const auto element = parser->next();
    REQUIRE(element);
    REQUIRE(*element);
    if ((*element)->kind != ElementKind::page) continue;
    CHECK(std::ranges::equal((*element)->bytes, Stream().full_page(page, "rom/b", 'y').bytes));
    CHECK((*element)->data.size() == page);
    CHECK((*element)->size == page);
    CHECK(std::ranges::all_of((*element)->data, [](std::byte byte) { return byte == std::byte{'y'}; }));
    break;
  }
}

TEST_CASE(
    "Huge pages: entries of the block list have a page size when POSTCOPY_ADVISE says so and the next byte does") {
  constexpr std::uint64_t huge = 2 << 20;
  const auto header = [](std::uint64_t advised) {
    return Stream().header().configuration().command(1).advise(advised);
  };
  const auto check = [](const Stream& stream, std::vector<std::uint64_t> page_sizes) {
    for (const std::size_t most : {SIZE_MAX, std::size_t{1}}) {
      const Outcome outcome = test::parse(stream.bytes, {.most = most});
      CHECK(outcome.code == std::error_code{});
      CHECK(outcome.bytes == stream.bytes);
    }
    const MainStreamParser parser = parsed(stream);
    std::vector<std::uint64_t> got;
    for (const auto& block : parser.blocks()) got.push_back(block.page_size);
    CHECK(got == page_sizes);
  };
  const auto tail = [](Stream stream) { return stream.flush().eos().footer().end().eos().footer().devices(); };

  // Small pages only: nothing has the field.
  check(tail(header(page).start().two_blocks()), {0, 0});
  // First, last, both, none.
  check(tail(header(huge | page).start().total(10 * page).block("a", 8 * page).be(8, huge).block("b", 2 * page)),
        {huge, 0});
  check(tail(header(huge | page).start().total(10 * page).block("a", 8 * page).block("b", 2 * page).be(8, huge)),
        {0, huge});
  check(tail(header(huge).start().total(10 * page).block("a", 8 * page).be(8, huge).block("b", 2 * page).be(8, huge)),
        {huge, huge});
  check(tail(header(0x10000).start().two_blocks()), {0, 0});  // a host with 64 KiB pages
  // ADVISE without data comes from postcopy of other things than RAM.
  check(tail(Stream().header().configuration().command(3).start().two_blocks()), {0, 0});
}

TEST_CASE("Huge pages and x-ignore-shared together: page size in front, guest-physical address behind") {
  constexpr std::uint64_t huge = 2 << 20;
  Stream stream;
  stream.header().configuration().capabilities({"x-ignore-shared"}).advise(huge | page).start().total(4 * page);
  stream.block("a", page).be(8, huge).be(8, 0x100000);
  stream.block("b", page).be(8, 0x200000);
  stream.block("c", page).be(8, 0);
  stream.block("d", page).be(8, huge).be(8, 0x300000).eos().footer();
  const MainStreamParser parser = parsed(stream);
  REQUIRE(parser.blocks().size() == 4);
  CHECK(parser.blocks()[0].page_size == huge);
  CHECK(parser.blocks()[0].gpa == 0x100000);
  CHECK(parser.blocks()[1].page_size == 0);
  CHECK(parser.blocks()[1].gpa == 0x200000);
  CHECK(parser.blocks()[2].gpa == 0);
  CHECK(parser.blocks()[3].page_size == huge);
  CHECK(parser.blocks()[3].gpa == 0x300000);
}

TEST_CASE("Blocks are found by name, whatever their number and order") {
  constexpr std::uint64_t count = 600;
  Stream stream;
  stream.header().configuration().start().total(count * page);
  const auto name = [](std::uint64_t i) { return std::to_string(i * 7919 % count) + "-block"; };
  for (std::uint64_t i = 0; i < count; ++i) stream.block(name(i), page);
  stream.eos().footer().part();
  for (std::uint64_t i = 0; i < count; ++i) stream.zero(0, name(count - 1 - i));
  const Outcome outcome = test::parse(stream.bytes);
  CHECK(outcome.code == Errc::truncated_stream);
  REQUIRE(outcome.events.size() > count);
  for (std::uint64_t i = 0; i < count; ++i)
    CHECK(outcome.events[outcome.events.size() - count + i] ==
          "zero " + name(count - 1 - i) + "#" + std::to_string(count - 1 - i) + "+0");
}

TEST_CASE("Nothing is allocated after create()") {
  const Stream stream = test::per_round_stream();
  auto parser = MainStreamParser::create({});
  REQUIRE(parser);
  const auto before = test::allocations_of_this_thread();
  std::size_t elements = 0;
  for (std::size_t at = 0;;) {
    const auto element = parser->next();
    if (!element) break;
    if (*element) {
      ++elements;
      continue;
    }
    if (at == stream.bytes.size()) break;
    const auto room = parser->room();
    room[0] = stream.bytes[at++];
    parser->commit(1);
  }
  CHECK(test::allocations_of_this_thread() == before);
  CHECK(elements > 30);
  CHECK(parser->finish());
}

TEST_CASE("create() refuses limits that are none") {
  const auto refused = [](const MainStreamLimits& limits) { return test::code_of(MainStreamParser::create(limits)); };
  CHECK(refused({.page_bytes = 512}) == Errc::bad_page_size);
  CHECK(refused({.page_bytes = 4097}) == Errc::bad_page_size);
  CHECK(refused({.max_blocks = 0}) == Errc::bad_option);
  CHECK(refused({.max_blocks = 65537}) == Errc::bad_option);
  CHECK(refused({.max_machine_type_bytes = 4097}) == Errc::bad_option);
  CHECK(refused({.max_capabilities = 65}) == Errc::bad_option);
  CHECK(refused({.max_blocks = 65536, .max_machine_type_bytes = 4096, .max_capabilities = 64}) == std::error_code{});
}
