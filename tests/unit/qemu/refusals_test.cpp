// SPDX-License-Identifier: MIT
//
// What MainStreamParser refuses: each with its code, the refused value, and the name that a message can show.
#include "unit/qemu/stream.hpp"

#include "multifd/qemu/main_stream.hpp"

using multifd::Errc;
using test::check_refused;
using test::page;
using test::Stream;

namespace {

Stream configured() { return Stream().header().configuration(); }
Stream list_of(std::uint64_t total) { return configured().start().total(total); }
Stream in_part() { return Stream().up_to_start().part(); }

}  // namespace

TEST_CASE("Refused: another magic, another version (9.1)") {
  check_refused(Stream().be(4, 0x11223344).be(4, 1), Errc::bad_stream_magic, 0x11223344);
  check_refused(Stream().text("GET / HTTP/1.1"), Errc::bad_stream_magic, 0x47455420);
  check_refused(Stream().text("QEVM").be(4, 2), Errc::bad_stream_version, 2);
  check_refused(Stream().text("QEVM").be(4, 0x03000000), Errc::bad_stream_version, 0x03000000);
}

TEST_CASE("Refused in the configuration (9.3): lengths over the limits") {
  check_refused(Stream().header().be(1, 7).be(4, 257), Errc::stream_limit_exceeded, 257);
  check_refused(Stream().header().be(1, 7).be(4, 0xffffffff), Errc::stream_limit_exceeded, 0xffffffff);
  check_refused(configured().subsection("configuration/capabilities").be(4, 33), Errc::stream_limit_exceeded, 33);
  check_refused(configured().subsection("configuration/capabilities").be(4, 0xffffffff), Errc::stream_limit_exceeded,
                0xffffffff);
  const multifd::qemu::MainStreamLimits narrow{.max_machine_type_bytes = 3, .max_capabilities = 0};
  check_refused(Stream().header().configuration("abcd"), Errc::stream_limit_exceeded, 4, "", narrow);
  check_refused(Stream().header().configuration("abc").subsection("configuration/capabilities").be(4, 1),
                Errc::stream_limit_exceeded, 1, "", narrow);
}

TEST_CASE("The longest configuration within the limits is whole, also one byte at a time") {
  Stream stream;
  stream.header().configuration(std::string(256, 'm'));
  stream.subsection("configuration/target-page-bits").be(4, 12).capabilities({"x-ignore-shared"});
  stream.subsection("configuration/uuid").be(8, 1).be(8, 2).command(1);
  for (const std::size_t most : {SIZE_MAX, std::size_t{1}}) {
    const auto outcome = test::parse(stream.bytes, {.most = most});
    CHECK(outcome.code == Errc::truncated_stream);
    CHECK(outcome.bytes == stream.bytes);
    CHECK(outcome.events.back() == "command 1");
  }
}

TEST_CASE("Refused in the configuration: what changes the stream in a way that cannot be followed") {
  check_refused(configured().capabilities({"mapped-ram"}), Errc::mapped_ram_refused, 0, "mapped-ram");
  check_refused(configured().capabilities({"x-ignore-shared", "mapped-ram"}), Errc::mapped_ram_refused, 0,
                "mapped-ram");
  check_refused(configured().capabilities({"x-colo"}), Errc::unknown_capability, 0, "x-colo");
  check_refused(configured().capabilities({""}), Errc::unknown_capability, 0, "");
  check_refused(configured().subsection("configuration/target-page-bits").be(4, 14), Errc::page_size_mismatch, 1 << 14);
  check_refused(configured().subsection("configuration/target-page-bits").be(4, 0xffffffff), Errc::page_size_mismatch,
                0xffffffff);
}

TEST_CASE("Refused in the configuration: malformed ones") {
  using namespace std::string_view_literals;
  check_refused(Stream().header().configuration("pc\0q35"sv), Errc::bad_configuration, 6);
  check_refused(configured().subsection("configuration/new"), Errc::bad_configuration, 17, "configuration/new");
  check_refused(configured().subsection(""), Errc::bad_configuration, 0, "");
  check_refused(configured().subsection("configuration/uuid", 2), Errc::bad_configuration, 2, "configuration/uuid");
  check_refused(configured().capabilities({"x-ignore-shared", "x-ignore-shared"}), Errc::bad_configuration, 0,
                "x-ignore-shared");
  check_refused(configured().capabilities({}).capabilities({}), Errc::bad_configuration, 26,
                "configuration/capabilities");
  check_refused(configured().subsection("configuration/uuid").be(8, 0).be(8, 0).subsection("configuration/uuid"),
                Errc::bad_configuration, 18, "configuration/uuid");
  check_refused(
      configured().subsection("configuration/target-page-bits").be(4, 12).subsection("configuration/target-page-bits"),
      Errc::bad_configuration, 30, "configuration/target-page-bits");
}

