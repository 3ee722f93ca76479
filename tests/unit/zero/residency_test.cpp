// SPDX-License-Identifier: MIT
#include "multifd/zero/residency.hpp"
#include "support/page_group.hpp"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <cstring>
#include <latch>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "multifd/testing/zero_policy_contract.hpp"

// Swapped pages cannot be tested here: most machines that run this have no swap. That they count as data rests on the
// kernel's documentation of PAGE_IS_SWAPPED, of bit 62, and of SEEK_DATA.

namespace {

using multifd::BlockId;
using multifd::PagemapReading;
using multifd::PageRef;
using multifd::RamMap;
using multifd::ResidencyAware;
using multifd::SharedMemoryFile;
using multifd::UntouchedPages;
using multifd::ZeroPagesLegacy;
using multifd::ZeroPagesMultifd;
using multifd::ZeroStage;
using multifd::detail::AreaFile;
using multifd::detail::MemoryArea;

using Aware = ResidencyAware<ZeroPagesMultifd>;
static_assert(multifd::check_zero_page_policy<Aware>());
static_assert(multifd::check_zero_page_policy<ResidencyAware<ZeroPagesLegacy>>());
static_assert(multifd::HasZeroMask<Aware>);
static_assert(Aware::name == "multifd+residency");
static_assert(Aware::stage == ZeroStage::channel);
static_assert(ResidencyAware<ZeroPagesLegacy>::name == "legacy+residency");
static_assert(ResidencyAware<ZeroPagesLegacy>::stage == ZeroStage::producer);

const std::size_t host_page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));

/// A policy that reads nothing and counts the pages it is asked about.
struct Asked {
  static constexpr std::string_view name = "asked";
  static constexpr ZeroStage stage = ZeroStage::channel;
  std::vector<std::uint64_t>* offsets = nullptr;
  bool is_zero(PageRef page) const noexcept {
    offsets->push_back(page.offset);
    return false;
  }
};

/// Mapped memory, given back at the end; with a memfd when it is shared.
class Memory {
 public:
  enum class Kind { anonymous, memfd, shared_anonymous, private_file };

  explicit Memory(std::size_t pages, Kind kind = Kind::anonymous) : bytes_(pages * host_page) {
    if (kind == Kind::memfd || kind == Kind::private_file) {
      fd_ = ::memfd_create("residency test", MFD_CLOEXEC);
      REQUIRE(fd_ >= 0);
      REQUIRE(::ftruncate(fd_, static_cast<off_t>(bytes_)) == 0);
    }
    const bool shared = kind == Kind::memfd || kind == Kind::shared_anonymous;
    const int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | (fd_ < 0 ? MAP_ANONYMOUS : 0);
    data_ = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, fd_, 0);
    REQUIRE(data_ != MAP_FAILED);
    ::madvise(data_, bytes_, MADV_NOHUGEPAGE);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    ::munmap(data_, bytes_);
    if (fd_ >= 0) ::close(fd_);
  }

  int fd() const { return fd_; }
  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(data_), bytes_}; }
  std::byte* page(std::size_t i) const { return bytes().data() + i * host_page; }
  void write(std::size_t i, unsigned char value = 1) const { *page(i) = std::byte{value}; }
  void read(std::size_t i) const { static_cast<void>(*static_cast<volatile std::byte*>(page(i))); }

  std::size_t resident() const {
    std::vector<unsigned char> in_core(bytes_ / host_page);
    REQUIRE(::mincore(data_, bytes_, in_core.data()) == 0);
    return static_cast<std::size_t>(std::ranges::count_if(in_core, [](unsigned char c) { return (c & 1) != 0; }));
  }

 private:
  std::size_t bytes_;
  int fd_ = -1;
  void* data_ = nullptr;
};

/// Kilobytes of a line of /proc/self/status.
std::size_t status_kb(const char* key) {
  std::FILE* const status = std::fopen("/proc/self/status", "re");
  REQUIRE(status != nullptr);
  char line[256];
  std::size_t kb = 0;
  while (std::fgets(line, sizeof line, status) != nullptr)
    if (std::strncmp(line, key, std::strlen(key)) == 0) std::sscanf(line + std::strlen(key), ": %zu", &kb);
  std::fclose(status);
  return kb;
}

