// SPDX-License-Identifier: MIT
#include "fuzz/receiver.hpp"
#include "multifd/compress/igzip.hpp"

namespace {

using Target = fuzz::ReceiverTarget<multifd::Igzip>;
const fuzz::Register registered({.name = "receiver_igzip", .test = Target::test, .mutate = Target::mutate});

}  // namespace