TEST_CASE("Refused: elements that are unknown, or out of place (9.2)") {
  for (const unsigned type : {0x09u, 0x0au, 0x10u, 0x45u, 0x7du, 0x7fu, 0xffu})
    check_refused(configured().be(1, type), Errc::unknown_element, type);
  check_refused(configured().be(1, 6), Errc::unexpected_element, 6);
  check_refused(configured().be(1, 0x7e), Errc::unexpected_element, 0x7e);
  check_refused(configured().configuration(), Errc::unexpected_element, 7);
  check_refused(Stream().header().command(1).configuration(), Errc::unexpected_element, 7);
  check_refused(Stream().header().be(1, 5), Errc::unexpected_element, 5);
  check_refused(configured().command(1).subsection("configuration/uuid"), Errc::unexpected_element, 5);
  // The end, ahead of RAM's: what a source that gives up may write.
  check_refused(configured().be(1, 0), Errc::unexpected_element, 0);
  check_refused(Stream().up_to_start().be(1, 0), Errc::unexpected_element, 0);
  check_refused(Stream().up_to_start().end().eos().footer().be(1, 6), Errc::unexpected_element, 6);
}

TEST_CASE("Refused: postcopy, COLO and unknown commands, by name; known ones of a wrong length (9.7)") {
  const auto command = [](unsigned number, std::size_t bytes = 0) {
    return configured().command(number, test::Bytes(bytes));
  };
  check_refused(command(4), Errc::postcopy_refused, 4, "POSTCOPY_LISTEN");
  check_refused(command(5), Errc::postcopy_refused, 5, "POSTCOPY_RUN");
  check_refused(command(6, 20), Errc::postcopy_refused, 6, "POSTCOPY_RAM_DISCARD");
  check_refused(command(7, 4), Errc::postcopy_refused, 7, "PACKAGED");
  check_refused(command(8), Errc::colo_refused, 8, "ENABLE_COLO");
  check_refused(command(9), Errc::postcopy_refused, 9, "POSTCOPY_RESUME");
  check_refused(command(10, 7), Errc::postcopy_refused, 10, "RECV_BITMAP");
  check_refused(command(0), Errc::unknown_command, 0);
  check_refused(command(12), Errc::unknown_command, 12);
  check_refused(command(0xffff, 100), Errc::unknown_command, 0xffff);

  check_refused(command(1, 1), Errc::bad_command_length, 1, "OPEN_RETURN_PATH");
  check_refused(command(2, 3), Errc::bad_command_length, 3, "PING");
  check_refused(command(2, 5), Errc::bad_command_length, 5, "PING");
  check_refused(command(3, 8), Errc::bad_command_length, 8, "POSTCOPY_ADVISE");
  check_refused(command(11, 65535), Errc::bad_command_length, 65535, "SWITCHOVER_START");
  // Also between sections, when RAM has started.
  check_refused(Stream().up_to_start().command(4), Errc::postcopy_refused, 4, "POSTCOPY_LISTEN");
  // A guest with other pages than this side believes.
  check_refused(configured().advise(0x10000, 0x10000), Errc::page_size_mismatch, 0x10000, "POSTCOPY_ADVISE");
}

TEST_CASE("Refused: sections that hold something else than RAM, by name (9.9)") {
  check_refused(configured().start("dirty-bitmap", 1, 1), Errc::unknown_section, 0, "dirty-bitmap");
  check_refused(configured().start("0000:00:02.0/vfio", 3, 1, 7), Errc::unknown_section, 7, "0000:00:02.0/vfio");
  check_refused(configured().start("ram", 3, 4, 1), Errc::unknown_section, 1, "ram");
  check_refused(configured().start("", 3, 4), Errc::unknown_section, 0, "");
  check_refused(configured().start("ram2", 3, 4), Errc::unknown_section, 0, "ram2");
  check_refused(Stream().up_to_start().start("block", 3, 1), Errc::unknown_section, 0, "block");
  // Early devices: ahead of START, and between START and the first PART, where QEMU 10.0 sends virtio-mem's.
  check_refused(configured().full("0000:00:03.0/virtio-mem-early"), Errc::early_device_refused, 0,
                "0000:00:03.0/virtio-mem-early");
  check_refused(Stream().up_to_start().full("timer"), Errc::early_device_refused, 0, "timer");
}

