// SPDX-License-Identifier: MIT
//
// One migration over loopback TCP with the library's own Sender and Receiver, both in this process: what unit costs are
// taken from, and what predictions are held against.
#pragma once

#include <multifd/transport/interrupt.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "advise/model.hpp"
#include "common/mapping.hpp"

namespace advise {

struct Transfer {
  double seconds = 0;
  double producer_cpu_s = 0;
  double senders_cpu_s = 0;
  double receivers_cpu_s = 0;
  double packets = 0;
  double wire_bytes = 0;  ///< on the channels

  double source_cpu_s() const noexcept { return producer_cpu_s + senders_cpu_s; }
};

/// Memory for the other end, as large as what is sent.
program::Mapping memory_for(Destination destination, std::size_t bytes, const multifd::Interrupt& interrupt);

/// Which stack, and a cap on the sender (0: none).
struct TransferOptions {
  std::string compressor = "none";
  int level = 1;
  ZeroMode zero_pages = ZeroMode::none;
  unsigned channels = 1;
  std::uint64_t bandwidth = 0;
};

/// Moves `from` into `to`, which is made warm or fresh again before. Throws program::Failure, also when what arrived is
/// not what was sent.
Transfer transfer(std::span<std::byte> from, const program::Mapping& to, Destination destination,
                  const TransferOptions& options, const multifd::Interrupt& interrupt);

}  // namespace advise
