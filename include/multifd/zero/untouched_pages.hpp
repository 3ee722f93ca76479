// SPDX-License-Identifier: MIT
//
// Which pages of guest memory were never touched, found in bulk and without touching them: such a page is zero, and
// reading it would make it resident (shared memory) or grow the page tables (private memory), at about 1 us a page.
//
// A snapshot is valid when it is taken and goes stale with the guest's next write. So each page is reported once only,
// and the whole snapshot is dropped when the first round is over: see UntouchedPages for the rule.
#pragma once

#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "multifd/memory/pagemap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/result.hpp"
#include "multifd/zero/detail/area_file.hpp"
#include "multifd/zero/detail/memory_areas.hpp"
#include "multifd/zero/file_holes.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd {

/// The file that a block's shared memory (mmap with MAP_SHARED) comes from.
struct SharedMemoryFile {
  BlockId block{};
  int fd = -1;  ///< a memfd, or a file on tmpfs; its position is moved and restored
};

/// Settings of UntouchedPages::snapshot().
struct UntouchedOptions {
  /// The files behind blocks of shared memory. Default: none, and then a file is found only if this process has it open, or
  /// may use /proc/self/map_files (CAP_CHECKPOINT_RESTORE); else all of that memory is read. Name the memfd or tmpfs file
  /// of each block where it is closed, or to be told when it is not the right one.
  std::span<const SharedMemoryFile> files{};
  /// How page tables are read. Leave it alone; tests set `entries` to try what older kernels get.
  PagemapReading reading = PagemapReading::best;
};

/// Pages of a RamMap that were untouched at one moment. A handle: copies share one set of pages.
///
/// The rule: take the snapshot when dirty tracking is on and its log has been read and cleared for the last time before
/// the first round, so that the log has every later write; call forget() before the log is read again. Then a page that
/// is written after the snapshot belongs to a later round, in which it is read.
///
/// Known: private anonymous memory, also of huge pages; shared memory of a memfd or of a file of a file system whose holes
/// are zero (file_holes.hpp), also anonymous, if its file is found; shared memory of huge pages, where one area maps all of
/// the file that there is. A swapped page counts as data. Everything else (private mappings of files, other file systems)
/// is not known and has to be read; memory that userfaultfd write-protects before it was touched looks swapped. Blocks with userfaultfd's missing mode must not
/// be in the map: a page that is missing there is not zero.
///
/// Threads: any, concurrently; when several threads ask for one page at once, one of them gets true. Wait-free.
class UntouchedPages {
 public:
  /// Knows nothing: every page has to be read.
  UntouchedPages() = default;

  /// Scans the page tables of all memory of a map.
  ///
  /// Params: `ram`: may be destroyed afterwards; `options`: the files of shared memory. Threads: any.
  /// Errors: Errc::bad_option (a file that its block's memory does not come from), bad_range (a block that the map
  ///   does not have), errno of /proc/self/pagemap, /proc/self/maps and of the files; out of memory.
  /// Cost: one bit a page. System calls per run, not per page: 8 GiB of which 90 % are untouched take milliseconds.
  ///   Nothing becomes resident.
  [[nodiscard]] static Result<UntouchedPages> snapshot(const RamMap& ram, UntouchedOptions options = {}) {
    return catch_bad_alloc(Stage::setup, "UntouchedPages", [&] { return scan(ram, options); });
  }

  /// Whether a page is known to be untouched. Takes the page: the next call for it returns false.
  bool take(PageRef page) const noexcept {
    const Block* const block = block_at(page.block);
    if (block == nullptr || page.bytes.size() >> state_->page_shift != 1) return false;
    const std::uint64_t number = page.offset >> state_->page_shift;
    // A copy of a page is not the page that was scanned.
    if (number >= block->pages || page.bytes.data() != block->host + page.offset) return false;
    return block->take(number / 64, std::uint64_t{1} << number % 64) != 0;
  }

