// SPDX-License-Identifier: MIT
//
// Checks the rules of the PageSink concept that types cannot express. Run it on your own policy, in any test framework:
//
//   auto report = multifd::check_page_sink_contract<MySink>([&] { return MySink{...}; }, read_page);
//   assert(report.ok());  // else print report.text()
//
// `read_page(block, offset, page)` fills `page` with what the sink has there: it is how the check sees where pages went.
// A sink that writes the map's memory needs none.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/ends/page_sink.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/testing/page_content.hpp"
#include "multifd/testing/timed_call.hpp"

namespace multifd {

/// Fills `page` with what a sink has at a place.
using ReadPage = std::function<void(BlockId, std::uint64_t offset, std::span<std::byte> page)>;

struct PageSinkContractOptions {
  std::size_t page_bytes = 4096;  ///< of the map; packets get as many as fit
  /// What memory holds before the first page comes. Zeros are right for every sink; other bytes show whether a zero page
  /// is written over them.
  std::byte old_content{};
  std::chrono::milliseconds patience = std::chrono::seconds(5);  ///< how long stop() may take; only a bad one needs it
};

namespace testing::detail {

template <PageSink S>
class PageSinkCheck {
 public:
  PageSinkCheck(std::function<S()> make, ReadPage read_page, PageSinkContractOptions options)
      : make_(std::move(make)), read_page_(std::move(read_page)), options_(options) {}

  ContractReport run() {
    places_and_arrives();
    if (report_.ok()) several_channels_at_once();
    refuses_offsets();
    stops();
    return std::move(report_);
  }

 private:
  using Sink = typename S::Sink;
  using Channel = typename S::Sink::Channel;
  using Bytes = std::vector<std::byte>;

  static constexpr std::size_t used_pages = 144;  ///< of a block; more than a full batch, of pages of 4 KiB
  static constexpr std::size_t block_pages = used_pages + used_pages / 9;
  static constexpr std::size_t channels = 4;
  static constexpr std::byte guard{0xa7};

  /// A guest of two blocks between guard bytes, and a sink for it.
  struct Guest {
    Guest(const PageSinkContractOptions& options, const std::function<S()>& make)
        : page_bytes(options.page_bytes), old_content(options.old_content), map(page_bytes), settings(make()) {
      const std::size_t block_bytes = block_pages * page_bytes;
      memory.resize(2 * block_bytes + 4 * page_bytes, guard);
      const std::size_t misplaced = reinterpret_cast<std::uintptr_t>(memory.data()) % page_bytes;
      std::byte* at = memory.data() + 2 * page_bytes - misplaced;
      for (const char* const idstr : {"pc.ram", "vga.vram"}) {
        const std::span host(at, block_bytes);
        hosts.push_back(host);
        static_cast<void>(S::writes_memory ? map.add(idstr, host) : map.add_elsewhere(idstr, block_bytes));
        at += block_bytes + page_bytes;
      }
      fill(old_content);
      hook = [this](const ThreadInfo&) {
        const std::scoped_lock lock(mutex);
        threads.push_back(::gettid());
      };
    }

    void fill(std::byte content) {
      old_content = content;
      for (const std::span<std::byte> host : hosts) std::ranges::fill(host, content);
    }

    bool guards_intact() const {
      const auto intact = [](const std::byte* from, const std::byte* to) { return holds_only({from, to}, guard); };
      const std::byte* const end = memory.data() + memory.size();
      return intact(memory.data(), hosts[0].data()) && intact(hosts[0].data() + hosts[0].size(), hosts[1].data()) &&
             intact(hosts[1].data() + hosts[1].size(), end);
    }

    const std::size_t page_bytes;
    std::byte old_content;
    Bytes memory;
    std::vector<std::span<std::byte>> hosts;
    RamMap map;
    S settings;
    std::mutex mutex;
    std::vector<pid_t> threads;  ///< those in which the hook ran
    ThreadHook hook;
    std::unique_ptr<Sink> sink;
  };

  /// What must be at each place that a page has come to.
  using Expected = std::map<std::pair<std::uint32_t, std::uint64_t>, Bytes>;

  bool expect(bool held, const std::string& what) { return report_.expect(held, what); }

  std::shared_ptr<Guest> open() {
    auto guest = std::make_shared<Guest>(options_, make_);
    auto sink = Sink::create(guest->map, guest->settings, guest->hook);
    if (!expect(sink.has_value(), "Sink::create: " + (sink ? "" : describe(sink.error())))) return nullptr;
    if (!expect(*sink != nullptr, "Sink::create: returns no sink")) return nullptr;
    guest->sink = std::move(*sink);
    return guest;
  }

