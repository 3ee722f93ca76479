// SPDX-License-Identifier: MIT
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include <doctest/doctest.h>

#include "multifd/testing/transport_contract.hpp"
#include "multifd/transport/any_transport.hpp"
#include "support/tls_links.hpp"

using namespace multifd;
using namespace test;

namespace {

template <class L>
void check(const std::string& name, Wire wire) {
  // Over a UNIX socket, too, a cut shows: there is no close_notify.
  const ContractReport report = check_transport_contract<typename L::Transport>(
      [&] {
        auto links = tls_links<L>(wire == Wire::tcp ? tcp_links(1) : unix_links(1), name);
        return std::pair(std::move(links.sender.front()), std::move(links.receiver.front()));
      },
      {.after_shutdown = AfterShutdown::error, .patience = 20s});
  CHECK_MESSAGE(report.ok(), report.text());
  CHECK(report.notes.empty());
}

}  // namespace

TEST_CASE_TEMPLATE("TLS with certificates over TCP keeps the Transport contract", L, TLS_LIBRARIES) {
  check<L>("good", Wire::tcp);
}
TEST_CASE_TEMPLATE("TLS with certificates over UNIX keeps the Transport contract", L, TLS_LIBRARIES) {
  check<L>("good", Wire::unix_socket);
}
TEST_CASE_TEMPLATE("TLS with pre-shared keys keeps the Transport contract", L, TLS_LIBRARIES) {
  check<L>("keys.psk", Wire::tcp);
}

TEST_CASE_TEMPLATE("AnyTransport keeps the Transport contract with TLS in it", L, TLS_LIBRARIES) {
  using Any = AnyTransport<FdTransport, typename L::Transport>;
  const ContractReport report = check_transport_contract<Any>(
      [] {
        auto links = tls_links<L>(tcp_links(1), "keys.psk");
        std::pair<Any, Any> pair(std::move(links.sender.front()), std::move(links.receiver.front()));
        CHECK(pair.first.secured());
        CHECK(pair.second.cipher().starts_with("TLS1."));
        return pair;
      },
      {.after_shutdown = AfterShutdown::error, .patience = 20s});
  CHECK_MESSAGE(report.ok(), report.text());
  CHECK(report.notes.empty());
}
#else
#include <doctest/doctest.h>

TEST_CASE("TLS is not in this build") { MESSAGE("neither GnuTLS nor OpenSSL was found, or both are off"); }
#endif