  /// The same for a group: bit i for page i. Fastest for adjacent pages.
  std::uint64_t take(const PageGroup& group) const noexcept {
    const Block* const block = block_at(group.block);
    if (block == nullptr || group.page_bytes >> state_->page_shift != 1 || group.offsets.empty()) return 0;
    if (group.pages[0] != block->host + group.offsets[0]) return 0;  // copies of pages were not scanned
    std::uint64_t taken = 0;
    for (std::size_t i = 0; i < group.offsets.size();) {
      const std::uint64_t page = group.offsets[i] >> state_->page_shift;
      std::size_t run = 1;  // adjacent pages in one word
      while (i + run < group.offsets.size() && page % 64 + run < 64 &&
             group.offsets[i + run] == group.offsets[i] + run * group.page_bytes)
        ++run;
      if (page < block->pages) taken |= block->take(page / 64, ones(run) << page % 64) >> page % 64 << i;
      i += run;
    }
    return taken;
  }

  /// Takes the untouched pages from `first_page` on, up to the first that is not, `most` at most. Returns how many. For
  /// producers of whole ranges.
  std::uint64_t take_run(BlockId id, std::uint64_t first_page, std::uint64_t most) const noexcept {
    const Block* const block = block_at(id);
    if (block == nullptr || first_page >= block->pages) return 0;
    const std::uint64_t end = first_page + std::min(most, block->pages - first_page);
    std::uint64_t page = first_page;
    while (page < end) {
      const std::uint64_t wanted = ones(std::min(end - page, 64 - page % 64));
      const std::uint64_t seen = block->words[page / 64].load(std::memory_order_relaxed) >> page % 64 & wanted;
      const int run = std::countr_one(seen);
      if (run == 0) break;
      // Another thread may take some of them meanwhile. Pages taken behind the first of those are read as usual.
      const int got =
          std::countr_one(block->take(page / 64, ones(static_cast<unsigned>(run)) << page % 64) >> page % 64);
      page += static_cast<std::uint64_t>(got);
      if (got < run || page % 64 != 0) break;
    }
    return page - first_page;
  }

  /// Takes all untouched pages of a block, and sets their bits. Params: `bitmap`: a bit for each page, as a dirty bitmap's.
  void take_all(BlockId id, std::span<std::uint64_t> bitmap) const noexcept {
    const Block* const block = block_at(id);
    if (block == nullptr) return;
    for (std::size_t word = 0; word < (block->pages + 63) / 64; ++word)
      bitmap[word] |= block->take(word, ~std::uint64_t{0});
  }

  /// How many pages from `first_page` on, `most` at most, are not known to be untouched.
  std::uint64_t other_run(BlockId id, std::uint64_t first_page, std::uint64_t most) const noexcept {
    const Block* const block = block_at(id);
    if (block == nullptr) return most;
    for (std::uint64_t page = first_page; page < block->pages && page - first_page < most; page += 64 - page % 64) {
      const std::uint64_t rest = block->words[page / 64].load(std::memory_order_relaxed) >> page % 64;
      if (rest != 0) return std::min(most, page - first_page + static_cast<std::uint64_t>(std::countr_zero(rest)));
    }
    return most;
  }

  /// Drops the snapshot, in all copies: from now on every page has to be read.
  ///
  /// Threads: any. A thread that gets pages afterwards, through any hand-off that orders memory, gets no stale answer.
  void forget() const noexcept {
    if (state_ != nullptr) state_->forgotten.store(true, std::memory_order_relaxed);
  }

  /// Pages that are known to be untouched and have not been taken.
  std::uint64_t count() const noexcept {
    if (state_ == nullptr || state_->forgotten.load(std::memory_order_relaxed)) return 0;
    std::uint64_t sum = 0;
    for (const Block& block : state_->blocks)
      for (std::size_t i = 0; i < (block.pages + 63) / 64; ++i)
        sum += static_cast<std::uint64_t>(std::popcount(block.words[i].load(std::memory_order_relaxed)));
    return sum;
  }