  static void write(MutableBuffers runs, const Bytes& content) {
    for (std::size_t done = 0; const iovec& run : runs) {
      std::memcpy(run.iov_base, content.data() + done, run.iov_len);
      done += run.iov_len;
    }
  }

  /// One packet through a channel, as the worker does it. `text` gets what is wrong, if anything.
  static bool pass(const Guest& guest, Channel& channel, PageRuns& runs, ArrivingPages pages, const Bytes& content,
                   std::string& text) {
    const auto wrong = [&text](std::string what) {
      text = std::move(what);
      return false;
    };
    runs.clear();
    if (auto placed = channel.place(pages, runs); !placed) return wrong("place: " + describe(placed.error()));
    pages.runs = runs.view();
    if (total_bytes(pages.runs) != content.size()) return wrong("place: the runs are not as long as the normal pages");
    for (std::size_t done = 0; const iovec& run : pages.runs) {
      if (run.iov_len % guest.page_bytes != 0) return wrong("place: a run is no whole number of pages");
      if (!S::writes_memory) continue;
      const std::span<std::byte> host = guest.hosts[index(pages.block)];
      for (std::size_t at = 0; at < run.iov_len; at += guest.page_bytes, ++done)
        if (static_cast<std::byte*>(run.iov_base) + at != host.data() + pages.offsets[done])
          return wrong("place: the runs are not the pages' places in memory, in the order of their offsets");
    }
    channel.begin(pages);
    write(pages.runs, content);
    auto arrived = channel.arrived(pages);
    return arrived ? true : wrong("arrived: " + describe(arrived.error()));
  }

  /// Leaves one page in ten alone.
  static constexpr std::size_t page_of(std::size_t i) { return i + i / 9 + 1; }

  /// A packet of `normal` and `zero` pages among `count` used pages of a block from `first` on. Remembers what they hold.
  static void make_packet(std::mt19937_64& random, std::size_t page_bytes, BlockId block, std::size_t first,
                          std::size_t count, std::size_t normal, std::size_t zero, std::vector<std::uint64_t>& offsets,
                          Bytes& content, Expected& expected) {
    std::vector<std::uint64_t> all(count);
    for (std::size_t i = 0; i < count; ++i) all[i] = page_of(first + i) * page_bytes;
    if (random() % 2 == 0) std::ranges::shuffle(all, random);  // else neighbours, which make long runs
    offsets.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(normal + zero));
    content.resize(normal * page_bytes);
    fill_differently(content, random);
    for (std::size_t i = 0; i < normal + zero; ++i) {
      Bytes& page = expected[{index(block), offsets[i]}];
      page.assign(page_bytes, std::byte{});
      if (i < normal) std::memcpy(page.data(), content.data() + i * page_bytes, page_bytes);
    }
  }

  /// Whether all pages that came are there, and nothing else has changed.
  void compare(const Guest& guest, const Expected& expected, const std::string& when) {
    std::size_t wrong = 0;
    Bytes page(guest.page_bytes);
    for (const auto& [place, content] : expected) {
      page.assign(guest.page_bytes, std::byte{0x5c});
      if (S::writes_memory)
        std::memcpy(page.data(), guest.hosts[place.first].data() + place.second, guest.page_bytes);
      else
        read_page_(BlockId{place.first}, place.second, page);
      wrong += page != content;
    }
    expect(wrong == 0, when + ": " + std::to_string(wrong) + " of " + std::to_string(expected.size()) +
                           " pages are not what arrived");
    std::size_t touched = 0;
    for (std::uint32_t block = 0; block < guest.hosts.size(); ++block)
      for (std::size_t at = 0; at < guest.hosts[block].size(); at += guest.page_bytes)
        if (!S::writes_memory || !expected.contains({block, at}))
          touched += !holds_only(guest.hosts[block].subspan(at, guest.page_bytes), guest.old_content);
    expect(touched == 0, when + ": " + std::to_string(touched) + " pages changed that did not arrive");
    expect(guest.guards_intact(), when + ": bytes beside the blocks changed");
  }

