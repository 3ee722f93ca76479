// SPDX-License-Identifier: MIT
//
// Builds main streams byte by byte from the tables of format/main_stream.md section 9, without a line of the library's,
// and runs the parser over them: what it cut them into, as text.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ostream>  // lets doctest print a std::error_code
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "multifd/qemu/main_stream.hpp"

namespace test {

using Bytes = std::vector<std::byte>;
inline constexpr std::uint64_t page = 4096;
inline constexpr std::uint32_t ram_id = 2;

class Stream {
 public:
  static constexpr std::string_view description = R"({"page_size": 4096, "devices": []})";
  Bytes bytes;

  Stream& be(std::size_t size, std::uint64_t value) {
    for (std::size_t i = 0; i < size; ++i)
      bytes.push_back(static_cast<std::byte>(value >> (8 * (size - 1 - i)) & 0xff));
    return *this;
  }
  Stream& text(std::string_view text) {
    for (const char c : text) bytes.push_back(static_cast<std::byte>(c));
    return *this;
  }
  Stream& named(std::string_view name) { return be(1, name.size()).text(name); }
  Stream& append(const Bytes& more) {
    bytes.insert(bytes.end(), more.begin(), more.end());
    return *this;
  }

  Stream& header() { return text("QEVM").be(4, 3); }
  Stream& configuration(std::string_view machine = "pc-q35-7.2") {
    return be(1, 7).be(4, machine.size()).text(machine);
  }
  Stream& subsection(std::string_view name, std::uint32_t version = 1) { return be(1, 5).named(name).be(4, version); }
  Stream& capabilities(const std::vector<std::string>& names) {
    subsection("configuration/capabilities").be(4, names.size());
    for (const auto& name : names) named(name);
    return *this;
  }
  Stream& command(unsigned number, const Bytes& data = {}) {
    return be(1, 8).be(2, number).be(2, data.size()).append(data);
  }
  Stream& ping(std::uint32_t value) { return command(2, Stream().be(4, value).bytes); }
  Stream& advise(std::uint64_t pages, std::uint64_t target = page) {
    return command(3, Stream().be(8, pages).be(8, target).bytes);
  }

  Stream& start(std::string_view name = "ram", std::uint32_t id = ram_id, std::uint32_t version = 4,
                std::uint32_t instance = 0) {
    return be(1, 1).be(4, id).named(name).be(4, instance).be(4, version);
  }
  Stream& part(std::uint32_t id = ram_id) { return be(1, 2).be(4, id); }
  Stream& end(std::uint32_t id = ram_id) { return be(1, 3).be(4, id); }
  Stream& full(std::string_view name, std::uint32_t id = 9) { return be(1, 4).be(4, id).named(name).be(4, 0).be(4, 1); }
  Stream& footer(std::uint32_t id = ram_id) { return be(1, 0x7e).be(4, id); }

  Stream& total(std::uint64_t bytes_of_ram) { return be(8, bytes_of_ram | 4); }
  Stream& block(std::string_view name, std::uint64_t used_length) { return named(name).be(8, used_length); }
  Stream& zero(std::uint64_t offset, std::string_view name = {}) { return record(offset, 2, name).be(1, 0); }
  Stream& full_page(std::uint64_t offset, std::string_view name = {}, char fill = 'x',
                    std::uint64_t page_bytes = page) {
    return record(offset, 8, name).text(std::string(page_bytes, fill));
  }
  Stream& xbzrle(std::uint64_t offset, std::string_view name, std::string_view changes, unsigned encoding = 1) {
    return record(offset, 0x40, name).be(1, encoding).be(2, changes.size()).text(changes);
  }
  Stream& record(std::uint64_t offset, std::uint64_t flags, std::string_view name) {
    return name.empty() ? be(8, offset | flags | 0x20) : be(8, offset | flags).named(name);
  }
  Stream& flush() { return be(8, 0x200); }
  Stream& eos() { return be(8, 0x10); }

