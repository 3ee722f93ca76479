// SPDX-License-Identifier: MIT
//
// A dirty log for memory without KVM, or with a KVM whose log is taken: userfaultfd write-protects the pages
// (UFFD_FEATURE_WP_ASYNC, Linux 6.7), PAGEMAP_SCAN finds the written ones and protects them again in one step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "multifd/memory/pagemap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty/detail/log_pages.hpp"
#include "multifd/migrate/dirty/detail/userfaultfd.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// What this process writes to the memory of a map: its threads, a KVM guest, system calls. A model of DirtySource.
///
/// Not what is written to pages that somebody has pinned (VFIO, RDMA, registered buffers of io_uring), nor by another
/// process that shares the memory. A page that is given back to the kernel (MADV_DONTNEED, a balloon) may go unreported,
/// because nobody has written it. Where a read makes a page resident, the page is reported once.
///
/// Cost: a first write to a page takes a fault in the kernel, 1.0 to 1.5 us, and splits a huge page. fetch() reads the
///   page tables of the block: 1 ms a GiB of which little is dirty, 10 ms a GiB of which all is. start() is one system call
///   a block, and reads its page tables. rearm() does nothing. From a KVM guest the kernel takes the mappings of what
///   fetch() reads, so that every page costs it a fault again: its own log is the better one.
/// Threads, Errors: as DirtySource.
/// Lifetime: the memory stays mapped until the destructor, which stops. A child process after fork() is not watched.
class UserfaultfdDirtyLog {
 public:
  static constexpr DirtyFetch fetches = DirtyFetch::complete;

  /// Errors: Errc::not_supported (the kernel has no WP_ASYNC), block_without_memory, bad_range (a block that is not made of
  ///   whole pages of the host); errno of userfaultfd (EPERM: seccomp, or no access to /dev/userfaultfd), of
  ///   /proc/self/pagemap; ENOMEM.
  [[nodiscard]] static Result<UserfaultfdDirtyLog> create(const RamMap& ram) {
    const std::size_t page_bytes = detail::host_page_bytes();
    for (const RamBlock& block : ram.blocks()) {
      if (block.access == Access::none)
        return fail(Errc::block_without_memory, Stage::setup, "UserfaultfdDirtyLog", 0, 0, block.idstr);
      const std::uint64_t past = reinterpret_cast<std::uintptr_t>(block.host.data()) % page_bytes;
      if (past != 0 || block.bytes % page_bytes != 0)
        return fail(Errc::bad_range, Stage::setup, "UserfaultfdDirtyLog: block is not made of whole pages of the host",
                    past != 0 ? past : block.bytes, page_bytes, block.idstr);
    }
    MULTIFD_TRY_ASSIGN(auto memory, detail::WriteProtectedMemory::open());
    MULTIFD_TRY_ASSIGN(auto pagemap, multifd::detail::Pagemap::open(PagemapReading::best));
    return catch_bad_alloc(Stage::setup, "UserfaultfdDirtyLog", [&]() -> Result<UserfaultfdDirtyLog> {
      return UserfaultfdDirtyLog(std::make_unique<State>(ram, std::move(memory), std::move(pagemap)));
    });
  }
  UserfaultfdDirtyLog(UserfaultfdDirtyLog&&) noexcept = default;
  UserfaultfdDirtyLog& operator=(UserfaultfdDirtyLog&&) = delete;
  ~UserfaultfdDirtyLog() { static_cast<void>(stop()); }

  [[nodiscard]] Result<void> start() noexcept {
    MULTIFD_TRY(stop());
    State& s = *state_;
    for (const RamBlock& block : s.ram.blocks()) {
      auto done = s.memory.watch(block.host);
      if (done) {
        ++s.watched;
        done = s.pagemap.protect_written(begin_of(block), begin_of(block) + block.bytes);
      }
      if (done) continue;
      done.error().subject = block.idstr;
      static_cast<void>(stop());
      return done;
    }
    return {};
  }

  [[nodiscard]] Result<void> fetch(BlockId id, std::span<std::uint64_t> bitmap) noexcept {
    State& s = *state_;
    MULTIFD_TRY(check_on(s.watched != 0));
    MULTIFD_TRY(check_fetch(s.ram, id, bitmap));
    const RamBlock& block = s.ram.block(id);
    const std::uintptr_t host = begin_of(block);
    auto done = s.pagemap.take_written(host, host + block.bytes, [&](std::uintptr_t begin, std::uintptr_t end) {
      s.log_pages.report_bytes(begin - host, end - host, bitmap);
    });
    if (done) return {};
    // The kernel does not say what it protected before the error.
    s.log_pages.report_bytes(0, block.bytes, bitmap);
    done.error().subject = block.idstr;
    return done;
  }

  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(state_->watched != 0));
    return check_rearm(state_->ram, block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return false; }

  [[nodiscard]] Result<void> stop() noexcept {
    if (state_ == nullptr) return {};
    Result<void> first;
    for (; state_->watched > 0; --state_->watched) {
      const RamBlock& block = state_->ram.blocks()[state_->watched - 1];
      auto left = state_->memory.leave(block.host);
      if (left || !first) continue;
      first = std::move(left);
      first.error().subject = block.idstr;
    }
    return first;
  }
  std::size_t page_bytes() const noexcept { return state_->log_pages.bytes(); }

 private:
  struct State {
    RamMap ram;
    detail::WriteProtectedMemory memory;
    multifd::detail::Pagemap pagemap;
    detail::LogPages log_pages;
    std::size_t watched = 0;  ///< blocks, from the first on; 0: off

    State(const RamMap& of, detail::WriteProtectedMemory opened, multifd::detail::Pagemap reader)
        : ram(of), memory(std::move(opened)), pagemap(std::move(reader)), log_pages(of.page_bytes()) {}
  };

  explicit UserfaultfdDirtyLog(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  static std::uintptr_t begin_of(const RamBlock& block) noexcept {
    return reinterpret_cast<std::uintptr_t>(block.host.data());
  }

  std::unique_ptr<State> state_;
};
static_assert(check_dirty_source<UserfaultfdDirtyLog>());

}  // namespace multifd::migrate
