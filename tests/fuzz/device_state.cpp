// SPDX-License-Identifier: MIT
//
// A device-state packet's header. Input: be32 limit, then the 276 bytes (what is missing is 0).
#include "multifd/format/device_state.hpp"

#include <memory>

#include "fuzz/fuzz.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

void test(Span input) {
  Reader in(input);
  const std::size_t limit = in.number(4);
  constexpr std::size_t size = wire::device_state_header_bytes;
  // Of its own on the heap, so that one byte too far is seen.
  const auto bytes = std::make_unique<std::byte[]>(size);
  std::ranges::copy(in.take(size), bytes.get());

  const auto header = wire::parse_device_state_header(std::span<const std::byte, size>(bytes.get(), size), limit);
  if (!header) {
    require(header.error().code == Condition::peer_protocol, "a refused header is the peer's fault");
    return;
  }
  require(header->payload_bytes > 0 && header->payload_bytes <= limit, "the payload is within the limit");
  require(!header->idstr.empty() && header->idstr.size() <= multifd::max_idstr_length, "the name has its length");
  require(header->idstr.find('\0') == header->idstr.npos, "the name has no NUL");
  std::array<std::byte, size> again;
  const std::byte nothing{};
  wire::encode_device_state_header(again.data(),
                                   {.idstr = header->idstr,
                                    .instance_id = header->instance_id,
                                    .bytes = {&nothing, header->payload_bytes}});  // only its size is used
  const auto same = wire::parse_device_state_header(again, limit);
  require(same && same->idstr == header->idstr && same->instance_id == header->instance_id &&
              same->payload_bytes == header->payload_bytes,
          "what was accepted means the same when it is written again");
}

const Register registered({.name = "device_state", .test = test});

}  // namespace