  /// What follows RAM: two devices, one with bytes that look like anything, and the description.
  Stream& devices() {
    full("timer").text("QEVM").be(8, 0x0006'0000'0001'7e7e).footer(9);
    full("cpu").be(8, 0x1122334455667788).footer(9);
    return be(1, 0).be(1, 6).be(4, description.size()).text(description);
  }

  /// Two blocks: ram.a of 8 pages, rom/b of 2.
  Stream& two_blocks() { return total(10 * page).block("ram.a", 8 * page).block("rom/b", 2 * page); }
  // The extension of our own (format/extension.md section 19).
  Stream& ask(unsigned version = 1) { return command(1).ping(0x6d660000 | version); }
  Stream& message(unsigned kind, const Bytes& body = {}) {
    return command(0x6d66, Stream().be(2, kind).append(body).bytes);
  }
  Stream& settings() { return message(1, Stream().be(4, 0x01010100).bytes); }
  Stream& section_size(std::uint64_t size) { return message(6, Stream().be(8, size).bytes); }
  Stream& page_digests(std::uint32_t block, std::uint64_t offset, std::size_t pages) {
    return message(7, Stream().be(4, block).be(8, offset).append(Bytes(8 * pages)).bytes);
  }
  Stream& missing_pages(std::uint32_t block, std::uint64_t offset, const std::vector<std::uint64_t>& words) {
    Stream body = Stream().be(4, block).be(8, offset);
    for (const std::uint64_t word : words) body.be(8, word);
    return message(12, body.bytes);
  }
  Stream& known_zeros(std::uint32_t block, std::uint64_t offset, std::uint64_t word) {
    return message(14, Stream().be(4, block).be(8, offset).be(8, word).bytes);
  }
  Stream& base_wanted() { return message(15); }
  Stream& memory_follows(std::uint64_t pages, unsigned connections = 2) {
    return message(13, Stream().be(8, pages).be(2, connections).append(Bytes(16)).bytes);
  }
  Stream& state_whole(std::uint32_t sections) { return message(8, Stream().be(4, sections).bytes); }
  Stream& hand_over() { return message(10); }
  /// A whole device's section, and its size ahead of it.
  Stream& sized(std::string_view name, std::string_view state, std::uint32_t id = 9) {
    return section_size(state.size()).full(name, id).text(state).footer(id);
  }
  /// An own source's stream up to RAM's end.
  Stream& own_ram() {
    header().configuration().ask().settings().start().two_blocks().flush().eos().footer();
    return part().flush().eos().footer().end().flush().eos().footer();
  }

  /// Everything up to RAM's START, its footer included; SYNC style by machine type.
  Stream& up_to_start() { return header().configuration().start().two_blocks().eos().footer(); }
};

/// Up to 8.0: each section's end closes an epoch (section 6.2). With zero records that reach over section borders.
inline Stream per_section_stream() {
  return Stream()
      .header()
      .configuration("pc-i440fx-7.2")
      .command(1)
      .ping(1)
      .start()
      .two_blocks()
      .eos()
      .footer()
      .part()
      .zero(0, "ram.a")
      .zero(page)
      .zero(0, "rom/b")
      .eos()
      .footer()
      .part()
      .zero(page)
      .zero(7 * page, "ram.a")
      .eos()
      .footer()
      .end()
      .zero(2 * page)
      .eos()
      .footer()
      .devices();
}

/// 8.1 and later: FLUSH closes an epoch, in START and then anywhere.
inline Stream per_round_stream() {
  return Stream()
      .header()
      .configuration("pc-i440fx-10.0")
      .command(1)
      .ping(0xdeadbeef)
      .start()
      .two_blocks()
      .flush()
      .eos()
      .footer()
      .part()
      .zero(page, "ram.a")
      .eos()
      .footer()
      .part()
      .zero(0)
      .flush()
      .zero(3 * page)
      .flush()
      .eos()
      .footer()
      .part()
      .eos()
      .footer()
      .command(11)
      .end()
      .full_page(2 * page)
      .flush()
      .flush()
      .eos()
      .footer()
      .devices();
}

/// An own source's: two devices whose sizes are announced, digests, and the end.
inline Stream own_stream() {
  Stream stream;
  stream.own_ram().message(4, Stream().text("hello").bytes).sized("timer", "QEVM").page_digests(1, page, 1);
  stream.sized("cpu", "", 10).state_whole(2).hand_over();
  return stream.be(1, 0).be(1, 6).be(4, Stream::description.size()).text(Stream::description);
}

/// How much of a stream arrives at once.
struct Feed {
  std::size_t most = SIZE_MAX;  ///< bytes per commit(); each commit() a random number of them if `rng` is there
  std::mt19937_64* rng = nullptr;
};

/// What the parser made of a stream.
struct Outcome {
  std::vector<std::string> events;  ///< pieces of device state, and of a description, in a row as one
  Bytes bytes;                      ///< all elements' bytes again
  std::error_code code;             ///< of next() or finish(); none if both were content
  std::uint64_t detail = 0;
  std::string subject;
  bool ram_complete = false;
  std::optional<multifd::SyncStyle> style;

