// SPDX-License-Identifier: MIT
//
// The library against what real QEMUs sent while their guests ran (README.md here): the main streams through the parser,
// the whole migrations through a Receiver, and the packets themselves against what format/versions.md says of each
// version.
#include "golden/captured.hpp"

#include <doctest/doctest.h>

#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/qemu/main_stream.hpp"
#include "multifd/qemu/stream_end.hpp"
#include "multifd/receiver.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

namespace qemu = multifd::qemu;
namespace wire = multifd::wire;
using golden::Capture;
using golden::captures;
using namespace test;

namespace {

constexpr std::size_t page_bytes = 4096;
constexpr std::size_t header_bytes = 1344;
using Bytes = std::vector<std::byte>;
using Span = std::span<const std::byte>;

/// Gives a main stream to a parser in pieces of random size, and each element to `handle`.
template <class Handle>
qemu::MainStreamParser parse_main(const Capture& capture, Rng& rng, std::size_t most_bytes, Handle&& handle) {
  auto parser = qemu::MainStreamParser::create({});
  REQUIRE(parser.has_value());
  Span left = capture.main;
  for (;;) {
    auto element = parser->next();
    if (!element) FAIL(text(element), " ", std::string(parser->subject()));
    if (*element) {
      handle(*parser, **element);
    } else if (left.empty()) {
      REQUIRE_MESSAGE(parser->finish().has_value(), text(parser->finish()));
      return std::move(*parser);
    } else {
      const std::span<std::byte> room = parser->room();
      const std::size_t bytes = std::min({left.size(), room.size(), 1 + below(rng, most_bytes)});
      std::ranges::copy(left.first(bytes), room.begin());
      parser->commit(bytes);
      left = left.subspan(bytes);
    }
  }
}

// ---- packets, read with nothing of the library but byte order ------------------------------------------------------

struct RawPacket {
  std::size_t channel;
  std::size_t epoch;  ///< SYNCs before it on its channel
  Span header;        ///< all of it
  Span payload;
  std::uint32_t flags, alloc, normal, size, zero;
  std::uint64_t number;

  bool is_sync() const { return (flags & 1) != 0; }
  bool has_pages() const { return normal + zero != 0; }
  std::uint64_t offset(std::size_t slot) const { return wire::load_be<std::uint64_t>(&header[320 + 8 * slot]); }
  std::string name() const { return reinterpret_cast<const char*>(&header[64]); }
};

std::vector<RawPacket> packets_of(const Capture& capture, std::size_t channel) {
  std::vector<RawPacket> packets;
  Span left = Span(capture.channels[channel]).subspan(64);
  std::size_t epoch = 0;
  while (!left.empty()) {
    REQUIRE(left.size() >= header_bytes);
    const auto word = [&](std::size_t at) { return wire::load_be<std::uint32_t>(&left[at]); };
    REQUIRE(word(0) == 0x11223344);
    REQUIRE(word(4) == 1);
    const std::size_t payload_bytes = word(16) > 0 ? word(20) : 0;
    REQUIRE(left.size() >= header_bytes + payload_bytes);
    packets.push_back({channel, epoch, left.first(header_bytes), left.subspan(header_bytes, payload_bytes), word(8),
                       word(12), word(16), word(20), word(32), wire::load_be<std::uint64_t>(&left[24])});
    epoch += packets.back().is_sync();
    left = left.subspan(header_bytes + payload_bytes);
  }
  return packets;
}

bool all_zero(Span bytes) {
  return std::ranges::all_of(bytes, [](std::byte each) { return each == std::byte{}; });
}

std::uint32_t method_of(const Capture& capture) {
  const std::string& name = capture.how.at("compression");
  return name == "zlib" ? 2 : name == "zstd" ? 4 : 0;
}

/// Whether a page comes twice in one epoch (format/packets.md section 6).
bool repeats_pages(const Capture& capture, Rng& rng) {
  std::set<std::tuple<std::size_t, std::string, std::uint64_t>> seen;
  bool repeated = false;
  for (std::size_t channel = 0; channel < capture.channels.size(); ++channel)
    for (const RawPacket& packet : packets_of(capture, channel))
      for (std::size_t slot = 0; slot < packet.normal + packet.zero; ++slot)
        repeated |= !seen.emplace(packet.epoch, packet.name(), packet.offset(slot)).second;
  std::size_t epoch = 0;
  parse_main(capture, rng, 1000, [&](auto&, const qemu::Element& element) {
    if (element.kind == qemu::ElementKind::zero_page)
      repeated |= !seen.emplace(epoch, std::string(element.name), element.offset).second;
    epoch += element.closes_epoch;
  });
  return repeated;
}

// ---- whole migrations ----------------------------------------------------------------------------------------------

/// What becomes of zero records: they can be dropped, so that tests see that captures notice.
enum class ZeroRecords { apply, drop };

struct Replay {
  ZeroRecords zero_records = ZeroRecords::apply;
  multifd::Barrier barrier = multifd::Barrier::manual;  ///< automatic: the channels begin when the main stream is over
  multifd::DestinationMemory destination = multifd::DestinationMemory::unknown;
  multifd::FirstPacket first_packet = multifd::FirstPacket::sync;
  std::byte before{};  ///< what memory holds before
  std::size_t most_io_bytes = ~std::size_t{0};

