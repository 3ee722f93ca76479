// SPDX-License-Identifier: MIT
//
// Senders and receivers over TLS: how they end when they are cancelled, and when the stream is cut.
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include <doctest/doctest.h>
#include <sys/socket.h>

#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/memory.hpp"
#include "support/tls_links.hpp"

using namespace multifd;
using namespace test;

namespace {

template <class L>
using Tx = Sender<typename L::Transport, NoComp, ZeroPagesNone>;
template <class L>
using Rx = Receiver<typename L::Transport, NoComp>;

}  // namespace

TEST_CASE_TEMPLATE("A sender over TLS is cancelled while it writes to a peer that does not read", L, TLS_LIBRARIES) {
  const Watchdog watchdog("cancel a sender");
  GuestRam source(16 * 1024);
  for (auto plain : {tcp_links, unix_links}) {
    auto links = tls_links<L>(plain(2));
    auto tx = Tx<L>::open(source.map, std::move(links.sender));
    REQUIRE_MESSAGE(tx.has_value(), text(tx));
    std::error_code code;
    std::thread caller([&] { code = code_of(tx->queue_range(source.block, 0, source.memory.size())); });
    CHECK(eventually([&] { return tx->stats().producer_waits > 0; }));
    const Stopwatch watch;
    tx->cancel();
    caller.join();
    CHECK(watch.elapsed() < no_hang);
    CHECK(code == Errc::cancelled);
    CHECK(code_of(tx->close_channels()) == Errc::cancelled);
  }
}

TEST_CASE_TEMPLATE("A receiver over TLS is cancelled while it waits for packets, and its peer sees a broken stream", L,
                   TLS_LIBRARIES) {
  const Watchdog watchdog("cancel a receiver");
  GuestRam source(64), target(64);
  auto links = tls_links<L>(tcp_links(2));
  auto tx = Tx<L>::open(source.map, std::move(links.sender));
  auto rx = Rx<L>::open(target.map, std::move(links.receiver));
  REQUIRE_MESSAGE(tx.has_value(), text(tx));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  std::error_code code;
  std::thread caller([&] { code = code_of(rx->finish()); });
  REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  REQUIRE(tx->close_epoch_and_wait().has_value());
  CHECK(eventually([&] { return rx->stats().epochs == 1; }));
  const Stopwatch watch;
  rx->cancel();
  caller.join();
  CHECK(watch.elapsed() < no_hang);
  CHECK(code == Errc::cancelled);
  Result<QueuedPages> queued;
  while (queued) queued = tx->queue_range(source.block, 0, source.memory.size());
  CHECK_MESSAGE(queued.error().code == Condition::peer_gone, text(queued));
}

TEST_CASE_TEMPLATE("A receiver whose channels are cut between two packets names the missing close_notify", L,
                   TLS_LIBRARIES) {
  const Watchdog watchdog("cut channels");
  GuestRam source(64), target(64);
  auto links = tls_links<L>(unix_links(2));
  auto tx = Tx<L>::open(source.map, std::move(links.sender));
  auto rx = Rx<L>::open(target.map, std::move(links.receiver));
  REQUIRE((tx.has_value() && rx.has_value()));
  REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  REQUIRE(tx->close_epoch_and_wait().has_value());
  CHECK(eventually([&] { return rx->stats().epochs == 1; }));
  tx->cancel();  // over UNIX: an end, and to a receiver without TLS an orderly one
  const auto finished = rx->finish();
  CHECK_MESSAGE(code_of(finished) == Errc::tls_truncated, text(finished));
}

TEST_CASE_TEMPLATE("A sender whose certificate the receiver refuses says so, with the channel", L, TLS_LIBRARIES) {
  const Watchdog watchdog("refused sender");
  GuestRam source(16 * 1024);
  auto [client, server] =
      handshake_both(tcp_links(2), credentials<L>("expired", TlsRole::client), credentials<L>("good", TlsRole::server));
  REQUIRE_FALSE(server.has_value());
  CHECK_MESSAGE(code_of(server) == Errc::tls_expired_certificate, text(server));
  // The refusal comes before or after the client's last handshake.
  if (!client) {
    CHECK_MESSAGE(code_of(client) == Errc::tls_refused, text(client));
    return;
  }
  auto tx = Tx<L>::open(source.map, std::move(*client));
  REQUIRE(tx.has_value());
  Result<QueuedPages> queued;
  while (queued) queued = tx->queue_range(source.block, 0, source.memory.size());
  // One channel was told, the other may only have been cut.
  const Error& error = queued.error();
  CHECK_MESSAGE((error.code == Errc::tls_refused || error.code == Condition::peer_gone), text(queued));
  CHECK(error.channel != no_channel);
}

#else
#include <doctest/doctest.h>

TEST_CASE("TLS is not in this build") { MESSAGE("neither GnuTLS nor OpenSSL was found, or both are off"); }
#endif
