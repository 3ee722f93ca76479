// SPDX-License-Identifier: MIT
//
// All that a VMM writes to migrate its guest. Two processes: `vmm_in_sixty_lines listen tcp::7000` takes the guest in that
// `vmm_in_sixty_lines connect tcp:HOST:7000` runs and gives away.
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

// [readme]
struct Stacks {  // what this VMM offers; the source's options choose
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};

struct Vm {  // its guest counts, all over its memory
  std::vector<std::byte> memory = std::vector<std::byte>(256 << 20);
  RamMap map;
  BlockId pc_ram = *map.add("pc.ram", memory);
  DirtyPages dirty = *DirtyPages::create(map);
  std::atomic<std::uint64_t> count = 0;  // its only register
  std::jthread vcpu;

  void run(const std::stop_token& stop) {
    for (; !stop.stop_requested(); ++count) {
      const std::uint64_t now = count, at = now * 4096 % memory.size();
      std::memcpy(&memory[at], &now, sizeof now);
      dirty.mark(pc_ram, at, sizeof now);
    }
  }
  Result<RamMap> ram() { return map; }
  DirtyPages& dirty_source() { return dirty; }
  Result<void> pause() { return vcpu = {}, Result<void>(); }
  Result<void> resume() {
    return vcpu = std::jthread([this](const std::stop_token& stop) { run(stop); }), Result<void>();
  }
  Result<void> save(StateWriter& to) {
    const std::uint64_t now = count;
    return to.device({.idstr = "vcpu"}, std::as_bytes(std::span(&now, 1)));
  }
  Result<RamMap> prepare(const Announcement&) { return map; }
  Result<void> load(StateReader& from) {
    for (std::uint64_t now = 0;;) {
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) return {};
      std::memcpy(&now, section->state.data(), std::min(sizeof now, section->state.size()));
      count = now;
    }
  }
};

int main(int argc, char** argv) {
  const auto address = parse_address(argc == 3 ? argv[2] : "");
  const std::string_view role = address ? argv[1] : "";
  Vm vm;
  if (role == "listen") {
    auto listener = Listener::listen(*address);
    const auto taken = listener ? migrate_from<Stacks>(vm, *listener) : std::unexpected(listener.error());
    if (!taken) return std::fprintf(stderr, "%s\n", describe(taken.error()).c_str()), 1;
    std::printf("the guest goes on here, at %llu\n", static_cast<unsigned long long>(vm.count));
  } else if (role == "connect") {
    static_cast<void>(vm.resume());
    const auto moved = migrate_to<Stacks>(vm, *address, {.converge = {.max_downtime = std::chrono::milliseconds(100)}});
    if (!moved) return std::fprintf(stderr, "the guest stays: %s\n", describe(moved.error()).c_str()), 1;
    std::printf("the guest has gone, at %llu\n", static_cast<unsigned long long>(vm.count));
  } else {
    return std::fprintf(stderr, "usage: %s listen|connect tcp:HOST:PORT\n", argv[0]), 2;
  }
}
// [readme end]
