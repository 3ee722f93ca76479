// SPDX-License-Identifier: MIT
#include "common/mapping.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/statfs.h>
#include <unistd.h>
#include <multifd/format/constants.hpp>
#include <multifd/zero/buffer_is_zero.hpp>
#include <multifd/zero/file_holes.hpp>
#include <multifd/zero/untouched_pages.hpp>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/older_copy.hpp"
#include "common/sparse_digest.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace program {
namespace {

/// The size of a file's pages in memory: mappings of hugetlbfs files are whole huge pages.
std::size_t page_bytes_of(int fd, const std::string& what) {
  struct statfs system{};
  if (::fstatfs(fd, &system) != 0) fail_path(what);
  return system.f_type == HUGETLBFS_MAGIC ? static_cast<std::size_t>(system.f_bsize) : 4096;
}

/// Adds a run to those before it, widened to whole pages.
void add(std::vector<Run>& runs, std::uint64_t begin, std::uint64_t end, std::size_t page_bytes) {
  begin = begin / page_bytes * page_bytes;
  end = (end + page_bytes - 1) / page_bytes * page_bytes;
  if (!runs.empty() && begin <= runs.back().offset + runs.back().bytes) {
    runs.back().bytes = std::max(end, runs.back().offset + runs.back().bytes) - runs.back().offset;
  } else if (begin < end) {
    runs.push_back({begin, end - begin});
  }
}

/// The runs of private memory that may hold data, from the page tables.
std::vector<Run> data_of_memory(std::span<std::byte> memory, std::size_t page_bytes) {
  std::vector<Run> runs;
  multifd::RamMap ram(page_bytes);
  const multifd::BlockId block = need(ram.add("memory", memory));
  const auto untouched = multifd::UntouchedPages::snapshot(ram);
  if (!untouched) return {{0, memory.size()}};  // no /proc: then everything counts as data
  const std::uint64_t pages = memory.size() / page_bytes;
  for (std::uint64_t page = 0; page < pages;) {
    const std::uint64_t run = untouched->other_run(block, page, pages - page);
    if (run != 0) runs.push_back({page * page_bytes, run * page_bytes});
    page += run;
    page += untouched->take_run(block, page, pages - page);
  }
  return runs;
}

// Whole pages of any size: the end of the memory may be in the middle of a larger one.
constexpr std::size_t digest_page_bytes = multifd::min_page_bytes;

std::string digest_of(std::span<const std::byte> memory, const std::vector<Run>& data) {
  SparseDigest digest;
  for (const Run& run : data) digest.add(run.offset, memory.subspan(run.offset, run.bytes));
  digest.skip_to(memory.size());
  check_mapped_files();
  return digest.text();
}

/// Calls madvise() on a range, in steps, so that a signal can end it. False: the kernel does not know the advice.
bool advise(std::span<std::byte> bytes, int advice, const multifd::Interrupt* interrupt) {
  constexpr std::size_t step = std::size_t{64} << 20;
  for (std::size_t at = 0; at < bytes.size(); at += step) {
    if (interrupt != nullptr && interrupt->triggered())
      throw cause_of(Failure(multifd::Error{.code = multifd::Errc::cancelled}));
    const auto part = bytes.subspan(at, std::min(step, bytes.size() - at));
    if (::madvise(part.data(), part.size(), advice) == 0) continue;
    if (errno == EINVAL) return false;
    throw cause_of(Failure(multifd::fail_errno(multifd::Stage::setup, "populate memory").error()));
  }
  return true;
}

}  // namespace

