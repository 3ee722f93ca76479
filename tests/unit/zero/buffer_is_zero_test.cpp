// SPDX-License-Identifier: MIT
#include "multifd/zero/buffer_is_zero.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using multifd::ZeroKernel;

constexpr std::array<unsigned char, 3> patterns{0x01, 0x80, 0xff};

/// Memory between two pages that cannot be touched: one byte too far, on either side, ends the test with
/// SIGSEGV.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t at_least) : page_(static_cast<std::size_t>(::sysconf(_SC_PAGESIZE))) {
    size_ = (at_least + page_ - 1) / page_ * page_;
    base_ = ::mmap(nullptr, size_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(base_ != MAP_FAILED);
    REQUIRE(::mprotect(begin(), size_, PROT_READ | PROT_WRITE) == 0);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { ::munmap(base_, size_ + 2 * page_); }

  unsigned char* begin() const { return static_cast<unsigned char*>(base_) + page_; }
  unsigned char* end() const { return begin() + size_; }

 private:
  std::size_t page_;
  std::size_t size_ = 0;
  void* base_ = nullptr;
};

/// Counts wrong answers and keeps the first: a CHECK for each of millions of cases would take minutes.
struct Mistakes {
  std::size_t count = 0;
  std::string first;

  void expect(bool right, const ZeroKernel& kernel, std::size_t length, std::size_t alignment, std::size_t position) {
    if (right) return;
    if (count++ == 0)
      first = std::string(kernel.name) + ", length " + std::to_string(length) + ", alignment " +
              std::to_string(alignment) + ", byte " + std::to_string(position);
  }
};

constexpr std::size_t nowhere = ~std::size_t{0};

/// The kernels that this machine runs; says once which it leaves out, because their tests did not happen.
const std::vector<ZeroKernel>& kernels_here() {
  static const std::vector<ZeroKernel> here = [] {
    std::vector<ZeroKernel> supported;
    for (const ZeroKernel& kernel : multifd::zero_kernels()) {
      if (kernel.supported) {
        supported.push_back(kernel);
      } else {
        std::printf("skipped: zero kernel %s does not run on this machine\n", std::string(kernel.name).c_str());
      }
    }
    return supported;
  }();
  return here;
}

/// Puts the automatic choice back when a test ends.
struct AutomaticKernelAfter {
  ~AutomaticKernelAfter() { static_cast<void>(multifd::force_zero_kernel("auto")); }
};

}  // namespace

TEST_CASE("no bytes at all are zero, even nowhere") {
  CHECK(multifd::buffer_is_zero(nullptr, 0));
  for (const ZeroKernel& kernel : kernels_here()) CHECK(kernel.is_zero(nullptr, 0));
}

TEST_CASE("every kernel sees only its own bytes, at all lengths up to 1100 and all alignments") {
  const std::vector<ZeroKernel>& kernels = kernels_here();
  std::vector<unsigned char> memory(64 + 64 + 1100 + 64, 0xff);
  const std::size_t misplaced = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  unsigned char* const aligned = memory.data() + (64 - misplaced);
  Mistakes mistakes;
  for (std::size_t length = 0; length <= 1100; ++length) {
    for (std::size_t alignment = 0; alignment < 64; ++alignment) {
      unsigned char* const data = aligned + alignment;
      std::fill_n(data, length, static_cast<unsigned char>(0));
      for (const ZeroKernel& kernel : kernels)
        mistakes.expect(kernel.is_zero(data, length), kernel, length, alignment, nowhere);
      std::fill_n(data, length, static_cast<unsigned char>(0xff));
    }
  }
  CHECK_MESSAGE(mistakes.count == 0, mistakes.first);
}

TEST_CASE("every kernel finds a single non-zero byte at each position, at all alignments") {
  const std::vector<ZeroKernel>& kernels = kernels_here();
  std::vector<unsigned char> memory(64 + 64 + 1100, 0);
  const std::size_t misplaced = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  unsigned char* const aligned = memory.data() + (64 - misplaced);
  Mistakes mistakes;
  for (std::size_t length = 1; length <= 1100; ++length) {
    // Beyond a few steps of the widest kernel, fewer alignments do: the loads are unaligned by design.
    const std::size_t alignment_step = length <= 320 ? 1 : 31;
    const std::size_t position_step = length <= 640 ? 1 : 3;
    for (std::size_t alignment = 0; alignment < 64; alignment += alignment_step) {
      unsigned char* const data = aligned + alignment;
      for (std::size_t position = 0; position < length; position += position_step) {
        data[position] = patterns[(position + length) % patterns.size()];
        for (const ZeroKernel& kernel : kernels)
          mistakes.expect(!kernel.is_zero(data, length), kernel, length, alignment, position);
        data[position] = 0;
      }
    }
  }
  CHECK_MESSAGE(mistakes.count == 0, mistakes.first);
}