struct Vm {
  explicit Vm(const Memory& memory, std::size_t page_bytes = host_page) : ram(page_bytes) {
    const auto added = ram.add("pc.ram", memory.bytes());
    REQUIRE(added);
    block = *added;
  }
  PageRef page(std::size_t i) const {
    const std::size_t bytes = ram.page_bytes();
    return {block, i * bytes, ram.block(block).host.subspan(i * bytes, bytes)};
  }
  RamMap ram;
  BlockId block{};
};

/// The area of /proc/self/maps in which the memory begins.
MemoryArea area_of(const Memory& memory) {
  std::optional<MemoryArea> found;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.page(0));
  const auto done = multifd::detail::for_each_memory_area([&](const MemoryArea& area) -> multifd::Result<void> {
    if (area.begin <= begin && begin < area.end) found = area;
    return {};
  });
  REQUIRE(done);
  REQUIRE(found.has_value());
  return *found;
}

UntouchedPages snapshot(const Vm& vm, multifd::UntouchedOptions options = {}) {
  auto taken = UntouchedPages::snapshot(vm.ram, options);
  REQUIRE_MESSAGE(taken.has_value(), multifd::describe(taken.error()));
  return *taken;
}

/// One letter a page: u untouched, . not. Takes what it says.
std::string take_all(const UntouchedPages& pages, const Vm& vm) {
  std::string said;
  for (std::size_t i = 0; i < vm.ram.pages(vm.block); ++i) said += pages.take(vm.page(i)) ? 'u' : '.';
  return said;
}

/// Whether this kernel has PAGEMAP_SCAN. Without it a page that was only read cannot be told from data.
bool kernel_scans() {
  const Memory memory(1);
  memory.read(0);
  const Vm vm(memory);
  const bool scans = snapshot(vm).count() == 1;
  if (!scans) std::printf("skipped in part: this kernel has no PAGEMAP_SCAN\n");
  return scans;
}

}  // namespace

TEST_CASE("private anonymous memory: untouched pages are known, written ones are not") {
  for (const PagemapReading reading : {PagemapReading::best, PagemapReading::entries}) {
    CAPTURE(static_cast<int>(reading));
    const Memory memory(200);
    for (const std::size_t i : {0u, 5u, 6u, 63u, 64u, 199u}) memory.write(i);
    const Vm vm(memory);
    const UntouchedPages pages = snapshot(vm, {.reading = reading});
    CHECK(pages.count() == 194);
    std::string expected(200, 'u');
    for (const std::size_t i : {0u, 5u, 6u, 63u, 64u, 199u}) expected[i] = '.';
    CHECK(take_all(pages, vm) == expected);
    CHECK(pages.count() == 0);
  }
}

TEST_CASE("private anonymous memory: a page written with zeros is not known, one that was only read is") {
  const bool scans = kernel_scans();
  const Memory memory(4);
  memory.write(1, 0);
  memory.read(2);
  const Vm vm(memory);
  CHECK(take_all(snapshot(vm), vm) == (scans ? "u.uu" : "u..u"));
  CHECK(take_all(snapshot(vm, {.reading = PagemapReading::entries}), vm) == "u..u");
}

TEST_CASE("memory that was given back is untouched again") {
  const Memory memory(8);
  for (std::size_t i = 0; i < 8; ++i) memory.write(i);
  REQUIRE(::madvise(memory.page(2), 3 * host_page, MADV_DONTNEED) == 0);
  const Vm vm(memory);
  CHECK(take_all(snapshot(vm), vm) == "..uuu...");
}

TEST_CASE("a memfd's holes are untouched, whoever wrote the rest") {
  const Memory memory(100, Memory::Kind::memfd);
  memory.write(3);
  memory.write(50);
  const char byte = 1;  // by another way than this mapping: its page tables do not know
  REQUIRE(::pwrite(memory.fd(), &byte, 1, static_cast<off_t>(70 * host_page)) == 1);
  REQUIRE(::lseek(memory.fd(), 17, SEEK_SET) == 17);
  const Vm vm(memory);
  const SharedMemoryFile file{vm.block, memory.fd()};
  const UntouchedPages pages = snapshot(vm, {.files = std::span(&file, 1)});
  CHECK(::lseek(memory.fd(), 0, SEEK_CUR) == 17);
  std::string expected(100, 'u');
  for (const std::size_t i : {3u, 50u, 70u}) expected[i] = '.';
  CHECK(take_all(pages, vm) == expected);
}