// tmpfs checks each page, 10 ms a GiB. The result is nevertheless not kept for the next call. A running guest fills holes
// through a mapping of its own, and neither the file's times nor its block count show that in time: a page that was left out
// as a hole would be lost.
std::vector<Run> data_of_file(int fd, std::uint64_t bytes, std::size_t page_bytes) {
  struct statfs system{};
  if (::fstatfs(fd, &system) != 0 || multifd::file_holes(system) == multifd::FileHoles::unknown) return {{0, bytes}};
  // A file with blocks for all its bytes has no hole; tmpfs would check each page to find that, 50 ns each.
  struct stat status{};
  if (::fstat(fd, &status) == 0 && status.st_blocks * 512 >= status.st_size) return {{0, bytes}};
  std::vector<Run> runs;
  const auto size = static_cast<off_t>(bytes);
  for (off_t at = 0; at < size;) {
    off_t data = ::lseek(fd, at, SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;  // nothing but a hole from here on
    if (data >= size) break;
    off_t hole = data < 0 ? -1 : ::lseek(fd, data, SEEK_HOLE);
    if (data < 0) data = at;
    if (hole <= data) hole = size;  // a file system that cannot tell holes
    add(runs, static_cast<std::uint64_t>(data), static_cast<std::uint64_t>(std::min(hole, size)), page_bytes);
    at = hole;
  }
  return runs;
}

void Mapping::Unmap::operator()(std::byte* memory) const noexcept { ::munmap(memory, length); }

Mapping Mapping::map(std::uint64_t bytes, int protection, int flags, Descriptor file, const std::string& what) {
  const bool of_file = file.get() >= 0;
  const std::size_t unit = of_file ? page_bytes_of(file.get(), what) : 4096;
  const std::size_t length = (bytes + unit - 1) / unit * unit;
  void* const memory = ::mmap(nullptr, bytes, protection, flags, file.get(), 0);
  if (memory == MAP_FAILED && errno == ENOMEM && unit > 4096)
    throw Failure(fmt::format("{}: {} huge pages of {} are needed, more than are free (/proc/sys/vm/nr_hugepages)",
                              what, length / unit, format_bytes(static_cast<double>(unit))));
  if (memory == MAP_FAILED) fail_path(what);
  Mapping mapping;
  mapping.memory_ = {static_cast<std::byte*>(memory), Unmap{length}};
  mapping.bytes_ = {mapping.memory_.get(), bytes};
  if (!of_file) return mapping;
  mapping.source_.file = std::move(file);
  if (::fstat(mapping.source_.file.get(), &mapping.source_.then) != 0) fail_path(what);
  mapping.source_.watched =
      std::make_unique<MappedFile>(std::span(mapping.memory_.get(), length), bytes, mapping.source_.file.get(), what);
  return mapping;
}

Mapping Mapping::read_file(const std::string& path, std::uint64_t bytes, std::size_t page_bytes) {
  Descriptor file = open_regular(path, O_RDONLY);
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail_path(path);
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size == 0) throw Failure(path + ": empty");
  if (bytes > size) throw Failure(fmt::format("{}: has {} bytes, fewer than --size {}", path, size, bytes));
  if (bytes == 0) bytes = size;
  if (bytes % page_bytes != 0)
    throw Failure(fmt::format("{}: {} bytes are not a multiple of the page size {}: choose --size or --page-size", path,
                              bytes, page_bytes));
  // Shared: a private mapping of a hugetlbfs file wants as many huge pages again, for copies that are never made.
  return map(bytes, PROT_READ, MAP_SHARED, std::move(file), path);
}

Mapping Mapping::write_file(int fd, std::uint64_t bytes, const std::string& what) {
  Descriptor again(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (again.get() < 0) fail_path(what);
  return map(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, std::move(again), what);
}

Mapping Mapping::anonymous(std::uint64_t bytes) {
  Mapping mapping = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, Descriptor(),
                        fmt::format("{} of memory", format_bytes(static_cast<double>(bytes))));
  // Faults of 4 KiB pages cost more than the transfer; where the kernel has no huge pages nothing is lost. But each page of
  // a sparse guest would take a huge one, so not where these might be more than there is.
  if (bytes <= physical_memory() / 2) (void)::madvise(mapping.memory_.get(), bytes, MADV_HUGEPAGE);
  return mapping;
}

std::vector<Run> Mapping::data(std::size_t page_bytes) const {
  if (source_.file.get() < 0) return data_of_memory(bytes_, page_bytes);
  return data_of_file(source_.file.get(), bytes_.size(), page_bytes);
}

std::string Mapping::digest() const { return digest_of(bytes_, data(digest_page_bytes)); }

