// SPDX-License-Identifier: MIT
#include "multifd/migrate/dirty/userfaultfd_dirty_log.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "multifd/testing/dirty_source_contract.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"
#include "support/kvm_vm.hpp"
#include "support/skip.hpp"

using namespace multifd;
using namespace multifd::migrate;
using test::bitmap_of;
using test::code_of;
using test::DirtyRam;
using test::fetched;
using test::text;
using Numbers = std::vector<std::uint64_t>;

namespace {

constexpr BlockId ram_block{0}, video_block{1};

/// Why this kernel cannot do it, or does not let us.
std::string why_not() {
  const DirtyRam ram;
  auto log = UserfaultfdDirtyLog::create(ram.map);
  return log ? "" : describe(log.error());
}

UserfaultfdDirtyLog make_log(const RamMap& map) {
  auto log = UserfaultfdDirtyLog::create(map);
  REQUIRE_MESSAGE(log.has_value(), text(log));
  return std::move(*log);
}

std::uint64_t faults_of_this_thread() {
  rusage usage{};
  CHECK(::getrusage(RUSAGE_THREAD, &usage) == 0);
  return static_cast<std::uint64_t>(usage.ru_minflt);
}

/// Memory of a kind that `Block` has not.
class Mapping {
 public:
  Mapping(std::size_t bytes, int flags, int fd = -1)
      : bytes_(bytes), at_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0)) {
    REQUIRE(at_ != MAP_FAILED);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(at_, bytes_); }
  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(at_), bytes_}; }

 private:
  std::size_t bytes_;
  void* at_;
};

/// One block of that memory.
RamMap map_of(std::span<std::byte> memory) {
  RamMap map;
  REQUIRE(map.add("pc.ram", memory).has_value());
  return map;
}

}  // namespace

TEST_CASE("UserfaultfdDirtyLog keeps the DirtySource contract, with all page sizes") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("userfaultfd's dirty log");
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    CAPTURE(page_bytes);
    const DirtyRam ram(page_bytes);
    UserfaultfdDirtyLog log = make_log(ram.map);
    CHECK(!log.needs_rearm());
    test::check(check_dirty_source_contract(
        log,
        {.ram = ram.map,
         .write = [&](BlockId block, std::uint64_t offset, std::uint64_t value) { ram.store(block, offset, value); },
         .faults = faults_of_this_thread,
         .seed = test::seed()}));
  }
}

TEST_CASE("What the contract takes for cost, faults, is there while the log is on") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  UserfaultfdDirtyLog log = make_log(ram.map);
  ram.store(ram_block, 0, 1);
  REQUIRE(log.start().has_value());
  const std::uint64_t before = faults_of_this_thread();
  ram.store(ram_block, 0, 2);
  CHECK(faults_of_this_thread() > before);
}

TEST_CASE("Memory of each kind is watched page by page: shared, of huge pages, and never touched") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  constexpr std::size_t bytes = std::size_t{8} << 20;
  const auto check_kind = [](std::span<std::byte> memory, bool touched) {
    const RamMap map = map_of(memory);
    if (touched)
      for (std::size_t at = 0; at < memory.size(); at += 4096) memory[at] = std::byte{1};
    UserfaultfdDirtyLog log = make_log(map);
    REQUIRE(log.start().has_value());
    for (int round = 0; round < 2; ++round) {
      CAPTURE(round);
      memory[5 * 4096] = std::byte{2};
      memory[1000 * 4096 + 4095] = std::byte{2};
      memory.back() = std::byte{2};
      // A page table that a first write makes stands for pages that were not there before: these may come with it once.
      auto dirty = fetched(log, map, ram_block);
      if (touched || round > 0) CHECK(dirty == Numbers{5, 1000, memory.size() / 4096 - 1});
      std::erase_if(dirty,
                    [&](std::uint64_t page) { return page != 5 && page != 1000 && page != memory.size() / 4096 - 1; });
      CHECK(dirty.size() == 3);
      CHECK(fetched(log, map, ram_block).empty());
    }
    REQUIRE(log.stop().has_value());
  };
  SUBCASE("private, touched") { check_kind(Mapping(bytes, MAP_PRIVATE | MAP_ANONYMOUS).bytes(), true); }
  SUBCASE("private, never touched") { check_kind(Mapping(bytes, MAP_PRIVATE | MAP_ANONYMOUS).bytes(), false); }
  SUBCASE("shared, anonymous") { check_kind(Mapping(bytes, MAP_SHARED | MAP_ANONYMOUS).bytes(), true); }
  SUBCASE("shared, never touched") { check_kind(Mapping(bytes, MAP_SHARED | MAP_ANONYMOUS).bytes(), false); }
  SUBCASE("of a memfd") {
    const int fd = ::memfd_create("userfaultfd_dirty_log_test", MFD_CLOEXEC);
    REQUIRE(fd >= 0);
    REQUIRE(::ftruncate(fd, bytes) == 0);
    check_kind(Mapping(bytes, MAP_SHARED, fd).bytes(), true);
    ::close(fd);
  }
  SUBCASE("huge pages, if the kernel gives any") {
    const Mapping memory(bytes + (std::size_t{2} << 20), MAP_PRIVATE | MAP_ANONYMOUS);
    const std::size_t past = reinterpret_cast<std::uintptr_t>(memory.bytes().data()) % (std::size_t{2} << 20);
    const auto aligned = memory.bytes().subspan((std::size_t{2} << 20) - past, bytes);
    static_cast<void>(::madvise(aligned.data(), aligned.size(), MADV_HUGEPAGE));
    check_kind(aligned, true);
  }
}

