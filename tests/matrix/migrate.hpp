// SPDX-License-Identifier: MIT
//
// One migration of the matrix: several rounds of rewriting, then the two memories are equal and every counter of one
// side agrees with the other side's and with what was queued.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

namespace test {

using namespace multifd;

inline constexpr unsigned rounds = 3;

struct Case {
  Wire wire;
  unsigned channels;
  std::size_t page_bytes;
  std::uint64_t seed;
};

/// Two blocks on each side, and what happens to them between the rounds.
struct Guest {
  Guest(std::size_t page_bytes, Rng& random)
      : page(page_bytes),
        rng(random),
        pages{524288 / page_bytes + 3, 7},
        source{Block(pages[0] * page), Block(pages[1] * page)},
        target{Block(pages[0] * page), Block(pages[1] * page)},
        source_map(page),
        target_map(page) {
    for (std::size_t b = 0; b < 2; ++b) {
      // The destination is not fresh: a zero page that is not written shows.
      target[b].fill(std::byte{0xee});
      REQUIRE(source_map.add(names[b], source[b].bytes()).has_value());
      REQUIRE(target_map.add(names[b], target[b].bytes()).has_value());
      dirty[b].assign((pages[b] + 63) / 64, 0);
      for (std::size_t p = 0; p < pages[b]; ++p) rewrite(b, p);
    }
  }

  void rewrite(std::size_t b, std::size_t p) {
    fill_page(source[b].page(p, page), any_fill(rng), rng);
    dirty[b][p / 64] |= std::uint64_t{1} << (p % 64);
  }

  /// A third of the pages gets new content; some turn zero, some of the zero ones turn back.
  void next_round() {
    for (std::size_t b = 0; b < 2; ++b) {
      std::ranges::fill(dirty[b], 0);
      for (std::size_t p = 0; p < pages[b]; ++p)
        if (below(rng, 3) == 0) rewrite(b, p);
    }
  }

  void zero_on_target(std::size_t b, std::uint64_t offset) { std::memset(target[b].data() + offset, 0, page); }

  std::uint64_t dirty_pages() const {
    std::uint64_t sum = 0;
    for (const auto& bitmap : dirty)
      for (const std::uint64_t word : bitmap) sum += static_cast<unsigned>(std::popcount(word));
    return sum;
  }

  static constexpr const char* names[2] = {"pc.ram", "0000:00:02.0/vga.vram"};
  std::size_t page;
  Rng& rng;
  std::size_t pages[2];
  Block source[2];
  Block target[2];
  RamMap source_map, target_map;
  std::vector<std::uint64_t> dirty[2];
};

template <class T, class C, class Z>
void migrate(const Case& c, Links<T> links) {
  Rng rng(c.seed);
  Guest guest(c.page_bytes, rng);
  // Legacy zero pages are applied by the caller, between the barriers of two epochs: that takes the manual barrier.
  constexpr bool legacy = Z::stage == ZeroStage::producer;
  const Barrier barrier = legacy ? Barrier::manual : Barrier::automatic;

  Result<Receiver<T, C>> rx = std::unexpected(Error{});
  std::thread opening([&] {
    rx = Receiver<T, C>::open(guest.target_map, std::move(links.receiver),
                              {.compressor = {}, .barrier = barrier, .hello_timeout = 20s});
  });
  auto tx = Sender<T, C, Z>::open(guest.source_map, std::move(links.sender));
  opening.join();
  REQUIRE_MESSAGE(tx.has_value(), text(tx));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));

  std::uint64_t queued = 0;
  std::uint64_t zero_on_main = 0;
  for (unsigned round = 0; round < rounds; ++round) {
    std::uint64_t dirty = guest.dirty_pages();
    std::vector<std::uint64_t> zeros[2];
    for (std::uint32_t b = 0; b < 2; ++b) {
      const auto done =
          tx->queue_dirty(BlockId{b}, guest.dirty[b], 0, [&](std::uint64_t at) { zeros[b].push_back(at); });
      REQUIRE_MESSAGE(done.has_value(), text(done));
      CHECK(done->zero_on_main == zeros[b].size());
      queued += done->queued;
      zero_on_main += done->zero_on_main;
      dirty -= done->queued + done->zero_on_main;
    }
    CHECK(dirty == 0);
    const auto epoch = tx->close_epoch_and_wait();  // the guest rewrites pages only when they have left
    REQUIRE_MESSAGE(epoch.has_value(), text(epoch));
    CHECK(*epoch == round);
    if (legacy) {
      // The receiver's channels stand at the barrier of this epoch, none is in the next one.
      for (std::size_t b = 0; b < 2; ++b)
        for (const std::uint64_t at : zeros[b]) guest.zero_on_target(b, at);
      const auto met = rx->release_epoch();
      REQUIRE_MESSAGE(met.has_value(), text(met));
      CHECK(*met == round);
    }
    if (round + 1 < rounds) guest.next_round();
  }
  const auto closed = tx->close_channels();
  CHECK_MESSAGE(closed.has_value(), text(closed));
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));

  for (std::size_t b = 0; b < 2; ++b)
    CHECK_MESSAGE(guest.source[b] == guest.target[b], "block ", b, " differs first at byte ",
                  first_difference(guest.source[b].bytes(), guest.target[b].bytes()));

  const SenderStats sent = tx->stats();
  const ReceiverStats got = rx->stats();
  const ChannelStats out = total(sent.channels);
  const ChannelStats in = total(got.channels);
  CHECK(sent.queued_pages == queued);
  CHECK(sent.zero_on_main == zero_on_main);
  CHECK(queued == out.normal_pages + out.zero_pages);
  if (!legacy) CHECK(zero_on_main == 0);
  if (legacy) CHECK(zero_on_main > 0);
  if (Z::stage == ZeroStage::channel) CHECK(out.zero_pages > 0);
  if (Z::stage != ZeroStage::channel) CHECK(out.zero_pages == 0);
  CHECK(sent.epochs == rounds);
  CHECK(got.epochs == rounds);
  REQUIRE(sent.channels.size() == c.channels);
  REQUIRE(got.channels.size() == c.channels);
  const std::size_t header = wire::header_bytes(c.page_bytes);
  for (unsigned i = 0; i < c.channels; ++i) {
    const ChannelStats& o = sent.channels[i];
    const ChannelStats& r = got.channels[i];
    CHECK(o.id == i);
    CHECK(r.id == i);
    CHECK(o.packets == r.packets);
    CHECK(o.normal_pages == r.normal_pages);
    CHECK(o.zero_pages == r.zero_pages);
    CHECK(o.payload_bytes == r.payload_bytes);
    CHECK(o.wire_bytes == r.wire_bytes);
    CHECK(o.syncs == rounds);
    CHECK(r.syncs == rounds);
    CHECK(o.wire_bytes == wire::init_packet_bytes + (o.packets + o.syncs) * header + o.payload_bytes);
  }
  if (C::payload_form == PayloadForm::pages) CHECK(out.payload_bytes == out.normal_pages * c.page_bytes);
  if (C::payload_form == PayloadForm::encoded) CHECK(in.payload_bytes < in.normal_pages * c.page_bytes);
}

}  // namespace test
