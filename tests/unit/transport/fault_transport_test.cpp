// SPDX-License-Identifier: MIT
#include "multifd/testing/fault_transport.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <ostream>
#include <vector>

#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/algorithms.hpp"

using namespace multifd;
using namespace std::chrono_literals;
using testing::FaultOptions;
using testing::memory_transport_pair;
using testing::MemoryTransport;
using Fault = testing::FaultTransport<MemoryTransport>;

static_assert(check_transport<Fault>());

namespace {
const std::vector<std::byte> twelve(12, std::byte{5});

Result<void> write(Fault& transport) { return write_all(transport, std::span<const std::byte>(twelve)); }
}  // namespace

TEST_CASE("FaultTransport without faults passes everything on") {
  auto [a, b] = memory_transport_pair(100);
  Fault fault(std::move(a));
  CHECK(write(fault).has_value());
  CHECK(fault.finish().has_value());
  CHECK(fault.operation_count() == 2);
  std::vector<std::byte> received(12);
  CHECK(read_exact(b, std::span<std::byte>(received)).has_value());
  CHECK(received == twelve);
}

TEST_CASE("FaultTransport fails from operation N on and leaves the stream below whole") {
  for (std::uint64_t at = 0; at < 4; ++at) {
    auto [a, b] = memory_transport_pair(100);
    Fault fault(std::move(a), {.fail_at = at, .error = {.code = Errc::corrupt_payload}, .max_io_bytes = 3});
    const auto result = write(fault);
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code == Errc::corrupt_payload);
    CHECK(fault.operation_count() == at + 1);
    CHECK_FALSE(write(fault).has_value());
    CHECK_FALSE(fault.finish().has_value());
    std::vector<std::byte> received(100);
    iovec buffer = mutable_buffer(received);
    if (at > 0) CHECK(b.read_some(std::span(&buffer, 1)) == 3 * at);
  }
}

TEST_CASE("FaultTransport counts several transports together") {
  std::atomic<std::uint64_t> operations = 0;
  auto [a, b] = memory_transport_pair(100);
  auto [c, d] = memory_transport_pair(100);
  Fault one(std::move(a), {.fail_at = 1, .operations = &operations});
  Fault other(std::move(c), {.fail_at = 1, .operations = &operations});
  CHECK(write(one).has_value());
  CHECK_FALSE(write(other).has_value());
  CHECK(write(one).has_value());  // the fault hit the other one
  CHECK_FALSE(write(other).has_value());
  CHECK(operations == 4);
}

TEST_CASE("FaultTransport cuts the stream after a number of bytes") {
  for (std::uint64_t bytes = 0; bytes <= 12; ++bytes) {
    CAPTURE(bytes);
    auto [a, b] = memory_transport_pair(100);
    Fault fault(std::move(a), {.cut_after_bytes = bytes});
    const auto result = write(fault);
    CHECK(result.has_value() == (bytes == 12));
    if (!result) CHECK(result.error().code == Errc::peer_closed);
    CHECK(write(fault).has_value() == false);
    std::byte byte;
    const auto peer = read_exact(b, std::span<std::byte>(&byte, 1));
    REQUIRE_FALSE(peer.has_value());
    CHECK(peer.error().code == Errc::peer_closed);
  }
}

TEST_CASE("FaultTransport delays") {
  auto [a, b] = memory_transport_pair(100);
  Fault fault(std::move(a), {.max_io_bytes = 4, .delay = 10ms});
  const auto start = std::chrono::steady_clock::now();
  CHECK(write(fault).has_value());
  CHECK(std::chrono::steady_clock::now() - start >= 30ms);
}
