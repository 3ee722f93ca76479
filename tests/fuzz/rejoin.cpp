// SPDX-License-Identifier: MIT
//
// How connections that return begin (format/extension.md section 19.10). Input: what the source or the destination says;
// both parsers get it. Behind a channel's REJOIN the rest is its first epoch.
#include "multifd/format/rejoin.hpp"

#include <algorithm>

#include "fuzz/fuzz.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

/// Shows what was refused. Nothing but the value of a field may say why.
void check_refused(const Error& error) {
  require(error.code == Errc::bad_extension_message && error.code == Condition::peer_protocol,
          "what is refused is the peer's fault");
  require(!describe(error).empty(), "a refusal can be shown");
}

void check_rejoin(std::span<const std::byte, wire::rejoin_bytes> said) {
  const auto rejoin = wire::parse_rejoin(said);
  if (!rejoin) {
    check_refused(rejoin.error());
    return;
  }
  require(rejoin->generation > 0, "the first connection is no REJOIN");
  if (rejoin->role == wire::RejoinRole::main)
    require(rejoin->channel == 0, "the main connection has no id");
  else
    require(rejoin->role == wire::RejoinRole::channel && rejoin->received == 0, "a channel has nothing to receive");
  require(std::ranges::equal(rejoin->session, said.subspan(12, sizeof(Uuid))), "any session is taken as it is");
  require(std::ranges::equal(wire::encode_rejoin(*rejoin).view(), said), "a REJOIN is what we would write");
}

void check_answer(std::span<const std::byte, wire::rejoin_answer_bytes> said) {
  const auto answer = wire::parse_rejoin_answer(said);
  if (!answer) {
    check_refused(answer.error());
    return;
  }
  require(!wire::to_string(answer->verdict).empty(), "a verdict has a name");
  require(std::ranges::equal(wire::encode_rejoin_answer(*answer).view(), said), "an answer is what we would write");
}

void test(Span input) {
  if (input.size() >= wire::rejoin_bytes) check_rejoin(input.first<wire::rejoin_bytes>());
  if (input.size() >= wire::rejoin_answer_bytes) check_answer(input.first<wire::rejoin_answer_bytes>());
}

const Register registered({.name = "rejoin", .test = test});

}  // namespace