  struct Outcome {
    std::string different;  ///< blocks that are not what the source had
    std::uint64_t zero_records = 0;
    std::uint64_t zero_records_over_data = 0;  ///< for pages that had come as bytes
    multifd::ReceiverStats stats;
  };

  template <multifd::Compressor C>
  Outcome run(const Capture& capture, Rng& rng) const {
    std::vector<Block> memory;
    multifd::RamMap map;
    std::optional<multifd::Receiver<MemoryTransport, C>> receiver;
    Outcome outcome;
    const auto parser = parse_main(capture, rng, 1000, [&](qemu::MainStreamParser& main, const qemu::Element& element) {
      if (element.kind == qemu::ElementKind::block) {
        memory.emplace_back(element.size);
        if (before != std::byte{}) memory.back().fill(before);
        REQUIRE(map.add(element.name, memory.back().bytes()).has_value());
        if (main.block_list_complete() && barrier == multifd::Barrier::manual) receiver.emplace(open<C>(capture, map));
      }
      if (element.kind == qemu::ElementKind::zero_page) {
        const auto block = static_cast<multifd::BlockId>(element.block);
        ++outcome.zero_records;
        const auto bytes = memory[element.block].page(element.offset / page_bytes, page_bytes);
        if (receiver) {
          outcome.zero_records_over_data += receiver->received().test(block, element.offset) && !all_zero(bytes);
          if (zero_records == ZeroRecords::apply) REQUIRE(receiver->apply_zero(block, element.offset).has_value());
        } else if (zero_records == ZeroRecords::apply) {
          std::ranges::fill(bytes, std::byte{});
        }
      }
      if (element.closes_epoch && barrier == multifd::Barrier::manual) {
        const auto synced = receiver->release_epoch();
        REQUIRE_MESSAGE(synced.has_value(), text(synced));
      }
    });
    if (!receiver) receiver.emplace(open<C>(capture, map));
    const auto finished = receiver->finish();
    REQUIRE_MESSAGE(finished.has_value(), text(finished));
    outcome.stats = receiver->stats();
    for (std::size_t i = 0; i < memory.size(); ++i) {
      const std::string name(parser.blocks()[i].idstr);
      REQUIRE(capture.blocks.contains(name));
      CHECK(capture.blocks.at(name).bytes == memory[i].size());
      if (multifd::digest_of(memory[i].bytes()) != capture.blocks.at(name).digest) outcome.different += name + " ";
    }
    return outcome;
  }

