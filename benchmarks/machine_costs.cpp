// SPDX-License-Identifier: MIT
//
// machine_costs: what kind of machine this is, as one JSON object: what the CPU offers and what the kernel charges.
// Results carry it, because a figure of a machine with dear system calls says little about one with cheap ones.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

/// The median of `rounds` measurements of `body`, in nanoseconds per each of its `count` operations.
double median_ns(unsigned rounds, double count, const std::function<void()>& body) {
  std::vector<double> took;
  for (unsigned i = 0; i < rounds; ++i) {
    const auto began = Clock::now();
    body();
    took.push_back(std::chrono::duration<double, std::nano>(Clock::now() - began).count() / count);
  }
  std::ranges::sort(took);
  return took[took.size() / 2];
}

/// Anonymous memory that was never touched, unmapped at the end.
class Memory {
 public:
  Memory(std::size_t bytes, int advice) : bytes_(bytes) {
    void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("mmap");
    memory_ = static_cast<std::byte*>(at);
    static_cast<void>(::madvise(memory_, bytes, advice));  // a kernel without huge pages has 4 KiB ones
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { ::munmap(memory_, bytes_); }

  std::byte* data() noexcept { return memory_; }
  void touch(std::size_t step) noexcept {
    for (std::size_t at = 0; at < bytes_; at += step) const_cast<volatile std::byte*>(memory_)[at] = std::byte{1};
  }

 private:
  std::byte* memory_ = nullptr;
  const std::size_t bytes_;
};

constexpr std::size_t size = 128 << 20;

double first_touch_ns_per_page(int advice) {
  constexpr std::size_t page = 4096;
  return median_ns(5, double{size} / page, [&] { Memory(size, advice).touch(page); });
}

double copy_gb_per_s() {
  Memory from(size, MADV_HUGEPAGE), to(size, MADV_HUGEPAGE);
  from.touch(4096), to.touch(4096);
  return 1 / median_ns(5, size, [&] { std::memcpy(to.data(), from.data(), size); });
}

std::string cpu_line(const std::string& key) {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with(key)) return line.substr(std::min(line.size(), line.find(':') + 2));
  return {};
}

}  // namespace

int main() {
  const std::string flags = ' ' + cpu_line("flags") + ' ';
  std::vector<std::string> has;
  for (const char* flag : {"avx2", "avx512f", "aes", "vaes", "vpclmulqdq", "sha_ni"})
    if (flags.contains(' ' + std::string(flag) + ' ')) has.emplace_back(flag);
  utsname system{};
  ::uname(&system);
  constexpr int calls = 100'000;
  try {
    const nlohmann::ordered_json report{
        {"cpu", cpu_line("model name")},
        {"cpu_has", has},
        {"cores", std::thread::hardware_concurrency()},
        {"kernel", system.release},
        {"kvm", ::access("/dev/kvm", R_OK | W_OK) == 0},
        {"system_call_ns", median_ns(5, calls,
                                     [] {
                                       for (int i = 0; i < calls; ++i) ::syscall(SYS_getppid);
                                     })},
        {"first_touch_ns_per_4k_page", first_touch_ns_per_page(MADV_NOHUGEPAGE)},
        {"first_touch_ns_per_4k_page_of_huge_pages", first_touch_ns_per_page(MADV_HUGEPAGE)},
        {"copy_gb_per_s", copy_gb_per_s()}};
    std::puts(report.dump(2).c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "machine_costs: %s\n", error.what());
    return 1;
  }
}
