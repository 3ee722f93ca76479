// SPDX-License-Identifier: MIT
//
// The first round over a guest most of whose memory was never touched: reading it against ResidencyAware, snapshot
// included. 8 GiB (MULTIFD_BENCH_RESIDENCY_MIB), of which 10 % were written, in runs of 16 pages on average; fresh memory
// for each measurement. Private anonymous memory and a shared memfd.
//
//   residency/<kind>/reading      ZeroPagesMultifd
//   residency/<kind>/resident     UntouchedPages::snapshot(), then ResidencyAware<ZeroPagesMultifd>, 64 pages a call
//   residency/<kind>/snapshot     the snapshot alone
//   residency/<kind>/runs         the snapshot, then take_run(): what a producer pays that skips whole ranges; the other
//                                 pages are read
//
// Counters: ns per page (of all pages) by the clock and of processor time, and by how many MiB and KiB resident memory
// and page tables grew.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arena.hpp"
#include "corpus.hpp"
#include "multifd/zero/residency.hpp"

namespace {

using kernels::page_bytes;

/// Kilobytes of a line of a file in /proc.
std::size_t proc_kb(const char* file, const char* key) {
  std::FILE* const from = std::fopen(file, "re");
  if (from == nullptr) return 0;
  char line[256];
  std::size_t kb = 0;
  while (std::fgets(line, sizeof line, from) != nullptr)
    if (std::strncmp(line, key, std::strlen(key)) == 0) std::sscanf(line + std::strlen(key), "%zu", &kb);
  std::fclose(from);
  return kb;
}

/// Free of what other programs do to the clock.
double thread_cpu_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

std::size_t guest_bytes() {
  const char* const mib = std::getenv("MULTIFD_BENCH_RESIDENCY_MIB");
  const std::size_t size = mib != nullptr ? std::strtoull(mib, nullptr, 10) : 0;
  return (size != 0 ? size : 8192) << 20;
}

/// A guest's memory, 10 % of it written.
class Guest {
 public:
  enum class Kind { anonymous, memfd };

  explicit Guest(Kind kind) : bytes_(guest_bytes()) {
    if (kind == Kind::memfd) {
      fd_ = ::memfd_create("guest", MFD_CLOEXEC);
      if (fd_ < 0 || ::ftruncate(fd_, static_cast<off_t>(bytes_)) != 0) throw std::runtime_error("memfd");
    }
    const int flags = fd_ < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
    data_ = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, fd_, 0);
    if (data_ == MAP_FAILED) throw std::runtime_error("mmap");
    ::madvise(data_, bytes_, MADV_NOHUGEPAGE);
    corpus::Random random(1);
    for (std::size_t at = 0; at < bytes_;) {
      const std::size_t end = std::min(at + (1 + random.below(31)) * page_bytes, bytes_);
      const bool written = random.below(10) == 0;
      for (; at < end; at += page_bytes)
        if (written) std::memset(host() + at, 1, 64);
    }
    block_ = *ram_.add("pc.ram", {host(), bytes_});
  }
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  ~Guest() {
    ::munmap(data_, bytes_);
    if (fd_ >= 0) ::close(fd_);
  }

  std::byte* host() const { return static_cast<std::byte*>(data_); }
  std::size_t pages() const { return bytes_ / page_bytes; }
  multifd::BlockId block() const { return block_; }

  multifd::UntouchedPages snapshot() const {
    const multifd::SharedMemoryFile file{block_, fd_};
    auto taken = multifd::UntouchedPages::snapshot(ram_, {.files = std::span(&file, fd_ < 0 ? 0 : 1)});
    if (!taken) throw std::runtime_error(multifd::describe(taken.error()));
    return *taken;
  }