  Outcome operator()(const Capture& capture, Rng& rng) const {
    switch (method_of(capture)) {
      case 2: return run<multifd::Zlib>(capture, rng);
      case 4: return run<multifd::Zstd>(capture, rng);
      default: return run<multifd::NoComp>(capture, rng);
    }
  }

 private:
  template <multifd::Compressor C>
  multifd::Receiver<MemoryTransport, C> open(const Capture& capture, const multifd::RamMap& map) const {
    auto opened = multifd::Receiver<MemoryTransport, C>::open(
        map, links(capture), {.barrier = barrier, .into = {.destination = destination}, .first_packet = first_packet});
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    return std::move(*opened);
  }

  /// The captured channels, each already written to its end; the last one first, as arrival is not in order of ids.
  std::vector<MemoryTransport> links(const Capture& capture) const {
    std::vector<MemoryTransport> links;
    for (std::size_t i = capture.channels.size(); i-- > 0;) {
      const Bytes& stream = capture.channels[i];
      auto [near, far] = multifd::testing::memory_transport_pair(stream.size() + 1, {.max_io_bytes = most_io_bytes});
      REQUIRE(multifd::write_all(near, Span(stream)).has_value());
      REQUIRE(near.finish().has_value());
      links.push_back(std::move(far));
    }
    return links;
  }
};

/// The capture with all zero lists emptied: what a receiver before QEMU 9.0 makes of them.
Capture without_zero_lists(Capture capture) {
  for (std::size_t channel = 0; channel < capture.channels.size(); ++channel)
    for (const RawPacket& packet : packets_of(capture, channel))
      wire::store_be<std::uint32_t>(const_cast<std::byte*>(&packet.header[32]), 0);
  return capture;
}

/// The capture as one channel that has the packets of all, sorted by `key`, and one SYNC at the end. Not for compression, which has
/// a state per channel.
template <class Key>
Capture merged(Capture capture, Key&& key) {
  std::vector<RawPacket> packets;
  for (std::size_t channel = 0; channel < capture.channels.size(); ++channel)
    std::ranges::copy(packets_of(capture, channel), std::back_inserter(packets));
  std::ranges::sort(packets, {}, [&](const RawPacket& packet) { return std::pair(key(packet), packet.number); });
  Bytes stream(64);
  wire::store_be<std::uint32_t>(&stream[0], 0x11223344);
  wire::store_be<std::uint32_t>(&stream[4], 1);
  for (const RawPacket& packet : packets) {
    if (packet.is_sync()) continue;
    stream.insert(stream.end(), packet.header.begin(), packet.header.end());
    stream.insert(stream.end(), packet.payload.begin(), packet.payload.end());
  }
  Bytes sync(header_bytes);
  wire::encode_header(sync.data(), {.flags = wire::flag_sync});
  stream.insert(stream.end(), sync.begin(), sync.end());
  capture.channels = {std::move(stream)};
  return capture;
}

}  // namespace

TEST_CASE("Captured: all three QEMUs, all codecs, both zero modes, both SYNC styles are there") {
  std::set<std::string> machines, codecs, zero_modes, programs, return_paths;
  for (const Capture& capture : captures()) {
    machines.insert(capture.how.at("machine").substr(capture.how.at("machine").rfind('-') + 1));
    codecs.insert(capture.how.at("compression"));
    zero_modes.insert(capture.how.at("zero-pages"));
    return_paths.insert(capture.how.at("return-path"));
    programs.insert(capture.how.at("qemu").substr(0, 4));
  }
  CHECK(captures().size() >= 13);
  CHECK(programs == std::set<std::string>{"7.2.", "10.0", "11.1"});
  CHECK(machines == std::set<std::string>{"7.2", "8.1", "10.0", "11.1"});
  CHECK(codecs == std::set<std::string>{"none", "zlib", "zstd"});
  CHECK(zero_modes == std::set<std::string>{"legacy", "multifd"});
  CHECK(return_paths == std::set<std::string>{"on", "off"});
}

