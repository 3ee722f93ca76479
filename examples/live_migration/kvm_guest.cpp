// SPDX-License-Identifier: MIT
#include "kvm_guest.hpp"

#include <fmt/format.h>

#include <stdexcept>

#if defined(__x86_64__)

#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "common/descriptor.hpp"
#include "guest_code.hpp"
#include "guest_memory.hpp"

namespace live {
namespace {

using program::Descriptor;

constexpr std::size_t gib = std::size_t{1} << 30;

/// A PC keeps the last GiB below 4 GiB for devices (and KVM for pages of its own), so guest-physical memory
/// goes on at 4 GiB. The guest sees none of that: its page tables map memory() in one piece.
constexpr std::size_t hole_begin = 3 * gib;
constexpr std::size_t hole_end = 4 * gib;

/// What a virtual CPU without CPUID leaves can address: 36 bits, less the hole.
constexpr std::size_t memory_limit = 63 * gib;

constexpr std::uint64_t cr0_pe = 1 << 0, cr0_et = 1 << 4, cr0_pg = std::uint64_t{1} << 31;
constexpr std::uint64_t cr4_pae = 1 << 5;
constexpr std::uint64_t efer_lme = 1 << 8, efer_lma = 1 << 10;

/// "Accessed" and "dirty" are set from the start: a CPU that sets them itself would dirty the page tables.
constexpr std::uint64_t pte_present = 1 << 0, pte_write = 1 << 1, pte_accessed = 1 << 5, pte_dirty = 1 << 6,
                        pte_large = 1 << 7;

/// KVM_SET_SIGNAL_MASK. Its number contains the size of a struct that C++, unlike C, takes for 8 bytes
/// instead of 4.
constexpr unsigned long set_signal_mask = _IOW(KVMIO, 0x8b, std::uint32_t);

/// An ioctl that must work.
template <class Argument>
int control(const Descriptor& fd, unsigned long request, Argument argument, const char* name) {
  const int result = ioctl(fd.get(), request, argument);
  if (result < 0)
    throw std::runtime_error(fmt::format("{}: {}; use --backend thread on this host", name, std::strerror(errno)));
  return result;
}

struct Slot {
  std::size_t begin, end;  // bytes of memory()
  std::uint64_t guest_physical;
};

/// The guest uses general registers, segment and control registers. No FPU, no debug or model specific
/// registers except EFER (which is in kvm_sregs), no interrupts: nothing else has to travel.
struct CpuState {
  kvm_regs regs;
  kvm_sregs sregs;
};

class KvmGuest final : public Guest {
 public:
  explicit KvmGuest(const GuestConfig& config) : config_(config), memory_(checked_size(config)) {
    kvm_ = Descriptor(open("/dev/kvm", O_RDWR | O_CLOEXEC));
    if (kvm_.get() < 0)
      throw std::runtime_error(
          fmt::format("/dev/kvm does not open: {}; load the kvm module, join the group of /dev/kvm, or use "
                      "--backend thread",
                      std::strerror(errno)));
    if (const int version = ioctl(kvm_.get(), KVM_GET_API_VERSION, 0); version != KVM_API_VERSION)
      throw std::runtime_error(
          fmt::format("/dev/kvm speaks version {} instead of {}; use --backend thread", version, KVM_API_VERSION));
    if (ioctl(kvm_.get(), KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0)
      throw std::runtime_error("this KVM has no KVM_CAP_IMMEDIATE_EXIT (Linux 4.11); use --backend thread");

    vm_ = Descriptor(control(kvm_, KVM_CREATE_VM, 0, "KVM_CREATE_VM"));
    // Intel hosts may need three pages for themselves, within the hole.
    if (ioctl(kvm_.get(), KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR) > 0)
      control(vm_, KVM_SET_TSS_ADDR, 0xfffbd000UL, "KVM_SET_TSS_ADDR");
    slots_.push_back({0, std::min(config.memory_bytes, hole_begin), 0});
    if (config.memory_bytes > hole_begin) slots_.push_back({hole_begin, config.memory_bytes, hole_end});
    set_slots(0);

    vcpu_ = Descriptor(control(vm_, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU"));
    run_bytes_ = static_cast<std::size_t>(control(kvm_, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE"));
    void* shared = mmap(nullptr, run_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_.get(), 0);
    if (shared == MAP_FAILED)
      throw std::runtime_error(fmt::format("cannot map the vCPU: {}; use --backend thread", std::strerror(errno)));
    // Nothing may throw from here on: the destructor would not run.
    run_ = static_cast<kvm_run*>(shared);
  }

  ~KvmGuest() override {
    stop();
    munmap(run_, run_bytes_);
  }

  std::string_view backend() const override { return "kvm"; }
  std::span<std::byte> memory() override { return memory_.bytes(); }

  void boot() override {
    const auto memory = memory_.bytes();
    fill_memory(memory, config_);
    const Registers r = boot_program(memory, config_);
    write_page_tables();
    const auto program = guest_program();
    std::copy(program.begin(), program.end(), memory.begin() + layout::program);

    CpuState state{};
    control(vcpu_, KVM_GET_SREGS, &state.sregs, "KVM_GET_SREGS");
    state.sregs.cr3 = layout::pml4;
    state.sregs.cr4 = cr4_pae;
    state.sregs.cr0 = cr0_pe | cr0_et | cr0_pg;
    state.sregs.efer = efer_lme | efer_lma;
    kvm_segment segment{};
    segment.limit = 0xffffffff;
    segment.selector = 1 << 3;
    segment.type = 11;  // code, read, accessed
    segment.present = segment.s = segment.l = segment.g = 1;
    state.sregs.cs = segment;
    segment.selector = 2 << 3;
    segment.type = 3;  // data, write, accessed
    segment.l = 0;
    segment.db = 1;
    state.sregs.ds = state.sregs.es = state.sregs.fs = state.sregs.gs = state.sregs.ss = segment;

    state.regs.rip = layout::program;
    state.regs.rflags = 2;  // the bit that is always set
    state.regs.rbp = layout::mailbox;
    state.regs.rax = r.value;
    state.regs.rdi = r.address;
    state.regs.r8 = r.set_begin;
    state.regs.r9 = r.set_end;
    state.regs.r10 = page_step;
    state.regs.r11 = sweep_step;
    state.regs.r12 = r.sweep;
    state.regs.r13 = r.wrap_step;
    state.regs.r14 = r.written;
    state.regs.r15 = r.errors;
    state.regs.rsi = r.first_error;
    state.regs.rbx = r.countdown;
    set_cpu(state);
  }

  void run() override {
    if (thread_.joinable()) throw std::runtime_error("the guest runs already");
    stopping_.store(false, std::memory_order_relaxed);
    const std::uint64_t rate = mailbox_word(memory_.bytes(), MailboxWord::dirty_bytes_per_s);
    pages_per_exit_ = mailbox_word(memory_.bytes(), MailboxWord::pages_per_exit);
    pacer_.start(rate, config_.quiet);

    // The thread starts with all signals blocked, inside KVM_RUN all but `kick_signal` are. So a kick ends
    // KVM_RUN but is never delivered: it needs no handler, and the signals of the process stay with the other
    // threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      thread_ = std::thread([this] { vcpu_loop(); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void stop() override {
    if (!thread_.joinable()) return;
    stopping_.store(true, std::memory_order_relaxed);
    pacer_.interrupt();
    // Stays pending until KVM_RUN sees it, so one is enough.
    pthread_kill(thread_.native_handle(), kick_signal());
    thread_.join();
  }

  void start_dirty_log() override {
    if (logging_) return discard_log();
    set_slots(KVM_MEM_LOG_DIRTY_PAGES);
    slot_log_.assign(bitmap_words(memory_.bytes().size()), 0);
    logging_ = true;
  }

  void fetch_dirty(std::span<std::uint64_t> bitmap) override {
    if (!logging_) throw std::runtime_error("fetch_dirty without start_dirty_log");
    if (bitmap.size() < slot_log_.size()) throw std::runtime_error("fetch_dirty: the bitmap is too short");
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
      const std::size_t words = get_log(slot);
      const std::size_t first = slots_[slot].begin / guest_page_size / 64;
      for (std::size_t i = 0; i < words; ++i) bitmap[first + i] |= slot_log_[i];
    }
  }

  void stop_dirty_log() override {
    if (!logging_) return;
    set_slots(0);
    logging_ = false;
  }

  std::vector<std::byte> save_state() override {
    if (thread_.joinable()) throw std::runtime_error("save_state of a running guest");
    CpuState state{};
    control(vcpu_, KVM_GET_REGS, &state.regs, "KVM_GET_REGS");
    control(vcpu_, KVM_GET_SREGS, &state.sregs, "KVM_GET_SREGS");
    return encode_state(backend(), memory_.bytes().size(), std::as_bytes(std::span(&state, 1)));
  }

  void load_state(std::span<const std::byte> bytes) override {
    if (thread_.joinable()) throw std::runtime_error("load_state into a running guest");
    const auto payload = decode_state(bytes, backend(), memory_.bytes().size(), sizeof(CpuState));
    CpuState state;
    std::memcpy(&state, payload.data(), sizeof state);
    const kvm_regs& regs = state.regs;
    check_resumable(memory_.bytes(), {.sweep = regs.r12,
                                      .written = regs.r14,
                                      .errors = regs.r15,
                                      .first_error = regs.rsi,
                                      .address = regs.rdi,
                                      .value = regs.rax,
                                      .set_begin = regs.r8,
                                      .set_end = regs.r9,
                                      .wrap_step = regs.r13,
                                      .countdown = regs.rbx});
    set_cpu(state);
  }

  GuestReport report() override {
    GuestReport report = read_mailbox(memory_.bytes());
    report.failure = failure_.get();
    return report;
  }

 private:
  static std::size_t checked_size(const GuestConfig& config) {
    if (config.memory_bytes > memory_limit)
      throw std::runtime_error("the KVM guest addresses up to 63 GiB; choose a smaller --memory or --backend thread");
    return config.memory_bytes;
  }

  static int kick_signal() { return SIGRTMIN; }

  void set_slots(std::uint32_t flags) {
    for (std::uint32_t i = 0; i < slots_.size(); ++i) {
      kvm_userspace_memory_region region{};
      region.slot = i;
      region.flags = flags;
      region.guest_phys_addr = slots_[i].guest_physical;
      region.memory_size = slots_[i].end - slots_[i].begin;
      region.userspace_addr = reinterpret_cast<std::uint64_t>(memory_.bytes().data() + slots_[i].begin);
      control(vm_, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    }
  }

  /// Takes the log of a slot into slot_log_; KVM watches the pages again before it returns. Returns: its
  /// words.
  std::size_t get_log(std::size_t slot) {
    kvm_dirty_log log{};
    log.slot = static_cast<std::uint32_t>(slot);
    log.dirty_bitmap = slot_log_.data();
    control(vm_, KVM_GET_DIRTY_LOG, &log, "KVM_GET_DIRTY_LOG");
    return bitmap_words(slots_[slot].end - slots_[slot].begin);
  }

  void discard_log() {
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) get_log(slot);
  }

  /// Maps memory() at address 0, with pages of 2 MiB.
  void write_page_tables() {
    const auto memory = memory_.bytes();
    const auto put = [memory](std::size_t table, std::size_t index, std::uint64_t entry) {
      std::memcpy(memory.data() + table + index * sizeof entry, &entry, sizeof entry);
    };
    constexpr std::uint64_t table_bits = pte_present | pte_write | pte_accessed;
    constexpr std::uint64_t page_bits = table_bits | pte_dirty | pte_large;
    constexpr std::size_t large = std::size_t{2} << 20;
    put(layout::pml4, 0, layout::pdpt | table_bits);
    for (std::size_t at = 0; at < memory.size(); at += large) {
      const std::size_t directory = layout::page_directories + at / gib * guest_page_size;
      if (at % gib == 0) put(layout::pdpt, at / gib, directory | table_bits);
      const std::uint64_t physical = at < hole_begin ? at : at - hole_begin + hole_end;
      put(directory, at % gib / large, physical | page_bits);
    }
  }

  void set_cpu(const CpuState& state) {
    control(vcpu_, KVM_SET_SREGS, &state.sregs, "KVM_SET_SREGS");
    control(vcpu_, KVM_SET_REGS, &state.regs, "KVM_SET_REGS");
  }

  void vcpu_loop() {
    pthread_setname_np(pthread_self(), "vcpu0");
    if (std::string why = run_until_stopped(); !why.empty()) failure_.set(std::move(why));
  }

  /// Returns: why the vCPU cannot go on, or nothing when it was told to stop.
  std::string run_until_stopped() {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    sigdelset(&mask, kick_signal());
    // A length and a signal set of the kernel, which is shorter than glibc's.
    constexpr std::uint32_t kernel_sigset_bytes = 8;
    std::array<std::uint32_t, 3> in_guest = {kernel_sigset_bytes};
    std::memcpy(&in_guest[1], &mask, kernel_sigset_bytes);
    if (ioctl(vcpu_.get(), set_signal_mask, in_guest.data()) < 0)
      return fmt::format("KVM_SET_SIGNAL_MASK: {}", std::strerror(errno));

    while (!stopping_.load(std::memory_order_relaxed)) {
      if (ioctl(vcpu_.get(), KVM_RUN, 0) < 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        return fmt::format("KVM_RUN: {}", std::strerror(errno));
      }
      switch (run_->exit_reason) {
        case KVM_EXIT_IO:
          if (run_->io.port != pacing_port) return fmt::format("the guest used port {:#x}", +run_->io.port);
          pacer_.wait(pages_per_exit_);
          break;
        case KVM_EXIT_INTR: break;
        case KVM_EXIT_SHUTDOWN: return "the guest ran into a triple fault";
        case KVM_EXIT_FAIL_ENTRY:
          return fmt::format("KVM could not enter the guest (hardware reason {:#x})",
                             +run_->fail_entry.hardware_entry_failure_reason);
        case KVM_EXIT_INTERNAL_ERROR:
          return fmt::format("KVM gave up on the guest (internal error {})", +run_->internal.suberror);
        default: return fmt::format("the guest stopped for reason {} of KVM", +run_->exit_reason);
      }
    }

    // An `out` is complete, and the instruction pointer behind it, only with the next entry. Enter without
    // running.
    run_->immediate_exit = 1;
    const int result = ioctl(vcpu_.get(), KVM_RUN, 0);
    const int error = errno;
    run_->immediate_exit = 0;
    if (result == 0 || error != EINTR) return fmt::format("KVM_RUN with immediate_exit: {}", std::strerror(error));
    return {};
  }

  GuestConfig config_;
  GuestMemory memory_;
  Descriptor kvm_, vm_, vcpu_;
  std::vector<Slot> slots_;
  kvm_run* run_ = nullptr;
  std::size_t run_bytes_ = 0;

  bool logging_ = false;
  std::vector<std::uint64_t> slot_log_;

  Pacer pacer_;
  std::uint64_t pages_per_exit_ = 1;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
  Failure failure_;
};

}  // namespace

std::unique_ptr<Guest> make_kvm_guest(const GuestConfig& config) { return std::make_unique<KvmGuest>(config); }

}  // namespace live

#else

namespace live {

std::unique_ptr<Guest> make_kvm_guest(const GuestConfig&) {
  throw std::runtime_error("the KVM guest is a program for x86-64; use --backend thread");
}

}  // namespace live

#endif
