// SPDX-License-Identifier: MIT
//
// Feeds hand-made streams to a Receiver and returns the outcome.
#pragma once

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/receiver.hpp"
#include "support/links.hpp"
#include "support/raw_stream.hpp"

namespace test {

/// What the peer does after its last byte.
enum class Then { end_of_stream, silence };

struct Outcome {
  Result<void> result;
  multifd::ReceiverStats stats;  ///< empty when open() failed
  std::chrono::milliseconds elapsed;
};

/// feed() for loops that have a Watchdog of their own.
template <multifd::Compressor C, multifd::PageSink Into = multifd::IntoMemory>
Outcome feed_unwatched(const multifd::RamMap& map, const std::vector<Bytes>& streams, Then then,
                       multifd::ReceiverOptions<C, Into> options = {}) {
  Links<MemoryTransport> links;
  for (const Bytes& stream : streams) {
    auto pair = memory_links(1, stream.size() + 1);
    REQUIRE(multifd::write_all(pair.sender[0], std::span<const std::byte>(stream)).has_value());
    if (then == Then::end_of_stream) REQUIRE(pair.sender[0].finish().has_value());
    links.sender.push_back(std::move(pair.sender[0]));
    links.receiver.push_back(std::move(pair.receiver[0]));
  }
  const Stopwatch watch;
  auto rx = multifd::Receiver<MemoryTransport, C, Into>::open(map, std::move(links.receiver), std::move(options));
  if (!rx) return {std::unexpected(rx.error()), {}, watch.elapsed()};
  auto finished = rx->finish();
  const auto elapsed = watch.elapsed();
  return {finished, rx->stats(), elapsed};
}

/// Gives stream i to link i, all at once.
template <multifd::Compressor C, multifd::PageSink Into = multifd::IntoMemory>
Outcome feed(const multifd::RamMap& map, const std::vector<Bytes>& streams, Then then,
             multifd::ReceiverOptions<C, Into> options = {}) {
  const Watchdog watchdog("feed a receiver");
  return feed_unwatched<C, Into>(map, streams, then, std::move(options));
}

}  // namespace test
