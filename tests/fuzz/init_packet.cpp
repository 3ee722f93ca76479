// SPDX-License-Identifier: MIT
//
// The hello of a channel. Input: u8 channels, then the 64 bytes (what is missing is 0).
#include "multifd/format/init_packet.hpp"

#include "fuzz/fuzz.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

void test(Span input) {
  Reader in(input);
  const unsigned channels = in.u8();
  wire::InitPacketBytes bytes{};
  std::ranges::copy(in.take(bytes.size()), bytes.begin());

  const auto packet = wire::parse_init_packet(bytes, channels);
  if (!packet) {
    require(packet.error().stage == Stage::hello, "the stage is hello");
    require(packet.error().code == Condition::peer_protocol, "a refused hello is the peer's fault");
    return;
  }
  require(packet->id < channels, "the id is one of the channels");
  // The reserved bytes are the only ones that do not matter, but for what a sender of ours announces.
  const auto again = wire::encode(*packet);
  require(std::ranges::equal(std::span(again).first(25), std::span(bytes).first(25)), "encode() is parse()'s inverse");
  if (packet->announced)
    require(packet->announced->channels == channels, "an announced channel count is compared");
  else
    for (const std::byte each : std::span(again).subspan(25)) require(each == std::byte{}, "reserved bytes are zero");
  std::fill(bytes.begin() + 25, bytes.end(), std::byte{0xff});
  require(wire::parse_init_packet(bytes, channels).has_value(), "reserved bytes are ignored");
}

const Register registered({.name = "init_packet", .test = test});

}  // namespace
