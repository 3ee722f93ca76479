// SPDX-License-Identifier: MIT
#include "multifd/postcopy/remote_pages.hpp"

#include <doctest/doctest.h>

#include <string>
#include <thread>

#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/postcopy/page_server.hpp"
#include "support/page_ends.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

/// Fetches every page of a served guest over one connection of each kind, and compares.
template <Compressor C, class T = MemoryTransport>
void fetches_everything(std::size_t page_bytes, Digest digest) {
  CAPTURE(page_bytes);
  const Watchdog watchdog("fetches_everything");
  const std::size_t pages = page_bytes > 4096 ? 60 : 300;  // of large ones a compressor has much to do
  ServedGuest<C, T> served(pages, page_bytes, {.session = session_of(3), .digest = digest});
  auto client = served.client({.session = session_of(3)});
  REQUIRE(client->page_bytes() == page_bytes);
  REQUIRE(client->blocks().size() == 2);
  CHECK(client->blocks()[0].idstr == "pc.ram");
  CHECK(client->blocks()[1].bytes == 2 * page_bytes);
  Rng rng(seed());
  std::string wrong;
  for (const std::uint64_t bytes : {page_bytes, 7 * page_bytes, batch_bytes}) {
    CAPTURE(bytes);
    const auto ranges = all_ranges(*client, std::min(bytes, batch_bytes), rng);
    for (const FetchKind kind : {FetchKind::background, FetchKind::urgent}) {
      const auto fetched = fetch(*client, kind, ranges, served.guest.map, wrong);
      CHECK_MESSAGE(fetched.has_value(), text(fetched));
      CHECK(wrong == "");
    }
  }
  const auto finished = client->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(served.server->wait_until_whole(20s).has_value());
  const PageServerStats stats = served.server->stats();
  CHECK(stats.urgent_requests * 2 == stats.requests);
  CHECK(stats.normal_pages + stats.zero_pages == 6 * (pages + 2));
  CHECK(stats.zero_pages > pages);
  CHECK(stats.connections_failed == 0);
}

}  // namespace

TEST_CASE("RemotePages fetches every page, with every compressor, page size and size of a request") {
  for (const std::size_t page_bytes : {std::size_t{4096}, std::size_t{1024}, std::size_t{65536}}) {
    fetches_everything<NoComp>(page_bytes, Digest::off);
    fetches_everything<Zlib>(page_bytes, Digest::on);
    fetches_everything<Zstd>(page_bytes, Digest::off);
  }
  fetches_everything<NoComp>(4096, Digest::on);
  fetches_everything<NoComp, FdTransport>(4096, Digest::off);
}
