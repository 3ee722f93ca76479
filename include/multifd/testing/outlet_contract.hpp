// SPDX-License-Identifier: MIT
//
// Checks the rules of the Outlet concept that types cannot express. Run it on the outlet of your own format, in any test
// framework:
//
//   auto report = multifd::check_outlet_contract<MyOutlet>(make_transfer);
//   assert(report.ok());  // else print report.text()
//
// `make_transfer(map, channels)` returns a fresh OutletTransfer: the outlets, and how to see what the other end has.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/engine/outlet.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/testing/page_content.hpp"
#include "multifd/testing/timed_call.hpp"

namespace multifd {

/// One transfer for check_outlet_contract(). Members end in reverse order.
template <engine::Outlet O>
struct OutletTransfer {
  /// What the others use: the file, a receiver. The outlets end before.
  std::shared_ptr<void> other_end;
  /// One for each channel, not begun.
  std::vector<O> outlets;
  /// Waits until so many pages have arrived in all, normal and zero; false when they do not. Called when nothing is held
  /// back any more.
  std::function<bool(std::uint64_t pages)> wait_for_pages;
  /// Fills `page` with what the other end has at a place.
  std::function<void(BlockId, std::uint64_t offset, std::span<std::byte> page)> read_page;
  /// Called when every outlet has come to its end(): whether the other end has taken the transfer for a whole one.
  std::function<bool()> whole;
};

struct OutletContractOptions {
  std::size_t page_bytes = 4096;  ///< of the map; the format may depend on it
  /// How long a call may go on that has to end. Only an outlet that fails needs so long.
  std::chrono::milliseconds patience = std::chrono::seconds(5);
};

namespace testing::detail {

template <engine::Outlet O>
class OutletCheck {
 public:
  using Transfer = OutletTransfer<O>;
  using MakeTransfer = std::function<Transfer(const RamMap&, unsigned channels)>;

  OutletCheck(MakeTransfer make, MakeTransfer make_stalled, OutletContractOptions options)
      : make_(std::move(make)), make_stalled_(std::move(make_stalled)), options_(options) {}

  ContractReport run() {
    pages_arrive();
    if (!report_.ok()) return std::move(report_);  // nothing else can hold
    keeps_to_the_cap();
    keeps_epochs_in_order();
    shutdown_ends_calls();
    return std::move(report_);
  }

 private:
  using Bytes = std::vector<std::byte>;
  static constexpr std::size_t block_pages = 200;

  /// Guest memory of two blocks, a transfer of it, and what a worker has for each channel.
  struct Trial {
    Trial(const MakeTransfer& make, unsigned channels, std::size_t page_bytes, std::uint64_t cap = 0)
        : map(page_bytes), memory(2 * block_pages * page_bytes), limiter(cap), counters(channels) {
      for (std::size_t i = 0; i < 2; ++i)
        static_cast<void>(map.add(i == 0 ? "pc.ram" : "vga.vram",
                                  std::span(memory).subspan(i * block_pages * page_bytes, block_pages * page_bytes)));
      for (engine::ChannelCounters& each : counters) meters.push_back(std::make_unique<engine::Meter>(each, limiter));
      transfer = make(map, channels);
      for (O& outlet : transfer.outlets) outlets.push_back(std::make_unique<O>(std::move(outlet)));
    }
    ~Trial() { outlets.clear(); }

    std::span<std::byte> page(BlockId block, std::size_t i) {
      return std::span(memory).subspan((index(block) * block_pages + i) * map.page_bytes(), map.page_bytes());
    }

    RamMap map;
    Bytes memory;
    engine::RateLimiter limiter;
    std::vector<engine::ChannelCounters> counters;
    std::vector<std::unique_ptr<engine::Meter>> meters;
    Transfer transfer;
    std::vector<std::unique_ptr<O>> outlets;  ///< moved once more, as an outlet is on its way to its worker
  };

  bool expect(bool held, const std::string& what) { return report_.expect(held, what); }

  template <class T>
  bool good(const Result<T>& result, const std::string& what) {
    return expect(result.has_value(), what + (result ? "" : ": " + describe(result.error())));
  }

