// SPDX-License-Identifier: MIT
#include "guest_code.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "guest_memory.hpp"

// The machine code lies among the constants: it runs in the guest, after it was copied there. It is short,
// because a software KVM may need a microsecond for each instruction.
//
//   rax value     rdi address     r8 set_begin   r10 page_step    r12 sweep     rbx countdown   rbp mailbox
//   rcx scratch   rsi first_error r9 set_end     r11 sweep_step   r14 written   r13 wrap_step
//   rdx scratch   r15 errors
//
// No stack, no interrupts, no floating point: general registers are all the state there is. The guest can be
// stopped, and go on elsewhere, between any two instructions.
#if defined(__x86_64__)
asm(R"(
  .pushsection .rodata
  .intel_syntax noprefix

  .set MB_SWEEP, 8                  # MailboxWord * 8
  .set MB_WRITTEN, 16
  .set MB_ERRORS, 24
  .set MB_FIRST_ERROR, 32
  .set MB_PAGES_PER_EXIT, 40
  .set PACING_PORT, 0x10

  # Counts an error of the page that address \address is in, and remembers the first one.
  .macro live_error address
    mov rdx, \address
    shr rdx, 12
    test r15, r15
    cmovz rsi, rdx
    inc r15
    mov [rbp + MB_ERRORS], r15
    mov [rbp + MB_FIRST_ERROR], rsi
  .endm

  .globl live_guest_program_begin
  .globl live_guest_program_end
  .hidden live_guest_program_begin
  .hidden live_guest_program_end
live_guest_program_begin:
.Llive_next_page:
    cmp rdi, r9
    je .Llive_next_sweep
.Llive_check:
    mov rdx, rax                    # does the page hold what the sweep before wrote?
    sub rdx, r11
    cmp [rdi], rdx
    jne .Llive_bad_page
    not rdx
    cmp [rdi + 4088], rdx
    jne .Llive_bad_page
.Llive_write:
    mov [rdi], rax
    mov rdx, rax
    not rdx
    mov [rdi + 4088], rdx
    add rax, r10
    add rdi, 4096

    mov ecx, 1                      # one page more; did the mailbox know of all before?
    xadd [rbp + MB_WRITTEN], rcx    # in one instruction, lest a stale mailbox be overwritten unseen
    cmp rcx, r14
    jne .Llive_bad_count
.Llive_count:
    inc r14
    dec rbx
    jnz .Llive_next_page
    mov rbx, [rbp + MB_PAGES_PER_EXIT]
    out PACING_PORT, al             # the host waits here as long as the rate asks for
    jmp .Llive_next_page

.Llive_next_sweep:
    cmp [rbp + MB_SWEEP], r12
    jne .Llive_bad_sweep
.Llive_begin_sweep:
    mov rdi, r8
    add rax, r13
    inc r12
    mov [rbp + MB_SWEEP], r12
    jmp .Llive_check

.Llive_bad_page:
    live_error rdi
    jmp .Llive_write
.Llive_bad_count:
    live_error rbp
    lea rcx, [r14 + 1]
    mov [rbp + MB_WRITTEN], rcx
    jmp .Llive_count
.Llive_bad_sweep:
    live_error rbp
    jmp .Llive_begin_sweep
live_guest_program_end:

  .att_syntax prefix
  .popsection
)");
extern "C" {
extern const std::byte live_guest_program_begin[];
extern const std::byte live_guest_program_end[];
}
#endif

namespace live {
namespace {

constexpr std::uint64_t mailbox_magic = 0x74736575'6764666d;  // "mfdguest" in memory order

static_assert(static_cast<std::size_t>(MailboxWord::sweep) * 8 == 8 &&
                  static_cast<std::size_t>(MailboxWord::pages_per_exit) * 8 == 40 && pacing_port == 0x10,
              "the machine code has these numbers too");

/// A word of guest memory. Migration reads it at the same time, by design; the access is atomic so that at
/// least no word is torn.
std::atomic_ref<std::uint64_t> word_at(std::span<std::byte> memory, std::size_t offset) {
  return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(memory.data() + offset));
}

std::atomic_ref<std::uint64_t> mailbox(std::span<std::byte> memory, MailboxWord word) {
  return word_at(memory, layout::mailbox + static_cast<std::size_t>(word) * 8);
}

/// For words of the guest; no order is needed, because stop() joins the guest before anyone relies on them.
constexpr auto relaxed = std::memory_order_relaxed;

struct StateHeader {
  std::array<char, 8> magic;
  std::uint32_t version;
  std::uint32_t payload_bytes;
  std::array<char, 8> backend;
  std::uint64_t memory_bytes;
  std::uint64_t checksum;  // of the header with 0 here, and of the payload
};
static_assert(sizeof(StateHeader) == 40);

constexpr std::array<char, 8> state_magic = {'m', 'f', 'd', 'g', 'u', 'e', 's', 't'};
constexpr std::uint32_t state_version = 1;

/// FNV-1a: finds damage, not malice.
std::uint64_t checksum(StateHeader header, std::span<const std::byte> payload) {
  header.checksum = 0;
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&hash](std::span<const std::byte> bytes) {
    for (std::byte b : bytes) hash = (hash ^ std::to_integer<std::uint64_t>(b)) * 0x100000001b3;
  };
  add(std::as_bytes(std::span(&header, 1)));
  add(payload);
  return hash;
}