TEST_CASE("Captured main streams come out of the parser as they went in, whatever the pieces") {
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    for (const std::size_t most_bytes : {std::size_t{1}, std::size_t{17}, std::size_t{5000}, std::size_t{1} << 20}) {
      if (most_bytes == 1 && !capture.name.ends_with(quick() ? "7.2-zlib" : "zlib")) continue;  // slow
      CAPTURE(capture.name);
      CAPTURE(most_bytes);
      Bytes out;
      std::size_t ended_early = 0;
      const auto parser = parse_main(capture, rng, most_bytes, [&](auto& so_far, const qemu::Element& element) {
        out.insert(out.end(), element.bytes.begin(), element.bytes.end());
        if (out.size() < capture.main.size()) ended_early += so_far.tail() == qemu::StreamTail::description;
      });
      CHECK(out == capture.main);
      CHECK(parser.tail() == qemu::StreamTail::description);
      CHECK(ended_early == 0);
    }
  }
}

TEST_CASE("A captured main stream is whole at its end mark and at its description's end, and at no other byte") {
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    CAPTURE(capture.name);
    Bytes devices;
    parse_main(capture, rng, 1 << 20, [&](auto&, const qemu::Element& element) {
      if (element.kind == qemu::ElementKind::device_state)
        devices.insert(devices.end(), element.data.begin(), element.data.end());
    });
    std::vector<std::size_t> marks, descriptions;
    qemu::StreamEnd end;
    for (std::size_t i = 0; i < devices.size(); ++i) {
      end.feed(Span(devices).subspan(i, 1));
      if (end.tail(true) == qemu::StreamTail::end_mark) marks.push_back(i + 1);
      if (end.tail(true) == qemu::StreamTail::description) descriptions.push_back(i + 1);
    }
    CHECK(descriptions == std::vector{devices.size()});
    REQUIRE(marks.size() == 1);
    // 06, length, and the rest is text.
    CHECK(wire::load_be<std::uint32_t>(&devices[marks[0] + 1]) == devices.size() - marks[0] - 5);
  }
}

