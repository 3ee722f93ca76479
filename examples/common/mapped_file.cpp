// SPDX-License-Identifier: MIT
#include "common/mapped_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>
#include <utility>

namespace program {

/// The handler reads these while others come and go, so they are never freed, only used again.
struct MappedFile::Entry {
  std::atomic<std::uintptr_t> begin = 0;  ///< 0: free
  std::atomic<std::size_t> length = 0;
  std::atomic<std::size_t> lost_at = npos;  ///< the first place that could not be touched
  std::size_t bytes = 0;
  int fd = -1;
  std::string path;
  Entry* next = nullptr;

  static constexpr std::size_t npos = ~std::size_t{0};
};

namespace {

using Entry = MappedFile::Entry;

std::atomic<Entry*> entries = nullptr;
std::atomic<multifd::Interrupt*> told = nullptr;

struct Lost {
  std::mutex mutex;  ///< also of the entries, for all but the handler
  std::optional<std::string> of_the_past;
};
Lost& lost() {
  static auto* const all = new Lost;  // never destroyed, because threads may outlive main()
  return *all;
}

/// Async-signal-safe.
void on_bus_error(int signal, siginfo_t* info, void* /*context*/) {
  const int saved_errno = errno;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (Entry* entry = info->si_code > 0 ? entries.load(std::memory_order_acquire) : nullptr; entry != nullptr;
       entry = entry->next) {
    const std::uintptr_t begin = entry->begin.load(std::memory_order_acquire);  // meets the constructor's release
    const std::size_t length = entry->length.load(std::memory_order_relaxed);
    if (begin == 0 || address < begin || address - begin >= length) continue;
    std::size_t none = Entry::npos;
    entry->lost_at.compare_exchange_strong(none, address - begin);
    if (multifd::Interrupt* const interrupt = told.load()) interrupt->trigger();
    // All of it at once: the run is over, and page by page it would be signals without end.
    void* const instead = ::mmap(reinterpret_cast<void*>(begin), length, PROT_READ | PROT_WRITE,
                                 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (instead == MAP_FAILED) break;
    errno = saved_errno;
    return;
  }
  std::signal(signal, SIG_DFL);  // not ours: it comes again, and then for good
  if (info->si_code <= 0) ::raise(signal);
}

/// Where a write would have to find room; the start where nobody knows.
off_t first_hole(int fd, off_t from) {
  const off_t hole = ::lseek(fd, from, SEEK_HOLE);
  return hole < 0 ? from : hole;
}

/// Why a page of a file cannot be touched; nothing where nothing is known to be wrong.
std::optional<std::string> look_at(const Entry& entry, std::size_t lost_at) {
  struct stat status{};
  struct statfs system{};
  if (::fstat(entry.fd, &status) != 0 || ::fstatfs(entry.fd, &system) != 0) return std::strerror(errno);
  if (static_cast<std::size_t>(status.st_size) < entry.bytes)
    return fmt::format("has shrunk from {} to {} bytes while it was in use", entry.bytes, status.st_size);
  if (lost_at == Entry::npos) lost_at = 0;
  const bool written = (::fcntl(entry.fd, F_GETFL) & O_ACCMODE) == O_RDWR;
  if (system.f_type == HUGETLBFS_MAGIC) return "no huge page is left for it (/proc/sys/vm/nr_hugepages)";
  if (written) {
    const off_t hole = first_hole(entry.fd, static_cast<off_t>(lost_at) / 4096 * 4096);
    if (hole < status.st_size && ::fallocate(entry.fd, FALLOC_FL_KEEP_SIZE, hole, 4096) != 0 && errno != EOPNOTSUPP)
      return fmt::format("{} while it was written to", std::strerror(errno));
    if (system.f_bavail == 0) return fmt::format("{} while it was written to", std::strerror(ENOSPC));
    return std::nullopt;
  }
  char byte = 0;
  if (::pread(entry.fd, &byte, 1, static_cast<off_t>(lost_at)) < 0)
    return fmt::format("{} while it was read", std::strerror(errno));
  return std::nullopt;
}

/// The lock is held.
std::optional<std::string> failure_of(const Entry& entry, bool in_a_system_call) {
  const std::size_t lost_at = entry.lost_at.load();
  if (lost_at == Entry::npos && !in_a_system_call) return std::nullopt;
  std::optional<std::string> why = look_at(entry, lost_at);
  if (!why && lost_at != Entry::npos) why = "a page of it could not be had: an I/O error, or no room for a moment";
  if (!why) return std::nullopt;
  return entry.path + ": " + *why;
}

std::optional<std::string> failure_of_any(bool in_a_system_call) {
  const std::lock_guard lock(lost().mutex);
  if (lost().of_the_past) return lost().of_the_past;
  for (const Entry* entry = entries.load(); entry != nullptr; entry = entry->next)
    if (entry->begin.load() != 0)
      if (auto failure = failure_of(*entry, in_a_system_call)) return failure;
  return std::nullopt;
}

}  // namespace

MappedFile::MappedFile(std::span<std::byte> memory, std::size_t bytes, int fd, std::string path) {
  const std::lock_guard lock(lost().mutex);
  entry_ = entries.load();
  while (entry_ != nullptr && entry_->begin.load() != 0) entry_ = entry_->next;
  const bool is_new = entry_ == nullptr;
  if (is_new) entry_ = new Entry;
  entry_->length.store(memory.size());
  entry_->lost_at.store(Entry::npos);
  entry_->bytes = bytes;
  entry_->fd = fd;
  entry_->path = std::move(path);
  entry_->begin.store(reinterpret_cast<std::uintptr_t>(memory.data()), std::memory_order_release);
  if (!is_new) return;
  entry_->next = entries.load();
  entries.store(entry_, std::memory_order_release);
}

MappedFile::~MappedFile() {
  const std::lock_guard lock(lost().mutex);
  // Who reports the end of the run may come after the file's end.
  if (!lost().of_the_past) lost().of_the_past = failure_of(*entry_, false);
  entry_->begin.store(0);
}

std::optional<std::string> mapped_file_failure() { return failure_of_any(false); }

void check_mapped_files() {
  if (const auto failure = mapped_file_failure()) throw Failure(*failure);
}

Failure cause_of(const Failure& failure) {
  const bool in_a_system_call = failure.code() == std::error_code(EFAULT, std::system_category());
  if (const auto of_file = failure_of_any(in_a_system_call)) return Failure(*of_file);
  return failure;
}

void watch_mapped_files(multifd::Interrupt& interrupt) {
  told.store(&interrupt);
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, nullptr);
}

}  // namespace program