  std::shared_ptr<Trial> open(unsigned channels, std::uint64_t cap = 0) { return open(make_, channels, cap); }

  std::shared_ptr<Trial> open(const MakeTransfer& make, unsigned channels, std::uint64_t cap) {
    auto trial = std::make_shared<Trial>(make, channels, options_.page_bytes, cap);
    if (!expect(trial->outlets.size() == channels, "setup: the transfer has not one outlet for each channel"))
      return nullptr;
    for (auto& outlet : trial->outlets) {
      const auto begun = outlet->begin();
      if (!good(begun, "begin()")) return nullptr;
      expect(begun->payload_bytes == 0, "begin(): counts page data, and there is none");
    }
    return trial;
  }

  /// Sends a list as the worker does. What the list lies in is overwritten afterwards, as the next batch would.
  [[nodiscard]] static Result<engine::Sent> send(Trial& trial, unsigned channel, BlockId block,
                                                 const std::vector<std::size_t>& normal,
                                                 const std::vector<std::size_t>& zero, bool in_guest = false) {
    const std::size_t page_bytes = trial.map.page_bytes();
    std::vector<std::uint64_t> offsets;
    auto runs = PageRuns::create(trial.map.batch_pages());
    if (!runs) return std::unexpected(runs.error());
    for (const std::size_t page : normal) {
      offsets.push_back(page * page_bytes);
      runs->add(trial.page(block, page).data(), page_bytes);
    }
    for (const std::size_t page : zero) offsets.push_back(page * page_bytes);
    std::vector<iovec> buffers(runs->view().begin(), runs->view().end());
    const engine::PageList pages{.id = block,
                                 .block = trial.map.block(block),
                                 .offsets = offsets,
                                 .normal_pages = normal.size(),
                                 .runs = buffers,
                                 .in_guest = in_guest};
    auto sent = trial.outlets[channel]->send(pages, *trial.meters[channel]);
    std::ranges::fill(offsets, 3 * page_bytes);
    std::ranges::fill(buffers, iovec{});
    return sent;
  }

  static std::vector<std::size_t> pages_from(std::size_t first, std::size_t count, std::size_t step = 1) {
    std::vector<std::size_t> pages;
    for (std::size_t i = 0; i < count; ++i) pages.push_back(first + i * step);
    return pages;
  }

  std::string arrived_otherwise(Trial& trial, BlockId block, const std::vector<std::size_t>& pages, std::byte content) {
    Bytes page(options_.page_bytes);
    std::size_t wrong = 0;
    for (const std::size_t each : pages) {
      std::ranges::fill(page, std::byte{0x5c});
      trial.transfer.read_page(block, each * options_.page_bytes, page);
      wrong += !holds_only(page, content);
    }
    return wrong == 0 ? ""
                      : std::to_string(wrong) + " of " + std::to_string(pages.size()) + " pages are not what was sent";
  }