TEST_CASE("Captured main streams have the elements of their versions, in their order") {
  using enum qemu::ElementKind;
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    CAPTURE(capture.name);
    std::string shape;  // one letter per element
    std::vector<std::uint16_t> commands;
    std::size_t epochs = 0, continued_parts = 0;
    auto before = header;
    std::set<std::uint32_t> section_ids;
    Bytes devices;
    const auto parser = parse_main(capture, rng, 100, [&](auto&, const qemu::Element& element) {
      shape += "hckSPEMbzpxf.F|"[static_cast<std::size_t>(element.kind)];
      if (element.kind == command) commands.push_back(element.command);
      if (element.kind == footer || element.kind == section_part) section_ids.insert(element.section_id);
      if (element.kind == device_state) devices.insert(devices.end(), element.data.begin(), element.data.end());
      if (element.kind == zero_page) {
        CHECK(element.size == page_bytes);
        continued_parts += before == section_part && element.continues;
      }
      epochs += element.closes_epoch;
      before = element.kind;
    });
    // Consecutive repetitions once: h c k* S M b+ ( z* f* . F ) and so on.
    shape.erase(std::ranges::unique(shape).begin(), shape.end());
    CAPTURE(shape);
    std::string_view rest = shape;
    const auto eat = [&rest](char letter) {
      const bool there = rest.starts_with(letter);
      if (there) rest.remove_prefix(1);
      return there;
    };
    const auto eat_section = [&] {
      while (eat('z') || eat('f')) {
      }
      REQUIRE(eat('.'));
      REQUIRE(eat('F'));
    };
    REQUIRE(eat('h'));
    REQUIRE(eat('c'));
    CHECK(eat('k') == capture.has_return_path());
    REQUIRE(eat('S'));
    REQUIRE(eat('M'));
    REQUIRE(eat('b'));
    eat_section();
    std::size_t parts = 0;
    for (; eat('P'); ++parts) eat_section();
    CHECK(parts >= 4);
    CHECK(eat('k') == capture.announces_switchover());
    REQUIRE(eat('E'));
    eat_section();
    CHECK(eat('|'));
    CHECK(rest.empty());

    std::vector<std::uint16_t> expected;
    if (capture.has_return_path()) expected = {qemu::command_open_return_path, qemu::command_ping};
    if (capture.announces_switchover()) expected.push_back(qemu::command_switchover_start);
    CHECK(commands == expected);
    CHECK(parser.return_path_open() == capture.has_return_path());
    CHECK(parser.ram_complete());
    CHECK(parser.machine_type() == capture.how.at("machine"));
    CHECK(parser.sync_style() ==
          (capture.machine_is("7.2") ? multifd::SyncStyle::per_section : multifd::SyncStyle::per_round));
    CHECK(section_ids == std::set<std::uint32_t>{capture.from_qemu_7_2() ? 2u : 1u});
    CHECK((shape.find('f') != shape.npos) == !capture.machine_is("7.2"));
    if (capture.machine_is("7.2")) CHECK(epochs == parts + 2);
    if (capture.from_qemu_7_2()) CHECK(continued_parts > 0);
    CHECK((shape.find('z') != shape.npos) == (capture.how.at("zero-pages") == "legacy"));
    for (std::size_t channel = 0; channel < capture.channels.size(); ++channel) {
      const auto packets = packets_of(capture, channel);
      CHECK(static_cast<std::size_t>(std::ranges::count_if(packets, &RawPacket::is_sync)) == epochs);
    }

    std::uint64_t bytes = 0;
    for (const qemu::BlockInfo& block : parser.blocks()) {
      REQUIRE(capture.blocks.contains(std::string(block.idstr)));
      CHECK(capture.blocks.at(std::string(block.idstr)).bytes == block.used_length);
      bytes += block.used_length;
    }
    CHECK(parser.ram_bytes() == bytes);
    CHECK(parser.blocks().size() == capture.blocks.size());

    // Section 9.10.
    const std::string_view tail(reinterpret_cast<const char*>(devices.data()), devices.size());
    const std::size_t json = tail.rfind(std::string_view("\0\6", 2));
    REQUIRE(json != tail.npos);
    if (capture.from_qemu_7_2()) {
      CHECK(tail.substr(json + 6).starts_with(R"({"page_size": 4096, "devices": [)"));
    } else {
      CHECK(tail.substr(json + 6, 100).find(R"("configuration")") != tail.npos);
    }
  }
}

TEST_CASE("Captured main streams that end too early are known to be cut, up to the end of RAM") {
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    CAPTURE(capture.name);
    std::size_t ram_end = 0, at = 0;
    parse_main(capture, rng, 100, [&](auto& parser, const qemu::Element& element) {
      at += element.bytes.size();
      if (!parser.ram_complete()) ram_end = at;
    });
    for (int i = 0; i < 30; ++i) {
      const std::size_t bytes = i == 0 ? ram_end : below(rng, ram_end + 1);
      CAPTURE(bytes);
      auto parser = qemu::MainStreamParser::create({});
      REQUIRE(parser.has_value());
      REQUIRE(parser->room().size() >= bytes);
      std::ranges::copy(Span(capture.main).first(bytes), parser->room().begin());
      parser->commit(bytes);
      for (auto element = parser->next(); element.value();) element = parser->next();
      CHECK(code_of(parser->finish()) == multifd::Errc::truncated_stream);
    }
  }
}

