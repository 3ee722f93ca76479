// SPDX-License-Identifier: MIT
//
// What fuzzing (tests/fuzz) has found, one test for each finding.
#include <doctest/doctest.h>

#include "multifd/compress/nocomp.hpp"
#include "support/feed.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

TEST_CASE("A device state that is cut says how much of it came, however it was read") {
  // receiver_none: what came in the same read as the header was not counted.
  Bytes device_state(276 + 3, std::byte{7});
  put(device_state, 0, 0x11223344, 4);
  put(device_state, 4, 1, 4);
  put(device_state, 8, 0x40, 4);
  std::fill(device_state.begin() + 12, device_state.begin() + 276, std::byte{});
  device_state[12] = std::byte{'d'};
  put(device_state, 272, 10, 4);
  const RawStream stream = RawStream().hello(0).raw(device_state);

  const Block ram(4096);
  RamMap map;
  REQUIRE(map.add("pc.ram", ram.bytes()).has_value());
  for (const std::size_t most_io_bytes : {std::size_t{1}, std::size_t{277}, std::size_t{4096}}) {
    CAPTURE(most_io_bytes);
    auto links = memory_links(1, stream.size(), {.max_io_bytes = most_io_bytes});
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream.bytes())).has_value());
    REQUIRE(links.sender[0].finish().has_value());
    ReceiverOptions<NoComp> options;
    options.on_device_state.take = [](const DeviceState&) { return Result<void>{}; };
    auto rx = Receiver<MemoryTransport, NoComp>::open(map, std::move(links.receiver), std::move(options));
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    const auto finished = rx->finish();
    CHECK_MESSAGE(code_of(finished) == Errc::truncated_payload, text(finished));
    CHECK(finished.error().detail == 3);
  }
}