std::array<char, 8> padded(std::string_view name) {
  std::array<char, 8> out{};
  std::copy_n(name.data(), std::min(name.size(), out.size() - 1), out.data());
  return out;
}

}  // namespace

std::span<const std::byte> guest_program() {
#if defined(__x86_64__)
  return {live_guest_program_begin, live_guest_program_end};
#else
  return {};
#endif
}

void step(std::span<std::byte> memory, Registers& r) {
  const auto count_error = [&](std::uint64_t address) {
    if (r.errors++ == 0) r.first_error = address / guest_page_size;
    mailbox(memory, MailboxWord::errors).store(r.errors, relaxed);
    mailbox(memory, MailboxWord::first_error).store(r.first_error, relaxed);
  };
  if (r.address == r.set_end) {
    if (mailbox(memory, MailboxWord::sweep).load(relaxed) != r.sweep) count_error(layout::mailbox);
    r.address = r.set_begin;
    r.value += r.wrap_step;
    mailbox(memory, MailboxWord::sweep).store(++r.sweep, relaxed);
  }
  const auto first = word_at(memory, r.address);
  const auto last = word_at(memory, r.address + guest_page_size - 8);
  const std::uint64_t old_value = r.value - sweep_step;
  if (first.load(relaxed) != old_value || last.load(relaxed) != ~old_value) count_error(r.address);
  first.store(r.value, relaxed);
  last.store(~r.value, relaxed);
  r.value += page_step;
  r.address += guest_page_size;

  if (mailbox(memory, MailboxWord::written).load(relaxed) != r.written) count_error(layout::mailbox);
  mailbox(memory, MailboxWord::written).store(++r.written, relaxed);
}

std::uint64_t pages_per_exit(std::uint64_t dirty_bytes_per_s) {
  // An exit a millisecond is often enough to pace, and seldom enough not to cost.
  if (dirty_bytes_per_s == 0) return 256;
  return std::clamp<std::uint64_t>(dirty_bytes_per_s / guest_page_size / 1000, 1, 256);
}

Registers boot_program(std::span<std::byte> memory, const GuestConfig& config) {
  const WorkingSet set = working_set(config);
  Registers r;
  r.set_begin = r.address = set.first_byte;
  r.set_end = set.first_byte + set.pages * guest_page_size;
  r.wrap_step = sweep_step - set.pages * page_step;
  r.countdown = pages_per_exit(config.dirty_bytes_per_s);
  // As if a sweep 0 had been over them.
  std::uint64_t value = config.seed + set.first_byte / guest_page_size * page_step;
  r.value = value + sweep_step;
  for (std::size_t at = r.set_begin; at < r.set_end; at += guest_page_size, value += page_step) {
    word_at(memory, at).store(value, relaxed);
    word_at(memory, at + guest_page_size - 8).store(~value, relaxed);
  }
  mailbox(memory, MailboxWord::magic).store(mailbox_magic, relaxed);
  mailbox(memory, MailboxWord::sweep).store(r.sweep, relaxed);
  mailbox(memory, MailboxWord::written).store(r.written, relaxed);
  mailbox(memory, MailboxWord::errors).store(r.errors, relaxed);
  mailbox(memory, MailboxWord::first_error).store(r.first_error, relaxed);
  mailbox(memory, MailboxWord::pages_per_exit).store(r.countdown, relaxed);
  mailbox(memory, MailboxWord::dirty_bytes_per_s).store(config.dirty_bytes_per_s, relaxed);
  mailbox(memory, MailboxWord::set_begin).store(r.set_begin, relaxed);
  mailbox(memory, MailboxWord::set_end).store(r.set_end, relaxed);
  return r;
}

std::uint64_t mailbox_word(std::span<std::byte> memory, MailboxWord word) {
  return mailbox(memory, word).load(relaxed);
}

GuestReport read_mailbox(std::span<std::byte> memory) {
  GuestReport report;
  report.pages_written = mailbox_word(memory, MailboxWord::written);
  report.errors = mailbox_word(memory, MailboxWord::errors);
  report.first_error_page = mailbox_word(memory, MailboxWord::first_error);
  const std::uint64_t set_begin = mailbox_word(memory, MailboxWord::set_begin);
  report.working_set_first = set_begin / guest_page_size;
  report.working_set_pages = (mailbox_word(memory, MailboxWord::set_end) - set_begin) / guest_page_size;
  if (report.working_set_pages != 0)  // 0 only before boot
    report.sweeps = report.pages_written / report.working_set_pages;
  return report;
}

