// SPDX-License-Identifier: MIT
//
// Where a receiver's pages go. A policy, because the question arises for every page.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/options.hpp"

namespace multifd {

/// The pages of one packet before they are placed: normal pages first, zero pages behind them. The offsets come from
/// the peer, and nothing about them is checked before place().
struct ArrivingPages {
  BlockId block{};
  std::span<const std::uint64_t> offsets;
  std::size_t normal_pages = 0;
  std::uint32_t channel = no_channel;
  ConstBuffers runs{};  ///< where the normal pages' bytes go, as place() has gathered them; empty before

  std::span<const std::uint64_t> normal() const noexcept { return offsets.first(normal_pages); }
  std::span<const std::uint64_t> zeros() const noexcept { return offsets.subspan(normal_pages); }
};

/// Settings that make two kinds of objects: one Sink for all channels, and for each channel a Sink::Channel.
///
/// Semantics: `S::Sink::create(map, settings, hook)`; `S::Sink::Channel::create(sink)`. For each packet of a channel,
///   in this order: `place(pages, runs)` checks every offset and appends to `runs` where the bytes of the normal pages
///   go; `begin(pages)` is called before those bytes are read, `arrived(pages)` when all of them are in their places.
///   `stop()` ends the sink's own threads.
/// `S::writes_memory`: the pages go into the map's memory, whose blocks must be writable.
/// Errors: what place() or arrived() returns ends the migration; place() must have changed nothing then.
/// Threads: a Channel's calls come from its worker, the Sink's from any.
/// Models: IntoMemory, IntoHook.
template <class S>
concept PageSink = std::move_constructible<S> &&
                   requires(const RamMap& map, S& settings, const ThreadHook& hook, typename S::Sink& sink,
                            typename S::Sink::Channel& channel, const ArrivingPages& pages, PageRuns& runs) {
                     { S::writes_memory } -> std::convertible_to<bool>;
                     {
                       S::Sink::create(map, settings, hook)
                     } -> std::same_as<Result<std::unique_ptr<typename S::Sink>>>;
                     { S::Sink::Channel::create(sink) } -> std::same_as<Result<typename S::Sink::Channel>>;
                     { channel.place(pages, runs) } noexcept -> std::same_as<Result<void>>;
                     { channel.begin(pages) } noexcept;
                     { channel.arrived(pages) } -> std::same_as<Result<void>>;
                     { sink.stop() } noexcept;
                   };

}  // namespace multifd
