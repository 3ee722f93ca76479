// SPDX-License-Identifier: MIT
//
// The program that the guest runs, twice: as machine code for KVM (guest_program()) and as C++ for the thread
// backend (step()). Both keep their progress in the same registers, compare it with the same mailbox page,
// and write the same values. Also here: the checks a resumed guest must pass, the bytes of a saved state, and
// the pacing of the writes.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "guest.hpp"

namespace live {

/// What sweep `s` writes into the first word of page number `p`: seed + s * sweep_step + p * page_step. The
/// last word gets the complement. Two odd constants of 64 bits, so that no two sweeps or pages in reach give
/// the same.
inline constexpr std::uint64_t sweep_step = 0x9e3779b97f4a7c15;
inline constexpr std::uint64_t page_step = 0xbf58476d1ce4e5b9;

/// What the guest knows; in the KVM guest, CPU registers (named in guest_code.cpp).
struct Registers {
  std::uint64_t sweep = 1;  ///< the one that runs; the boot values count as sweep 0
  std::uint64_t written = 0;
  std::uint64_t errors = 0;
  std::uint64_t first_error = 0;  ///< page number, when errors > 0
  std::uint64_t address = 0;      ///< next page, or set_end
  std::uint64_t value = 0;        ///< what that page gets
  std::uint64_t set_begin = 0;    ///< bytes
  std::uint64_t set_end = 0;
  std::uint64_t wrap_step = 0;  ///< added to `value` at the end of a sweep, to get that of the first page in the next
  std::uint64_t countdown = 1;  ///< pages until the next exit
};

/// Words of the mailbox page. `sweep` is rewritten once a sweep, `written` after each page, `errors` and
/// `first_error` with each error; the others stay as boot wrote them.
enum class MailboxWord : std::size_t {
  magic,
  sweep,
  written,
  errors,
  first_error,
  pages_per_exit,
  dirty_bytes_per_s,
  set_begin,
  set_end,
};

/// The port that the machine code writes to every `pages_per_exit` pages, to let the host pace it.
inline constexpr std::uint16_t pacing_port = 0x10;

/// Machine code, position independent, to be entered at its first byte in 64-bit mode. Empty on other CPUs
/// than x86-64.
std::span<const std::byte> guest_program();

/// One page of the C++ twin: check it, write it, tell the mailbox. Does not touch the countdown.
void step(std::span<std::byte> memory, Registers& registers);

/// How often a guest with that rate (0: no limit) lets the host pace it.
std::uint64_t pages_per_exit(std::uint64_t dirty_bytes_per_s);

/// Registers, mailbox and boot values of the working set, for a guest that starts.
Registers boot_program(std::span<std::byte> memory, const GuestConfig& config);

GuestReport read_mailbox(std::span<std::byte> memory);
std::uint64_t mailbox_word(std::span<std::byte> memory, MailboxWord word);

/// Errors: throws when the mailbox in `memory` is not that of the guest with these registers, or when they would lead
///   it out of its memory. Progress is not compared, because the guest itself finds errors there.
void check_resumable(std::span<std::byte> memory, const Registers& registers);

/// A saved state: header (magic, version, backend, sizes, checksum) and the backend's own bytes.
std::vector<std::byte> encode_state(std::string_view backend, std::size_t memory_bytes,
                                    std::span<const std::byte> payload);
/// Returns: the backend's bytes, within `state`.
/// Errors: throws with the first thing that does not fit.
std::span<const std::byte> decode_state(std::span<const std::byte> state, std::string_view backend,
                                        std::size_t memory_bytes, std::size_t payload_bytes);

/// Keeps a writer at its rate. Lost time is made up for by at most a tenth of a second's writes.
class Pacer {
 public:
  /// Starts anew; 0 means no limit.
  void start(std::uint64_t bytes_per_s, const QuietPhases& quiet);
  /// Waits until it is time for more after `pages` pages. Returns early when interrupted.
  void wait(std::uint64_t pages);
  /// Ends the wait, and all waits until start(). Any thread.
  void interrupt();

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  bool interrupted_ = false;
  std::uint64_t bytes_per_s_ = 0;
  QuietPhases quiet_{};
  std::chrono::steady_clock::time_point began_;
  std::chrono::steady_clock::time_point due_;
};

/// Why a backend cannot go on; set by its threads, read by any.
class Failure {
 public:
  void set(std::string why) {
    const std::lock_guard lock(mutex_);
    if (why_.empty()) why_ = std::move(why);
  }
  std::string get() {
    const std::lock_guard lock(mutex_);
    return why_;
  }

 private:
  std::mutex mutex_;
  std::string why_;
};

}  // namespace live
