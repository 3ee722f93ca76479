// SPDX-License-Identifier: MIT
#include "multifd/image/mapped_ram_sink.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <vector>

#include "multifd/image/file.hpp"

using namespace multifd;

TEST_CASE("MappedRamSink reads back what was written last; zeros where a page is zero or has not come") {
  constexpr std::size_t page = 4096;
  auto file = image::File::adopt(::memfd_create("image", MFD_CLOEXEC));
  REQUIRE(file);
  const std::array blocks{qemu::BlockInfo{.idstr = "pc.ram", .used_length = 70 * page},
                          qemu::BlockInfo{.idstr = "pc.bios", .used_length = page}};
  auto sink = image::MappedRamSink::create(*file, {.machine_type = "pc-q35-10.0"}, blocks);
  REQUIRE(sink);
  const auto filled = [](char fill) { return std::vector<std::byte>(page, static_cast<std::byte>(fill)); };
  const auto read = [&](std::uint32_t block, std::uint64_t at) {
    std::vector<std::byte> bytes = filled('?');
    CHECK(sink->read(BlockId{block}, at * page, bytes).has_value());
    return bytes;
  };
  CHECK(read(0, 69) == filled(0));
  CHECK(sink->page(BlockId{0}, 69 * page, filled('a')).has_value());
  CHECK(sink->page(BlockId{0}, 64 * page, filled('b')).has_value());
  CHECK(sink->page(BlockId{1}, 0, filled('c')).has_value());
  CHECK(read(0, 69) == filled('a'));
  CHECK(read(0, 64) == filled('b'));
  CHECK(read(0, 5) == filled(0));  // the same bit of another word
  CHECK(read(0, 0) == filled(0));
  CHECK(read(1, 0) == filled('c'));
  CHECK(sink->page(BlockId{0}, 69 * page, filled('d')).has_value());
  CHECK(read(0, 69) == filled('d'));
  sink->zero(BlockId{0}, 69 * page);
  CHECK(read(0, 69) == filled(0));
  CHECK(sink->page(BlockId{1}, 0, filled(0)).has_value());
  CHECK(read(1, 0) == filled(0));
}