TEST_CASE("a block in the middle of a file, in several areas, gets the holes that are its own") {
  const Memory memory(32, Memory::Kind::memfd);
  memory.write(0);
  memory.write(4);
  memory.write(11);
  memory.write(20);
  REQUIRE(::mprotect(memory.page(9), host_page, PROT_READ) == 0);  // three areas
  RamMap ram(host_page);
  const auto block = ram.add("part", memory.bytes().subspan(8 * host_page, 8 * host_page));
  REQUIRE(block);
  const SharedMemoryFile file{*block, memory.fd()};
  const auto pages = UntouchedPages::snapshot(ram, {.files = std::span(&file, 1)});
  REQUIRE(pages);
  CHECK(pages->count() == 7);
  CHECK(pages->take_run(*block, 0, 8) == 3);
  CHECK(pages->take_run(*block, 3, 8) == 0);
  CHECK(pages->take_run(*block, 4, 8) == 4);
}

TEST_CASE("private memory of a file is not known: what no page table maps comes from the file") {
  const Memory private_file(8, Memory::Kind::private_file);
  const char byte = 1;
  REQUIRE(::pwrite(private_file.fd(), &byte, 1, 0) == 1);
  const Vm vm(private_file);
  CHECK(snapshot(vm).count() == 0);
}

TEST_CASE("the file of shared memory is found: by the kernel's link, and among those that are open") {
  const Memory memory(8, Memory::Kind::memfd);
  memory.write(2);
  const char byte = 1;  // by another way than this mapping
  REQUIRE(::pwrite(memory.fd(), &byte, 1, static_cast<off_t>(6 * host_page)) == 1);
  REQUIRE(::lseek(memory.fd(), 17, SEEK_SET) == 17);
  const Vm vm(memory);
  CHECK(take_all(snapshot(vm), vm) == "uu.uuu.u");
  CHECK(::lseek(memory.fd(), 0, SEEK_CUR) == 17);

  MemoryArea area = area_of(memory);
  struct ::stat own{}, found{};
  REQUIRE(::fstat(memory.fd(), &own) == 0);
  area.begin += 1;  // no such link
  const AreaFile open = AreaFile::of(area);
  REQUIRE(open);
  REQUIRE(::fstat(open.get(), &found) == 0);
  CHECK(found.st_ino == own.st_ino);
  CHECK(found.st_dev == own.st_dev);
  CHECK(open.is_the_same());
  area.inode += 1;
  CHECK_FALSE(AreaFile::of(area));
}

TEST_CASE("a look at the file of shared memory takes away no record lock that the process has on it") {
  const Memory memory(8, Memory::Kind::memfd);
  struct ::flock lock{};
  lock.l_type = F_WRLCK;
  REQUIRE(::fcntl(memory.fd(), F_SETLK, &lock) == 0);
  const Vm vm(memory);
  CHECK(take_all(snapshot(vm), vm) == "uuuuuuuu");
  const pid_t other = ::fork();
  if (other == 0) {
    struct ::flock asked{};
    asked.l_type = F_WRLCK;
    ::_exit(::fcntl(memory.fd(), F_GETLK, &asked) == 0 && asked.l_type == F_WRLCK ? 0 : 1);
  }
  REQUIRE(other > 0);
  int status = 1;
  REQUIRE(::waitpid(other, &status, 0) == other);
  CHECK(status == 0);  // it is locked still
}

TEST_CASE("shared memory whose file nobody has open is known by the kernel's link, or not at all") {
  const Memory memory(8, Memory::Kind::shared_anonymous);
  memory.write(5);
  const Vm vm(memory);
  const std::string expected = AreaFile::of(area_of(memory)) ? "uuuuu.uu" : "........";
  if (expected.front() == '.') std::printf("skipped in part: needs CAP_CHECKPOINT_RESTORE\n");
  CHECK(take_all(snapshot(vm), vm) == expected);
}

