// SPDX-License-Identifier: MIT
#include "common/mapping.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <multifd/memory/page_digest.hpp>
#include <multifd/zero/buffer_is_zero.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace program {
namespace {

std::span<std::byte> map(std::uint64_t bytes, int protection, int flags, int fd, const std::string& what) {
  void* memory = ::mmap(nullptr, bytes, protection, flags, fd, 0);
  if (memory == MAP_FAILED) fail_path(what);
  return {static_cast<std::byte*>(memory), bytes};
}

}  // namespace

Mapping Mapping::read_file(const std::string& path, std::uint64_t bytes, std::size_t page_bytes) {
  const Descriptor file = open_regular(path, O_RDONLY);
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail_path(path);
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size == 0) throw Failure(path + ": empty");
  if (bytes > size) throw Failure(fmt::format("{}: has {} bytes, fewer than --size {}", path, size, bytes));
  if (bytes == 0) bytes = size;
  if (bytes % page_bytes != 0)
    throw Failure(fmt::format("{}: {} bytes are not a multiple of the page size {}: choose --size or --page-size", path,
                              bytes, page_bytes));
  return Mapping(map(bytes, PROT_READ, MAP_PRIVATE, file.get(), path));
}

Mapping Mapping::anonymous(std::uint64_t bytes) {
  const auto memory = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                          fmt::format("{} of memory", format_bytes(static_cast<double>(bytes))));
  // Faults of 4 KiB pages cost more than the transfer; where the kernel has no huge pages nothing is lost.
  (void)::madvise(memory.data(), memory.size(), MADV_HUGEPAGE);
  return Mapping(memory);
}

Mapping::Mapping(Mapping&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}
Mapping::~Mapping() {
  if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
}

void Mapping::populate() const {
  if (::madvise(bytes_.data(), bytes_.size(), MADV_POPULATE_WRITE) == 0) return;
  if (errno != EINVAL) fail_path("populate memory");
  // Before Linux 5.14: touch by hand, each page as it is.
  for (std::size_t at = 0; at < bytes_.size(); at += 4096) {
    volatile std::byte& byte = bytes_[at];
    byte = byte;
  }
}

void Mapping::populate_for_reading() const {
  if (::madvise(bytes_.data(), bytes_.size(), MADV_POPULATE_READ) == 0) return;
  if (errno != EINVAL) fail_path("populate memory");
  for (std::size_t at = 0; at < bytes_.size(); at += 4096) (void)*static_cast<volatile const std::byte*>(&bytes_[at]);
}

void NewFile::allocate(std::uint64_t bytes) {
  // Room is reserved now: running out of it later would be a SIGBUS in a worker.
  if (const int error = ::posix_fallocate(file_.fd(), 0, static_cast<off_t>(bytes)); error != 0)
    fail_path(file_.part(), error);
  mapping_ = Mapping(map(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_.fd(), file_.part()));
}

NewFile::Summary NewFile::make_sparse(std::size_t page_bytes) const {
  static constexpr std::array<std::byte, 64 * 1024> zeros{};
  auto digest = need(multifd::PageDigest::create());
  digest.begin();
  Summary summary;
  const std::span<const std::byte> bytes = mapping_.bytes();
  std::size_t done = 0;  // digested and, where zero, punched
  const auto skip_to = [&](std::size_t end) {
    if (end <= done) return;
    // Where the file system cannot, the file keeps its size on disk.
    (void)::fallocate(file_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(done),
                      static_cast<off_t>(end - done));
    summary.zero_pages += (end - done) / page_bytes;
    for (; done < end; done += std::min(zeros.size(), end - done))
      digest.add(std::span(zeros).first(std::min(zeros.size(), end - done)));
  };
  for (std::size_t at = 0; at < bytes.size();) {
    const off_t data = ::lseek(file_.fd(), static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;  // nothing but room behind `at`
    const off_t hole = data < 0 ? data : ::lseek(file_.fd(), data, SEEK_HOLE);
    // Both in whole pages; a file system that does not know has data everywhere.
    const std::size_t end = hole < 0 ? bytes.size() : std::min(bytes.size(), static_cast<std::size_t>(hole));
    for (at = std::max(at, static_cast<std::size_t>(std::max<off_t>(data, 0)) / page_bytes * page_bytes); at < end;
         at += page_bytes) {
      const std::span<const std::byte> page = bytes.subspan(at, page_bytes);
      if (multifd::buffer_is_zero(page.data(), page.size())) continue;
      skip_to(at);
      digest.add(page);
      done = at + page_bytes;
    }
  }
  skip_to(bytes.size());
  summary.digest = fmt::format("{:016x}", digest.value());
  return summary;
}

void NewFile::keep() {
  sync();
  rename();
  release();
}

std::string digest_text(std::span<const std::byte> bytes) { return fmt::format("{:016x}", multifd::digest_of(bytes)); }

std::uint64_t physical_memory() {
  return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace program