TEST_CASE("every kernel finds a single non-zero byte at each position of a page, between guard pages") {
  const std::vector<ZeroKernel>& kernels = kernels_here();
  for (const std::size_t length : {std::size_t{4096}, std::size_t{16384}, std::size_t{65536}}) {
    CAPTURE(length);
    const GuardedMemory memory(length);
    unsigned char* const data = memory.end() - length;
    Mistakes mistakes;
    for (const ZeroKernel& kernel : kernels) {
      mistakes.expect(kernel.is_zero(data, length), kernel, length, 0, nowhere);
      for (std::size_t position = 0; position < length; ++position) {
        for (std::size_t which = 0; which < patterns.size(); ++which) {
          if (length > 4096 && which != position % patterns.size()) continue;
          data[position] = patterns[which];
          mistakes.expect(!kernel.is_zero(data, length), kernel, length, 0, position);
        }
        data[position] = 0;
      }
    }
    CHECK_MESSAGE(mistakes.count == 0, mistakes.first);
  }
}

TEST_CASE("no kernel reads outside its buffer") {
  const std::vector<ZeroKernel>& kernels = kernels_here();
  const GuardedMemory memory(8192);
  Mistakes mistakes;
  for (std::size_t length = 0; length <= 1100; ++length) {
    for (const ZeroKernel& kernel : kernels) {
      mistakes.expect(kernel.is_zero(memory.begin(), length), kernel, length, 0, nowhere);
      mistakes.expect(kernel.is_zero(memory.end() - length, length), kernel, length, length % 64, nowhere);
    }
  }
  CHECK_MESSAGE(mistakes.count == 0, mistakes.first);
}

TEST_CASE("every kernel gives the answer of a plain loop on random sparse buffers") {
  const unsigned seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937 random(seed);
  const std::vector<ZeroKernel>& kernels = kernels_here();
  std::vector<unsigned char> memory(20000);
  Mistakes mistakes;
  for (int round = 0; round < 4000; ++round) {
    const std::size_t offset = random() % 128;
    const std::size_t length = random() % (round % 8 == 0 ? 19000 : 1500);
    const std::size_t position = random() % memory.size();
    memory[position] = static_cast<unsigned char>(1u << (random() % 8));
    const bool expected =
        std::all_of(memory.data() + offset, memory.data() + offset + length, [](unsigned char b) { return b == 0; });
    for (const ZeroKernel& kernel : kernels)
      mistakes.expect(kernel.is_zero(memory.data() + offset, length) == expected, kernel, length, offset, position);
    memory[position] = 0;
  }
  CHECK_MESSAGE(mistakes.count == 0, mistakes.first);
}

