// SPDX-License-Identifier: MIT
//
// A guest that stands still but where a test writes, in memory of each kind of which the library asks what was touched; and
// both ends of its migration in one process.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <future>
#include <optional>
#include <span>
#include <vector>

#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "support/basics.hpp"
#include "support/leftovers.hpp"

namespace test {

enum class MemoryKind { anonymous, memfd, memfd_closed, shared_anonymous };

/// Pages of 4 KiB that nobody has touched, and no huge ones.
class FreshMemory {
 public:
  static constexpr std::size_t page = 4096;

  FreshMemory(MemoryKind kind, std::size_t pages) {
    const std::size_t size = pages * page;
    int fd = -1;
    if (kind == MemoryKind::memfd || kind == MemoryKind::memfd_closed) {
      fd = ::memfd_create("fresh memory", MFD_CLOEXEC);
      REQUIRE(fd >= 0);
      REQUIRE(::ftruncate(fd, static_cast<off_t>(size)) == 0);
    }
    const int flags = (kind == MemoryKind::anonymous ? MAP_PRIVATE : MAP_SHARED) | (fd < 0 ? MAP_ANONYMOUS : 0);
    void* const at = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, fd, 0);
    REQUIRE(at != MAP_FAILED);
    ::madvise(at, size, MADV_NOHUGEPAGE);
    bytes_ = {static_cast<std::byte*>(at), size};
    if (kind == MemoryKind::memfd_closed) ::close(fd);
    if (kind == MemoryKind::memfd) fd_ = fd;
  }
  FreshMemory(const FreshMemory&) = delete;
  FreshMemory& operator=(const FreshMemory&) = delete;
  ~FreshMemory() {
    ::munmap(bytes_.data(), bytes_.size());
    if (fd_ >= 0) ::close(fd_);
  }

  std::span<std::byte> bytes() const { return bytes_; }
  /// Pages.
  std::size_t resident() const {
    std::vector<unsigned char> in_core(bytes_.size() / page);
    REQUIRE(::mincore(bytes_.data(), bytes_.size(), in_core.data()) == 0);
    return static_cast<std::size_t>(std::ranges::count_if(in_core, [](unsigned char c) { return (c & 1) != 0; }));
  }

 private:
  std::span<std::byte> bytes_;
  int fd_ = -1;
};

/// Both halves of the guest.
struct StillGuest {
  StillGuest(MemoryKind kind, std::size_t pages) : memory(kind, pages) {
    block = *map.add("ram", memory.bytes());
    dirty.emplace(*multifd::migrate::DirtyPages::create(map));
  }
  void write(std::size_t number, char with) {
    std::memset(memory.bytes().data() + number * FreshMemory::page, with, FreshMemory::page);
    dirty->mark(block, number * FreshMemory::page, FreshMemory::page);
  }

  multifd::Result<multifd::RamMap> ram() { return map; }
  multifd::migrate::DirtyPages& dirty_source() { return *dirty; }
  multifd::Result<void> pause() { return {}; }
  multifd::Result<void> resume() { return {}; }
  multifd::Result<void> save(multifd::migrate::StateWriter& to) { return to.device({.idstr = "nothing"}, {}); }
  multifd::Result<multifd::RamMap> prepare(const multifd::migrate::Announcement&) { return map; }
  multifd::Result<void> load(multifd::migrate::StateReader& from) {
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) return {};
    }
  }

  FreshMemory memory;
  multifd::RamMap map;
  multifd::BlockId block{};
  std::optional<multifd::migrate::DirtyPages> dirty;
};

struct MigrationEnds {
  multifd::Result<multifd::migrate::MigrationReport> moved;
  multifd::Result<multifd::migrate::ArrivalReport> taken;
};

/// Migrates over TCP. Params: the guest's halves, of which each may be of a type of its own.
template <class Stacks, class Source, class Destination>
MigrationEnds migrate_between(Source& here, Destination& there, const multifd::migrate::SourceOptions& from,
                              const multifd::migrate::DestinationOptions& to) {
  const Watchdog watchdog("a migration");
  const Leftovers leftovers;
  auto listener = multifd::Listener::listen({.host = "127.0.0.1"}, 64);
  REQUIRE(listener.has_value());
  auto taken =
      std::async(std::launch::async, [&] { return multifd::migrate::migrate_from<Stacks>(there, *listener, to); });
  auto moved = multifd::migrate::migrate_to<Stacks>(here, listener->local_address(), from);
  return {.moved = std::move(moved), .taken = taken.get()};
}

}  // namespace test
