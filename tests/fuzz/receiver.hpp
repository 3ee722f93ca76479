// SPDX-License-Identifier: MIT
//
// A whole Receiver with what one or two channels bring (receiver_input.hpp). What must hold: it ends; no byte changes
// but in pages that a packet announced; the reads' sizes do not matter.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>

#include "fuzz/guarded.hpp"
#include "fuzz/receiver_input.hpp"
#include "multifd/receiver.hpp"
#include "multifd/testing/memory_transport.hpp"

namespace fuzz {

using multifd::testing::MemoryTransport;

/// The blocks: a whole packet's pages, one page, two pages.
class Destination {
 public:
  explicit Destination(std::size_t page_bytes)
      : memory_{Guarded(packet_page_bytes), Guarded(page_bytes), Guarded(2 * page_bytes)}, map_(page_bytes) {
    for (std::size_t i = 0; i < memory_.size(); ++i)
      require(map_.add(block_names[i], memory_[i].bytes()).has_value(), "RamMap::add");
  }

  const multifd::RamMap& map() const { return map_; }
  void fill(std::byte value) {
    before_ = value;
    for (const Guarded& block : memory_) block.fill(value);
  }
  bool page_untouched(std::size_t block, std::size_t offset) const {
    const auto page = memory_[block].bytes().subspan(offset, map_.page_bytes());
    return page.front() == before_ && std::memcmp(page.data(), page.data() + 1, page.size() - 1) == 0;
  }
  bool untouched() const {
    for (std::size_t block = 0; block < memory_.size(); ++block)
      for (std::size_t offset = 0; offset < memory_[block].bytes().size(); offset += map_.page_bytes())
        if (!page_untouched(block, offset)) return false;
    return true;
  }
  /// Pages that did not arrive, as the receiver sees it, are as they were.
  void check(const multifd::ReceivedPages& received, const multifd::ReceivedPages& touched) const {
    for (std::size_t block = 0; block < memory_.size(); ++block)
      for (std::size_t offset = 0; offset < memory_[block].bytes().size(); offset += map_.page_bytes())
        if (const auto id = static_cast<multifd::BlockId>(block);
            !received.test(id, offset) && !touched.test(id, offset))
          require(page_untouched(block, offset), "a page that no packet announced is untouched");
  }
  void check_guards() const {
    for (const Guarded& block : memory_) block.check();
  }
  Bytes contents() const {
    Bytes all;
    for (const Guarded& block : memory_) append(all, block.bytes());
    return all;
  }

 private:
  std::array<Guarded, 3> memory_;
  multifd::RamMap map_;
  std::byte before_{};
};

/// What became of it; equal for equal streams, whatever the reads.
struct Became {
  std::string end;
  std::uint64_t packets = 0, syncs = 0, normal_pages = 0, zero_pages = 0, epochs = 0;
  bool operator==(const Became&) const = default;

  std::string text() const {
    std::string all = end;
    for (const auto number : {packets, syncs, normal_pages, zero_pages, epochs}) all += " " + std::to_string(number);
    return all;
  }
};

template <multifd::Compressor C>
class ReceiverTarget {
 public:
  static void test(Span bytes) {
    const ReceiverInput input = ReceiverInput::read(bytes);
    static std::array<std::unique_ptr<Destination>, 4> destinations;
    auto& destination = destinations[input.more & 3];
    if (!destination) destination = std::make_unique<Destination>(input.page_bytes());

    const bool cut = input.reads() == Reads::cut;
    const Became became = run(input, *destination, cut ? 1 + input.count() * 37 : std::size_t{1} << 30);
    // Two channels may meet an error each, or a channel and the caller, and either be the first.
    if (!cut || input.channels() > 1 || input.has(ReceiverInput::manual)) return;
    const auto memory = destination->contents();
    const Became in_one = run(input, *destination, std::size_t{1} << 30);
    if (became != in_one) std::fprintf(stderr, "cut: %s\nwhole: %s\n", became.text().c_str(), in_one.text().c_str());
    require(became == in_one, "the reads' sizes do not matter");
    // memcmp: libFuzzer looks at each comparison that was compiled with it.
    const auto memory_in_one = destination->contents();
    require(std::memcmp(memory.data(), memory_in_one.data(), memory.size()) == 0, "the same memory");
  }

  static void mutate(Bytes& input, std::size_t most_bytes, Rng& rng) {
    mutate_receiver_input(input, most_bytes, rng, C::method);
  }

 private:
  using Reads = ReceiverInput::Reads;

  static Became run(const ReceiverInput& input, Destination& destination, std::size_t io_bytes) {
    if (input.has(ReceiverInput::packet_hook)) return run_into<multifd::IntoHook>(input, destination, io_bytes);
    return run_into<multifd::IntoMemory>(input, destination, io_bytes);
  }