TEST_CASE("zero_page_mask gives the answers of a plain loop, for every count of pages and with every kernel") {
  const AutomaticKernelAfter restore;
  const unsigned seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937 random(seed);
  for (const ZeroKernel& kernel : kernels_here()) {
    REQUIRE(multifd::force_zero_kernel(kernel.name));
    CAPTURE(kernel.name);
    for (const std::size_t page_bytes :
         {std::size_t{1}, std::size_t{48}, std::size_t{64}, std::size_t{1024}, std::size_t{4096}, std::size_t{4100}}) {
      CAPTURE(page_bytes);
      const GuardedMemory memory(64 * page_bytes);
      auto* const first = reinterpret_cast<std::byte*>(memory.end()) - 64 * page_bytes;
      std::size_t wrong = 0;
      for (std::size_t count = 1; count <= 64; ++count) {
        std::fill_n(first, 64 * page_bytes, std::byte{});
        std::vector<const std::byte*> pages;
        for (std::size_t i = 0; i < 64; ++i) pages.push_back(first + i * page_bytes);
        std::ranges::shuffle(pages, random);
        const std::uint_fast32_t share = random() % 5;  // 0: all pages stay zero, 4: none does
        for (std::size_t i = 0; i < 64; ++i) {
          if (random() % 4 < share) {
            const std::size_t position = random() % 2 == 0 ? random() % page_bytes : 0;
            first[i * page_bytes + position] = static_cast<std::byte>(patterns[random() % patterns.size()]);
          }
        }
        std::uint64_t expected = 0;
        for (std::size_t i = 0; i < count; ++i) {
          const bool zero = std::all_of(pages[i], pages[i] + page_bytes, [](std::byte b) { return b == std::byte{}; });
          expected |= std::uint64_t{zero} << i;
        }
        wrong += multifd::zero_page_mask(pages.data(), count, page_bytes) != expected;
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("zero_page_mask finds a single non-zero byte at each position of each page of a group") {
  const AutomaticKernelAfter restore;
  constexpr std::size_t page_bytes = 1024;
  const std::vector<std::byte> zeros(page_bytes);
  for (const ZeroKernel& kernel : kernels_here()) {
    REQUIRE(multifd::force_zero_kernel(kernel.name));
    CAPTURE(kernel.name);
    std::vector<std::byte> page(page_bytes);
    std::size_t wrong = 0;
    for (std::size_t count = 1; count <= 9; ++count) {
      for (std::size_t which = 0; which < count; ++which) {
        std::vector pages(count, zeros.data());
        pages[which] = page.data();
        const std::uint64_t all = (std::uint64_t{1} << count) - 1;
        for (std::size_t position = 0; position < page_bytes; ++position) {
          page[position] = std::byte{0x80};
          wrong += multifd::zero_page_mask(pages.data(), count, page_bytes) != (all & ~(std::uint64_t{1} << which));
          page[position] = std::byte{};
        }
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("the kernels are listed by name, and the chosen one is the last that runs here") {
  const AutomaticKernelAfter restore;
  REQUIRE(multifd::force_zero_kernel("auto"));
  std::string names;
  const ZeroKernel* best = nullptr;
  for (const ZeroKernel& kernel : multifd::zero_kernels()) {
    names +=
        std::string(names.empty() ? "" : ", ") + std::string(kernel.name) + (kernel.supported ? "" : " (not here)");
    if (kernel.supported) best = &kernel;
  }
  std::printf("zero kernels: %s; chosen: %s\n", names.c_str(), std::string(multifd::chosen_zero_kernel().name).c_str());
  REQUIRE(best != nullptr);
  CHECK(&multifd::chosen_zero_kernel() == best);
  CHECK(multifd::zero_kernels().front().name == "scalar");
  CHECK(multifd::zero_kernels().front().supported);
}

TEST_CASE("force_zero_kernel takes every kernel that runs here and refuses the others") {
  const AutomaticKernelAfter restore;
  for (const ZeroKernel& kernel : multifd::zero_kernels()) {
    CAPTURE(kernel.name);
    REQUIRE(multifd::force_zero_kernel("scalar"));
    const auto forced = multifd::force_zero_kernel(kernel.name);
    CHECK(forced.has_value() == kernel.supported);
    if (forced) {
      CHECK(multifd::chosen_zero_kernel().name == kernel.name);
    } else {
      CHECK(forced.error().code == multifd::Errc::not_supported);
      CHECK(forced.error().stage == multifd::Stage::setup);
      CHECK(multifd::chosen_zero_kernel().name == "scalar");
    }
  }
}

TEST_CASE(
    "force_zero_kernel refuses an unknown name and keeps the kernel in use; no name is the automatic "
    "choice") {
  const AutomaticKernelAfter restore;
  REQUIRE(multifd::force_zero_kernel("auto"));
  const std::string_view automatic = multifd::chosen_zero_kernel().name;
  REQUIRE(multifd::force_zero_kernel("scalar"));
  for (const std::string_view name : {"mmx", "AVX2", "avx2 ", "scalarr"}) {
    CAPTURE(name);
    const auto forced = multifd::force_zero_kernel(name);
    REQUIRE(!forced);
    CHECK(forced.error().code == multifd::Errc::unknown_policy);
    CHECK(forced.error().code == multifd::Condition::misuse);
  }
  CHECK(multifd::chosen_zero_kernel().name == "scalar");
  REQUIRE(multifd::force_zero_kernel(""));
  CHECK(multifd::chosen_zero_kernel().name == automatic);
}

TEST_CASE("checks may run while another thread writes to the page and another changes the kernel") {
  const AutomaticKernelAfter restore;
  std::vector<unsigned char> page(4096);
  page[4095] = 1;  // stays: every answer must be "not zero"
  std::atomic<bool> done{false};
  std::jthread guest([&] {
    for (unsigned i = 0; !done.load(std::memory_order_relaxed); ++i)
      *const_cast<volatile unsigned char*>(&page[(i * 64) % 4032]) = static_cast<unsigned char>(i >> 8);
  });
  std::jthread forcer([&] {
    while (!done.load(std::memory_order_relaxed)) {
      for (const ZeroKernel& kernel : multifd::zero_kernels())
        static_cast<void>(multifd::force_zero_kernel(kernel.name));
    }
  });
  const auto* bytes = reinterpret_cast<const std::byte*>(page.data());
  const std::array<const std::byte*, 4> pages{bytes, bytes, bytes, bytes};
  std::size_t wrong = 0;
  for (int i = 0; i < 20000; ++i) {
    wrong += multifd::buffer_is_zero(page.data(), page.size());
    wrong += multifd::zero_page_mask(pages.data(), pages.size(), page.size()) != 0;
  }
  done.store(true, std::memory_order_relaxed);
  CHECK(wrong == 0);
}
