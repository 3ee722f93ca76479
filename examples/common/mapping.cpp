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

[[noreturn]] void fail(const std::string& path) { throw Failure(fmt::format("{}: {}", path, std::strerror(errno))); }

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

std::span<std::byte> map(std::uint64_t bytes, int protection, int flags, int fd, const std::string& what) {
  void* memory = ::mmap(nullptr, bytes, protection, flags, fd, 0);
  if (memory == MAP_FAILED) fail(what);
  return {static_cast<std::byte*>(memory), bytes};
}

}  // namespace

Mapping Mapping::read_file(const std::string& path, std::uint64_t bytes, std::size_t page_bytes) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status{};
  if (file.get() < 0 || ::fstat(file.get(), &status) != 0) fail(path);
  if (!S_ISREG(status.st_mode)) throw Failure(path + ": not a regular file");
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
  if (errno != EINVAL) fail("populate memory");
  // Before Linux 5.14: touch by hand, each page as it is.
  for (std::size_t at = 0; at < bytes_.size(); at += 4096) {
    volatile std::byte& byte = bytes_[at];
    byte = byte;
  }
}

void Mapping::populate_for_reading() const {
  if (::madvise(bytes_.data(), bytes_.size(), MADV_POPULATE_READ) == 0) return;
  if (errno != EINVAL) fail("populate memory");
  for (std::size_t at = 0; at < bytes_.size(); at += 4096) (void)*static_cast<volatile const std::byte*>(&bytes_[at]);
}

NewFile::NewFile(std::string path, std::uint64_t bytes)
    : path_(std::move(path)), part_(path_ + ".part"), unfinished_(part_), mapping_(std::span<std::byte>{}) {
  const Descriptor file(::open(part_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (file.get() < 0) fail(part_);
  try {
    // Room is reserved now: running out of it later would be a SIGBUS in a worker.
    if (const int error = ::posix_fallocate(file.get(), 0, static_cast<off_t>(bytes)); error != 0) {
      errno = error;
      fail(part_);
    }
    mapping_ = Mapping(map(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), part_));
  } catch (...) {
    ::unlink(part_.c_str());
    throw;
  }
}

NewFile::~NewFile() {
  if (!kept_) ::unlink(part_.c_str());
}

NewFile::Summary NewFile::make_sparse(std::size_t page_bytes) const {
  static constexpr std::array<std::byte, 64 * 1024> zeros{};
  const Descriptor file(::open(part_.c_str(), O_RDWR | O_CLOEXEC));
  if (file.get() < 0) fail(part_);
  auto digest = need(multifd::PageDigest::create());
  digest.begin();
  Summary summary;
  const std::span<const std::byte> bytes = mapping_.bytes();
  std::size_t done = 0;  // digested and, where zero, punched
  const auto skip_to = [&](std::size_t end) {
    if (end <= done) return;
    // Where the file system cannot, the file keeps its size on disk.
    (void)::fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(done),
                      static_cast<off_t>(end - done));
    summary.zero_pages += (end - done) / page_bytes;
    for (; done < end; done += std::min(zeros.size(), end - done))
      digest.add(std::span(zeros).first(std::min(zeros.size(), end - done)));
  };
  for (std::size_t at = 0; at < bytes.size();) {
    const off_t data = ::lseek(file.get(), static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;  // nothing but room behind `at`
    const off_t hole = data < 0 ? data : ::lseek(file.get(), data, SEEK_HOLE);
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
  // It has had its size from the start: after a crash of the machine nothing else would tell whether it is whole.
  const Descriptor file(::open(part_.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0 || ::fsync(file.get()) != 0) fail(part_);
  if (std::rename(part_.c_str(), path_.c_str()) != 0) fail(path_);
  kept_ = true;
}

std::string digest_text(std::span<const std::byte> bytes) { return fmt::format("{:016x}", multifd::digest_of(bytes)); }

std::uint64_t physical_memory() {
  return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace program
