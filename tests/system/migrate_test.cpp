// SPDX-License-Identifier: MIT
//
// migrate_to() and migrate_from(): whole migrations of a running guest over real sockets, and every way in which they can
// come to nothing.
#include <doctest/doctest.h>

#include <future>
#include <optional>

#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "support/leftovers.hpp"
#include "support/migrate_guest.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::chrono_literals;
using test::MigratingGuest;

namespace {

struct Stacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp, Zlib, Zstd>;
  using ZeroPages = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;
};

/// A destination that listens, and takes one guest in.
class There {
 public:
  explicit There(std::size_t pages, DestinationOptions options = {}) : guest(pages), options_(std::move(options)) {
    auto opened = Listener::listen({.host = "127.0.0.1"}, 64);
    REQUIRE(opened.has_value());
    listener_.emplace(std::move(*opened));
    auto handle = Migration::create();
    REQUIRE(handle.has_value());
    migration.emplace(std::move(*handle));
    options_.migration = &*migration;
    taken_ = std::async(std::launch::async, [this] { return migrate_from<Stacks>(guest, *listener_, options_); });
  }
  Address address() const { return listener_->local_address(); }
  Result<ArrivalReport> result() { return taken_.get(); }

  MigratingGuest guest;
  std::optional<Migration> migration;

 private:
  DestinationOptions options_;
  std::optional<Listener> listener_;
  std::future<Result<ArrivalReport>> taken_;
};

}  // namespace

TEST_CASE("A running guest goes on elsewhere, with every codec and zero mode") {
  for (const char* compression : {"none", "zlib", "zstd"})
    for (const char* zero_pages : {"none", "legacy", "multifd"}) {
      CAPTURE(compression);
      CAPTURE(zero_pages);
      const test::Watchdog watchdog("a migration");
      const test::Leftovers leftovers;
      constexpr std::size_t pages = 4096;
      MigratingGuest here(pages);
      here.boot();
      here.run(64, 50us);
      There there(pages);
      auto moved = migrate_to<Stacks>(
          here, there.address(),
          {.channels = 3, .compression = compression, .zero_pages = zero_pages, .verify = Verify::required});
      const auto taken = there.result();
      REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
      REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
      CHECK_FALSE(here.runs());
      CHECK(there.guest.runs());
      CHECK(moved->own_peer);
      CHECK(moved->pages_verified == pages);
      CHECK(taken->pages_verified == pages);
      CHECK(there.guest.devices == std::vector<std::string>{"vcpu:0", "disk:7"});
      const std::uint64_t then = here.written();
      CHECK(test::eventually([&] { return there.guest.written() > then + 10; }));
      there.guest.stop();
    }
}
