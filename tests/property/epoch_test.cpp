// SPDX-License-Identifier: MIT
//
// The promise of SYNC (format/packets.md section 6): however far the channels run apart, the newest content wins. Each
// property is shown twice: with the barrier it holds; with SYNCs hidden from the receiver, so that nothing holds its
// channels, the same script leaves stale pages. The second half proves that the first can fail.
#include <doctest/doctest.h>

#include <deque>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

/// Takes the SYNC bit out of the first `hidden` SYNC packets: a receiver without a barrier, as far as it can tell.
template <Transport Next>
class SyncHider {
 public:
  SyncHider(Next next, unsigned hidden) : next_(std::move(next)), hidden_(hidden) {}

  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    if (ready_.empty()) {
      if (auto filled = fill(); !filled) {
        if (filled.error().code == Errc::peer_closed && filled.error().stage == Stage::read && at_boundary_)
          return std::size_t{0};
        return std::unexpected(filled.error());
      }
    }
    std::size_t done = 0;
    for (const iovec& buffer : buffers)
      for (std::size_t i = 0; i < buffer.iov_len && !ready_.empty(); ++i, ++done) {
        static_cast<std::byte*>(buffer.iov_base)[i] = ready_.front();
        ready_.pop_front();
      }
    return done;
  }
  Result<std::size_t> write_some(ConstBuffers buffers) noexcept { return next_.write_some(buffers); }
  Result<void> finish() noexcept { return next_.finish(); }
  void shutdown() noexcept { next_.shutdown(); }

 private:
  Result<void> fetch(std::size_t bytes) {
    const std::size_t at = chunk_.size();
    chunk_.resize(at + bytes);
    at_boundary_ = at == 0;
    return read_exact(next_, std::span(chunk_).subspan(at));
  }

  Result<void> fill() {
    chunk_.clear();
    if (!greeted_) {
      if (auto got = fetch(64); !got) return got;
      greeted_ = true;
    } else {
      if (auto got = fetch(wire::header_bytes(4096)); !got) return got;
      const auto flags = get(chunk_, 8, 4);
      if ((flags & 1) != 0 && hidden_ > 0) {
        put(chunk_, 8, flags & ~std::uint64_t{1}, 4);
        --hidden_;
      }
      if (get(chunk_, 16, 4) > 0)
        if (auto got = fetch(get(chunk_, 20, 4)); !got) return got;
    }
    ready_.assign(chunk_.begin(), chunk_.end());
    return {};
  }

  Next next_;
  unsigned hidden_;
  bool greeted_ = false;
  bool at_boundary_ = false;
  std::deque<std::byte> ready_;
  Bytes chunk_;
};