TEST_CASE("What a system call writes into guest memory is reported") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  ram.memory[0].fill(std::byte{1});
  UserfaultfdDirtyLog log = make_log(ram.map);
  REQUIRE(log.start().has_value());
  CHECK(fetched(log, ram.map, ram_block).empty());
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  REQUIRE(::write(ends[1], "disk", 4) == 4);
  REQUIRE(::read(ends[0], ram.memory[0].data() + 9 * 4096 - 2, 4) == 4);  // across two pages
  CHECK(fetched(log, ram.map, ram_block) == Numbers{8, 9});
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("A log that is stopped or destroyed leaves the memory to others; one that is on does not") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  std::optional<UserfaultfdDirtyLog> first(make_log(ram.map));
  UserfaultfdDirtyLog second = make_log(ram.map);
  REQUIRE(first->start().has_value());
  const auto refused = second.start();
  CHECK(code_of(refused) == std::error_code(EBUSY, std::system_category()));
  CHECK_MESSAGE(text(refused).find("pc.ram") != std::string::npos, text(refused));
  REQUIRE(first->stop().has_value());
  CHECK(second.start().has_value());
  REQUIRE(second.stop().has_value());
  REQUIRE(first->start().has_value());
  std::optional<UserfaultfdDirtyLog> moved(std::move(*first));
  first.reset();
  CHECK(code_of(second.start()) == std::error_code(EBUSY, std::system_category()));
  moved.reset();
  CHECK(second.start().has_value());
}

TEST_CASE("A log that cannot watch its second block does not keep the first") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  const RamMap video = map_of(ram.memory[1].bytes());
  UserfaultfdDirtyLog other = make_log(video);
  REQUIRE(other.start().has_value());
  UserfaultfdDirtyLog log = make_log(ram.map);
  const auto refused = log.start();
  CHECK(code_of(refused) == std::error_code(EBUSY, std::system_category()));
  CHECK_MESSAGE(text(refused) == "UFFDIO_REGISTER: Device or resource busy (vga.vram)", text(refused));
  auto bitmap = bitmap_of(ram.map, ram_block);
  CHECK(code_of(log.fetch(ram_block, bitmap)) == Errc::already_closed);
  const RamMap first = map_of(ram.memory[0].bytes());
  UserfaultfdDirtyLog third = make_log(first);
  CHECK(third.start().has_value());
}

TEST_CASE("After an error everything counts as dirty, because the kernel does not say what it took") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  UserfaultfdDirtyLog log = make_log(ram.map);
  REQUIRE(log.start().has_value());
  // Other memory in the place of one page, which nobody watches.
  void* const at = ram.memory[0].data() + 200 * 4096;
  REQUIRE(::mmap(at, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
  auto bitmap = bitmap_of(ram.map, ram_block);
  CHECK(code_of(log.fetch(ram_block, bitmap)) == std::error_code(EPERM, std::system_category()));
  CHECK(count_dirty(bitmap) == 304);
  CHECK(fetched(log, ram.map, video_block).size() <= 80);
}

TEST_CASE("Blocks that no page table can watch are refused") {
  const DirtyRam ram;
  RamMap small(1024);
  REQUIRE(small.add("pc.ram", ram.memory[0].bytes().subspan(1024, 8192)).has_value());
  CHECK(code_of(UserfaultfdDirtyLog::create(small)) == Errc::bad_range);
  RamMap odd(1024);
  REQUIRE(odd.add("pc.ram", ram.memory[0].bytes().first(5 * 1024)).has_value());
  CHECK(code_of(UserfaultfdDirtyLog::create(odd)) == Errc::bad_range);
  RamMap relay;
  REQUIRE(relay.add_elsewhere("pc.ram", 8192).has_value());
  CHECK(code_of(UserfaultfdDirtyLog::create(relay)) == Errc::block_without_memory);
}

#if defined(__x86_64__)
TEST_CASE("UserfaultfdDirtyLog sees what a KVM guest writes") {
  if (const std::string why = why_not(); !why.empty()) return test::skip(why);
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("userfaultfd's dirty log of a KVM guest");
  const DirtyRam ram;
  test::KvmVm vm(ram);
  UserfaultfdDirtyLog log = make_log(ram.map);
  test::check(check_dirty_source_contract(
      log, {.ram = ram.map,
            .write = [&](BlockId block, std::uint64_t offset, std::uint64_t value) { vm.write(block, offset, value); },
            .faults = vm.vcpu().faults(),
            .seed = test::seed()}));
  CHECK(vm.vcpu().failure() == "");
}
#endif
