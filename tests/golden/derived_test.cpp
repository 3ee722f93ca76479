// SPDX-License-Identifier: MIT
//
// The library against the images of derived.hpp: what old and new peers send is read as it is meant, and what
// we send is what new peers send.
#include <doctest/doctest.h>

#include <algorithm>
#include <ostream>  // lets doctest print a std::error_code
#include <span>
#include <thread>
#include <vector>

#include "golden/derived.hpp"
#include "golden/hex_dump.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/format/init_packet.hpp"
#include "multifd/format/packet.hpp"
#include "multifd/receiver.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/algorithms.hpp"

namespace wire = multifd::wire;

namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t header_bytes = 1344;

Bytes hello() { return from_hex(64, golden::hello_channel_1); }
Bytes header(std::string_view image) { return from_hex(header_bytes, image); }

wire::PacketHeader parsed(const Bytes& bytes, std::uint32_t method) {
  const auto result = wire::parse_header(bytes, {.method = method});
  REQUIRE_MESSAGE(result.has_value(), multifd::describe(result.error()));
  return *result;
}

void append(Bytes& to, const Bytes& bytes) { to.insert(to.end(), bytes.begin(), bytes.end()); }

}  // namespace

TEST_CASE("Golden: the hello of channel 1") {
  const Bytes bytes = hello();
  const auto packet = wire::parse_init_packet(std::span(bytes).first<64>(), 2);
  REQUIRE(packet);
  CHECK(packet->id == 1);
  for (std::size_t i = 0; i < 16; ++i) CHECK(std::to_integer<std::size_t>(packet->uuid[i]) == 0x11 * i);
  CHECK(std::ranges::equal(wire::encode(*packet), bytes));
}

TEST_CASE("Golden: a SYNC from 9.2 on, read and written") {
  const Bytes bytes = header(golden::sync_9_2);
  const wire::PacketHeader sync = parsed(bytes, wire::flag_zstd);
  CHECK(sync.is_sync());
  CHECK_FALSE(sync.has_pages());
  CHECK(sync.packet_num == 42);
  Bytes ours(header_bytes);
  wire::encode_header(ours.data(), {.flags = wire::flag_sync, .packet_num = 42});
  CHECK(ours == bytes);
}

TEST_CASE("Golden: a SYNC of 7.2 with stale fields announces no payload") {
  const wire::PacketHeader sync = parsed(header(golden::sync_7_2_stale), wire::flag_zlib);
  CHECK(sync.is_sync());
  CHECK_FALSE(sync.has_pages());
  CHECK(sync.next_packet_size == 181099);
  CHECK(wire::payload_bytes(sync) == 0);
}

TEST_CASE("Golden: 7.2 lets a SYNC ride on a data packet and sends an empty one after it") {
  const Bytes bytes = header(golden::data_and_sync_7_2);
  const wire::PacketHeader both = parsed(bytes, wire::flag_zlib);
  CHECK(both.is_sync());
  CHECK(both.normal_pages == 2);
  CHECK(both.zero_pages == 0);
  CHECK(both.idstr == "pc.ram");
  CHECK(wire::payload_bytes(both) == 44);
  CHECK(wire::load_offset(bytes.data(), 0) == 0x1000);
  CHECK(wire::load_offset(bytes.data(), 1) == 0x5000);

  const wire::PacketHeader empty = parsed(header(golden::empty_after_sync_7_2), wire::flag_zlib);
  CHECK_FALSE(empty.is_sync());
  CHECK_FALSE(empty.has_pages());
  CHECK(empty.packet_num == both.packet_num);
  CHECK(wire::payload_bytes(empty) == 0);
}

TEST_CASE("Golden: a data packet with a zero list, read and written") {
  const Bytes bytes = header(golden::data_9_2);
  const wire::PacketHeader data = parsed(bytes, wire::flag_none);
  CHECK_FALSE(data.is_sync());
  CHECK(data.normal_pages == 1);
  CHECK(data.zero_pages == 2);
  CHECK(data.idstr == "pc.ram");
  CHECK(wire::payload_bytes(data) == 4096);
  Bytes ours(header_bytes);
  wire::encode_header(ours.data(), data);
  wire::store_offset(ours.data(), 0, 0x3000);
  wire::store_offset(ours.data(), 1, 0x2000);
  wire::store_offset(ours.data(), 2, 0x1000);
  CHECK(ours == bytes);
}

TEST_CASE("Golden: a Receiver takes a whole channel of old and new packets") {
  // SYNC; data with a zero list; the 7.2 pair, which without compression has flags 0x01 and whole pages; a
  // stale SYNC.
  Bytes channel = hello();
  channel[24] = std::byte{0};  // the only channel
  append(channel, header(golden::sync_9_2));
  append(channel, header(golden::data_9_2));
  append(channel, Bytes(4096, std::byte{0x33}));
  Bytes both = header(golden::data_and_sync_7_2);
  both[11] = std::byte{0x01};
  wire::store_be<std::uint32_t>(both.data() + 20, 2 * 4096);
  append(channel, both);
  append(channel, Bytes(4096, std::byte{0x11}));
  append(channel, Bytes(4096, std::byte{0x55}));
  append(channel, header(golden::empty_after_sync_7_2));
  append(channel, header(golden::sync_7_2_stale));

  // Memory with old content: zero pages must be written, the others keep theirs.
  Bytes memory(8 * 4096, std::byte{0xee});
  multifd::RamMap ram;
  REQUIRE(ram.add("pc.ram", memory));
  auto pair = multifd::testing::memory_transport_pair(1 << 20);
  {
    std::jthread peer([&, end = std::move(pair.first)]() mutable {
      (void)multifd::write_all(end, std::span<const std::byte>(channel));
      (void)end.finish();
    });
    std::vector<multifd::testing::MemoryTransport> links;
    links.push_back(std::move(pair.second));
    using Receiver = multifd::Receiver<multifd::testing::MemoryTransport, multifd::NoComp>;
    auto receiver = Receiver::open(ram, std::move(links), {.first_packet = multifd::FirstPacket::sync});
    REQUIRE(receiver);
    const auto finished = receiver->finish();
    CHECK_MESSAGE(finished.has_value(), multifd::describe(finished ? multifd::Error{} : finished.error()));
    CHECK(receiver->stats().epochs == 3);
    CHECK(receiver->stats().channels[0].normal_pages == 3);
    CHECK(receiver->stats().channels[0].zero_pages == 2);
  }
  // 0x1000 was zero in the first packet and 0x11 in the second; 0x2000 zero; 0x3000 and 0x5000 came as bytes.
  const int expected[] = {0xee, 0x11, 0x00, 0x33, 0xee, 0x55, 0xee, 0xee};
  for (std::size_t page = 0; page < 8; ++page) {
    CAPTURE(page);
    const auto bytes = std::span(memory).subspan(page * 4096, 4096);
    CHECK(std::ranges::count(bytes, static_cast<std::byte>(expected[page])) == 4096);
  }
}