TEST_CASE("huge pages: private ones are known; shared ones where one area maps all that the file has") {
  constexpr std::size_t huge = std::size_t{2} << 20;
  constexpr std::size_t count = 4;
  const auto map = [](int flags, int fd) {
    void* const at = ::mmap(nullptr, count * huge, PROT_READ | PROT_WRITE, flags, fd, 0);
    return at == MAP_FAILED ? std::span<std::byte>() : std::span(static_cast<std::byte*>(at), count * huge);
  };
  const auto untouched = [](std::span<std::byte> memory) {
    RamMap ram(host_page);
    const auto block = ram.add("huge", memory);
    REQUIRE(block);
    const auto pages = UntouchedPages::snapshot(ram);
    REQUIRE(pages);
    std::string said;
    for (std::size_t i = 0; i < count; ++i)
      said += pages->take_run(*block, i * huge / host_page, huge / host_page) == huge / host_page ? 'u' : '.';
    return said;
  };
  const auto anonymous = map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
  if (anonymous.empty()) {
    std::printf("skipped: no huge pages (/proc/sys/vm/nr_hugepages)\n");
    return;
  }
  CHECK(untouched(anonymous) == "uuuu");
  anonymous[huge + 5] = std::byte{1};
  CHECK(untouched(anonymous) == "u.uu");
  ::munmap(anonymous.data(), anonymous.size());

  const int fd = ::memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
  REQUIRE(fd >= 0);
  REQUIRE(::ftruncate(fd, count * huge) == 0);
  const auto memory = map(MAP_SHARED, fd);
  const auto elsewhere = map(MAP_SHARED, fd);
  REQUIRE((!memory.empty() && !elsewhere.empty()));
  CHECK(untouched(memory) == "uuuu");
  memory[0] = std::byte{1};
  CHECK(untouched(memory) == ".uuu");
  elsewhere[2 * huge] = std::byte{1};  // the page tables of `memory` do not know
  CHECK(untouched(memory) == "....");
  static_cast<void>(*static_cast<volatile std::byte*>(&memory[2 * huge]));
  CHECK(untouched(memory) == ".u.u");
  for (const auto& each : {memory, elsewhere}) ::munmap(each.data(), each.size());
  ::close(fd);
}

TEST_CASE("a file that the block's memory does not come from is refused, and so is a descriptor that is none") {
  const Memory memory(8, Memory::Kind::memfd);
  const Memory other(8, Memory::Kind::memfd);
  const Vm vm(memory);
  SharedMemoryFile file{vm.block, other.fd()};
  auto refused = UntouchedPages::snapshot(vm.ram, {.files = std::span(&file, 1)});
  REQUIRE(!refused);
  CHECK(refused.error().code == multifd::Errc::bad_option);
  CHECK(refused.error().stage == multifd::Stage::setup);

  file.fd = -1;
  refused = UntouchedPages::snapshot(vm.ram, {.files = std::span(&file, 1)});
  REQUIRE(!refused);
  CHECK(refused.error().code == std::errc::bad_file_descriptor);

  file = {BlockId{7}, memory.fd()};
  refused = UntouchedPages::snapshot(vm.ram, {.files = std::span(&file, 1)});
  REQUIRE(!refused);
  CHECK(refused.error().code == multifd::Errc::bad_range);
}

TEST_CASE("a file that is not on tmpfs says nothing, and is no error") {
  const Memory memory(8);
  const Vm vm(memory);
  std::FILE* const maps = std::fopen("/proc/self/maps", "re");
  REQUIRE(maps != nullptr);
  const SharedMemoryFile file{vm.block, ::fileno(maps)};
  CHECK(snapshot(vm, {.files = std::span(&file, 1)}).count() == 8);  // anonymous all the same
  std::fclose(maps);
}

TEST_CASE("neither the snapshot nor the policy makes a page resident or a page table grow") {
  constexpr std::size_t pages = 64 * 1024;
  for (const Memory::Kind kind : {Memory::Kind::anonymous, Memory::Kind::memfd}) {
    for (const PagemapReading reading : {PagemapReading::best, PagemapReading::entries}) {
      CAPTURE(static_cast<int>(kind));
      const Memory memory(pages, kind);
      for (std::size_t i = 0; i < pages; i += 1000) memory.write(i);
      const std::size_t resident = memory.resident();
      CHECK(resident == 66);
      const Vm vm(memory);
      const std::size_t tables_kb = status_kb("VmPTE");
      const SharedMemoryFile file{vm.block, memory.fd()};
      multifd::UntouchedOptions options{.files = {}, .reading = reading};
      if (kind == Memory::Kind::memfd) options.files = std::span(&file, 1);
      const Aware policy{.untouched = snapshot(vm, options), .next = {}};
      std::size_t zero = 0;
      std::vector<std::uint64_t> offsets(64);
      for (std::size_t first = 0; first < pages; first += 64) {
        for (std::size_t i = 0; i < 64; ++i) offsets[i] = (first + i) * host_page;
        const test::GroupAt group{vm.block, memory.bytes().data(), host_page, offsets};
        zero += static_cast<std::size_t>(std::popcount(policy.zero_mask(group)));
      }
      CHECK(zero == pages - 66);
      CHECK(memory.resident() == resident);
      // Reading all pages takes 240 KiB; the snapshot, and a sanitizer about it, a few tables of their own.
      CHECK(status_kb("VmPTE") <= tables_kb + 100);
    }
  }
}

