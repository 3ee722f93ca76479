// SPDX-License-Identifier: MIT
//
// What a destination says to a source on the main connection. Input: u8 size of the pieces (even: the extension of our
// own is taken), then the bytes.
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
  if (message.type == wire::extension_number) {
    const auto again = wire::parse_extension(message.bytes.subspan(4), wire::Towards::source);
    require(again && again->kind == message.message.kind && again->number == message.message.number &&
                again->body.data() == message.message.body.data(),
            "a message of the extension is in its bytes");
    return;
  }
  const bool same =
      message.type == qemu::return_shut   ? std::ranges::equal(qemu::encode_shut(message.value), message.bytes)
      : message.type == qemu::return_pong ? std::ranges::equal(qemu::encode_pong(message.value), message.bytes)
                                          : std::ranges::equal(qemu::encode_switchover_ack(), message.bytes);
  require(same, "a message that was accepted is what we would write");
}

Said parse(Span input, std::size_t piece, bool extension) {
  Said said;
  qemu::ReturnPathParser parser;
  if (extension) parser.take_extension();
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
  const bool extension = piece % 2 == 1;
  const Said whole = parse(bytes, bytes.size() + 1, extension);
  require(whole == parse(bytes, piece, extension) && whole == parse(bytes, 1, extension), "the pieces do not matter");
  if (!extension) require(!whole.text.contains("extension"), "nobody is taken for an own peer unasked");
}

const Register registered({.name = "return_path", .test = test});

}  // namespace
