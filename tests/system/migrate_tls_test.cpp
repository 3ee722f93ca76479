// SPDX-License-Identifier: MIT
//
// migrate_to() and migrate_from() under TLS, and what each side says when only one of them has it: who does not speak TLS
// is a stranger to a destination that does, and the other way round, because nothing that was said before can be trusted.
#include <doctest/doctest.h>

#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)

#include <future>
#include <string>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "multifd/transport/any_transport.hpp"
#include "multifd/transport/connect.hpp"
#include "support/leftovers.hpp"
#include "support/migrate_guest.hpp"
#include "support/tls_links.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 256;

struct Stacks {
  using Link = AnyTransport<FdTransport, SomeTls::Transport>;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};
using Link = Stacks::Link;

/// Connects a source's main connection and two channels, with TLS or without.
Result<SourceLinks<Link>> connect_source(const Address& address, const SomeTls::Credentials* credentials) {
  MULTIFD_TRY_ASSIGN(FdTransport main, connect_to(address, {.connect_timeout = 5s}));
  MULTIFD_TRY_ASSIGN(std::vector<FdTransport> channels, connect_channels(address, 2, {.connect_timeout = 5s}));
  if (credentials == nullptr) return SourceLinks<Link>{std::move(main), Link::all_of(std::move(channels))};
  const TlsOptions options{.hostname = "localhost", .handshake_timeout = 5s};
  // The main connection first: a destination knows its channels by it.
  std::vector<FdTransport> first;
  first.push_back(std::move(main));
  MULTIFD_TRY_ASSIGN(std::vector<SomeTls::Transport> secured, tls_handshakes(std::move(first), *credentials, options));
  MULTIFD_TRY_ASSIGN(std::vector<SomeTls::Transport> others,
                     tls_handshakes(std::move(channels), *credentials, options));
  return SourceLinks<Link>{std::move(secured.front()), Link::all_of(std::move(others))};
}

struct Outcome {
  Result<MigrationReport> sent = std::unexpected(Error{});
  Result<ArrivalReport> taken = std::unexpected(Error{});
  std::string strangers;  ///< what the destination has said of them
};

/// One try, with TLS at the sides that have it.
Outcome try_once(MigratingGuest& here, MigratingGuest& there, bool source_has, bool destination_has) {
  const SomeTls::Credentials client = credentials("good", TlsRole::client),
                             server = credentials("good", TlsRole::server);
  auto listener = Listener::listen({.host = "127.0.0.1"}, 16);
  REQUIRE(listener.has_value());
  auto handle = Migration::create();
  REQUIRE(handle.has_value());
  Outcome outcome;
  const DestinationOptions options{
      .on_stranger = [&](const char* why) { outcome.strangers += std::string(why) + "\n"; }, .migration = &*handle};
  auto taking = std::async(std::launch::async, [&]() -> Result<ArrivalReport> {
    if (!destination_has) return migrate_from<Stacks>(there, *listener, options);
    MULTIFD_TRY_ASSIGN(auto acceptor, TlsAcceptorOf<SomeTls::Credentials>::open(
                                          *listener, {.credentials = &server, .on_refused = [&](const Error& error) {
                                                        outcome.strangers += describe(error) + "\n";
                                                      }}));
    return migrate_from<Stacks>(there, acceptor, options);
  });
  auto links = connect_source(listener->local_address(), source_has ? &client : nullptr);
  if (links)
    outcome.sent = migrate_to<Stacks>(here, std::move(*links), {.verify = Verify::required, .answer_timeout = 5s});
  else
    outcome.sent = std::unexpected(links.error());
  // A destination that has met strangers alone goes on waiting.
  if (!outcome.sent) handle->cancel();
  outcome.taken = taking.get();
  return outcome;
}

}  // namespace

TEST_CASE("A guest goes on elsewhere under TLS, and SETTINGS say so") {
  const Watchdog watchdog("a migration under TLS");
  MigratingGuest here(pages), there(pages);
  here.boot();
  here.run(16, 50us);
  const Outcome outcome = try_once(here, there, true, true);
  REQUIRE_MESSAGE(outcome.sent.has_value(), text(outcome.sent));
  REQUIRE_MESSAGE(outcome.taken.has_value(), text(outcome.taken));
  CHECK(there.runs());
  CHECK(there.torn_when_resumed == 0);
  CHECK(outcome.sent->pages_verified == pages);
}

TEST_CASE("TLS at one side alone: no page travels, both sides have a text, the guest runs on") {
  const Watchdog watchdog("TLS at one side");
  for (const bool source_has : {true, false}) {
    CAPTURE(source_has);
    const Leftovers leftovers;
    {
      MigratingGuest here(pages), there(pages);
      here.boot();
      here.run(16, 50us);
      const Outcome outcome = try_once(here, there, source_has, !source_has);
      REQUIRE_FALSE(outcome.sent.has_value());
      CHECK_MESSAGE(code_of(outcome.taken) == Errc::cancelled, text(outcome.taken));
      MESSAGE("source: ", text(outcome.sent), "; destination: ", outcome.strangers);
      CHECK(outcome.strangers.contains("TLS"));
      CHECK_MESSAGE(text(outcome.sent).contains("TLS"), text(outcome.sent));
      CHECK_MESSAGE(outcome.sent.error().code == Condition::peer_gone, text(outcome.sent));
      CHECK(here.runs());
      CHECK_FALSE(here.logging());
      CHECK_FALSE(there.runs());
    }
    CHECK(leftovers.no_thread());
    CHECK(leftovers.no_descriptor());
  }
}

#endif
