// SPDX-License-Identifier: MIT
#include "fuzz/receiver.hpp"
#include "multifd/compress/nocomp.hpp"

namespace {

using Target = fuzz::ReceiverTarget<multifd::NoComp>;
const fuzz::Register registered({.name = "receiver_none", .test = Target::test, .mutate = Target::mutate});

}  // namespace