  std::size_t count(std::string_view event) const {
    return static_cast<std::size_t>(std::ranges::count(events, event));
  }
};

inline std::string event_text(const multifd::qemu::Element& element) {
  using enum multifd::qemu::ElementKind;
  const std::string name(element.name);
  const auto page_text = [&](const char* kind) {
    return std::string(kind) + (element.continues ? " continued " : " ") + name + "#" + std::to_string(element.block) +
           "+" + std::to_string(element.offset);
  };
  const std::string closes = element.closes_epoch ? " closes" : "";
  switch (element.kind) {
    case header: return "header";
    case configuration: return "configuration " + name;
    case command: {
      std::string data;
      for (const std::byte byte : element.data) data += " " + std::to_string(std::to_integer<int>(byte));
      return "command " + std::to_string(element.command) + data;
    }
    case section_start: return "start " + name + " " + std::to_string(element.section_id);
    case section_part: return "part " + name + " " + std::to_string(element.section_id);
    case section_end: return "end " + name + " " + std::to_string(element.section_id);
    case ram_size: return "ram_size " + std::to_string(element.size);
    case block: return "block " + name + "#" + std::to_string(element.block) + " " + std::to_string(element.size);
    case zero_page: return page_text("zero");
    case page: return page_text("page") + " " + static_cast<char>(element.data[0]);
    case xbzrle_page: return page_text("xbzrle") + " " + std::to_string(element.data.size());
    case flush: return "flush" + closes;
    case end_of_records: return "eos" + closes;
    case footer: return "footer " + std::to_string(element.section_id);
    case device_state: return "devices";
    case extension: {
      const auto message = multifd::wire::parse_extension(element.data, multifd::wire::Towards::destination);
      return message ? std::string(multifd::wire::extension_name(message->kind)) : "a message that is none";
    }
    case device_section:
      return "device " + name + " " + std::to_string(element.section_id) + " " + std::to_string(element.size);
    case end_of_stream: return "end of stream";
    case description: return "description";
  }
  return "?";
}

inline Outcome parse(const Bytes& bytes, Feed feed = {}, const multifd::qemu::MainStreamLimits& limits = {}) {
  auto parser = multifd::qemu::MainStreamParser::create(limits);
  REQUIRE(parser);
  Outcome outcome;
  bool in_bounds = true;  // one check in the end: doctest's are slow
  std::size_t at = 0;
  // Each turn takes an element of at least one byte, or feeds at least one byte, or is the last.
  for (std::size_t turns = 0;; ++turns) {
    if (turns > 2 * bytes.size() + 2) FAIL("the parser does not get on");
    const auto element = parser->next();
    if (!element) {
      outcome.code = element.error().code;
      outcome.detail = element.error().detail;
      CHECK(element.error().stage == multifd::Stage::parse);
      CHECK(parser->room().empty());
      const auto again = parser->next();
      CHECK((!again && again.error().code == outcome.code));  // sticky
      const auto finished = parser->finish();
      CHECK((!finished && finished.error().code == outcome.code));
      break;
    }
    if (*element) {
      const auto& e = **element;
      in_bounds = in_bounds && !e.bytes.empty();
      outcome.bytes.insert(outcome.bytes.end(), e.bytes.begin(), e.bytes.end());
      std::string text = event_text(e);
      if ((text != "devices" && text != "description") || outcome.events.empty() || outcome.events.back() != text)
        outcome.events.push_back(std::move(text));
      if (e.block != multifd::qemu::no_block) {
        if (e.block >= parser->blocks().size()) FAIL("block index ", e.block);
        const auto& block = parser->blocks()[e.block];
        in_bounds = in_bounds && block.idstr == e.name && block.used_length >= limits.page_bytes &&
                    e.offset <= block.used_length - limits.page_bytes && e.offset % limits.page_bytes == 0;
      }
      continue;
    }
    if (at == bytes.size()) {
      const auto finished = parser->finish();
      if (!finished) {
        outcome.code = finished.error().code;
        outcome.detail = finished.error().detail;
      }
      break;
    }
    const auto room = parser->room();
    if (room.empty()) FAIL("no room");
    std::size_t n = std::min({feed.most, room.size(), bytes.size() - at});
    if (feed.rng != nullptr) n = 1 + (*feed.rng)() % n;
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), n, room.begin());
    parser->commit(n);
    at += n;
  }
  CHECK(in_bounds);
  outcome.subject = parser->subject();
  outcome.ram_complete = parser->ram_complete();
  outcome.style = parser->sync_style();
  return outcome;
}

/// Checks that a stream is refused with this code, value and name, however its bytes arrive.
inline void check_refused(const Stream& stream, multifd::Errc code, std::uint64_t detail, std::string_view subject = {},
                          const multifd::qemu::MainStreamLimits& limits = {}) {
  for (const std::size_t most : {SIZE_MAX, std::size_t{1}}) {
    CAPTURE(most);
    const Outcome outcome = parse(stream.bytes, {.most = most}, limits);
    CHECK(outcome.code == code);
    CHECK(outcome.code == multifd::Condition::peer_protocol);
    CHECK(outcome.detail == detail);
    CHECK(outcome.subject == subject);
  }
}

}  // namespace test
