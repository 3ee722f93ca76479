// SPDX-License-Identifier: MIT
//
// The program about precopy in include/multifd/README.md, whole: the source's rounds with a dirty log and ResidencyAware, and a main() that
// runs them against a receiver while a "guest" writes.

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <multifd/multifd.hpp>
#include <multifd/zero/residency.hpp>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

using multifd::Result;

// Stands for KVM_MEM_LOG_DIRTY_PAGES and KVM_GET_DIRTY_LOG: write() is the guest, the rest is the VMM.
class Guest {
 public:
  explicit Guest(std::span<std::byte> memory) : memory_(memory), dirty_(memory.size() / 4096 / 64) {}

  void write(std::size_t page, int value) {
    const std::lock_guard lock(mutex_);
    if (stopped_) return;
    std::memset(memory_.data() + page * 4096, value, 4096);
    if (logging_) dirty_[page / 64] |= std::uint64_t{1} << page % 64;
  }
  void start_dirty_log() {
    const std::lock_guard lock(mutex_);
    logging_ = true;
  }
  std::vector<std::uint64_t> fetch_dirty() {
    const std::lock_guard lock(mutex_);
    return std::exchange(dirty_, std::vector<std::uint64_t>(dirty_.size()));
  }
  bool may_stop() { return ++rounds_ == 3; }
  void stop() {
    write(5, 50);
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }

 private:
  std::mutex mutex_;
  std::span<std::byte> memory_;
  std::vector<std::uint64_t> dirty_;
  int rounds_ = 0;
  bool logging_ = false;
  bool stopped_ = false;
};

constexpr multifd::BlockId pc_ram{0};

// [readme]
using Zeros = multifd::ResidencyAware<multifd::ZeroPagesMultifd>;
using Sender = multifd::Sender<multifd::FdTransport, multifd::NoComp, Zeros>;

Result<void> precopy(Guest& guest, multifd::RamMap& ram, std::vector<multifd::FdTransport> links) {
  guest.start_dirty_log();                                  // first: from here on every write is logged
  auto untouched = multifd::UntouchedPages::snapshot(ram);  // then: what was never touched; stale with the next write
  if (!untouched) return std::unexpected(untouched.error());
  auto tx = Sender::open(ram, std::move(links), {.zero_pages = {.untouched = *untouched}});
  if (!tx) return std::unexpected(tx.error());

  if (auto r = tx->queue_range(pc_ram, 0, ram.blocks()[0].host.size()); !r) return std::unexpected(r.error());
  if (auto r = tx->close_epoch(); !r) return std::unexpected(r.error());  // round 1 ends
  untouched->forget();  // before the log is read: a page that is dirty in it is not untouched any more
  for (bool last = false; !last;) {
    last = guest.may_stop();  // a VMM compares what is dirty with what the downtime allows
    if (last) guest.stop();
    if (auto r = tx->queue_dirty(pc_ram, guest.fetch_dirty()); !r) return std::unexpected(r.error());
    if (auto r = tx->close_epoch(); !r) return std::unexpected(r.error());
  }
  return tx->finish();
}
// [readme end]

namespace {

constexpr std::size_t size = std::size_t{64} << 20;

std::span<std::byte> untouched_memory() {
  void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return {};
  return {static_cast<std::byte*>(memory), size};
}

Result<void> receive(std::span<std::byte> memory, multifd::Listener& listener) {
  multifd::RamMap ram;
  if (auto block = ram.add("pc.ram", memory); !block) return std::unexpected(block.error());
  auto links = listener.accept_channels(2, std::chrono::seconds(30));
  if (!links) return std::unexpected(links.error());
  auto rx = multifd::Receiver<multifd::FdTransport, multifd::NoComp>::open(ram, std::move(*links));
  if (!rx) return std::unexpected(rx.error());
  return rx->finish();
}

Result<void> send(Guest& guest, std::span<std::byte> memory, std::uint16_t port) {
  multifd::RamMap ram;
  if (auto block = ram.add("pc.ram", memory); !block) return std::unexpected(block.error());
  auto links = multifd::tcp_connect("127.0.0.1", port, 2);
  if (!links) return std::unexpected(links.error());
  return precopy(guest, ram, std::move(*links));
}

bool report(const char* who, const Result<void>& result) {
  if (!result) std::fprintf(stderr, "%s: %s\n", who, describe(result.error()).c_str());
  return result.has_value();
}

}  // namespace

int main() {
  const auto here = untouched_memory();
  const auto there = untouched_memory();
  auto listener = multifd::Listener::listen({.host = "127.0.0.1"}, 2);
  if (here.empty() || there.empty() || !listener) return 1;
  Guest guest(here);
  guest.write(3, 1);

  std::jthread writer([&](std::stop_token stop) {  // touches pages that were untouched before
    for (std::size_t page = 100; !stop.stop_requested(); page = page * 5 % (size / 4096)) guest.write(page, 7);
  });
  bool received = false;
  std::thread receiver([&] { received = report("receiver", receive(there, *listener)); });
  const bool sent = report("sender", send(guest, here, listener->local_address().port));
  receiver.join();
  std::puts(std::memcmp(here.data(), there.data(), size) == 0 ? "equal" : "different");
  return sent && received && std::memcmp(here.data(), there.data(), size) == 0 ? 0 : 1;
}
