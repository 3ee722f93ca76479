// SPDX-License-Identifier: MIT
//
// Where a receiver's pages go. A policy, because the question arises for every page.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>

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

template <class S>
concept HasWritesMemory = requires { typename std::bool_constant<S::writes_memory>; };

template <class S>
concept HasSink = requires(const RamMap& map, S& settings, const ThreadHook& hook) {
  { S::Sink::create(map, settings, hook) } -> std::same_as<Result<std::unique_ptr<typename S::Sink>>>;
};

template <class S>
concept HasStop = requires(typename S::Sink& sink) {
  { sink.stop() } noexcept;
};

template <class S>
concept HasSinkChannel = requires(typename S::Sink& sink) {
  { S::Sink::Channel::create(sink) } -> std::same_as<Result<typename S::Sink::Channel>>;
};

template <class S>
concept HasPlace = requires(typename S::Sink::Channel& channel, const ArrivingPages& pages, PageRuns& runs) {
  { channel.place(pages, runs) } noexcept -> std::same_as<Result<void>>;
};

template <class S>
concept HasBegin = requires(typename S::Sink::Channel& channel, const ArrivingPages& pages) {
  { channel.begin(pages) } noexcept;
};

template <class S>
concept HasArrived = requires(typename S::Sink::Channel& channel, const ArrivingPages& pages) {
  { channel.arrived(pages) } -> std::same_as<Result<void>>;
};

/// Settings that make two kinds of objects: one Sink for all channels, and for each channel a Sink::Channel.
///
/// Semantics:
///   `S::writes_memory`: the pages go into the map's memory, whose blocks must be writable. Otherwise the blocks may have
///     no memory.
///   `S::Sink::create(map, settings, hook)` makes the sink; the settings may be moved from. `hook` runs in each thread
///     that the sink starts. Map and hook outlive the sink.
///   `S::Sink::Channel::create(sink)` makes what one channel needs; the sink outlives it.
///   For each packet of a channel, in this order:
///   `place(pages, runs)` checks every offset, of normal and of zero pages: they come from the peer. It appends to `runs`
///     where the bytes of the normal pages go, page after page. Where these bytes go belongs to the channel until
///     arrived(). Where place() fails, it has changed nothing, and the channel is not called again.
///   `begin(pages)` is called before the bytes of the normal pages are read. A zero page replaces what was there.
///   `arrived(pages)` is called when all bytes are where place() has said. It is not called when the channel fails before:
///     pages of which begin() knew may then hold anything.
///   `stop()` ends the sink's own threads; it may be called again, and the destructor does the same.
/// Errors: what create() returns is what Receiver::open() returns; what place() or arrived() returns ends the migration.
///   place() fails with Errc::offset_misaligned or offset_past_block for an offset that is no page of the block
///   (RamMap::check() says so), however large.
/// Threads: a Channel's calls come from its worker, several channels' at once; the Sink's calls from the receiver's
///   caller.
/// Cost: nothing may be allocated after both kinds of create(). place() and begin() are called once a packet.
/// Models: IntoMemory, IntoHook. Exemplar: tests/exemplar/page_sink.hpp.
///   Contract: multifd/testing/page_sink_contract.hpp.
template <class S>
concept PageSink = std::move_constructible<S> && HasWritesMemory<S> && HasSink<S> && HasStop<S> && HasSinkChannel<S> &&
                   HasPlace<S> && HasBegin<S> && HasArrived<S>;

/// Fails to compile with a message that says which member to write.
template <class S>
consteval bool check_page_sink() {
  static_assert(std::move_constructible<S>, "PageSink: needs a move constructor");
  static_assert(HasWritesMemory<S>, "PageSink: needs  static constexpr bool writes_memory");
  static_assert(
      HasSink<S>,
      "PageSink: needs  struct Sink { static Result<std::unique_ptr<Sink>> create(const RamMap&, S& settings, "
      "const ThreadHook&); }");
  static_assert(HasStop<S>, "PageSink: needs  void Sink::stop() noexcept");
  static_assert(HasSinkChannel<S>, "PageSink: needs  struct Sink::Channel { static Result<Channel> create(Sink&); }");
  static_assert(HasPlace<S>,
                "PageSink: needs  Result<void> Sink::Channel::place(const ArrivingPages&, PageRuns&) noexcept");
  static_assert(HasBegin<S>, "PageSink: needs  void Sink::Channel::begin(const ArrivingPages&) noexcept");
  static_assert(HasArrived<S>, "PageSink: needs  Result<void> Sink::Channel::arrived(const ArrivingPages&)");
  return PageSink<S>;
}

}  // namespace multifd