  void places_and_arrives() {
    const auto guest = open();
    if (!guest) return;
    const std::size_t most = guest->map.batch_pages();
    auto runs = PageRuns::create(most);
    auto channel = Channel::create(*guest->sink);
    if (!expect(channel.has_value() && runs.has_value(), "Channel::create failed")) return;
    Expected expected;
    std::vector<std::uint64_t> offsets;
    Bytes content;
    std::string wrong;
    for (std::size_t packet = 0; packet < 60; ++packet) {
      const BlockId block{static_cast<std::uint32_t>(packet % 2)};
      const std::size_t count = packet == 1 ? std::min(most, used_pages) : 1 + random_() % std::min(most, used_pages);
      const std::size_t first = random_() % (used_pages - count + 1);
      const std::size_t normal = packet % 5 == 3 ? 0 : packet % 5 == 4 ? count : random_() % (count + 1);
      const std::size_t zero = count - normal;
      make_packet(random_, guest->page_bytes, block, first, count, normal, zero, offsets, content, expected);
      const ArrivingPages pages{.block = block, .offsets = offsets, .normal_pages = normal, .channel = 0};
      if (!pass(*guest, *channel, *runs, pages, content, wrong)) return report_.fail("packet: " + wrong);
    }
    compare(*guest, expected, "one channel");
  }

  /// Each channel has pages of its own, as in an epoch.
  void several_channels_at_once() {
    const auto guest = open();
    if (!guest) return;
    constexpr std::size_t share = used_pages / channels;
    std::array<Expected, channels> expected;
    std::array<std::string, channels> wrong;
    std::vector<Channel> made;
    for (std::size_t c = 0; c < channels; ++c) {
      auto channel = Channel::create(*guest->sink);
      if (!expect(channel.has_value(), "Channel::create failed for one of four channels")) return;
      made.push_back(std::move(*channel));
    }
    if (!own_places(*guest, made, expected)) return;
    {
      std::vector<std::jthread> running;
      for (std::size_t c = 0; c < channels; ++c)
        running.emplace_back([&, c] {
          std::mt19937_64 random(c);
          auto runs = PageRuns::create(guest->map.batch_pages());
          std::vector<std::uint64_t> offsets;
          Bytes content;
          for (std::size_t packet = 0; packet < 40 && wrong[c].empty(); ++packet) {
            const BlockId block{static_cast<std::uint32_t>(packet % 2)};
            const std::size_t count = 1 + random() % std::min(share, guest->map.batch_pages());
            const std::size_t normal = random() % (count + 1);
            make_packet(random, guest->page_bytes, block, c * share, count, normal, count - normal, offsets, content,
                        expected[c]);
            pass(*guest, made[c], *runs,
                 {.block = block, .offsets = offsets, .normal_pages = normal, .channel = static_cast<std::uint32_t>(c)},
                 content, wrong[c]);
          }
        });
    }
    Expected all;
    for (std::size_t c = 0; c < channels; ++c) {
      if (!wrong[c].empty()) return report_.fail("four channels at once: " + wrong[c]);
      all.merge(expected[c]);
    }
    compare(*guest, all, "four channels at once");
  }

  /// Each channel has a packet under way at the same time.
  bool own_places(const Guest& guest, std::vector<Channel>& made, std::array<Expected, channels>& expected) {
    constexpr std::size_t pages = 5;
    std::array<std::vector<std::uint64_t>, channels> offsets;
    std::array<Bytes, channels> contents;
    std::array<ArrivingPages, channels> packets;
    std::vector<PageRuns> all_runs;
    for (std::size_t c = 0; c < channels; ++c) {
      all_runs.push_back(std::move(*PageRuns::create(guest.map.batch_pages())));
      make_packet(random_, guest.page_bytes, BlockId{0}, c * (used_pages / channels), pages, pages, 0, offsets[c],
                  contents[c], expected[c]);
      packets[c] = {
          .block = BlockId{0}, .offsets = offsets[c], .normal_pages = pages, .channel = static_cast<std::uint32_t>(c)};
      if (!expect(made[c].place(packets[c], all_runs[c]).has_value(), "place: failed for one of four channels"))
        return false;
      packets[c].runs = all_runs[c].view();
      if (!expect(total_bytes(packets[c].runs) == contents[c].size(), "place: too few or too many bytes")) return false;
    }
    std::vector<std::pair<const std::byte*, const std::byte*>> places;
    for (const ArrivingPages& packet : packets)
      for (const iovec& run : packet.runs) {
        const auto* const begin = static_cast<const std::byte*>(run.iov_base);
        places.emplace_back(begin, begin + run.iov_len);
      }
    std::ranges::sort(places);
    for (std::size_t i = 1; i < places.size(); ++i)
      if (!expect(places[i - 1].second <= places[i].first, "place: bytes of two channels go to the same place"))
        return false;
    for (std::size_t c = 0; c < channels; ++c) made[c].begin(packets[c]);
    for (std::size_t c = 0; c < channels; ++c) write(packets[c].runs, contents[c]);
    for (std::size_t c = 0; c < channels; ++c)
      if (!expect(made[c].arrived(packets[c]).has_value(), "arrived: failed for one of four channels")) return false;
    return true;
  }

