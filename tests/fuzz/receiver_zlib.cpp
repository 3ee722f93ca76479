// SPDX-License-Identifier: MIT
#include "fuzz/receiver.hpp"
#include "multifd/compress/zlib.hpp"

namespace {

using Target = fuzz::ReceiverTarget<multifd::Zlib>;
const fuzz::Register registered({.name = "receiver_zlib", .test = Target::test, .mutate = Target::mutate});

}  // namespace