  template <class Into>
  static Became run_into(const ReceiverInput& input, Destination& destination, std::size_t io_bytes) {
    using Receiver = multifd::Receiver<MemoryTransport, C, Into>;
    destination.fill(input.has(ReceiverInput::zeroed) ? std::byte{} : std::byte{0xee});
    std::vector<MemoryTransport> peers, links;
    for (std::size_t i = 0; i < input.channels(); ++i) {
      const Bytes& stream = input.streams[i];
      auto [near, far] = multifd::testing::memory_transport_pair(stream.size() + 1, {.max_io_bytes = io_bytes});
      require(multifd::write_all(near, Span(stream)).has_value(), "write_all");
      if (input.reads() != Reads::silence) require(near.finish().has_value(), "finish");
      peers.push_back(std::move(near));
      links.push_back(std::move(far));
    }

    std::uint64_t errors = 0;
    auto opened = Receiver::open(destination.map(), std::move(links), options<Into>(input, destination.map(), errors));
    Became became;
    if (!opened) {
      became.end = multifd::describe(opened.error());
      require(errors <= 1, "the error is told once");
    } else {
      std::unique_ptr<Receiver> receiver = std::make_unique<Receiver>(std::move(*opened));
      became.end = follow(input, *receiver);
      const auto stats = receiver->stats();
      const auto sum = multifd::total(stats.channels);
      became.packets = sum.packets;
      became.syncs = sum.syncs;
      became.normal_pages = sum.normal_pages;
      became.zero_pages = sum.zero_pages;
      became.epochs = stats.epochs;
      // After an error of its only channel, or an orderly end, no thread writes any more.
      if constexpr (Into::writes_memory) {
        if (became.end.empty() || (input.channels() == 1 && input.reads() != Reads::silence))
          destination.check(receiver->received(), receiver->touched());
      }
      if (became.end.empty()) {
        require(became.syncs == became.epochs * input.channels(), "every channel has had every epoch");
        require(errors == 0, "no error is told when there is none");
      }
      receiver.reset();
      require(errors == (became.end.empty() ? 0 : 1), "the error is told once");
    }
    if (!Into::writes_memory) require(destination.untouched(), "with a PacketHook, memory is not touched");
    destination.check_guards();
    return became;
  }

  template <class Into>
  static multifd::ReceiverOptions<C, Into> options(const ReceiverInput& input, const multifd::RamMap& map,
                                                   std::uint64_t& errors) {
    using namespace std::chrono_literals;
    // Where the streams end no call may wait: libFuzzer's time limit is below this one.
    const auto limit = input.reads() == Reads::silence ? 3ms : 600'000ms;
    multifd::ReceiverOptions<C, Into> all{.hello_timeout = limit, .barrier_timeout = limit, .progress_timeout = limit};
    if constexpr (requires { all.compressor.max_window_log; }) all.compressor.max_window_log = 20;
    if ((input.more & 8) != 0) all.uuid.kind = multifd::UuidCheck::Kind::any;
    if (input.has(ReceiverInput::manual)) all.barrier = multifd::Barrier::manual;
    if (input.has(ReceiverInput::sync_first)) all.first_packet = multifd::FirstPacket::sync;
    if (input.has(ReceiverInput::device_state)) {
      all.on_device_state.limit_bytes = 64 * 1024;
      all.on_device_state.take = [](const multifd::DeviceState& state) {
        require(!state.idstr.empty() && state.idstr.size() <= 255, "device state has a name");
        require(!state.bytes.empty() && state.bytes.size() <= 64 * 1024, "device state is within its limit");
        read_all(state.bytes);
        return multifd::Result<void>{};
      };
    }
    if constexpr (Into::writes_memory) {
      if (input.has(ReceiverInput::zeroed)) all.into.destination = multifd::DestinationMemory::zeroed;
      if ((input.more & 4) != 0) all.into.populate = multifd::Populate::ahead;
    } else {
      all.into.on_packet = [&map](multifd::ReceivedPacket& packet) {
        require(map.contains(packet.block), "a packet's block is on the map");
        require(packet.normal_pages <= packet.offsets.size() && !packet.offsets.empty(), "a packet has pages");
        require(packet.offsets.size() <= map.batch_pages(), "a packet has no more pages than fit");
        for (const std::uint64_t offset : packet.offsets)
          require(map.check(packet.block, offset).has_value(), "a packet's pages are its block's");
        read_all({packet.pages.data(), packet.normal_pages * map.page_bytes()});
        return multifd::Result<void>{};
      };
    }
    // Told by whatever thread met it, of which open() and the destructor wait for the end.
    all.on_error = [&errors](const multifd::Error&) { ++errors; };
    return all;
  }

  /// The caller's side. Returns the error, or nothing.
  template <class Receiver>
  static std::string follow(const ReceiverInput& input, Receiver& receiver) {
    if (input.has(ReceiverInput::manual)) {
      for (unsigned i = 0; i < input.count(); ++i)
        if (const auto synced = receiver.release_epoch(); !synced) return check(synced.error(), receiver);
    }
    const auto finished = receiver.finish();
    return finished ? std::string{} : check(finished.error(), receiver);
  }

  template <class Receiver>
  static std::string check(const multifd::Error& error, Receiver& receiver) {
    const std::string text = multifd::describe(error);
    require(error.code == multifd::Condition::peer_protocol || error.code == multifd::Condition::timed_out,
            text.c_str());  // anything else would be our own
    const auto again = receiver.finish();
    require(!again && multifd::describe(again.error()) == text, "the first error stays");
    return text;
  }

  static void read_all(Span bytes) {
    unsigned sum = 0;
    for (const std::byte byte : bytes) sum += std::to_integer<unsigned>(byte);
    static std::atomic<unsigned> seen;  // so that no compiler leaves the reading out
    seen.store(sum, std::memory_order_relaxed);
  }
};

}  // namespace fuzz