TEST_CASE("Refused: RAM sections of another version, out of order, or with another id") {
  check_refused(configured().start("ram", 2, 3), Errc::bad_ram_version, 3, "ram");
  check_refused(configured().start("ram", 2, 5), Errc::bad_ram_version, 5, "ram");
  check_refused(Stream().up_to_start().start(), Errc::unexpected_section, 2, "ram");
  check_refused(configured().part(), Errc::unexpected_section, 2);
  check_refused(configured().end(7), Errc::unexpected_section, 7);
  check_refused(Stream().up_to_start().part(3), Errc::wrong_section_id, 3);
  check_refused(Stream().up_to_start().end(0xffffffff), Errc::wrong_section_id, 0xffffffff);

  const auto ended = [] { return Stream().up_to_start().end().eos().footer(); };
  check_refused(ended().part(), Errc::unexpected_section, 2, "ram");
  check_refused(ended().end(), Errc::unexpected_section, 2, "ram");
  check_refused(ended().start(), Errc::unexpected_section, 2, "ram");
  check_refused(ended().start("dirty-bitmap"), Errc::unknown_section, 0, "dirty-bitmap");
}

TEST_CASE("Refused: a section without its footer (section 16, row 21)") {
  check_refused(in_part().eos().part(), Errc::bad_footer, 2, "ram");
  check_refused(in_part().eos().be(1, 0), Errc::bad_footer, 0, "ram");
  check_refused(in_part().eos().footer(3), Errc::bad_footer, 3, "ram");
}

TEST_CASE("Refused in the block list (9.5, section 16 row 19): a total that is none") {
  check_refused(configured().start().eos(), Errc::bad_block_list, 0x10);
  check_refused(configured().start().flush(), Errc::bad_block_list, 0x200);
  check_refused(configured().start().be(8, page), Errc::bad_block_list, 0);
  check_refused(configured().start().be(8, page | 0x24), Errc::bad_block_list, 0x24);
  check_refused(list_of(0), Errc::bad_block_list, 0);
  check_refused(list_of((std::uint64_t{1} << 44) + page), Errc::stream_limit_exceeded, (std::uint64_t{1} << 44) + page);
  check_refused(list_of(~std::uint64_t{0xfff}), Errc::stream_limit_exceeded, ~std::uint64_t{0xfff});
}

TEST_CASE("Refused in the block list: names") {
  using namespace std::string_view_literals;
  check_refused(list_of(2 * page).be(1, 0), Errc::bad_block_list, 0);
  check_refused(list_of(2 * page).block("pc\0ram"sv, page), Errc::bad_block_list, 6);
  check_refused(list_of(3 * page).block("a", page).block("b", page).block("a", page), Errc::repeated_block_name, 0,
                "a");
}

TEST_CASE(
    "Refused in the block list: lengths that are no whole pages or do not add up to the total, without wrapping") {
  check_refused(list_of(2 * page).block("a", 0), Errc::bad_used_length, 0, "a");
  check_refused(list_of(2 * page).block("a", page + 1), Errc::bad_used_length, page + 1, "a");
  check_refused(list_of(2 * page).block("a", page / 2), Errc::bad_used_length, page / 2, "a");
  check_refused(list_of(2 * page).block("a", 3 * page), Errc::bad_used_length, 3 * page, "a");
  check_refused(list_of(2 * page).block("a", page).block("b", 2 * page), Errc::bad_used_length, 2 * page, "b");
  // page + this = page, in 64 bits.
  check_refused(list_of(2 * page).block("a", page).block("b", ~std::uint64_t{0} - page + 1), Errc::bad_used_length,
                ~std::uint64_t{0} - page + 1, "b");
}

TEST_CASE("Refused in the block list: more blocks or bytes than the limits allow") {
  const multifd::qemu::MainStreamLimits limits{.max_blocks = 2, .max_ram_bytes = 4 * page};
  check_refused(list_of(5 * page), Errc::stream_limit_exceeded, 5 * page, "", limits);
  check_refused(list_of(4 * page).block("a", page).block("b", page).block("c", page), Errc::stream_limit_exceeded, 3,
                "", limits);
  const Stream fits = list_of(4 * page).block("a", page).block("b", 3 * page).eos();
  CHECK(test::parse(fits.bytes, {}, limits).code == Errc::truncated_stream);
}

