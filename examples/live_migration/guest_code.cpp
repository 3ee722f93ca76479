// SPDX-License-Identifier: MIT
#include "guest_code.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "guest_memory.hpp"

// The machine code lies among the constants: it runs in the guest, after it was copied there.
//
//   rbp mailbox   r8 set_address   r9 set_pages   r10 seed    r11 pages_per_exit   rbx countdown
//   r12 sweep     r13 index        r14 written    r15 errors  rsi first_error      rax rcx rdx rdi: scratch
//
// No stack, no interrupts, no floating point: general registers are all the state there is.
#if defined(__x86_64__)
asm(R"(
  .pushsection .rodata
  .intel_syntax noprefix

  .set MB_SWEEP, 8        # MailboxWord * 8
  .set MB_INDEX, 16
  .set MB_WRITTEN, 24
  .set MB_ERRORS, 32
  .set MB_FIRST_ERROR, 40
  .set PACING_PORT, 0x10

  # rax = page_value(rax, page rdx, seed); spoils rcx
  .macro live_page_value
    movabs rcx, 0x9e3779b97f4a7c15
    imul rax, rcx
    movabs rcx, 0xbf58476d1ce4e5b9
    imul rcx, rdx
    add rax, rcx
    add rax, r10
    mov rcx, rax
    shr rcx, 29
    xor rax, rcx
    movabs rcx, 0x94d049bb133111eb
    imul rax, rcx
  .endm

  # Counts an error of page \page, and remembers the first one.
  .macro live_error page
    test r15, r15
    cmovz rsi, \page
    inc r15
  .endm

  .globl live_guest_program_begin
  .globl live_guest_program_end
  .hidden live_guest_program_begin
  .hidden live_guest_program_end
live_guest_program_begin:
.Llive_next_page:
    cmp [rbp + MB_SWEEP], r12       # does the mailbox say what the registers say?
    jne .Llive_bad_mailbox
    cmp [rbp + MB_INDEX], r13
    jne .Llive_bad_mailbox
    cmp [rbp + MB_WRITTEN], r14
    jne .Llive_bad_mailbox
    cmp [rbp + MB_ERRORS], r15
    je .Llive_mailbox_done
.Llive_bad_mailbox:
    mov rdx, rbp
    shr rdx, 12
    live_error rdx
.Llive_mailbox_done:
    mov rdi, r13                    # rdi = address, rdx = number of the page
    shl rdi, 12
    add rdi, r8
    mov rdx, rdi
    shr rdx, 12
    lea rax, [r12 - 1]              # does the page hold what the sweep before wrote?
    live_page_value
    cmp [rdi], rax
    jne .Llive_bad_page
    not rax
    cmp [rdi + 4088], rax
    je .Llive_page_done
.Llive_bad_page:
    live_error rdx
.Llive_page_done:
    mov rax, r12                    # write this sweep's value
    live_page_value
    mov [rdi], rax
    not rax
    mov [rdi + 4088], rax

    inc r14                         # next page, next sweep
    inc r13
    cmp r13, r9
    jb .Llive_same_sweep
    xor r13d, r13d
    inc r12
.Llive_same_sweep:
    mov [rbp + MB_SWEEP], r12
    mov [rbp + MB_INDEX], r13
    mov [rbp + MB_WRITTEN], r14
    mov [rbp + MB_ERRORS], r15
    mov [rbp + MB_FIRST_ERROR], rsi
    dec rbx
    jnz .Llive_next_page
    mov rbx, r11
    out PACING_PORT, al             # the host waits here as long as the rate asks for
    jmp .Llive_next_page
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
                  static_cast<std::size_t>(MailboxWord::first_error) * 8 == 40 && pacing_port == 0x10,
              "the machine code has these numbers too");

/// A word of guest memory. Migration reads it at the same time, by design; the access is atomic so that at least no
/// word is torn.
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
  const auto count_error = [&r](std::uint64_t page) {
    if (r.errors++ == 0) r.first_error = page;
  };
  if (mailbox(memory, MailboxWord::sweep).load(relaxed) != r.sweep ||
      mailbox(memory, MailboxWord::index).load(relaxed) != r.index ||
      mailbox(memory, MailboxWord::written).load(relaxed) != r.written ||
      mailbox(memory, MailboxWord::errors).load(relaxed) != r.errors)
    count_error(layout::mailbox / guest_page_size);

  const std::uint64_t address = r.set_address + r.index * guest_page_size;
  const std::uint64_t page = address / guest_page_size;
  const auto first = word_at(memory, address);
  const auto last = word_at(memory, address + guest_page_size - 8);
  const std::uint64_t old_value = page_value(r.sweep - 1, page, r.seed);
  if (first.load(relaxed) != old_value || last.load(relaxed) != ~old_value) count_error(page);

  const std::uint64_t new_value = page_value(r.sweep, page, r.seed);
  first.store(new_value, relaxed);
  last.store(~new_value, relaxed);

  ++r.written;
  if (++r.index == r.set_pages) {
    r.index = 0;
    ++r.sweep;
  }
  mailbox(memory, MailboxWord::sweep).store(r.sweep, relaxed);
  mailbox(memory, MailboxWord::index).store(r.index, relaxed);
  mailbox(memory, MailboxWord::written).store(r.written, relaxed);
  mailbox(memory, MailboxWord::errors).store(r.errors, relaxed);
  mailbox(memory, MailboxWord::first_error).store(r.first_error, relaxed);
}