 private:
  [[nodiscard]] static Result<UntouchedPages> scan(const RamMap& ram, const UntouchedOptions& options) {
    for (const SharedMemoryFile& file : options.files)
      if (!ram.contains(file.block))
        return fail(Errc::bad_range, Stage::setup, "UntouchedPages: block", index(file.block));
    auto pagemap = detail::Pagemap::open(options.reading);
    if (!pagemap) return std::unexpected(pagemap.error());

    detail::AreaFiles files;
    UntouchedPages snapshot;
    snapshot.state_ = std::make_shared<State>();
    snapshot.state_->page_shift = static_cast<unsigned>(std::countr_zero(ram.page_bytes()));
    for (std::uint32_t id = 0; id < ram.blocks().size(); ++id) {
      const RamBlock& from = ram.blocks()[id];
      Block block{.host = from.host.data(), .pages = from.host.size() / ram.page_bytes(), .words = nullptr};
      if (block.pages > 0) {
        block.words.reset(new (std::nothrow) std::atomic<std::uint64_t>[(block.pages + 63) / 64]);
        if (!block.words) return fail_errno(Stage::setup, "allocate untouched pages", ENOMEM);
        const auto file = std::ranges::find(options.files, BlockId{id}, &SharedMemoryFile::block);
        const int fd = file == options.files.end() ? -1 : file->fd;
        if (auto found =
                snapshot.state_->find(block, from.host.size(), *pagemap, files, fd, file != options.files.end());
            !found)
          return std::unexpected(found.error());
      }
      snapshot.state_->blocks.push_back(std::move(block));
    }
    return snapshot;
  }

  static constexpr std::uint64_t ones(std::uint64_t count) noexcept { return ~std::uint64_t{0} >> (64 - count); }

  struct Block {
    const std::byte* host;
    std::uint64_t pages;
    std::unique_ptr<std::atomic<std::uint64_t>[]> words;  // a bit for each page; a set bit: untouched, not yet taken

    /// Relaxed throughout: the caller does not read the memory that a bit stands for, so a bit orders nothing.
    std::uint64_t take(std::uint64_t word, std::uint64_t bits) const noexcept {
      // No write where no bit is set, so that threads do not contend for the cache line.
      if ((words[word].load(std::memory_order_relaxed) & bits) == 0) return 0;
      return words[word].fetch_and(~bits, std::memory_order_relaxed) & bits;
    }

    /// Adds the whole pages between two addresses.
    void add(std::uintptr_t begin, std::uintptr_t end, unsigned page_shift) noexcept {
      const auto base = reinterpret_cast<std::uintptr_t>(host);
      begin = std::max(begin, base) - base;
      end = end <= base ? 0 : std::min<std::uintptr_t>(end - base, pages << page_shift);
      std::uint64_t page = (begin + (std::uintptr_t{1} << page_shift) - 1) >> page_shift;
      for (const std::uint64_t last = end >> page_shift; page < last;) {
        const std::size_t run = std::min<std::uint64_t>(last - page, 64 - page % 64);
        words[page / 64].fetch_or(ones(run) << page % 64, std::memory_order_relaxed);
        page += run;
      }
    }
  };

  struct State {
    static constexpr long hugetlbfs = 0x958458f6;

    std::vector<Block> blocks;
    unsigned page_shift = 12;
    std::atomic<bool> forgotten{false};

    /// Fills a block's bits.
    [[nodiscard]] Result<void> find(Block& block, std::size_t bytes, detail::Pagemap& pagemap, detail::AreaFiles& files,
                                    int fd, bool has_file) const {
      struct ::stat file{};
      struct ::statfs system{};
      if (has_file && (::fstat(fd, &file) != 0 || ::fstatfs(fd, &system) != 0))
        return fail_errno(Stage::setup, "UntouchedPages: file");
      const bool on_tmpfs = has_file && file_holes(system) == FileHoles::zero_and_named;
      const auto begin = reinterpret_cast<std::uintptr_t>(block.host);
      bool file_seen = false;
      auto done = detail::for_each_memory_area([&](const detail::MemoryArea& whole) -> Result<void> {
        if (whole.end <= begin || whole.begin >= begin + bytes) return {};
        detail::MemoryArea area = whole;
        area.clip(begin, begin + bytes);
        const bool of_file = area.shared && on_tmpfs && area.device == file.st_dev && area.inode == file.st_ino;
        file_seen = file_seen || of_file;
        if (of_file) return add_holes(block, area, fd);
        if (area.anonymous()) return add_unmapped(block, area, pagemap);
        if (!area.shared) return {};
        const detail::AreaFile& found = files.of(whole);
        struct ::statfs of_found{};
        if (!found || ::fstatfs(found.get(), &of_found) != 0) return {};
        if (of_found.f_type == hugetlbfs) {
          MULTIFD_TRY(add_unmapped_huge(block, whole, area, found.get(), pagemap));
        } else if (file_holes(of_found) != FileHoles::unknown) {
          MULTIFD_TRY(add_holes(block, area, found.get()));
        }
        if (found.is_the_same()) return {};
        return fail_errno(Stage::setup, "UntouchedPages: the file of the memory was closed meanwhile", EBADF);
      });
      if (done && on_tmpfs && !file_seen)
        return fail(Errc::bad_option, Stage::setup, "UntouchedPages: the block's memory is not of this file");
      return done;
    }