/// Old content of a page waits on channel 0 while channel 1 delivers the next epoch's. Returns what the page holds in
/// the end: 1 old, 2 new.
int deliver_out_of_order(bool barrier) {
  const Watchdog watchdog("epochs out of order");
  Block memory(4096);
  RamMap map;
  REQUIRE(map.add("pc.ram", memory.bytes()).has_value());
  const auto page = [](int content) { return Bytes(4096, std::byte(content)); };
  auto links = memory_links(2, 1 << 20);
  std::vector<SyncHider<MemoryTransport>> hiders;
  for (auto& link : links.receiver) hiders.emplace_back(std::move(link), barrier ? 0 : 1);

  const auto send = [&](unsigned channel, const RawStream& stream) {
    REQUIRE(write_all(links.sender[channel], std::span<const std::byte>(stream.bytes())).has_value());
  };
  send(0, RawStream().hello(0));
  send(1, RawStream().hello(1).sync().packet({.normal = {0}, .payload = page(2)}).sync());
  auto rx = Receiver<SyncHider<MemoryTransport>, NoComp>::open(map, std::move(hiders));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  // Channel 1 goes as far as it can: to the barrier, or through it.
  CHECK(eventually([&] { return rx->stats().channels[1].syncs == 1; }));
  CHECK(rx->stats().channels[1].normal_pages == (barrier ? 0 : 1));
  send(0, RawStream().packet({.normal = {0}, .payload = page(1)}).sync().sync());
  for (auto& link : links.sender) CHECK(link.finish().has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(rx->stats().epochs == (barrier ? 2 : 1));
  return std::to_integer<int>(memory.bytes()[0]);
}

/// Rewrites a few pages over and over, each epoch on other channels, over wires of random slowness. Returns how many
/// pages are stale in the end.
template <class C>
std::size_t rewrite_at_random(std::uint64_t run_seed, bool barrier) {
  const Watchdog watchdog("random epochs");
  constexpr unsigned channels = 8;
  constexpr unsigned epochs = 12;
  constexpr std::size_t pages = 48;
  Rng rng(run_seed);
  Block source_memory(pages * 4096), target_memory(pages * 4096);
  RamMap source, target;
  const auto block = source.add("pc.ram", source_memory.bytes());
  REQUIRE(target.add("pc.ram", target_memory.bytes()).has_value());
  auto links = memory_links(channels, 4 << 20);  // wide enough that the sender never waits for a slow channel

  using Slow = SyncHider<JitterTransport<MemoryTransport>>;
  std::vector<Slow> slow;
  for (auto& link : links.receiver)
    slow.emplace_back(JitterTransport(std::move(link), rng(), 1 + static_cast<unsigned>(below(rng, 2500))),
                      barrier ? 0 : epochs - 1);
  auto tx = Sender<MemoryTransport, C, ZeroPagesMultifd>::open(source, std::move(links.sender));
  auto rx = Receiver<Slow, C>::open(target, std::move(slow));
  REQUIRE_MESSAGE(tx.has_value(), text(tx));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  for (unsigned epoch = 0; epoch < epochs; ++epoch) {
    for (std::size_t p = 0; p < pages; ++p) {
      if (below(rng, 3) == 0) continue;
      fill_page(source_memory.page(p, 4096), any_fill(rng), rng);
      REQUIRE(tx->queue_page(*block, p * 4096).has_value());
      if (below(rng, 6) == 0) REQUIRE(tx->push_out().has_value());  // small packets, so every channel gets some
    }
    // Written, so that the next round cannot change what is on its way. Nothing says that it has arrived.
    REQUIRE(tx->close_epoch_and_wait() == std::uint64_t{epoch});
  }
  CHECK(tx->close_channels().has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  std::size_t stale = 0;
  for (std::size_t p = 0; p < pages; ++p)
    stale += !same_bytes(source_memory.page(p, 4096), target_memory.page(p, 4096));
  return stale;
}

}  // namespace

TEST_CASE("A page of the next epoch waits for a slow channel's page of this one") {
  CHECK(deliver_out_of_order(true) == 2);
}

// Without the barrier channels write the same memory at once, which is what these two show; ThreadSanitizer says so too
// and would end the run.
TEST_CASE("Without the barrier the same delivery leaves the old page" * doctest::skip(under_tsan)) {
  CHECK(deliver_out_of_order(false) == 1);
}

TEST_CASE("Eight channels of random slowness end with the newest content") {
  const unsigned runs = quick() ? 3 : 8;
  for (unsigned run = 0; run < runs; ++run) {
    const std::uint64_t run_seed = seed() + run;
    CAPTURE(run_seed);
    CHECK(rewrite_at_random<NoComp>(run_seed, true) == 0);
    CHECK(rewrite_at_random<Zstd>(run_seed, true) == 0);
  }
}

TEST_CASE("Without the barrier the same runs end with stale content" * doctest::skip(under_tsan)) {
  std::size_t stale = 0;
  for (unsigned run = 0; run < 200 && stale == 0; ++run) stale += rewrite_at_random<NoComp>(seed() + run, false);
  CHECK_MESSAGE(stale > 0, "seed ", seed());
}
