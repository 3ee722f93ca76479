// SPDX-License-Identifier: MIT
//
// All that a VMM writes to migrate its guest: two processes, one with an address to listen at, one with an address to go to.
#include <multifd/migrate/destination.hpp>
#include <multifd/migrate/dirty/dirty_pages.hpp>
#include <multifd/migrate/source.hpp>
#include <multifd/multifd.hpp>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <thread>
#include <vector>

using namespace multifd;
using namespace multifd::migrate;

struct Stacks {  // what this VMM offers
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};

struct Vm {  // its guest counts, all over its memory
  std::vector<std::byte> memory = std::vector<std::byte>(256 << 20);
  RamMap map;
  BlockId pc_ram = *map.add("pc.ram", memory);
  DirtyPages dirty = *DirtyPages::create(map);
  std::uint64_t count = 0;  // its only register
  std::atomic<bool> stopping = false;
  std::thread vcpu;

  void run() {
    for (stopping = false; !stopping; ++count) {
      std::memcpy(&memory[count * 4096 % memory.size()], &count, sizeof count);
      dirty.mark(pc_ram, count * 4096 % memory.size(), sizeof count);
    }
  }
  Result<RamMap> ram() { return map; }
  Result<RamMap> prepare(const Announcement&) { return map; }
  DirtyPages& dirty_source() { return dirty; }
  Result<void> resume() { return vcpu = std::thread([this] { run(); }), Result<void>(); }
  Result<void> pause() { return stopping = true, vcpu.join(), Result<void>(); }
  Result<void> save(StateWriter& to) { return to.device({.idstr = "vcpu"}, std::as_bytes(std::span(&count, 1))); }
  Result<void> load(StateReader& from) {
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) return {};
      std::memcpy(&count, section->state.data(), std::min(sizeof count, section->state.size()));
    }
  }
};