void check_resumable(std::span<std::byte> memory, const Registers& r) {
  if (mailbox_word(memory, MailboxWord::magic) != mailbox_magic)
    throw std::runtime_error("guest state: memory holds no guest (no mailbox page); migrate memory before the state");
  if (mailbox_word(memory, MailboxWord::set_begin) != r.set_begin ||
      mailbox_word(memory, MailboxWord::set_end) != r.set_end)
    throw std::runtime_error("guest state: registers and memory are of different guests");
  if ((r.set_begin | r.set_end | r.address) % guest_page_size != 0 || r.set_begin < layout::low_end ||
      r.set_end > memory.size() || r.set_begin >= r.set_end || r.address < r.set_begin || r.address > r.set_end)
    throw std::runtime_error("guest state: registers lead out of the guest's memory");
}

std::vector<std::byte> encode_state(std::string_view backend, std::size_t memory_bytes,
                                    std::span<const std::byte> payload) {
  StateHeader header{.magic = state_magic,
                     .version = state_version,
                     .payload_bytes = static_cast<std::uint32_t>(payload.size()),
                     .backend = padded(backend),
                     .memory_bytes = memory_bytes,
                     .checksum = 0};
  header.checksum = checksum(header, payload);
  std::vector<std::byte> state(sizeof header + payload.size());
  std::memcpy(state.data(), &header, sizeof header);
  std::copy(payload.begin(), payload.end(), state.begin() + sizeof header);
  return state;
}

std::span<const std::byte> decode_state(std::span<const std::byte> state, std::string_view backend,
                                        std::size_t memory_bytes, std::size_t payload_bytes) {
  StateHeader header;
  if (state.size() < sizeof header)
    throw std::runtime_error(fmt::format("guest state: {} bytes are too few for a header", state.size()));
  std::memcpy(&header, state.data(), sizeof header);
  const auto payload = state.subspan(sizeof header);
  if (header.magic != state_magic)
    throw std::runtime_error("guest state: these bytes are not a saved state (wrong magic)");
  if (header.version != state_version)
    throw std::runtime_error(
        fmt::format("guest state: version {}, this program reads {}; use the same build on both sides", header.version,
                    state_version));
  if (header.payload_bytes != payload.size())
    throw std::runtime_error(
        fmt::format("guest state: {} bytes after the header instead of {}", payload.size(), header.payload_bytes));
  if (header.checksum != checksum(header, payload)) throw std::runtime_error("guest state: damaged (wrong checksum)");
  if (header.backend != padded(backend)) {
    header.backend.back() = '\0';
    throw std::runtime_error(
        fmt::format("guest state: saved by backend {}, this one is {}; give both sides the same --backend",
                    header.backend.data(), backend));
  }
  if (header.memory_bytes != memory_bytes)
    throw std::runtime_error(fmt::format("guest state: of a guest with {} bytes of memory, this one has {}",
                                         header.memory_bytes, memory_bytes));
  if (payload.size() != payload_bytes)
    throw std::runtime_error(
        fmt::format("guest state: {} bytes of registers instead of {}", payload.size(), payload_bytes));
  return payload;
}

void Pacer::start(std::uint64_t bytes_per_s, const QuietPhases& quiet) {
  const std::lock_guard lock(mutex_);
  interrupted_ = false;
  bytes_per_s_ = bytes_per_s;
  quiet_ = quiet;
  began_ = due_ = std::chrono::steady_clock::now();
}

void Pacer::wait(std::uint64_t pages) {
  using namespace std::chrono_literals;
  std::unique_lock lock(mutex_);
  std::uint64_t rate = bytes_per_s_;
  if (quiet_.quiet_s > 0) {
    const std::chrono::duration<double> now = std::chrono::steady_clock::now() - began_;
    if (std::fmod(now.count(), quiet_.busy_s + quiet_.quiet_s) >= quiet_.busy_s) rate = quiet_.dirty_bytes_per_s;
  }
  if (rate == 0) return;
  const std::chrono::duration<double> cost(static_cast<double>(pages * guest_page_size) / static_cast<double>(rate));
  due_ = std::max(due_, std::chrono::steady_clock::now() - 100ms) +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(cost);
  wake_.wait_until(lock, due_, [this] { return interrupted_; });
}

void Pacer::interrupt() {
  {
    const std::lock_guard lock(mutex_);
    interrupted_ = true;
  }
  wake_.notify_all();
}

}  // namespace live