  /// One channel, all kinds of lists, each page's content one byte's value.
  void pages_arrive() {
    const auto trial = open(1);
    if (!trial) return;
    const std::size_t most = std::min<std::size_t>(trial->map.batch_pages(), 64);
    struct List {
      const char* what;
      std::vector<std::size_t> normal, zero;
    };
    const List lists[] = {
        {"one normal page", {0}, {}},
        {"one zero page", {}, {1}},
        {"neighbours", pages_from(2, 6), {}},
        {"pages with gaps, backwards", {70, 60, 50, 40}, {}},
        {"normal and zero pages", {80, 81, 90}, {82, 83, 91}},
        {"zero pages only", {}, pages_from(100, 5, 2)},
        {"a full batch", pages_from(130, most), {}},
        {"a zero page where bytes were", {}, {0}},
        {"bytes where a zero page was", {1}, {}},
        {"the last page", {block_pages - 1}, {block_pages - 2}},
    };
    std::uint64_t pages = 0;
    std::uint64_t epoch = 0;
    int value = 1;
    for (const BlockId block : {BlockId{0}, BlockId{1}})
      for (const List& list : lists) {
        if (list.normal.size() + list.zero.size() > trial->map.batch_pages()) continue;
        const std::string name = std::string("send() of ") + list.what;
        const std::byte content{static_cast<unsigned char>(value++)};
        for (const std::size_t each : list.normal) std::ranges::fill(trial->page(block, each), content);
        const Bytes before = trial->memory;
        const bool in_guest = block == BlockId{1};
        const auto sent = send(*trial, 0, block, list.normal, list.zero, in_guest);
        if (!good(sent, name)) return;
        expect(trial->memory == before, name + ": writes to the pages");
        expect(sent->payload_bytes <= sent->wire_bytes, name + ": counts more page data than bytes");
        expect(!list.normal.empty() || sent->payload_bytes == 0, name + ": counts page data of zero pages");
        // A relay's buffer gets the next pages: what was sent must not change.
        const auto overwrite = [&] {
          for (const std::size_t each : list.normal) std::ranges::fill(trial->page(block, each), std::byte{0xdd});
        };
        if (!in_guest) overwrite();
        if (!good(trial->outlets[0]->push_out(*trial->meters[0]), name + ", then push_out()")) return;
        pages += list.normal.size() + list.zero.size();
        if (!expect(trial->transfer.wait_for_pages(pages), name + ", then push_out(): pages have not arrived")) return;
        for (const auto& [which, value_there] : {std::pair(&list.normal, content), std::pair(&list.zero, std::byte{})})
          if (const std::string wrong = arrived_otherwise(*trial, block, *which, value_there); !wrong.empty())
            return report_.fail(name + ": " + wrong);
        if (in_guest) overwrite();
        // The same page comes again only in another epoch.
        const auto closed = trial->outlets[0]->close_epoch(epoch++, *trial->meters[0]);
        if (!good(closed, "close_epoch()")) return;
      }
    if (!good(trial->outlets[0]->end(), "end()")) return;
    expect(trial->transfer.whole(), "end(): the other end does not take the transfer for a whole one");
  }

  void keeps_to_the_cap() {
    // A cap under which nothing may leave any more: whoever asks is told to stop.
    const auto trial = open(1, 1);
    if (!trial) return;
    trial->limiter.stop();
    std::ranges::fill(trial->page(BlockId{0}, 0), std::byte{9});
    const auto sent = send(*trial, 0, BlockId{0}, {0}, {});
    if (expect(!sent.has_value(), "send(): does not ask meter.acquire(), so that no bandwidth cap holds"))
      expect(sent.error().code == Errc::cancelled, "send(): does not return the error of meter.acquire()");
    for (auto& outlet : trial->outlets) outlet->shutdown();
  }

  /// Two channels have the same page, in two epochs; the one with the older content is late.
  void keeps_epochs_in_order() {
    const auto trial = open(2);
    if (!trial) return;
    struct Both {
      std::shared_ptr<Trial> trial;
      std::atomic<bool> newer_sent{false};
      std::atomic<bool> failed{false};
    };
    const auto both = std::make_shared<Both>();
    both->trial = trial;
    static constexpr BlockId block{0};
    std::ranges::fill(trial->page(block, 5), std::byte{1});
    std::ranges::fill(trial->page(BlockId{1}, 5), std::byte{2});  // the newer content, for the same place
    const auto channel = [both](unsigned c) {
      Trial& mine = *both->trial;
      O& outlet = *mine.outlets[c];
      engine::Meter& meter = *mine.meters[c];
      const auto check = [&](bool ok) { both->failed = both->failed || !ok; };
      if (c == 0) {
        // The other channel may be held at the end of its epoch: then it never comes so far.
        const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
        while (!both->newer_sent && std::chrono::steady_clock::now() < until)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        check(send(mine, 0, block, {5}, {}).has_value());
      }
      check(outlet.close_epoch(0, meter).has_value());
      if (c == 1) {
        const std::size_t page_bytes = mine.map.page_bytes();
        const std::uint64_t offset = 5 * page_bytes;
        const iovec run = const_buffer(mine.page(BlockId{1}, 5));
        const engine::PageList pages{.id = block,
                                     .block = mine.map.block(block),
                                     .offsets = std::span(&offset, 1),
                                     .normal_pages = 1,
                                     .runs = ConstBuffers(&run, 1)};
        check(outlet.send(pages, meter).has_value());
        check(outlet.push_out(meter).has_value());
        both->newer_sent = true;
      }
      check(outlet.close_epoch(1, meter).has_value());
      check(outlet.end().has_value());
      return true;
    };
    TimedCall<bool> first([channel] { return channel(0); });
    TimedCall<bool> second([channel] { return channel(1); });
    if (!expect(first.wait(options_.patience) && second.wait(options_.patience),
                "two channels, two epochs: a call does not return")) {
      for (auto& outlet : trial->outlets) outlet->shutdown();
      return;
    }
    if (!expect(!both->failed, "two channels, two epochs: a call failed")) return;
    expect(trial->transfer.whole(), "two channels: the other end does not take the transfer for a whole one");
    const std::string wrong = arrived_otherwise(*trial, block, {5}, std::byte{2});
    expect(wrong.empty(), "close_epoch(): a page of an older epoch replaces that of a newer one");
  }