bool Mapping::changed() const {
  struct stat now{};
  const struct stat& then = source_.then;
  if (source_.file.get() < 0 || ::fstat(source_.file.get(), &now) != 0) return false;
  const auto differ = [](const timespec& a, const timespec& b) {
    return a.tv_sec != b.tv_sec || a.tv_nsec != b.tv_nsec;
  };
  return now.st_size != then.st_size || differ(now.st_mtim, then.st_mtim);
}

void Mapping::populate(const multifd::Interrupt* interrupt) const {
  if (advise(bytes_, MADV_POPULATE_WRITE, interrupt)) return;
  // Before Linux 5.14: touch by hand, each page as it is.
  for (std::size_t at = 0; at < bytes_.size(); at += 4096) {
    volatile std::byte& byte = bytes_[at];
    byte = byte;
  }
}

void Mapping::populate_for_reading(const multifd::Interrupt* interrupt) const {
  for (const Run& run : data(4096)) {
    const auto bytes = bytes_.subspan(run.offset, std::min<std::size_t>(run.bytes, bytes_.size() - run.offset));
    if (advise(bytes, MADV_POPULATE_READ, interrupt)) continue;
    for (std::size_t at = 0; at < bytes.size(); at += 4096) (void)*static_cast<volatile const std::byte*>(&bytes[at]);
  }
}

void NewFile::allocate(std::uint64_t bytes) {
  const std::size_t unit = page_bytes_of(file_.fd(), file_.part());
  if (unit > 4096 && bytes % unit != 0)
    throw Failure(fmt::format("{}: lies on hugetlbfs, where a file is whole pages of {}: {} bytes are not",
                              file_.part(), format_bytes(static_cast<double>(unit)), bytes));
  if (::ftruncate(file_.fd(), static_cast<off_t>(bytes)) != 0) fail_path(file_.part());
  mapping_ = Mapping::write_file(file_.fd(), bytes, file_.part());
}

void NewFile::copy_of(const std::string& older, const multifd::Interrupt* interrupt) {
  const Descriptor from = open_regular(older, O_RDONLY);
  struct stat status{};
  if (::fstat(from.get(), &status) != 0) fail_path(older);
  if (status.st_size == 0) throw Failure(older + ": empty");
  copy_data(from.get(), older, file_.fd(), interrupt);
  mapping_ = Mapping::write_file(file_.fd(), static_cast<std::uint64_t>(status.st_size), file_.part());
}

Summary make_sparse(const Mapping& mapping, int fd, std::size_t page_bytes) {
  SparseDigest digest;
  Summary summary;
  const std::span<const std::byte> bytes = mapping.bytes();
  const auto punch_to = [&](std::uint64_t end) {
    if (end <= digest.done()) return;
    // Where the file system cannot, the file keeps its size on disk.
    (void)::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(digest.done()),
                      static_cast<off_t>(end - digest.done()));
    summary.zero_pages += (end - digest.done()) / page_bytes;
    digest.skip_to(end);
  };
  for (const Run& run : mapping.data(page_bytes)) {
    for (std::uint64_t at = run.offset; at < run.offset + run.bytes; at += page_bytes) {
      const std::span<const std::byte> page = bytes.subspan(at, page_bytes);
      if (multifd::buffer_is_zero(page.data(), page.size())) continue;
      punch_to(at);
      digest.add(at, page);
    }
  }
  punch_to(bytes.size());
  check_mapped_files();
  summary.digest = digest.text();
  return summary;
}

void check_size(int fd, const Mapping& mapping, const std::string& path) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) fail_path(path);
  if (static_cast<std::size_t>(status.st_size) != mapping.bytes().size())
    throw Failure(fmt::format("{}: has {} bytes by now instead of {}: another process has changed its size", path,
                              status.st_size, mapping.bytes().size()));
  check_mapped_files();
}

void NewFile::sync() {
  check_size(file_.fd(), mapping_, file_.part());
  file_.sync();
}

void NewFile::keep() {
  sync();
  rename();
  release();
}

std::string digest_of_memory(std::span<std::byte> memory) {
  return digest_of(memory, data_of_memory(memory, digest_page_bytes));
}

std::uint64_t physical_memory() {
  return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace program
