// SPDX-License-Identifier: MIT
//
// Stacks under TLS, with certificates and with pre-shared keys.
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include <doctest/doctest.h>

#include "matrix/migrate.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "support/tls_links.hpp"

using namespace multifd;
using namespace test;

namespace {

template <class L, class C, class Z>
void all_credentials() {
  const Watchdog watchdog("round trips under TLS", 240s);
  Rng seeds(seed());
  for (const std::string name : {"good", "keys.psk"})
    for (const Wire wire : {Wire::tcp, Wire::unix_socket})
      for (const unsigned channels : {1u, 4u}) {
        const Case c{wire, channels, 4096, seeds()};
        if (quick() && name != "good") continue;
        CAPTURE(name);
        CAPTURE(channels);
        CAPTURE(c.seed);
        migrate<typename L::Transport, C, Z>(
            c, tls_links<L>(wire == Wire::tcp ? tcp_links(channels) : unix_links(channels), name));
      }
}

}  // namespace

TEST_CASE_TEMPLATE("A round trip under TLS ends with equal memory and counters that agree: uncompressed", L,
                   TLS_LIBRARIES) {
  all_credentials<L, NoComp, ZeroPagesNone>();
}
TEST_CASE("A round trip under TLS ends with equal memory and counters that agree: zlib") {
  all_credentials<SomeTls, Zlib, ZeroPagesLegacy>();
}
TEST_CASE("A round trip under TLS ends with equal memory and counters that agree: zstd") {
  all_credentials<SomeTls, Zstd, ZeroPagesMultifd>();
}
#else
#include <doctest/doctest.h>

TEST_CASE("TLS is not in this build") { MESSAGE("neither GnuTLS nor OpenSSL was found, or both are off"); }
#endif