  /// Asks about pages as the channels do; returns how many are zero.
  template <class Z>
  std::size_t count_zero(const Z& policy, std::size_t first_page, std::size_t count) const {
    std::array<std::uint64_t, multifd::zero_mask_pages> offsets;
    std::array<const std::byte*, multifd::zero_mask_pages> pages;
    std::size_t zero = 0;
    for (std::size_t done = 0; done < count;) {
      const std::size_t n = std::min(offsets.size(), count - done);
      for (std::size_t i = 0; i < n; ++i) {
        offsets[i] = (first_page + done + i) * page_bytes;
        pages[i] = host() + offsets[i];
      }
      const multifd::PageGroup group{block_, page_bytes, std::span(offsets).first(n), pages.data()};
      zero += static_cast<std::size_t>(std::popcount(multifd::zero_mask(policy, group)));
      done += n;
    }
    return zero;
  }

 private:
  std::size_t bytes_;
  int fd_ = -1;
  void* data_ = nullptr;
  multifd::RamMap ram_;
  multifd::BlockId block_{};
};

std::size_t read_all(const Guest& guest) { return guest.count_zero(multifd::ZeroPagesMultifd{}, 0, guest.pages()); }

std::size_t ask_resident(const Guest& guest) {
  const multifd::ResidencyAware<multifd::ZeroPagesMultifd> policy{.untouched = guest.snapshot(), .next = {}};
  return guest.count_zero(policy, 0, guest.pages());
}

std::size_t only_snapshot(const Guest& guest) { return guest.snapshot().count(); }

std::size_t take_runs(const Guest& guest) {
  const multifd::UntouchedPages untouched = guest.snapshot();
  std::size_t zero = 0;
  for (std::size_t page = 0; page < guest.pages();) {
    const std::size_t run = untouched.take_run(guest.block(), page, guest.pages() - page);
    zero += run;
    page += run;
    const std::size_t other = untouched.other_run(guest.block(), page, guest.pages() - page);
    zero += guest.count_zero(multifd::ZeroPagesMultifd{}, page, other);
    page += other;
  }
  return zero;
}

void run(benchmark::State& state, Guest::Kind kind, std::size_t (*first_round)(const Guest&)) {
  if (proc_kb("/proc/meminfo", "MemAvailable:") < (guest_bytes() >> 10) * 5 / 4) {
    state.SkipWithError("not enough free memory: set MULTIFD_BENCH_RESIDENCY_MIB");
    return;
  }
  for (auto _ : state) {
    const Guest guest(kind);
    const char* const status = "/proc/self/status";
    const std::size_t resident_kb = proc_kb(status, "VmRSS:");
    const std::size_t tables_kb = proc_kb(status, "VmPTE:");
    const double cpu_begin = thread_cpu_ns();
    const auto begin = std::chrono::steady_clock::now();
    const std::size_t zero = first_round(guest);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    const double cpu_ns = thread_cpu_ns() - cpu_begin;
    state.SetIterationTime(took.count());
    const auto pages = static_cast<double>(guest.pages());
    state.counters["ns_per_page"] = took.count() * 1e9 / pages;
    state.counters["cpu_ns_per_page"] = cpu_ns / pages;
    state.counters["zero_share"] = static_cast<double>(zero) / pages;
    state.counters["resident_growth_mib"] =
        (static_cast<double>(proc_kb(status, "VmRSS:")) - static_cast<double>(resident_kb)) / 1024;
    state.counters["page_table_growth_kib"] =
        static_cast<double>(proc_kb(status, "VmPTE:")) - static_cast<double>(tables_kb);
  }
}

const bool registered = [] {
  for (const auto& [kind_name, kind] :
       {std::pair{"anonymous", Guest::Kind::anonymous}, {"memfd", Guest::Kind::memfd}}) {
    for (const auto& [name, first_round] : {std::pair{"reading", &read_all},
                                            {"resident", &ask_resident},
                                            {"snapshot", &only_snapshot},
                                            {"runs", &take_runs}}) {
      benchmark::RegisterBenchmark(
          (std::string("residency/") + kind_name + "/" + name).c_str(),
          [kind = kind, first_round = first_round](benchmark::State& state) { run(state, kind, first_round); })
          ->Iterations(1)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
  return true;
}();

}  // namespace
