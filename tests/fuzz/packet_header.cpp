// SPDX-License-Identifier: MIT
//
// A RAM packet's header against a map of several blocks. Input: u8 options (bits 0-1: page size; bits 2-3: compression),
// then the header (what is missing is 0).
#include "multifd/format/packet.hpp"

#include <array>
#include <memory>

#include "fuzz/channel_stream.hpp"
#include "fuzz/fuzz.hpp"
#include "fuzz/guarded.hpp"
#include "multifd/memory/ram_map.hpp"

namespace {

using namespace fuzz;
using namespace multifd;

Format format_of(unsigned options) {
  constexpr std::uint32_t methods[] = {wire::flag_none, wire::flag_zlib, wire::flag_zstd, wire::flag_qatzip};
  return {.page_bytes = page_bytes_of(options & 3), .method = methods[options >> 2 & 3]};
}

/// Blocks of 5 and 1 pages, one as large as a packet, and one that is nowhere.
struct Map {
  explicit Map(std::size_t page_bytes)
      : memory{Guarded(5 * page_bytes), Guarded(page_bytes), Guarded(fuzz::packet_page_bytes)}, map(page_bytes) {
    for (std::size_t i = 0; i < memory.size(); ++i)
      require(map.add(block_names[i], memory[i].bytes()).has_value(), "RamMap::add");
    require(map.add_elsewhere("far", std::uint64_t{1} << 40).has_value(), "RamMap::add_elsewhere");
  }
  std::array<Guarded, 3> memory;
  RamMap map;
};

void test(Span input) {
  Reader in(input);
  const unsigned options = in.u8();
  const Format format = format_of(options);
  static const std::array<Map, 4> maps{Map(page_bytes_of(0)), Map(page_bytes_of(1)), Map(page_bytes_of(2)),
                                       Map(page_bytes_of(3))};
  const RamMap& map = maps[options & 3].map;
  const std::size_t size = format.header_bytes();
  // Of its own on the heap, so that one byte too far is seen.
  const auto bytes = std::make_unique<std::byte[]>(size);
  std::ranges::copy(in.take(size), bytes.get());

  const wire::PacketLimits limits{.page_bytes = format.page_bytes, .method = format.method};
  const auto header = wire::parse_header({bytes.get(), size}, limits);
  if (!header) {
    require(header.error().code == Condition::peer_protocol, "a refused header is the peer's fault");
    return;
  }
  const std::size_t pages = std::size_t{header->normal_pages} + header->zero_pages;
  require(pages <= format.slots() && header->pages_alloc <= format.slots(), "counts fit the header");
  require(wire::payload_bytes(*header) <= wire::max_payload_bytes, "the payload fits its buffer");
  require((wire::payload_bytes(*header) == 0) == (header->normal_pages == 0), "payload and normal pages go together");
  if (format.method == 0)
    require(wire::payload_bytes(*header) == header->normal_pages * format.page_bytes, "pages as they are");
  require(header->idstr.empty() == (pages == 0), "pages have a block");
  require(header->idstr.size() <= multifd::max_idstr_length && header->idstr.find('\0') == header->idstr.npos,
          "the name");

  // Written again it means the same.
  const auto again = std::make_unique<std::byte[]>(size);
  wire::encode_header(again.get(), *header);
  const auto same = wire::parse_header({again.get(), size}, limits);
  require(same && same->flags == header->flags && same->pages_alloc == header->pages_alloc &&
              same->normal_pages == header->normal_pages && same->zero_pages == header->zero_pages &&
              same->next_packet_size == header->next_packet_size && same->packet_num == header->packet_num &&
              same->idstr == header->idstr && same->has_digest == header->has_digest && same->digest == header->digest,
          "what was accepted means the same when it is written again");

  if (pages == 0) return;
  const auto block = map.find(header->idstr);
  if (!block) return;
  for (std::size_t i = 0; i < pages; ++i) {
    const std::uint64_t offset = wire::load_offset(bytes.get(), i);
    const auto checked = map.check(*block, offset);
    const std::uint64_t block_bytes = map.block(*block).bytes;
    const bool inside = offset % format.page_bytes == 0 && offset < block_bytes;  // blocks are whole pages
    require(checked.has_value() == inside, "an offset is accepted when it is one of the block's pages, else not");
    if (map.block(*block).access == Access::none) continue;
    const auto page = map.resolve(*block, offset);
    require(page.has_value() == inside, "resolve() asks check()");
    if (!page) continue;
    const auto host = map.block(*block).host;
    require(page->size() == format.page_bytes && page->data() == host.data() + offset, "a page is where it says");
    page->front() = page->back() = std::byte{1};  // outside, this is a crash
  }
}

void mutate(Bytes& input, std::size_t most_bytes, Rng& rng) {
  if (input.empty() || below(rng, 16) == 0) input.resize(1, std::byte{});
  if (below(rng, 16) == 0) input[0] = std::byte(rng());
  const Format format = format_of(static_cast<unsigned>(input[0]));
  Bytes head(input.begin() + 1, input.end());
  if (head.size() < field::offsets) head = make_pages(format, block_names[0], 0, below(rng, 3), below(rng, 3)).head;
  head.resize(format.header_bytes());
  for (std::size_t i = 1 + below(rng, 3); i > 0; --i) mutate_header(head, format, rng);
  input.resize(1);
  append(input, head);
  if (input.size() > most_bytes) input.resize(most_bytes);
}

const Register registered({.name = "packet_header", .test = test, .mutate = mutate});

}  // namespace