  /// A peer's offsets, good ones around a bad one.
  void refuses_offsets() {
    const auto guest = open();
    if (!guest) return;
    guest->fill(std::byte{0x3c});  // shows a zero page that is written too early
    const std::uint64_t page_bytes = guest->page_bytes;
    const std::uint64_t block_bytes = block_pages * page_bytes;
    auto runs = PageRuns::create(guest->map.batch_pages());
    for (const std::uint64_t bad :
         {std::uint64_t{1}, page_bytes / 2, block_bytes - 1, block_bytes, block_bytes + page_bytes,
          std::uint64_t{1} << 32 | page_bytes, std::uint64_t{0} - page_bytes, ~std::uint64_t{0}}) {
      for (std::size_t at = 0; at < 5; ++at)
        for (const std::size_t normal : {0u, 2u, 5u}) {
          std::vector<std::uint64_t> offsets = {0, page_bytes, 7 * page_bytes, 8 * page_bytes,
                                                block_bytes - page_bytes};
          offsets[at] = bad;
          auto channel = Channel::create(*guest->sink);
          if (!expect(channel.has_value(), "Channel::create failed")) return;
          runs->clear();
          const std::string what =
              "place: offset " + std::to_string(bad) + (at < normal ? " of a normal page" : " of a zero page");
          const auto placed = channel->place({.block = BlockId{0}, .offsets = offsets, .normal_pages = normal}, *runs);
          // Nothing is written to `runs`: they may be anywhere.
          if (!expect(!placed.has_value(), what + " is accepted")) return;
          expect(placed.error().code == Condition::peer_protocol, what + ": not an error of the peer's");
        }
    }
    compare(*guest, {}, "place: refused, and yet");
  }

  void stops() {
    const auto guest = open();
    if (!guest) return;
    TimedCall<bool> stopping([guest] {
      guest->sink->stop();
      guest->sink->stop();
      return true;
    });
    if (!expect(stopping.wait(options_.patience), "stop() does not return")) return;
    // One that was joined may be seen for a moment more.
    const auto until = std::chrono::steady_clock::now() + options_.patience;
    const auto any_runs = [&] {
      const std::scoped_lock lock(guest->mutex);
      return std::ranges::any_of(guest->threads, [](pid_t thread) {
        return ::access(("/proc/self/task/" + std::to_string(thread)).c_str(), F_OK) == 0;
      });
    };
    while (any_runs() && std::chrono::steady_clock::now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    expect(!any_runs(), "stop() leaves a thread of the sink behind");
    TimedCall<bool> ending([guest] {
      guest->sink.reset();
      return true;
    });
    if (!expect(ending.wait(options_.patience), "the destructor does not return")) return;
    TimedCall<bool> alone([other = open()] {  // without stop()
      if (other) other->sink.reset();
      return true;
    });
    expect(alone.wait(options_.patience), "the destructor does not return without stop()");
  }

  std::function<S()> make_;
  ReadPage read_page_;
  PageSinkContractOptions options_;
  std::mt19937_64 random_{1};
  ContractReport report_;
};

}  // namespace testing::detail

/// Checks that pages arrive where they belong, on one channel and on four at once; that zero pages become zero; that every
/// offset that is no page of its block is refused before anything changes, as a normal and as a zero page; that nothing
/// beside the pages changes; and that stop() and the destructor end the sink's threads.
///
/// Params: `make()`: fresh settings for each sink; copyable. `read_page`: see the head; needed unless S::writes_memory.
/// Not checked: that nothing is allocated after create(), because only a whole program can count allocations.
/// Threads: makes some of its own. When stop() never returns, its thread and the sink are left behind.
template <class S, class Make>
[[nodiscard]] ContractReport check_page_sink_contract(Make make, ReadPage read_page = {},
                                                      PageSinkContractOptions options = {}) {
  static_assert(check_page_sink<S>());
  ContractReport report;
  if (!report.expect(S::writes_memory || read_page, "setup: needs read_page, because the pages do not go to memory"))
    return report;
  return testing::detail::PageSinkCheck<S>(std::move(make), std::move(read_page), options).run();
}

}  // namespace multifd
