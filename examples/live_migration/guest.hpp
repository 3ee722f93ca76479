// SPDX-License-Identifier: MIT
//
// The machine of the small VMM `live_migration`: its RAM, one virtual CPU that keeps rewriting a
// self-checking working set, and the log of the pages it dirties. Two backends stand behind one interface,
// chosen at run time: "kvm" (machine code in a KVM guest) and "thread" (the same program as a C++ thread,
// writes tracked by userfaultfd). How the bytes get to the other side is not known here: main.cpp does that
// with multifd.
//
//   source       make_guest - boot - run - start_dirty_log - fetch_dirty ... - stop - fetch_dirty -
//   save_state destination  make_guest - (memory() is filled) - load_state - run
//
// What the guest checks: each sweep goes over all pages of the working set. The first and the last word of a
// page must be what the sweep before wrote there, a mix of sweep number, page number and seed, so that a
// stale page, a lost page and a page at the wrong place all count as errors. Progress is kept in registers
// and in a mailbox page, and compared, so that lost registers and a stale mailbox count too.
//
// Errors of system calls are std::runtime_error, with a message that says what to do. One thread calls a
// Guest, unless the method says "any thread".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace live {

/// The unit of the dirty log and of the guest's checks, whatever the page size of the migration is.
inline constexpr std::size_t guest_page_size = 4096;

enum class Backend { automatic, kvm, thread };

/// Parses "auto", "kvm" or "thread"; no value for other names.
std::optional<Backend> parse_backend(std::string_view name);

/// When the guest writes less: busy for a time, then quiet, and so on, beginning with run().
struct QuietPhases {
  double busy_s = 0;
  double quiet_s = 0;  ///< 0: never quiet
  std::uint64_t dirty_bytes_per_s = std::uint64_t{1} << 20;
};

/// A destination uses only `memory_bytes`: everything else comes with the memory and the state.
struct GuestConfig {
  std::size_t memory_bytes = std::size_t{1} << 30;        ///< multiple of 4096, at least 2 MiB
  std::size_t working_set_bytes = std::size_t{64} << 20;  ///< rounded up to pages; lies in the middle of memory
  std::uint64_t dirty_bytes_per_s = 0;                    ///< 4096 per page written; 0: as fast as it goes
  QuietPhases quiet{};                                    ///< at the source; elsewhere the guest is always busy
  std::uint64_t seed = 1;                                 ///< same seed and sizes: same memory after boot()
  double zero_share = 0.4;                                ///< share of the pages left zero by boot()
  double text_share = 0.4;                                ///< share that compresses like text; the rest is random
};

struct GuestReport {
  std::uint64_t sweeps = 0;            ///< completed sweeps over the working set
  std::uint64_t pages_written = 0;     ///< since boot, on whatever host
  std::uint64_t errors = 0;            ///< checks that failed, since boot
  std::uint64_t first_error_page = 0;  ///< number (offset / 4096) of the first page found wrong, when errors > 0
  std::uint64_t working_set_pages = 0;
  std::uint64_t working_set_first = 0;  ///< number of its first page
  std::string failure;                  ///< not empty: the backend itself failed (the vCPU died), and why
};

class Guest {
 public:
  Guest() = default;
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  /// Stops the guest, its threads and the dirty log.
  virtual ~Guest() = default;

  /// "kvm" or "thread". A state can only be loaded by the backend that saved it. Any thread.
  virtual std::string_view backend() const = 0;

  /// The RAM, page aligned, the same as long as the guest lives; never touched until boot(). Any thread.
  virtual std::span<std::byte> memory() = 0;

  /// Source only: fills memory (a GiB in about a second), loads the program, sets the initial registers.
  virtual void boot() = 0;

  /// Starts the vCPU thread; after boot(), load_state() or stop().
  virtual void run() = 0;

  /// Ends the vCPU thread. After return registers and memory are final. Takes milliseconds; a second call
  /// does nothing.
  virtual void stop() = 0;

  /// From here on each write of the guest is logged. The log starts empty: whatever memory holds now is the
  /// first round.
  virtual void start_dirty_log() = 0;

  /// ORs the pages dirtied since the last call into `bitmap` (bit i % 64 of word i / 64: page i) and watches
  /// them again. What the guest had written when a page's bit was taken is in memory when this returns; later
  /// writes set the bit of the next call. So read the pages after it. Works after stop() too, for the last
  /// round.
  ///
  /// Params: `bitmap`: bitmap_words(memory().size()) words.
  virtual void fetch_dirty(std::span<std::uint64_t> bitmap) = 0;

  /// Ends the log, so that a guest whose migration has failed runs at full speed again.
  virtual void stop_dirty_log() = 0;

  /// Registers and what else is not in memory; after stop().
  virtual std::vector<std::byte> save_state() = 0;

  /// Takes over what save_state() gave, after memory() has been filled.
  /// Errors: throws when the bytes are no state, are damaged, come from another backend or another memory size, or
  ///   when memory does not hold the guest that they belong to. The guest is unchanged then.
  virtual void load_state(std::span<const std::byte> state) = 0;

  /// Progress and errors as the guest itself wrote them into its mailbox page; after boot() or load_state().
  /// Any thread.
  virtual GuestReport report() = 0;
};

/// Words that a dirty bitmap for that much memory has.
constexpr std::size_t bitmap_words(std::size_t memory_bytes) {
  const std::size_t pages = memory_bytes / guest_page_size;
  return (pages + 63) / 64;
}

/// Params: `note`, when given, receives a line that says which backend was taken and, for `automatic` without KVM,
///   why not KVM.
/// Errors: throws when the configuration is impossible or the backend asked for cannot be had.
std::unique_ptr<Guest> make_guest(Backend backend, const GuestConfig& config, std::string* note = nullptr);

}  // namespace live
