// SPDX-License-Identifier: MIT
//
// What a destination says to a source on the main connection. Input: u8 size of the pieces, then the bytes.
#include "multifd/qemu/return_path.hpp"

#include <string>

#include "fuzz/fuzz.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

/// All results of a parser, as text, and the bytes that it took.
struct Said {
  std::string text;
  std::size_t bytes = 0;
  bool shut = false;
  bool operator==(const Said&) const = default;
};

void check(const qemu::ReturnMessage& message) {
  const bool same =
      message.type == qemu::return_shut   ? std::ranges::equal(qemu::encode_shut(message.value), message.bytes)
      : message.type == qemu::return_pong ? std::ranges::equal(qemu::encode_pong(message.value), message.bytes)
                                          : std::ranges::equal(qemu::encode_switchover_ack(), message.bytes);
  require(same, "a message that was accepted is what we would write");
}

Said parse(Span input, std::size_t piece) {
  Said said;
  qemu::ReturnPathParser parser;
  for (;;) {
    const auto message = parser.next();
    if (!message) {
      said.text += describe(message.error());
      require(!parser.next().has_value() && parser.room().empty(), "an error stays");
      break;
    }
    if (*message) {
      check(**message);
      said.text += std::to_string((*message)->type) + ":" + std::to_string((*message)->value) + " ";
      said.bytes += (*message)->bytes.size();
      continue;
    }
    if (input.empty()) break;
    const auto room = parser.room();
    require(!room.empty(), "a parser that wants more has room for it");
    const auto now = input.first(std::min({piece, room.size(), input.size()}));
    std::ranges::copy(now, room.begin());
    parser.commit(now.size());
    input = input.subspan(now.size());
  }
  said.shut = parser.shut();
  return said;
}

void test(Span input) {
  Reader in(input);
  const std::size_t piece = 1 + in.u8();
  const Span bytes = in.rest();
  const Said whole = parse(bytes, bytes.size() + 1);
  require(whole == parse(bytes, piece) && whole == parse(bytes, 1), "the pieces do not matter");
}

const Register registered({.name = "return_path", .test = test});

}  // namespace