TEST_CASE("a page is known once: whoever asks again, also a copy, has it read") {
  const Memory memory(8);
  const Vm vm(memory);
  const Aware policy{.untouched = snapshot(vm), .next = {}};
  const Aware copy = policy;
  CHECK(policy.is_zero(vm.page(3)));
  memory.write(3);
  CHECK(!copy.is_zero(vm.page(3)));
  CHECK(!policy.is_zero(vm.page(3)));
  memory.write(3, 0);
  CHECK(policy.is_zero(vm.page(3)));  // read
}

TEST_CASE("after forget() every page is read, in all copies") {
  const Memory memory(8);
  const Vm vm(memory);
  const UntouchedPages pages = snapshot(vm);
  const Aware policy{.untouched = pages, .next = {}};
  memory.write(2);  // between the snapshot and the second round, never queued in the first
  pages.forget();
  CHECK(pages.count() == 0);
  CHECK(!policy.is_zero(vm.page(2)));
  const std::uint64_t offset = 2 * host_page;
  CHECK(policy.zero_mask(test::GroupAt{vm.block, memory.bytes().data(), host_page, std::span(&offset, 1)}) == 0);
  CHECK(pages.take_run(vm.block, 0, 8) == 0);
  CHECK(pages.other_run(vm.block, 0, 8) == 8);
}

TEST_CASE("a group's answer is that of its pages, in any order; only the others are shown to the inner policy") {
  const Memory memory(300);
  for (std::size_t i = 0; i < 300; i += 7) memory.write(i);
  const Vm vm(memory);
  for (const std::size_t stride : {1u, 3u, 299u, 298u, 64u}) {
    CAPTURE(stride);
    for (const std::size_t count : {1u, 2u, 63u, 64u}) {
      std::vector<std::uint64_t> asked;
      const ResidencyAware<Asked> policy{.untouched = snapshot(vm), .next = {&asked}};
      std::vector<std::uint64_t> offsets;
      std::vector<std::uint64_t> others;
      std::uint64_t expected = 0;
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t page = (60 + i * stride) % 300;
        const bool again = std::ranges::find(offsets, page * host_page) != offsets.end();
        offsets.push_back(page * host_page);
        if (page % 7 == 0 || again) {
          others.push_back(page * host_page);
        } else {
          expected |= std::uint64_t{1} << i;
        }
      }
      CHECK(policy.zero_mask(test::GroupAt{vm.block, memory.bytes().data(), host_page, offsets}) == expected);
      CHECK(asked == others);
    }
  }
}

TEST_CASE("what the inner policy finds among a group's other pages lands on their bits") {
  const Memory memory(64);
  memory.write(1);
  memory.write(2, 0);
  memory.write(40, 0);
  memory.write(63);
  const Vm vm(memory);
  const Aware policy{.untouched = snapshot(vm), .next = {}};
  std::vector<std::uint64_t> offsets;
  for (std::size_t i = 0; i < 64; ++i) offsets.push_back(i * host_page);
  const test::GroupAt group{vm.block, memory.bytes().data(), host_page, offsets};
  const std::uint64_t expected = ~(std::uint64_t{1} << 1 | std::uint64_t{1} << 63);
  CHECK(policy.zero_mask(group) == expected);
  CHECK(policy.zero_mask(group) == expected);
}

TEST_CASE("runs for producers: alternating, over word ends, bounded, and taken") {
  const Memory memory(300);
  memory.write(10);
  memory.write(200);
  const Vm vm(memory);
  const UntouchedPages pages = snapshot(vm);
  CHECK(pages.other_run(vm.block, 0, 300) == 0);
  CHECK(pages.take_run(vm.block, 0, 4) == 4);
  CHECK(pages.take_run(vm.block, 0, 300) == 0);
  CHECK(pages.other_run(vm.block, 0, 300) == 4);
  CHECK(pages.other_run(vm.block, 0, 2) == 2);
  CHECK(pages.take_run(vm.block, 4, 300) == 6);
  CHECK(pages.other_run(vm.block, 10, 300) == 1);
  CHECK(pages.take_run(vm.block, 11, 300) == 189);
  CHECK(pages.other_run(vm.block, 200, 300) == 1);
  CHECK(pages.take_run(vm.block, 201, 300) == 99);
  CHECK(pages.other_run(vm.block, 0, 300) == 300);
  CHECK(pages.take_run(vm.block, 300, 1) == 0);
  CHECK(pages.take_run(BlockId{1}, 0, 1) == 0);
  CHECK(pages.count() == 0);
}

