// SPDX-License-Identifier: MIT
//
// Every stack over every kind of wire.
#include "matrix/migrate.hpp"

#include <doctest/doctest.h>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"

using namespace multifd;
using namespace test;

namespace {

template <class C, class Z>
void all_wires() {
  const Watchdog watchdog("round trips", 240s);
  Rng seeds(seed());
  for (const Wire wire : {Wire::tcp, Wire::unix_socket, Wire::memory})
    for (const unsigned channels : {1u, 2u, 3u, 8u})
      for (const std::size_t page_bytes : {4096u, 16384u, 65536u}) {
        const Case c{wire, channels, page_bytes, seeds()};
        if (quick() && (channels == 3 || page_bytes == 16384)) continue;
        CAPTURE(name(wire));
        CAPTURE(channels);
        CAPTURE(page_bytes);
        CAPTURE(c.seed);
        switch (wire) {
          case Wire::tcp: migrate<FdTransport, C, Z>(c, tcp_links(channels)); break;
          case Wire::unix_socket: migrate<FdTransport, C, Z>(c, unix_links(channels)); break;
          case Wire::memory: migrate<MemoryTransport, C, Z>(c, memory_links(channels)); break;
        }
      }
}

}  // namespace

TEST_CASE_TEMPLATE("A round trip ends with equal memory and counters that agree: uncompressed", Z, ZeroPagesNone,
                   ZeroPagesLegacy, ZeroPagesMultifd) {
  all_wires<NoComp, Z>();
}
TEST_CASE_TEMPLATE("A round trip ends with equal memory and counters that agree: zlib", Z, ZeroPagesNone,
                   ZeroPagesLegacy, ZeroPagesMultifd) {
  all_wires<Zlib, Z>();
}
TEST_CASE_TEMPLATE("A round trip ends with equal memory and counters that agree: zstd", Z, ZeroPagesNone,
                   ZeroPagesLegacy, ZeroPagesMultifd) {
  all_wires<Zstd, Z>();
}

TEST_CASE("An empty migration is one: no pages, no epochs, or only epochs") {
  const Watchdog watchdog("empty migration");
  for (const unsigned epochs : {0u, 3u}) {
    Block a(4096), b(4096);
    RamMap source, target;
    REQUIRE(source.add("pc.ram", a.bytes()).has_value());
    REQUIRE(target.add("pc.ram", b.bytes()).has_value());
    auto links = memory_links(2);
    auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(source, std::move(links.sender));
    auto rx = Receiver<MemoryTransport, NoComp>::open(target, std::move(links.receiver));
    REQUIRE(tx.has_value());
    REQUIRE(rx.has_value());
    for (unsigned i = 0; i < epochs; ++i) CHECK(tx->close_epoch() == std::uint64_t{i});
    CHECK(tx->close_channels().has_value());
    CHECK(rx->finish().has_value());
    CHECK(rx->stats().epochs == epochs);
  }
}
