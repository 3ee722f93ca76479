// SPDX-License-Identifier: MIT
#include "fuzz/receiver.hpp"
#include "multifd/compress/zstd.hpp"

namespace {

using Target = fuzz::ReceiverTarget<multifd::Zstd>;
const fuzz::Register registered({.name = "receiver_zstd", .test = Target::test, .mutate = Target::mutate});

}  // namespace