    /// Adds huge pages of shared memory that the file does not have. lseek() knows none of its holes, and a page may be there
    /// which no page table of this process maps; but not if those that one maps are as many as the file has.
    [[nodiscard]] Result<void> add_unmapped_huge(Block& block, const detail::MemoryArea& whole,
                                                 const detail::MemoryArea& part, int fd,
                                                 detail::Pagemap& pagemap) const {
      std::uint64_t mapped = 0;
      // Not what only looks swapped: userfaultfd's marks stand also where the file has no page.
      MULTIFD_TRY(pagemap.for_each_present(whole.begin, whole.end,
                                           [&](std::uintptr_t data, std::uintptr_t end) { mapped += end - data; }));
      // Behind the scan: what has been added since then is in this, and what is in it later has been written later.
      struct ::stat file{};
      if (::fstat(fd, &file) != 0) return fail_errno(Stage::setup, "UntouchedPages: file");
      if (static_cast<std::uint64_t>(file.st_blocks) * 512 != mapped) return {};
      return add_unmapped(block, part, pagemap);
    }

    /// Adds the pages of private memory that hold no data.
    [[nodiscard]] Result<void> add_unmapped(Block& block, const detail::MemoryArea& area,
                                            detail::Pagemap& pagemap) const {
      std::uintptr_t at = area.begin;
      auto done = pagemap.for_each_data(area.begin, area.end, [&](std::uintptr_t data, std::uintptr_t data_end) {
        if (at < data) block.add(at, data, page_shift);
        at = data_end;
      });
      if (done && at < area.end) block.add(at, area.end, page_shift);
      return done;
    }

    /// Adds the pages of an area that map holes of a file.
    [[nodiscard]] Result<void> add_holes(Block& block, const detail::MemoryArea& area, int fd) const noexcept {
      // A file without holes, by its size: lseek() would look at each of its pages.
      struct ::stat file{};
      if (::fstat(fd, &file) != 0) return fail_errno(Stage::setup, "UntouchedPages: file");
      if (file.st_blocks * 512 >= file.st_size) return {};
      const off_t position = ::lseek(fd, 0, SEEK_CUR);
      const auto begin = static_cast<off_t>(area.file_offset);
      const off_t end = begin + static_cast<off_t>(area.end - area.begin);
      int error = 0;
      for (off_t hole = begin; hole < end;) {
        off_t data = ::lseek(fd, hole, SEEK_DATA);
        if (data < 0 && errno != ENXIO) error = errno;
        if (error != 0) break;
        if (data < 0 || data > end) data = end;  // no data from here on
        if (hole < data) {
          const auto address = [&](off_t offset) { return area.begin + static_cast<std::uintptr_t>(offset - begin); };
          block.add(address(hole), address(data), page_shift);
        }
        if (data == end) break;
        hole = ::lseek(fd, data, SEEK_HOLE);
        if (hole < 0) error = errno;
        if (error != 0) break;
      }
      ::lseek(fd, position, SEEK_SET);
      if (error != 0) return fail_errno(Stage::setup, "UntouchedPages: SEEK_DATA", error);
      return {};
    }
  };

  const Block* block_at(BlockId id) const noexcept {
    if (state_ == nullptr || state_->forgotten.load(std::memory_order_relaxed)) return nullptr;
    if (index(id) >= state_->blocks.size()) return nullptr;
    return &state_->blocks[index(id)];
  }

  std::shared_ptr<State> state_;
};

}  // namespace multifd