TEST_CASE("guest pages of another size than the host's: known only where they are untouched as a whole") {
  const Memory memory(64);
  memory.write(5);
  if (host_page >= 4096) {
    const Vm small(memory, 1024);
    const UntouchedPages pages = snapshot(small);
    const std::size_t each = host_page / 1024;
    CHECK(pages.count() == 63 * each);
    for (std::size_t i = 0; i < each; ++i) CHECK(!pages.take(small.page(5 * each + i)));
    CHECK(pages.take(small.page(6 * each)));
  }
  if (host_page == 4096) {
    const Vm large(memory, 16384);
    const UntouchedPages pages = snapshot(large);
    CHECK(take_all(pages, large) == "u.uuuuuuuuuuuuuu");
  }
}

TEST_CASE("memory that does not begin at a page of the host") {
  const Memory memory(6);
  memory.write(3);
  RamMap ram(1024);
  const auto block = ram.add("odd", memory.bytes().subspan(1024, 4 * host_page));
  REQUIRE(block);
  const auto pages = UntouchedPages::snapshot(ram);
  REQUIRE(pages);
  CHECK(pages->count() == 3 * host_page / 1024);
  CHECK(pages->take_run(*block, 0, 1000) == 3 * host_page / 1024 - 1);
}

TEST_CASE("a copy of a page, a page of another block and one of another size are not the page that was looked at") {
  const Memory memory(8);
  const Vm vm(memory);
  const UntouchedPages pages = snapshot(vm);
  const std::vector<std::byte> copy(host_page);
  PageRef page = vm.page(1);
  page.bytes = copy;
  CHECK(!pages.take(page));
  page = vm.page(1);
  page.block = BlockId{1};
  CHECK(!pages.take(page));
  page = vm.page(1);
  page.bytes = page.bytes.first(host_page / 2);
  CHECK(!pages.take(page));
  const std::uint64_t offset = host_page;
  CHECK(pages.take(test::GroupAt{vm.block, copy.data(), host_page, std::span(&offset, 1)}) == 0);
  CHECK(pages.take(vm.page(1)));
}

TEST_CASE("without a snapshot, and for blocks without memory, the inner policy is asked") {
  const Memory memory(2);
  const Vm vm(memory);
  const Aware policy{};
  CHECK(policy.is_zero(vm.page(0)));
  memory.write(1);
  CHECK(!policy.is_zero(vm.page(1)));
  CHECK(policy.untouched.count() == 0);
  policy.untouched.forget();

  RamMap ram(host_page);
  REQUIRE(ram.add_elsewhere("far", 16 * host_page));
  const auto pages = UntouchedPages::snapshot(ram);
  REQUIRE(pages);
  CHECK(pages->count() == 0);
}

TEST_CASE("many threads ask for the same pages: each page is given to exactly one") {
  constexpr std::size_t page_count = 4096;
  const Memory memory(page_count);
  const Vm vm(memory);
  const UntouchedPages pages = snapshot(vm);
  std::atomic<std::size_t> given{0};
  std::latch start(4);
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        start.arrive_and_wait();
        std::vector<std::uint64_t> offsets(64);
        for (std::size_t first = 0; first + 64 <= page_count; first += 32) {  // each page twice, over word ends
          for (std::size_t i = 0; i < 64; ++i) offsets[i] = (first + i) * host_page;
          const std::uint64_t got = pages.take(test::GroupAt{vm.block, memory.bytes().data(), host_page, offsets});
          given += static_cast<std::size_t>(std::popcount(got));
        }
      });
    }
  }
  CHECK(pages.count() == 0);
  CHECK(given == page_count);
}

TEST_CASE_TEMPLATE("a policy with a snapshot keeps the contract of zero page policies", Next, ZeroPagesLegacy,
                   ZeroPagesMultifd) {
  const Memory memory(4);
  const Vm vm(memory);
  const ResidencyAware<Next> policy{.untouched = snapshot(vm), .next = {}};
  REQUIRE(policy.untouched.count() == 4);
  const multifd::ContractReport report = multifd::check_zero_policy_contract(
      policy, {.page_bytes = host_page, .memory = memory.bytes(), .block = vm.block});
  CHECK_MESSAGE(report.ok(), report.text());
  REQUIRE(report.notes.size() == 1);
  CHECK(report.notes[0] == "finds a zero page");
}
