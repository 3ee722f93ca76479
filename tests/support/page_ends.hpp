// SPDX-License-Identifier: MIT
//
// Both ends of memory on demand for tests: a guest with contents of every kind, a page server over it, and a client that
// fetches pages through the PageFetcher interface.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/postcopy/page_server.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/postcopy/remote_pages.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "support/basics.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

namespace test {

using multifd::postcopy::FetchedPages;
using multifd::postcopy::FetchKind;
using multifd::postcopy::GuestPages;
using multifd::postcopy::PageFetcher;
using multifd::postcopy::PageRange;
using multifd::postcopy::PageServer;
using multifd::postcopy::PageStore;
using multifd::postcopy::RemotePages;

inline multifd::Uuid session_of(unsigned char value) {
  multifd::Uuid session{};
  session.fill(std::byte{value});
  return session;
}

/// A guest that has stopped: "pc.ram", of which half the pages are zero or were never touched, and a small "bios".
struct StoppedGuest {
  explicit StoppedGuest(std::size_t pages, std::size_t bytes_of_page = 4096)
      : page_bytes(bytes_of_page), ram(pages * bytes_of_page), bios(2 * bytes_of_page), map(bytes_of_page) {
    ::madvise(ram.data(), ram.size(), MADV_NOHUGEPAGE);  // so that what is not touched has no memory
    Rng rng(seed());
    for (std::size_t page = 0; page < pages;) {
      const std::size_t run = std::min(pages - page, 1 + below(rng, 40));
      const bool untouched = below(rng, 3) == 0;
      for (const std::size_t end = page + run; page < end; ++page)
        if (!untouched) fill_page(ram.page(page, page_bytes), any_fill(rng), rng);
    }
    bios.fill(std::byte{0xea});
    REQUIRE(map.add("pc.ram", ram.bytes()).has_value());
    REQUIRE(map.add("bios", bios.bytes()).has_value());
  }

  std::unique_ptr<GuestPages> pages() const {
    auto opened = GuestPages::open(map);
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    return std::move(*opened);
  }

  std::size_t page_bytes;
  Block ram;
  Block bios;
  multifd::RamMap map;
};

/// A page server over guest memory, and connections to it within the process.
template <multifd::Compressor C = multifd::NoComp, class T = MemoryTransport>
struct ServedGuest {
  using Server = PageServer<T, C>;
  using Client = RemotePages<T, C>;

  explicit ServedGuest(std::size_t pages, std::size_t bytes_of_page = 4096, typename Server::Options options = {})
      : guest(pages, bytes_of_page), store(guest.pages()) {
    auto opened = Server::open(*store, std::move(options));
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    server = std::move(*opened);
  }

  static Links<T> pair(std::size_t capacity) {
    if constexpr (std::same_as<T, MemoryTransport>)
      return memory_links(1, capacity);
    else
      return unix_links(1);
  }

  /// What RemotePages::open() wants.
  typename Client::Connect connect(std::size_t capacity = 64 * 1024) {
    return [this, capacity](FetchKind, const multifd::Interrupt&) -> Result<T> {
      auto links = pair(capacity);
      if (auto added = server->add(std::move(links.receiver[0])); !added) return std::unexpected(added.error());
      return std::move(links.sender[0]);
    };
  }

  std::unique_ptr<Client> client(typename Client::Options options = {}) {
    auto opened = Client::open(connect(), std::move(options));
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    return std::move(*opened);
  }

  StoppedGuest guest;
  std::unique_ptr<GuestPages> store;
  std::unique_ptr<Server> server;
};

/// Compares an answer with the guest. Returns what is wrong, or nothing.
inline std::string compare(const multifd::RamMap& map, const FetchedPages& fetched) {
  const std::size_t page_bytes = map.page_bytes();
  const auto memory = map.block(fetched.range.block).host;
  std::size_t next = 0;
  for (std::uint64_t at = fetched.range.offset; at < fetched.range.end(); at += page_bytes) {
    const auto expected = memory.subspan(at, page_bytes);
    const bool has = next < fetched.offsets.size() && fetched.offsets[next] == at;
    const bool same = has ? std::ranges::equal(fetched.bytes.subspan(next * page_bytes, page_bytes), expected)
                          : std::ranges::all_of(expected, [](std::byte b) { return b == std::byte{0}; });
    next += has;
    if (!same) return "page at " + std::to_string(at) + (has ? " has other bytes" : " is not zero");
  }
  return next == fetched.offsets.size() ? "" : "offsets outside of the range";
}

/// Every page of a store in ranges of `bytes`, in an order of their own for each `rng`.
inline std::vector<PageRange> all_ranges(const PageStore& store, std::uint64_t bytes, Rng& rng) {
  std::vector<PageRange> ranges;
  for (std::uint32_t id = 0; id < store.blocks().size(); ++id)
    for (std::uint64_t at = 0; at < store.blocks()[id].bytes; at += bytes)
      ranges.push_back({multifd::BlockId{id}, at, std::min(bytes, store.blocks()[id].bytes - at)});
  std::ranges::shuffle(ranges, rng);
  return ranges;
}

/// Fetches `ranges`, as many at once as the fetcher may, and compares each. After a lost connection with another fetcher.
/// Returns the first error that cannot be mended, or what is wrong with a page as `wrong`.
inline Result<void> fetch(PageStore& store, FetchKind kind, std::span<const PageRange> ranges,
                          const multifd::RamMap& map, std::string& wrong) {
  std::unique_ptr<PageFetcher> fetcher;
  std::size_t taken = 0;
  std::size_t asked = 0;
  const auto lost = [&](const multifd::Error& error) {
    asked = taken;
    fetcher.reset();
    return store.may_return(error);
  };
  while (taken < ranges.size()) {
    if (!fetcher) {
      auto opened = store.open(kind);
      if (!opened) return std::unexpected(opened.error());
      fetcher = std::move(*opened);
    }
    if (asked < ranges.size() && asked - taken < fetcher->window()) {
      auto done = fetcher->ask(ranges[asked]);
      if (done)
        ++asked;
      else if (!lost(done.error()))
        return done;
      continue;
    }
    auto fetched = fetcher->take();
    if (!fetched) {
      if (!lost(fetched.error())) return std::unexpected(fetched.error());
      continue;
    }
    if (fetched->range != ranges[taken]) wrong = "another range than was asked for";
    if (wrong.empty()) wrong = compare(map, *fetched);
    if (!wrong.empty()) return {};
    ++taken;
  }
  return {};
}

}  // namespace test
