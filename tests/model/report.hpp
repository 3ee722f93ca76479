// SPDX-License-Identifier: MIT
//
// What an exploration came to, as a check of doctest.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "model/scheduler.hpp"

namespace model {

inline void report(const char* what, const Explored& explored) {
  const std::string failure = explored.failure ? explored.failure->what + ", order " + explored.failure->order : "";
  MESSAGE(std::string(what), ": ", explored.orders, " orders, ", explored.steps, " steps, the longest ",
          explored.longest);
  CHECK_MESSAGE(!explored.failure, failure);
}

}  // namespace model
