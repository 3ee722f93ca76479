// SPDX-License-Identifier: MIT
//
// The smallest user of the installed library.
#include <cstdio>

#include "multifd/error.hpp"
#include "multifd/version.hpp"
#include "multifd/zero/policy.hpp"

int main() {
  static_assert(multifd::check_zero_page_policy<multifd::ZeroPagesMultifd>());
  const multifd::Error error{.code = multifd::Errc::bad_magic, .stage = multifd::Stage::hello};
  if (error.code != multifd::Condition::peer_protocol) return 1;
  std::printf("%s\nconsumer: ok\n", multifd::describe(error).c_str());
}