std::uint64_t pages_per_exit(std::uint64_t dirty_bytes_per_s) {
  // An exit a millisecond is often enough to pace, and seldom enough not to cost.
  if (dirty_bytes_per_s == 0) return 256;
  return std::clamp<std::uint64_t>(dirty_bytes_per_s / guest_page_size / 1000, 1, 256);
}

Registers boot_program(std::span<std::byte> memory, const GuestConfig& config) {
  const WorkingSet set = working_set(config);
  Registers r;
  r.set_address = set.first_byte;
  r.set_pages = set.pages;
  r.seed = config.seed;
  r.pages_per_exit = pages_per_exit(config.dirty_bytes_per_s);
  r.countdown = r.pages_per_exit;
  for (std::size_t i = 0; i < set.pages; ++i) {
    const std::size_t at = set.first_byte + i * guest_page_size;
    const std::uint64_t value = page_value(0, at / guest_page_size, r.seed);
    word_at(memory, at).store(value, relaxed);
    word_at(memory, at + guest_page_size - 8).store(~value, relaxed);
  }
  mailbox(memory, MailboxWord::magic).store(mailbox_magic, relaxed);
  mailbox(memory, MailboxWord::sweep).store(r.sweep, relaxed);
  mailbox(memory, MailboxWord::index).store(r.index, relaxed);
  mailbox(memory, MailboxWord::written).store(r.written, relaxed);
  mailbox(memory, MailboxWord::errors).store(r.errors, relaxed);
  mailbox(memory, MailboxWord::first_error).store(r.first_error, relaxed);
  mailbox(memory, MailboxWord::set_address).store(r.set_address, relaxed);
  mailbox(memory, MailboxWord::set_pages).store(r.set_pages, relaxed);
  mailbox(memory, MailboxWord::dirty_bytes_per_s).store(config.dirty_bytes_per_s, relaxed);
  return r;
}

std::uint64_t mailbox_word(std::span<std::byte> memory, MailboxWord word) {
  return mailbox(memory, word).load(relaxed);
}

GuestReport read_mailbox(std::span<std::byte> memory) {
  GuestReport report;
  const std::uint64_t sweep = mailbox_word(memory, MailboxWord::sweep);
  report.sweeps = sweep == 0 ? 0 : sweep - 1;  // 0 only before boot
  report.pages_written = mailbox_word(memory, MailboxWord::written);
  report.errors = mailbox_word(memory, MailboxWord::errors);
  report.first_error_page = mailbox_word(memory, MailboxWord::first_error);
  report.working_set_first = mailbox_word(memory, MailboxWord::set_address) / guest_page_size;
  report.working_set_pages = mailbox_word(memory, MailboxWord::set_pages);
  return report;
}

void check_resumable(std::span<std::byte> memory, const Registers& r) {
  if (mailbox_word(memory, MailboxWord::magic) != mailbox_magic)
    throw std::runtime_error("guest state: memory holds no guest (no mailbox page); migrate memory before the state");
  if (mailbox_word(memory, MailboxWord::set_address) != r.set_address ||
      mailbox_word(memory, MailboxWord::set_pages) != r.set_pages)
    throw std::runtime_error("guest state: registers and memory are of different guests");
  const std::uint64_t room = memory.size() - layout::low_end;
  if (r.set_address % guest_page_size != 0 || r.set_address < layout::low_end || r.set_address >= memory.size() ||
      r.set_pages == 0 || r.set_pages > room / guest_page_size ||
      r.set_address - layout::low_end > room - r.set_pages * guest_page_size || r.index >= r.set_pages ||
      r.pages_per_exit == 0 || r.countdown == 0)
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
  if (header.magic != state_magic) throw std::runtime_error("guest state: these bytes are none (wrong magic)");
  if (header.version != state_version)
    throw std::runtime_error(fmt::format("guest state: version {}, this program reads {}; use the same build on both sides",
                                         header.version, state_version));
  if (header.payload_bytes != payload.size())
    throw std::runtime_error(fmt::format("guest state: {} bytes after the header instead of {}", payload.size(),
                                         header.payload_bytes));
  if (header.checksum != checksum(header, payload)) throw std::runtime_error("guest state: damaged (wrong checksum)");
  if (header.backend != padded(backend)) {
    header.backend.back() = '\0';
    throw std::runtime_error(fmt::format("guest state: saved by backend {}, this one is {}; give both sides the same --backend",
                                         header.backend.data(), backend));
  }
  if (header.memory_bytes != memory_bytes)
    throw std::runtime_error(fmt::format("guest state: of a guest with {} bytes of memory, this one has {}",
                                         header.memory_bytes, memory_bytes));
  if (payload.size() != payload_bytes)
    throw std::runtime_error(fmt::format("guest state: {} bytes of registers instead of {}", payload.size(), payload_bytes));
  return payload;
}

void Pacer::start(std::uint64_t bytes_per_s) {
  const std::lock_guard lock(mutex_);
  interrupted_ = false;
  bytes_per_s_ = bytes_per_s;
  due_ = std::chrono::steady_clock::now();
}

void Pacer::wait(std::uint64_t pages) {
  using namespace std::chrono_literals;
  std::unique_lock lock(mutex_);
  if (bytes_per_s_ == 0) return;
  const std::chrono::duration<double> cost(static_cast<double>(pages * guest_page_size) /
                                           static_cast<double>(bytes_per_s_));
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