TEST_CASE("Captured packets have the fields that the formats' text says, version by version") {
  for (const Capture& capture : captures()) {
    const bool old = capture.from_qemu_7_2();
    const std::uint32_t method = method_of(capture);
    std::set<std::uint64_t> numbers;
    std::size_t data_and_sync = 0, stale_sizes = 0, zero_only = 0, packet_count = 0;
    for (std::size_t channel = 0; channel < capture.channels.size(); ++channel) {
      CAPTURE(capture.name);
      CAPTURE(channel);
      // Section 2.
      const Span hello = Span(capture.channels[channel]).first(64);
      CHECK(wire::load_be<std::uint32_t>(&hello[0]) == 0x11223344);
      CHECK(wire::load_be<std::uint32_t>(&hello[4]) == 1);
      CHECK(all_zero(hello.subspan(8, 16)));  // the guest has no uuid
      CHECK(std::to_integer<std::size_t>(hello[24]) == channel);
      CHECK(all_zero(hello.subspan(25)));

      const std::vector<RawPacket> packets = packets_of(capture, channel);
      packet_count += packets.size();
      CHECK(packets.front().is_sync());
      CHECK_FALSE(packets.front().has_pages());
      for (std::size_t i = 0; i < packets.size(); ++i) {
        CAPTURE(i);
        const RawPacket& packet = packets[i];
        const RawPacket* previous = i > 0 ? &packets[i - 1] : nullptr;
        CHECK(all_zero(packet.header.subspan(36, 28)));
        if (packet.has_pages()) {
          CHECK(packet.alloc == 128);
          CHECK((packet.flags & ~1u) == method);
          CHECK(packet.normal + packet.zero <= 128);
          CHECK(capture.blocks.contains(packet.name()));
          if (method == 0 && packet.normal > 0) CHECK(packet.size == packet.normal * page_bytes);
        }
        if (capture.how.at("zero-pages") == "legacy") CHECK(packet.zero == 0);

        if (old) {  // sections 3.1, 3.2, 6.3
          CHECK(packet.alloc == 128);
          const bool after_data_and_sync = previous != nullptr && previous->is_sync() && previous->has_pages();
          if (after_data_and_sync) {
            CHECK(packet.flags == 0);
            CHECK_FALSE(packet.has_pages());
            CHECK(packet.number == previous->number);
          } else {
            CHECK((packet.is_sync() || packet.has_pages()));
            CHECK(numbers.insert(packet.number).second);
          }
          if (!packet.has_pages()) {
            CHECK((packet.flags & ~1u) == 0);
            // Stale: what the packet before it on the channel had.
            CHECK(packet.size == (previous != nullptr ? previous->size : 0));
            CHECK(std::ranges::equal(packet.header.subspan(64),
                                     previous != nullptr ? previous->header.subspan(64) : Span(Bytes(1280))));
            stale_sizes += packet.size != 0;
          }
          data_and_sync += packet.is_sync() && packet.has_pages();
        } else {
          CHECK(numbers.insert(packet.number).second);
          if (packet.is_sync()) {
            CHECK(packet.flags == 1);
            CHECK(packet.alloc == 0);
            CHECK(packet.size == 0);
            CHECK_FALSE(packet.has_pages());
            CHECK(all_zero(packet.header.subspan(64)));
          } else {
            CHECK(packet.has_pages());
            // Cleared: nothing behind the name, nothing behind the used slots.
            CHECK(all_zero(packet.header.subspan(64 + packet.name().size(), 256 - packet.name().size())));
            CHECK(all_zero(packet.header.subspan(320 + 8 * std::size_t{packet.normal + packet.zero})));
          }
          if (packet.normal == 0) CHECK(packet.size == 0);
          zero_only += packet.normal == 0 && packet.zero > 0;
        }
      }
    }
    CAPTURE(capture.name);
    // A counter that all channels share.
    CHECK(*numbers.begin() == 0);
    CHECK(*numbers.rbegin() == packet_count - 1);  // a data packet with SYNC takes two, and has the second
    if (old) {
      CHECK(data_and_sync > 0);
      CHECK(stale_sizes > 0);
    }
    CHECK((zero_only > 0) == (capture.how.at("zero-pages") == "multifd"));
  }
}

