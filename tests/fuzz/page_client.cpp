// SPDX-License-Identifier: MIT
//
// What a page server says to a client. Input: u8 flags (1: zstd, 2: nothing is put in front; else a greeting and a list of
// blocks that fit are), u8 size of the reads, three times u8 first page and u8 pages; then the bytes.
#include <array>
#include <string>

#include "fuzz/fuzz.hpp"
#include "fuzz/page_script.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/postcopy/detail/remote_link.hpp"

namespace {

using namespace fuzz;
using namespace multifd;
using namespace multifd::postcopy;

constexpr std::size_t ram_pages = 256;

/// Fetches the ranges from the input. Returns what came of it. Below RemotePages, which would try again.
template <Compressor C>
std::string fetch(Span bytes, std::size_t piece, std::span<const PageRange> ranges) {
  // A small window: AddressSanitizer takes 20 ms for each decoder of the largest.
  static postcopy::detail::RemotePagesShared<C> shared([] {
    RemotePagesOptions<C> options{.blocks = {{"pc.ram", ram_pages * 4096}}, .page_bytes = 4096};
    if constexpr (std::same_as<C, Zstd>) options.compressor.max_window_log = 20;
    return options;
  }());
  using Link = postcopy::detail::RemoteLink<PageScript, C>;
  auto link = Link::create(shared, FetchKind::background, PageScript(bytes, piece, nullptr));
  if (!link) {
    const Error& error = link.error();
    require(error.code == Condition::peer_protocol || error.code == Condition::peer_gone, "the error is the server's");
    return describe(error);
  }
  PageFetcher* const fetcher = link->get();
  for (const PageRange& range : ranges) require(fetcher->ask(range).has_value(), "ask");
  std::string said;
  for (const PageRange& range : ranges) {
    const auto fetched = fetcher->take();
    if (!fetched) {
      const Error& error = fetched.error();
      require(error.code == Condition::peer_protocol || error.code == Condition::peer_gone,
              "the error is the server's");
      return said + describe(error);
    }
    require(fetched->range == range, "the range that was asked for");
    require(fetched->bytes.size() == fetched->offsets.size() * 4096, "bytes of all pages that are not zero");
    std::uint64_t next = range.offset;
    for (const std::uint64_t offset : fetched->offsets) {
      require(offset >= next && offset % 4096 == 0 && offset < range.end(), "pages of the range, in order");
      next = offset + 4096;
    }
    std::uint64_t sum = 0;
    for (const std::byte each : fetched->bytes) sum = sum * 31 + std::to_integer<unsigned>(each);
    said += std::to_string(fetched->offsets.size()) + ":" + std::to_string(sum) + " ";
  }
  return said;
}

template <Compressor C>
void test_with(Span bytes, std::size_t piece, std::span<const PageRange> ranges) {
  require(fetch<C>(bytes, 1 << 20, ranges) == fetch<C>(bytes, piece, ranges), "the sizes of reads play no part");
}

void test(Span input) {
  Reader in(input);
  const unsigned flags = in.u8();
  const std::size_t piece = 1 + in.u8() * 16u;
  std::array<PageRange, 3> ranges;
  for (PageRange& range : ranges) {
    range.offset = in.u8() * std::uint64_t{4096};
    range.bytes = (1 + in.u8() % std::min<std::uint64_t>(128, ram_pages - range.offset / 4096)) * 4096;
  }
  Bytes bytes;
  const bool zstd = (flags & 1) != 0;
  if ((flags & 2) == 0) {
    append(bytes, wire::encode_page_greeting({.page_bytes = 4096, .method = zstd ? wire::flag_zstd : wire::flag_none}));
    const auto block = wire::encode_page_block("pc.ram", ram_pages * 4096);
    append(bytes, wire::encode_page_accepted({.blocks = 1, .bytes = static_cast<std::uint32_t>(block.view().size())}));
    append(bytes, block.view());
  }
  append(bytes, in.rest());
  if (zstd)
    test_with<Zstd>(bytes, piece, ranges);
  else
    test_with<NoComp>(bytes, piece, ranges);
}

const Register registered({.name = "page_client", .test = test});

}  // namespace
