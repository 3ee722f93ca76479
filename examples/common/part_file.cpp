// SPDX-License-Identifier: MIT
#include "common/part_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "common/limits.hpp"

namespace program {
namespace {

// What tells a part that a killed program has left from a file of somebody else that has such a name: nobody sets the
// sticky bit of a file, and every file system with permissions keeps it.
constexpr mode_t part_mode = S_ISVTX | S_IRUSR | S_IWUSR;
constexpr mode_t whole_mode = S_IRUSR | S_IWUSR;

/// rename() that never replaces; an errno or 0.
int rename_to_free_name(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return 0;
  if (errno != EINVAL && errno != ENOSYS) return errno;
  // A file system without that flag: a second name, which is never that of another file.
  if (::link(from.c_str(), to.c_str()) == 0) {
    ::unlink(from.c_str());
    return 0;
  }
  if (errno == EEXIST) return errno;
  struct stat status{};
  if (::lstat(to.c_str(), &status) == 0) return EEXIST;
  return std::rename(from.c_str(), to.c_str()) == 0 ? 0 : errno;
}

}  // namespace

void fail_path(const std::string& path, int error) { throw Failure(fmt::format("{}: {}", path, error_text(error))); }
void fail_path(const std::string& path) { fail_path(path, errno); }

Descriptor open_regular(const std::string& path, int flags, unsigned mode) {
  Descriptor file(::open(path.c_str(), flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, mode));
  struct stat status{};
  // ENXIO: a FIFO that nobody reads, a socket, a device without a driver.
  if (file.get() < 0 && errno != ENXIO) fail_path(path);
  if (file.get() >= 0 && ::fstat(file.get(), &status) != 0) fail_path(path);
  if (!S_ISREG(status.st_mode)) throw Failure(path + ": not a regular file");
  return file;
}

void write_text(int fd, std::string_view text, const std::string& path) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EAGAIN) {
      pollfd entry{.fd = fd, .events = POLLOUT, .revents = 0};
      if (::poll(&entry, 1, 10'000) == 0) throw Failure(path + ": no process reads what is written to it");
    } else if (errno != EINTR) {
      fail_path(path);
    }
  }
}

PartFile::PartFile(std::string path) : path_(std::move(path)), part_(path_ + ".part") {
  struct stat status{};
  if (::lstat(path_.c_str(), &status) == 0)
    throw Failure(path_ + ": exists already, and nothing is overwritten: remove it or choose another name");
  if (errno != ENOENT) fail_path(path_);
  do {
    file_ = Descriptor(::open(part_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, whole_mode));
    const bool created = file_.get() >= 0;
    if (!created && errno != EEXIST) fail_path(part_);
    if (!created) file_ = open_regular(part_, O_RDWR | O_NOFOLLOW);
    if (::flock(file_.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno == EWOULDBLOCK)
        throw Failure(part_ + ": another program is writing to it: choose another name, or wait for its end");
      // A file system without locks: only who has created the file knows that it is nobody else's.
      if (!created) fail_path(part_ + ": exists, and cannot be locked");
    }
    // Whoever had it before may have renamed or removed it since open().
  } while (!is_ours(part_));
  if (::fstat(file_.get(), &status) != 0) fail_path(part_);
  if (status.st_size != 0 && (status.st_mode & 07777) != part_mode)
    throw Failure(part_ + ": exists, and is not what a killed program has left: remove it or choose another name");
  unfinished_.emplace(part_);
  if (::fchmod(file_.get(), part_mode) != 0 || ::ftruncate(file_.get(), 0) != 0) fail_path(part_);
}

PartFile::~PartFile() {
  if (!unfinished_) return;
  const std::string& now = renamed_ ? path_ : part_;
  if (is_ours(now)) ::unlink(now.c_str());
}

bool PartFile::is_ours(const std::string& path) const {
  struct stat here{};
  struct stat named{};
  return ::fstat(file_.get(), &here) == 0 && ::lstat(path.c_str(), &named) == 0 && here.st_dev == named.st_dev &&
         here.st_ino == named.st_ino;
}

void PartFile::check_writes() {
  struct statfs system{};
  if (::fstatfs(file_.get(), &system) == 0 && system.f_type == HUGETLBFS_MAGIC)
    throw Failure(part_ + ": lies on hugetlbfs, where only memory can be written to: choose another folder");
  write_text(file_.get(), "\n", part_);
  if (::fsync(file_.get()) != 0 || ::ftruncate(file_.get(), 0) != 0 || ::lseek(file_.get(), 0, SEEK_SET) != 0)
    fail_path(part_);
}

void PartFile::sync() {
  // After a crash of the machine nothing else would tell whether it is whole.
  if (::fsync(file_.get()) != 0) fail_path(part_);
  if (!is_ours(part_)) throw Failure(part_ + ": was removed or replaced while it was written");
  if (::fchmod(file_.get(), whole_mode) != 0) fail_path(part_);
  whole_ = true;
}

void PartFile::rename() {
  if (!is_ours(part_)) throw Failure(part_ + ": was removed or replaced while it was written");
  const int error = unfinished_->renamed_to(path_, [&] { return rename_to_free_name(part_, path_); });
  if (error == 0) {
    renamed_ = true;
    const std::size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
    const Descriptor directory(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    (void)::fsync(directory.get());  // the name, too; a file system that cannot has done what it can
    return;
  }
  if (!whole_) fail_path(path_, error);
  release();
  throw Failure(fmt::format("{}: {}: what was received is whole, and stays as {}", path_, std::strerror(error), part_));
}

}  // namespace program