TEST_CASE("Captured epochs have no page twice, over all channels and the main stream, save QEMU 7.2's") {
  Rng rng(seed());
  std::size_t with_repetitions = 0;
  for (const Capture& capture : captures()) {
    CAPTURE(capture.name);
    const bool repeats = repeats_pages(capture, rng);
    if (!capture.from_qemu_7_2()) CHECK_FALSE(repeats);
    with_repetitions += repeats;
  }
  CHECK(with_repetitions > 0);  // that receivers take them is part of what replays show
}

TEST_CASE("Captured migrations leave the memory that their sources had") {
  const Watchdog watchdog("replay of captures");
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    // Two channels then write one page at once, and ThreadSanitizer cannot know that a later epoch has it again.
    if (under_tsan && repeats_pages(capture, rng)) continue;
    CAPTURE(capture.name);
    const bool legacy = capture.how.at("zero-pages") == "legacy";
    SUBCASE("over memory that held something else") {
      const auto outcome = Replay{.before = std::byte{0xee}}(capture, rng);
      CHECK(outcome.different == "");
      CHECK((outcome.zero_records > 0) == legacy);
      CHECK((outcome.zero_records_over_data > 0) == legacy);
    }
    SUBCASE("over fresh memory, where zero pages are not written unless they must be") {
      const auto outcome = Replay{.destination = multifd::DestinationMemory::zeroed}(capture, rng);
      CHECK(outcome.different == "");
      CHECK(outcome.stats.zeros_written > 0);
    }
    SUBCASE("in short reads") {
      const auto outcome = Replay{.before = std::byte{0xee}, .most_io_bytes = 1 + below(rng, 700)}(capture, rng);
      CHECK(outcome.different == "");
    }
  }
}

TEST_CASE("Captured migrations notice zero pages that are left out") {
  const Watchdog watchdog("replay of captures");
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    if (under_tsan && repeats_pages(capture, rng)) continue;
    CAPTURE(capture.name);
    // In fresh memory, so that only pages which held data before they were zero can tell.
    const auto outcome = capture.how.at("zero-pages") == "legacy"
                             ? Replay{.zero_records = ZeroRecords::drop}(capture, rng)
                             : Replay{}(without_zero_lists(capture), rng);
    CHECK(outcome.different == "ram0 ");
  }
}

TEST_CASE("Captured migrations notice a main stream that does not wait for the channels") {
  const Watchdog watchdog("replay of captures");
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    if (capture.how.at("zero-pages") != "legacy" || (under_tsan && repeats_pages(capture, rng))) continue;
    CAPTURE(capture.name);
    const auto outcome = Replay{.barrier = multifd::Barrier::automatic}(capture, rng);
    CHECK(outcome.different == "ram0 ");
  }
}

TEST_CASE("Captured packets may come in any order of channels inside an epoch, in none across") {
  const Watchdog watchdog("replay of captures");
  Rng rng(seed());
  for (const Capture& capture : captures()) {
    if (capture.how.at("zero-pages") != "multifd" || method_of(capture) != 0) continue;
    CAPTURE(capture.name);
    const Replay replay{.barrier = multifd::Barrier::automatic, .first_packet = multifd::FirstPacket::any};
    const auto forwards = [](const RawPacket& packet) { return std::pair(packet.epoch, packet.channel); };
    const auto backwards = [](const RawPacket& packet) { return std::pair(packet.epoch, ~packet.channel); };
    const auto newest_first = [](const RawPacket& packet) { return ~packet.epoch; };
    CHECK(replay(merged(capture, forwards), rng).different == "");
    CHECK(replay(merged(capture, backwards), rng).different == "");
    CHECK(replay(merged(capture, newest_first), rng).different == "ram0 ");
  }
}
