// SPDX-License-Identifier: MIT
//
// QEMU's main stream. Input: u8 options (bits 0-1: page size; bit 2: small limits; bit 3: with the extension of our
// own; bit 4: with XBZRLE records), u8 size of the pieces, the bytes.
#include "multifd/qemu/main_stream.hpp"

#include <string>

#include "fuzz/fuzz.hpp"
#include "multifd/qemu/ram_records.hpp"
#include "multifd/qemu/stream_end.hpp"

namespace {

using namespace fuzz;
using namespace multifd;
using qemu::Element;
using qemu::ElementKind;

/// All results of a parser, without the sizes of the pieces of devices' state.
struct Said {
  std::vector<std::uint64_t> numbers;
  std::string text;
  Bytes stream;   ///< the bytes of all elements
  Bytes devices;  ///< those of the device state
  Bytes own;      ///< the same of an own source, whose sections have ends
  bool operator==(const Said&) const = default;
};

void check(const qemu::MainStreamParser& parser, const Element& element) {
  require(!element.bytes.empty(), "an element has bytes");
  const bool xbzrle = element.kind == ElementKind::xbzrle_page;
  const bool record = element.kind == ElementKind::zero_page || element.kind == ElementKind::page || xbzrle;
  if (!record) return;
  require(parser.block_list_complete(), "records come after the block list");
  require(element.block < parser.blocks().size(), "a record's block is on the list");
  const qemu::BlockInfo& block = parser.blocks()[element.block];
  require(element.offset % parser.page_bytes() == 0 && element.offset < block.used_length &&
              block.used_length - element.offset >= parser.page_bytes(),
          "a record's page lies inside its block");
  require(element.name == block.idstr, "a record has its block's name");
  if (xbzrle) {
    require(element.data.size() <= parser.page_bytes(), "changes are no longer than a page");
    return;  // nobody here writes such a record
  }
  // Written again, a record is the same bytes.
  std::array<std::byte, qemu::max_zero_record_bytes> again;
  const std::string_view name = element.continues ? std::string_view{} : element.name;
  const bool zero = element.kind == ElementKind::zero_page;
  const std::size_t size = zero ? qemu::encode_zero_record(again, element.offset, name)
                                : qemu::encode_page_header(again, element.offset, name);
  require(std::ranges::equal(std::span(again).first(size), element.bytes.first(std::min(size, element.bytes.size()))),
          "a record is what we would write");
  require(element.bytes.size() == size + element.data.size(), "a record is as long as what we would write");
  require(element.data.size() == (zero ? 0 : parser.page_bytes()), "a PAGE record has a page");
}

Said parse(Span input, const qemu::MainStreamLimits& limits, std::size_t piece) {
  Said said;
  auto parser = qemu::MainStreamParser::create(limits);
  require(parser.has_value(), "the limits are good");
  for (;;) {
    const auto element = parser->next();
    if (!element) {
      said.text += describe(element.error()) + " about " + std::string(parser->subject());
      require(element.error().code == Condition::peer_protocol, "a refused stream is the peer's fault");
      require(!parser->next().has_value() && parser->room().empty() && !parser->finish().has_value(), "an error stays");
      break;
    }
    if (*element) {
      const Element& e = **element;
      check(*parser, e);
      append(said.stream, e.bytes);
      if (e.kind == ElementKind::extension) {
        require(limits.extension && parser->commands().asked().has_value(),
                "the extension is taken where it was asked for");
        require(wire::parse_extension(e.data, wire::Towards::destination).has_value(), "a message is one");
      }
      if (e.kind == ElementKind::device_state || e.kind == ElementKind::description) {
        // The pieces are as they arrived; all of them together are not.
        append(parser->commands().own_source() ? said.own : said.devices, e.data);
        continue;
      }
      said.numbers.insert(said.numbers.end(), {std::uint64_t(e.kind), e.closes_epoch, e.continues, e.command,
                                               e.section_id, e.block, e.offset, e.size});
      said.text += e.name;
      continue;
    }
    if (input.empty()) {
      const auto finished = parser->finish();
      said.text += finished ? "end" : describe(finished.error());
      break;
    }
    const auto room = parser->room();
    require(!room.empty(), "a parser that wants more has room for it");
    const auto now = input.first(std::min({piece, room.size(), input.size()}));
    std::ranges::copy(now, room.begin());
    parser->commit(now.size());
    input = input.subspan(now.size());
  }
  require(parser->blocks().size() <= limits.max_blocks && parser->ram_bytes() <= limits.max_ram_bytes,
          "the limits hold");
  return said;
}

qemu::StreamTail tail(Span devices, bool footers, std::size_t piece) {
  qemu::StreamEnd end;
  for (; !devices.empty(); devices = devices.subspan(std::min(piece, devices.size())))
    end.feed(devices.first(std::min(piece, devices.size())));
  return end.tail(footers);
}

void test(Span input) {
  Reader in(input);
  const unsigned options = in.u8();
  const std::size_t piece = 1 + in.u8();
  const Span bytes = in.rest();
  qemu::MainStreamLimits limits{.page_bytes = page_bytes_of(options & 3), .max_blocks = 64};
  if ((options & 4) != 0)
    limits = {.page_bytes = limits.page_bytes,
              .max_blocks = 2,
              .max_ram_bytes = 4 * limits.page_bytes,
              .max_machine_type_bytes = 8,
              .max_capabilities = 1,
              .max_section_bytes = 1000,
              .max_description_bytes = 64};
  limits.extension = (options & 8) != 0;
  limits.xbzrle = (options & 16) != 0;

  const Said whole = parse(bytes, limits, bytes.size() + 1);
  require(whole.stream.size() <= bytes.size() && std::ranges::equal(whole.stream, bytes.first(whole.stream.size())),
          "the elements are the stream");
  require(whole == parse(bytes, limits, piece), "the pieces do not matter");
  for (const bool footers : {false, true})
    require(tail(whole.devices, footers, whole.devices.size()) == tail(whole.devices, footers, piece),
            "the end does not depend on them");
}

const Register registered({.name = "main_stream", .test = test});

}  // namespace
