// SPDX-License-Identifier: MIT
#include "multifd/postcopy/userfaultfd.hpp"

#include <doctest/doctest.h>
#include <sys/eventfd.h>

#include <array>

#include "unit/postcopy/lazy_guest.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

std::vector<std::byte> pages_of(std::size_t count, unsigned char first) {
  std::vector<std::byte> bytes(count * page_size);
  for (std::size_t i = 0; i < count; ++i) std::memset(&bytes[i * page_size], static_cast<int>(first + i), page_size);
  return bytes;
}

std::byte byte_at(const LazyBlock& memory, std::uint64_t page) {
  return *const_cast<const volatile std::byte*>(memory.data() + page * page_size);
}

}  // namespace

TEST_CASE("A page that is there stays as it is, and counts as placed; the others around it are placed") {
  if (!have_userfaultfd()) return;
  const auto memory = LazyBlock::create(Backing::anonymous, 16 * page_size);
  const auto fd = Userfaultfd::create();
  const std::uint64_t address = memory->region(0).address;
  REQUIRE(fd->register_range(address, 16 * page_size, FaultMode::missing).has_value());
  CHECK(fd->copy(address + 2 * page_size, pages_of(1, 100), page_size).value() == page_size);
  CHECK(fd->copy(address, pages_of(4, 1), page_size).value() == 4 * page_size);
  CHECK(byte_at(*memory, 1) == std::byte{2});
  CHECK(byte_at(*memory, 2) == std::byte{100});
  CHECK(byte_at(*memory, 3) == std::byte{4});
  CHECK(fd->zeropage(address + 3 * page_size, 2 * page_size, page_size).value() == 2 * page_size);
  CHECK(byte_at(*memory, 3) == std::byte{4});
  CHECK(byte_at(*memory, 4) == std::byte{0});
  REQUIRE(fd->unregister(address, 16 * page_size).has_value());
  CHECK(byte_at(*memory, 9) == std::byte{0});
  CHECK(code_of(fd->copy(address + 8 * page_size, pages_of(1, 1), page_size)) == std::errc::no_such_file_or_directory);
}

TEST_CASE(
    "Minor faults: what is in shared memory is shown by continue_(), once is enough, and what is not in it is told") {
  if (!have_userfaultfd()) return;
  const auto memory = LazyBlock::create(Backing::shared_minor, 4 * page_size);
  const auto fd = Userfaultfd::create();
  const LazyRegion region = memory->region(0);
  REQUIRE(fd->register_range(region.address, region.bytes, FaultMode::minor).has_value());
  std::memset(region.mapping + page_size, 7, page_size);
  std::thread guest([&] { CHECK(byte_at(*memory, 1) == std::byte{7}); });
  std::array<UserfaultfdEvent, 4> events;
  REQUIRE(eventually([&] { return fd->read(events).value() == 1; }));
  CHECK(events[0].kind == UserfaultfdEvent::Kind::fault);
  CHECK(events[0].minor);
  CHECK(events[0].address / page_size == region.address / page_size + 1);
  CHECK(fd->continue_(region.address + page_size, page_size, page_size).value() == page_size);
  guest.join();
  CHECK(fd->continue_(region.address + page_size, page_size, page_size).value() == page_size);
  CHECK(code_of(fd->continue_(region.address, page_size, page_size)) == std::errc::bad_address);
}

TEST_CASE("While a removal waits to be read nothing is placed, and nobody is told that it was") {
  if (!have_userfaultfd()) return;
  const auto memory = LazyBlock::create(Backing::anonymous, 8 * page_size);
  const auto fd = Userfaultfd::create();
  const std::uint64_t address = memory->region(0).address;
  REQUIRE(fd->register_range(address, 8 * page_size, FaultMode::missing).has_value());
  CHECK_FALSE(fd->layout_changes());
  CHECK(fd->copy(address, pages_of(2, 1), page_size).value() == 2 * page_size);
  std::thread balloon([&] { ::madvise(memory->data(), 2 * page_size, MADV_DONTNEED); });
  REQUIRE(eventually([&] { return fd->layout_changes(); }));
  CHECK(fd->copy(address + 4 * page_size, pages_of(2, 1), page_size).value() == 0);
  CHECK(fd->zeropage(address + 4 * page_size, page_size, page_size).value() == 0);
  std::array<UserfaultfdEvent, 4> events;
  REQUIRE(fd->read(events).value() == 1);
  CHECK(events[0].kind == UserfaultfdEvent::Kind::removed);
  CHECK(events[0].address == address);
  CHECK(events[0].bytes == 2 * page_size);
  balloon.join();
  CHECK_FALSE(fd->layout_changes());
  CHECK(fd->copy(address + 4 * page_size, pages_of(2, 1), page_size).value() == 2 * page_size);
  CHECK(memory->resident() == 2);
}

TEST_CASE("What is handed over has to be a userfaultfd that was told UFFDIO_API") {
  if (!have_userfaultfd()) return;
  for (const int fd : {::eventfd(0, EFD_CLOEXEC), ::open("/dev/null", O_RDWR | O_CLOEXEC)}) {
    const auto adopted = Userfaultfd::adopt(fd);
    CHECK(code_of(adopted) == Errc::not_userfaultfd);
    CHECK(::fcntl(fd, F_GETFD) < 0);  // it was owned, and is closed
  }
  const auto untold = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC));
  CHECK(code_of(Userfaultfd::adopt(untold)) == Errc::not_userfaultfd);
  CHECK(code_of(Userfaultfd::adopt(-1)) == std::errc::no_such_file_or_directory);
  const auto made = Userfaultfd::create(UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP);
  const auto adopted = Userfaultfd::adopt(::dup(made->native_handle()));
  REQUIRE_MESSAGE(adopted.has_value(), text(adopted));
  CHECK(adopted->features() == made->features());
  CHECK(code_of(Userfaultfd::create(std::uint64_t{1} << 40)) == Errc::not_supported);
}

TEST_CASE("Regions that are not aligned, overlap, or reach past their block are refused by name") {
  const FakeStore store({64 * page_size, 16 * page_size});
  const LazyRegion good{.address = 0x10'0000, .bytes = 16 * page_size, .block = BlockId{1}};
  CHECK(check_regions(std::span(&good, 1), store).has_value());
  const auto refused = [&](auto&& change) {
    LazyRegion bad = good;
    change(bad);
    return code_of(check_regions(std::span(&bad, 1), store));
  };
  CHECK(code_of(check_regions({}, store)) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.address += 1; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.address = 0; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.bytes -= 1; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.bytes = 0; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.bytes += page_size; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.offset = page_size; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.offset = ~std::uint64_t{0xfff}; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.address = ~std::uint64_t{0xfff}; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.unit_bytes = 0; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.unit_bytes = 1024; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.unit_bytes = 3 * page_size; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.unit_bytes = 2 * max_unit_bytes; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.mode = FaultMode::minor; }) == Errc::bad_region);
  CHECK(refused([](LazyRegion& r) { r.block = BlockId{2}; }) == Errc::unknown_block);

  const std::array<LazyRegion, 2> addresses{
      good, {.address = good.address + 15 * page_size, .bytes = page_size, .block = BlockId{0}}};
  CHECK(code_of(check_regions(addresses, store)) == Errc::bad_region);
  const std::array<LazyRegion, 2> offsets{
      good, {.address = 0x80'0000, .bytes = page_size, .block = BlockId{1}, .offset = 15 * page_size}};
  CHECK(code_of(check_regions(offsets, store)) == Errc::bad_region);
}
