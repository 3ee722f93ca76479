// SPDX-License-Identifier: MIT
//
// A virtual machine of a few instructions, for tests of KVM's dirty logs: its vCPU writes where the test says, and halts.
// Where there is no /dev/kvm the tests are skipped; nobody makes one.
#pragma once

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "multifd/migrate/dirty/kvm_memory_slot.hpp"
#include "support/dirty_ram.hpp"
#include "support/memory.hpp"

namespace test {

/// Why there is no KVM here that these tests can use; empty where there is one, which then has to work.
inline std::string why_no_kvm() {
#if defined(__x86_64__)
  const int fd = ::open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (fd < 0) return std::string("/dev/kvm: ") + std::strerror(errno);
  const int version = ::ioctl(fd, KVM_GET_API_VERSION, 0);
  ::close(fd);
  return version == KVM_API_VERSION ? "" : "/dev/kvm is not KVM's";
#else
  return "the guest of these tests is x86 code";
#endif
}

#if defined(__x86_64__)

/// One of the machine's vCPUs. Threads: one at a time.
class KvmVcpu {
 public:
  KvmVcpu(int kvm, int vm, unsigned number) : fd_(::ioctl(vm, KVM_CREATE_VCPU, number)) {
    REQUIRE(fd_ >= 0);
    run_bytes_ = static_cast<std::size_t>(::ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    void* const shared = ::mmap(nullptr, run_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    REQUIRE(shared != MAP_FAILED);
    run_ = static_cast<kvm_run*>(shared);
    // 32-bit protected mode without paging: addresses are guest-physical.
    kvm_sregs sregs{};
    REQUIRE(::ioctl(fd_, KVM_GET_SREGS, &sregs) == 0);
    kvm_segment segment{};
    segment.limit = 0xffffffff;
    segment.selector = 1 << 3;
    segment.type = 11;  // code, read, accessed
    segment.present = segment.s = segment.db = segment.g = 1;
    sregs.cs = segment;
    segment.selector = 2 << 3;
    segment.type = 3;  // data, write, accessed
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment;
    sregs.cr0 = 0x11;  // PE, ET
    REQUIRE(::ioctl(fd_, KVM_SET_SREGS, &sregs) == 0);
  }
  KvmVcpu(const KvmVcpu&) = delete;
  KvmVcpu& operator=(const KvmVcpu&) = delete;
  ~KvmVcpu() {
    ::munmap(run_, run_bytes_);
    ::close(fd_);
  }

  int fd() const { return fd_; }
  /// Not empty: the vCPU stopped for something else than its halt.
  const std::string& failure() const { return failure_; }

  /// Writes 8 bytes.
  void write(std::uint64_t physical, std::uint64_t value) {
    kvm_regs regs{};
    regs.rip = write_one;
    regs.rdi = physical;
    regs.rax = static_cast<std::uint32_t>(value);
    regs.rdx = value >> 32;
    start(regs);
    go_on();
  }

  /// Prepares to write the first 4 bytes of each of `pages` pages; go_on() does it.
  ///
  /// Params: `at`: write_pages, which leaves the guest after each page, or burst_of_pages, which need not.
  void begin_pages(std::uint64_t physical, std::uint32_t pages, std::uint32_t value, std::uint64_t at = write_pages) {
    kvm_regs regs{};
    regs.rip = at;
    regs.rdi = physical;
    regs.rcx = pages;
    regs.rax = value;
    start(regs);
  }

  /// Runs until the vCPU halts, or on_ring_full says no. Returns whether it has halted.
  bool go_on() {
    while (failure_.empty()) {
      if (::ioctl(fd_, KVM_RUN, 0) < 0) {
        if (errno != EINTR && errno != EAGAIN) failure_ = std::string("KVM_RUN: ") + std::strerror(errno);
        continue;
      }
      if (run_->exit_reason == KVM_EXIT_HLT) return true;
      if (run_->exit_reason == KVM_EXIT_IO) continue;
      if (run_->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
        if (!on_ring_full || !on_ring_full()) return false;
      } else {
        failure_ = "exit reason " + std::to_string(run_->exit_reason);
      }
    }
    return false;
  }

  /// What the VMM does when the dirty ring is full.
  std::function<bool()> on_ring_full{};

  /// Page faults that KVM has taken for this vCPU; nothing where the kernel does not say.
  std::function<std::uint64_t()> faults() const {
#if defined(KVM_GET_STATS_FD)
    const int stats = ::ioctl(fd_, KVM_GET_STATS_FD, 0);
    if (stats < 0) return {};
    const std::shared_ptr<const int> fd(new int(stats), [](const int* at) {
      ::close(*at);
      delete at;
    });
    kvm_stats_header header{};
    if (::pread(*fd, &header, sizeof header, 0) != sizeof header) return {};
    std::vector<char> room(sizeof(kvm_stats_desc) + header.name_size);
    for (std::uint32_t i = 0; i < header.num_desc; ++i) {
      const auto at = static_cast<off_t>(header.desc_offset + i * room.size());
      if (::pread(*fd, room.data(), room.size(), at) != static_cast<ssize_t>(room.size())) return {};
      kvm_stats_desc found{};
      std::memcpy(&found, room.data(), sizeof found);
      if (std::string(room.data() + sizeof found) != "pf_taken") continue;
      const auto value_at = static_cast<off_t>(header.data_offset + found.offset);
      return [fd, value_at] {
        std::uint64_t value = 0;
        CHECK(::pread(*fd, &value, sizeof value, value_at) == sizeof value);
        return value;
      };
    }
#endif
    return {};
  }

  static constexpr std::uint64_t write_one = 0, write_pages = 6, burst_of_pages = 20;

  /// What KvmVm puts at guest-physical address 0.
  static constexpr std::uint8_t program[] = {
      0x89, 0x07,                          // mov [edi], eax
      0x89, 0x57, 0x04,                    // mov [edi + 4], edx
      0xf4,                                // hlt
      0x89, 0x07,                          // again: mov [edi], eax
      0xe6, 0x10,                          // out 0x10, al
      0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,  // add edi, 4096
      0x49,                                // dec ecx
      0x75, 0xf3,                          // jnz again
      0xf4,                                // hlt
      0x89, 0x07,                          // more: mov [edi], eax
      0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,  // add edi, 4096
      0x49,                                // dec ecx
      0x75, 0xf5,                          // jnz more
      0xf4,                                // hlt
  };

 private:
  void start(kvm_regs& regs) {
    regs.rflags = 2;  // the bit that is always set
    if (::ioctl(fd_, KVM_SET_REGS, &regs) < 0) failure_ = std::string("KVM_SET_REGS: ") + std::strerror(errno);
  }

  int fd_;
  kvm_run* run_ = nullptr;
  std::size_t run_bytes_ = 0;
  std::string failure_;
};

/// A machine with a DirtyRam, whose first block lies in two slots that meet in the middle of a word of 64 pages.
class KvmVm {
 public:
  /// Params: `before_vcpus`: called with the VM's descriptor.
  explicit KvmVm(const DirtyRam& ram, unsigned vcpus = 1, const std::function<void(int vm)>& before_vcpus = {})
      : ram_(ram), code_(4096) {
    kvm_ = ::open("/dev/kvm", O_RDWR | O_CLOEXEC);
    REQUIRE(kvm_ >= 0);
    vm_ = ::ioctl(kvm_, KVM_CREATE_VM, 0);
    REQUIRE(vm_ >= 0);
    // Intel hosts may need three pages for themselves.
    if (::ioctl(kvm_, KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR) > 0)
      REQUIRE(::ioctl(vm_, KVM_SET_TSS_ADDR, 0xfffbd000UL) == 0);
    std::memcpy(code_.data(), KvmVcpu::program, sizeof KvmVcpu::program);
    map(code_slot, 0, code_.bytes());
    const multifd::BlockId first{0}, second{1};
    const std::size_t cut = ram.memory[0].size() / 4096 > 70 ? std::size_t{70} * 4096 : 4096;
    add_slot(0, first, 0, cut, std::uint64_t{1} << 24);
    add_slot(1, first, cut, ram.memory[0].size() - cut, std::uint64_t{2} << 24);
    add_slot(2, second, 0, ram.memory[1].size(), std::uint64_t{8} << 24);
    if (before_vcpus) before_vcpus(vm_);
    for (unsigned i = 0; i < vcpus; ++i) vcpus_.push_back(std::make_unique<KvmVcpu>(kvm_, vm_, i));
  }
  KvmVm(const KvmVm&) = delete;
  KvmVm& operator=(const KvmVm&) = delete;
  ~KvmVm() {
    vcpus_.clear();
    ::close(vm_);
    ::close(kvm_);
  }

  void add_slot(std::uint32_t number, multifd::BlockId block, std::uint64_t offset, std::uint64_t bytes,
                std::uint64_t physical, std::uint32_t flags = 0) {
    multifd::migrate::KvmMemorySlot& slot = slots_.emplace_back();
    slot.block = block;
    slot.region = map(number, physical, ram_.memory[index(block)].bytes().subspan(offset, bytes), flags);
  }

  int fd() const { return vm_; }
  std::vector<multifd::migrate::KvmMemorySlot>& slots() { return slots_; }
  KvmVcpu& vcpu(std::size_t i = 0) { return *vcpus_[i]; }
  std::vector<int> vcpu_fds() const {
    std::vector<int> fds;
    for (const auto& vcpu : vcpus_) fds.push_back(vcpu->fd());
    return fds;
  }

  /// Where the guest sees a byte of a block, in the nth of the slots that map it.
  std::uint64_t physical(multifd::BlockId block, std::uint64_t offset, std::size_t nth = 0) const {
    const auto address = reinterpret_cast<std::uintptr_t>(ram_.memory[index(block)].data() + offset);
    for (const multifd::migrate::KvmMemorySlot& slot : slots_) {
      const kvm_userspace_memory_region& region = slot.region;
      if (address < region.userspace_addr || address - region.userspace_addr >= region.memory_size) continue;
      if (nth-- == 0) return region.guest_phys_addr + (address - region.userspace_addr);
    }
    FAIL("no slot maps this");
    return 0;
  }

  /// As DirtySourceContractSetup::write.
  void write(multifd::BlockId block, std::uint64_t offset, std::uint64_t value) {
    vcpu().write(physical(block, offset), value);
  }

  /// Whether KVM has a dirty log for a slot.
  bool logs(std::uint32_t slot) const {
    std::vector<std::uint64_t> words(1024);
    kvm_dirty_log log{};
    log.slot = slot;
    log.dirty_bitmap = words.data();
    return ::ioctl(vm_, KVM_GET_DIRTY_LOG, &log) == 0;
  }

 private:
  static constexpr std::uint32_t code_slot = 9;

  kvm_userspace_memory_region map(std::uint32_t number, std::uint64_t physical, std::span<std::byte> memory,
                                  std::uint32_t flags = 0) const {
    kvm_userspace_memory_region region{};
    region.slot = number;
    region.flags = flags;
    region.guest_phys_addr = physical;
    region.memory_size = memory.size();
    region.userspace_addr = reinterpret_cast<std::uintptr_t>(memory.data());
    REQUIRE(::ioctl(vm_, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    return region;
  }

  const DirtyRam& ram_;
  Block code_;
  int kvm_ = -1, vm_ = -1;
  std::vector<multifd::migrate::KvmMemorySlot> slots_;
  std::vector<std::unique_ptr<KvmVcpu>> vcpus_;
};

#endif

}  // namespace test