  /// A channel that waits for the others in close_epoch(), and one that nobody reads.
  void shutdown_ends_calls() {
    const auto trial = open(2);
    if (!trial) return;
    TimedCall<bool> closing([trial] {
      static_cast<void>(trial->outlets[0]->close_epoch(0, *trial->meters[0]));
      return true;
    });
    closing.wait(std::chrono::milliseconds(50));  // it may, or may not, block
    for (int i = 0; i < 2; ++i)
      for (auto& outlet : trial->outlets) outlet->shutdown();
    expect(closing.wait(options_.patience), "shutdown() does not end close_epoch()");

    if (!make_stalled_) return;
    const auto stalled = open(make_stalled_, 1, 0);
    if (!stalled) return;
    std::ranges::fill(stalled->page(BlockId{0}, 0), std::byte{4});
    const auto send_on = [stalled] {
      for (int i = 0; i < 100'000; ++i)
        if (!send(*stalled, 0, BlockId{0}, {0}, {})) return false;
      return true;
    };
    TimedCall<bool> sending(send_on);
    if (!expect(!sending.wait(std::chrono::milliseconds(50)), "setup: send() does not block although nobody reads"))
      return;
    stalled->outlets[0]->shutdown();
    const bool* const sent = sending.wait(options_.patience);
    if (!expect(sent, "shutdown() does not end send()")) return;
    expect(!*sent, "a send() that shutdown() ended says that it succeeded");
    TimedCall<bool> later(send_on);
    const bool* const again = later.wait(options_.patience);
    expect(again && !*again, "after shutdown(), send() goes on");
  }

  MakeTransfer make_;
  MakeTransfer make_stalled_;  ///< may be empty
  OutletContractOptions options_;
  ContractReport report_;
};

}  // namespace testing::detail

/// Checks that the pages of all kinds of lists arrive, after push_out() at the latest and as they were when send() was
/// called; that nothing of a list is used later; that the bandwidth cap is asked; that epochs keep their order over two
/// channels; and that shutdown() ends calls that block.
///
/// Params: `make_transfer(map, channels)`: see the head of this file; a copyable callable. `make_stalled`: the same, of a
///   transfer whose other end takes nothing, so that send() blocks in the end; empty for formats where it never does.
/// Not checked: messages and answers, which are the format's own; that nothing is allocated, because only a whole program
///   can count allocations.
/// Threads: makes some of its own. When a call never returns, its thread and the transfer are left behind.
template <class O>
[[nodiscard]] ContractReport check_outlet_contract(
    std::function<OutletTransfer<O>(const RamMap&, unsigned channels)> make_transfer,
    std::function<OutletTransfer<O>(const RamMap&, unsigned channels)> make_stalled = {},
    OutletContractOptions options = {}) {
  static_assert(engine::check_outlet<O>());
  return testing::detail::OutletCheck<O>(std::move(make_transfer), std::move(make_stalled), options).run();
}

}  // namespace multifd