TEST_CASE("Refused in the block list: page sizes that are none") {
  const auto list = [](std::uint64_t page_size) {
    return configured().advise(0x201000).start().total(2 * page).block("a", page).be(8, page_size).block("b", page);
  };
  check_refused(list(0x300000), Errc::bad_block_list, 0x300000, "a");
  check_refused(list(0), Errc::bad_block_list, 0, "a");
  check_refused(list(1024), Errc::bad_block_list, 1024, "a");
}

TEST_CASE("Refused: RAM records that multifd excludes, by name (9.6)") {
  check_refused(in_part().be(8, 0x01), Errc::obsolete_ram_record, 0x01, "FULL");
  check_refused(in_part().be(8, 0x40).named("ram.a"), Errc::obsolete_ram_record, 0x40, "XBZRLE");
  check_refused(in_part().be(8, 0x60), Errc::obsolete_ram_record, 0x60, "XBZRLE");
  check_refused(in_part().be(8, 0x80), Errc::obsolete_ram_record, 0x80, "HOOK");
  check_refused(in_part().be(8, 0x100).named("ram.a"), Errc::obsolete_ram_record, 0x100, "COMPRESS_PAGE");
  check_refused(in_part().be(8, 0x120), Errc::obsolete_ram_record, 0x120, "COMPRESS_PAGE");
}

TEST_CASE("Refused: every other word, among them combinations of flags and offsets where none belongs") {
  for (std::uint64_t flags = 0; flags < page; ++flags) {
    const std::uint64_t bare = flags & ~std::uint64_t{0x20};
    const bool known = flags == 0x10 || flags == 0x200 || bare == 0x02 || bare == 0x08;
    const bool obsolete = bare == 0x01 || bare == 0x40 || bare == 0x80 || bare == 0x100;
    const auto outcome = test::parse(in_part().zero(0, "ram.a").be(8, flags).bytes);
    if (obsolete) {
      CHECK(outcome.code == Errc::obsolete_ram_record);
    } else if (!known) {
      CAPTURE(flags);
      CHECK(outcome.code == Errc::unknown_ram_record);
      CHECK(outcome.detail == flags);
    } else {
      CHECK(outcome.code == Errc::truncated_stream);
    }
  }
  check_refused(in_part().be(8, page | 0x10), Errc::unknown_ram_record, page | 0x10);
  check_refused(in_part().be(8, page | 0x200), Errc::unknown_ram_record, page | 0x200);
  check_refused(in_part().total(10 * page), Errc::unknown_ram_record, 10 * page | 4);
}

TEST_CASE("Refused: records of no block, of an unknown one, or past its end (section 16, row 20)") {
  check_refused(in_part().zero(0), Errc::record_without_block, 0);
  check_refused(in_part().full_page(page), Errc::record_without_block, page);
  // The block list names blocks, too, but CONTINUE does not mean those; nor does a refused record count.
  check_refused(in_part().eos().footer().part().zero(0), Errc::record_without_block, 0);
  check_refused(in_part().be(8, 2).be(1, 0), Errc::bad_block_name, 0);
  check_refused(in_part().zero(0, "ram.b"), Errc::unknown_block, 0, "ram.b");
  check_refused(in_part().zero(0, "ram."), Errc::unknown_block, 0, "ram.");
  check_refused(in_part().zero(0, "zzz"), Errc::unknown_block, 0, "zzz");

  check_refused(in_part().zero(8 * page, "ram.a"), Errc::offset_past_block, 8 * page, "ram.a");
  check_refused(in_part().zero(2 * page, "rom/b"), Errc::offset_past_block, 2 * page, "rom/b");
  check_refused(in_part().zero(7 * page, "ram.a").zero(8 * page), Errc::offset_past_block, 8 * page, "ram.a");
  check_refused(in_part().zero(~std::uint64_t{0xfff}, "ram.a"), Errc::offset_past_block, ~std::uint64_t{0xfff},
                "ram.a");
  check_refused(in_part().full_page(2 * page, "rom/b"), Errc::offset_past_block, 2 * page, "rom/b");
  check_refused(in_part().record(0, 2, "rom/b").be(1, 1), Errc::bad_zero_fill, 1, "rom/b");
  check_refused(in_part().record(0, 2, "rom/b").be(1, 0xff), Errc::bad_zero_fill, 0xff, "rom/b");
}
