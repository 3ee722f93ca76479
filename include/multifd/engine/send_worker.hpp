// SPDX-License-Identifier: MIT
//
// The worker of one sending channel: takes batches, finds zero pages, gathers runs, hands them to the channel's outlet,
// and gives the batches back. How pages are written is the outlet's part.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "multifd/ends/page_source.hpp"
#include "multifd/engine/outlet.hpp"
#include "multifd/engine/send_shared.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/thread.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd::engine {

/// Threads: run() is the body of the channel's thread; shutdown() from any.
template <Outlet O, ZeroPagePolicy Z, PageSource From>
class SendWorker {
 public:
  /// Allocates what the worker will need; the outlet has allocated its own.
  [[nodiscard]] static Result<std::unique_ptr<SendWorker>> create(SendShared& shared, unsigned channel, O outlet,
                                                                  const Z& zero) {
    auto runs = PageRuns::create(shared.map.batch_pages());
    if (!runs) return std::unexpected(runs.error());
    std::unique_ptr<SendWorker> worker(new (std::nothrow)
                                           SendWorker(shared, channel, std::move(outlet), zero, std::move(*runs)));
    if (!worker) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    worker->zeros_.reset(new (std::nothrow) std::uint64_t[shared.map.batch_pages()]);
    if (!worker->zeros_) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    return worker;
  }

  /// Ends when everything is sent, or at the first error of any channel.
  void run() noexcept {
    Result<void> ended = count(outlet_.begin());
    if (ended) ended = work();
    if constexpr (HasReconnect<O>) {
      while (!ended && shared_.journal && !shared_.error.failed() && outlet_.comes_back(ended.error())) {
        const Result<bool> back = come_back(ended.error());
        ended = !back ? std::unexpected(back.error()) : *back ? go_on() : Result<void>{};
        if (!back) break;
      }
    }
    counters().cpu_ns.set(thread_cpu_ns());
    if (!ended) raise(ended.error());
    shared_.epochs.channel_ended();
    if constexpr (HasAnswer<O>) {
      // Relaxed: the value is set before the hand-off has ended, and a worker that ends in order has seen that end.
      if (channel_ != 0 || !ended || !shared_.wants_confirmation.load(std::memory_order_relaxed)) return;
      if (auto confirmed = outlet_.confirmation(); !confirmed) shared_.error.raise(confirmed.error());
      shared_.epochs.confirmed();
    }
  }

  void shutdown() noexcept { outlet_.shutdown(); }
  /// Breaks the connection, so that another one is made. Threads: any.
  void drop_link() noexcept {
    if constexpr (HasReconnect<O>) outlet_.drop_link();
  }

 private:
  /// So long a worker that may lose its connection waits for work before it looks whether it has.
  static constexpr std::chrono::milliseconds longest_idle{100};

  SendWorker(SendShared& shared, unsigned channel, O outlet, const Z& zero, PageRuns runs) noexcept
      : shared_(shared),
        channel_(channel),
        outlet_(std::move(outlet)),
        zero_(zero),
        runs_(std::move(runs)),
        meter_(shared.counters[channel], shared.limiter) {}

  /// Makes this channel's error the first one. The other end may have left its reason before it broke the channel.
  void raise(Error error) noexcept {
    error.channel = channel_;
    error.packet = counters().packets.get();
    if constexpr (HasAnswer<O>) {
      if (error.code == Condition::peer_gone) error = outlet_.reason().value_or(error);
    }
    shared_.error.raise(error);
  }

  /// The connection is lost. Waits for another one; what goes wrong with that is no lost connection any more. False: none is
  /// needed.
  [[nodiscard]] Result<bool> come_back(const Error& why) noexcept
    requires HasReconnect<O>
  {
    if constexpr (HasAnswer<O>)
      if (const auto gave_up = outlet_.reason()) return std::unexpected(*gave_up);
    shared_.journal->lose(channel_);  // first: who finds this channel away finds its pages among the lost ones
    shared_.epochs.leave(channel_);
    shared_.handoff->leave();
    const auto connected = outlet_.reconnect(why);
    first_epoch_ = shared_.epochs.rejoin(channel_);
    shared_.handoff->come_back(channel_, first_epoch_);
    if (connected) return true;
    if (connected.error().code == Errc::cancelled && !shared_.error.failed()) return false;
    return std::unexpected(connected.error());
  }
  [[nodiscard]] Result<void> go_on() noexcept
    requires HasReconnect<O>
  {
    if (auto begun = count(outlet_.begin_at(first_epoch_)); !begun) return begun;
    return work();
  }

  [[nodiscard]] Result<void> work() noexcept {
    meter_.begin();
    for (;;) {
      std::optional<Work> next = shared_.handoff->try_take(channel_);
      if (!next) {
        if (auto out = outlet_.push_out(meter_); !out) return out;
        next = shared_.handoff->take(channel_, shared_.journal ? longest_idle : Signal::forever);
      }
      const Work work = *next;
      meter_.idled();
      switch (work.kind) {
        case Work::Kind::batch: {
          auto sent = send(*work.batch);
          shared_.handoff->give_back(work.batch);
          if (!sent) return sent;
          break;
        }
        case Work::Kind::close_epoch:
          if (auto closed = close_epoch(work.epoch); !closed) return closed;
          break;
        case Work::Kind::end: return outlet_.end();
        case Work::Kind::stopped: return {};  // the reason is the first error already
        case Work::Kind::idle:
          if constexpr (HasReconnect<O>) {
            if (auto there = outlet_.check_link(); !there) return there;
          }
          break;
      }
    }
  }

  [[nodiscard]] Result<void> close_epoch(std::uint64_t epoch) noexcept {
    shared_.epochs.closing(channel_);
    if (auto closed = count(outlet_.close_epoch(epoch, meter_)); !closed) return closed;
    counters().syncs.add(1);
    counters().cpu_ns.set(thread_cpu_ns());
    shared_.epochs.closed(channel_);
    return {};
  }

  [[nodiscard]] Result<void> send(PageBatch& batch) noexcept {
    if constexpr (HasMessages<O>) {
      if (batch.message.bytes) {
        auto sent = count(outlet_.send_message(batch.message, meter_));
        if (sent) counters().packets.add(1);
        return sent;
      }
    }
    if (shared_.journal) shared_.journal->note(channel_, batch.epoch, batch.block, batch.offsets());
    const RamBlock& block = shared_.map.block(batch.block);
    const std::size_t normal = split(batch, block);
    meter_.checked();
    const PageList pages{.id = batch.block,
                         .block = block,
                         .offsets = batch.offsets(),
                         .normal_pages = normal,
                         .runs = runs_.view(),
                         .in_guest = From::guest && !(From::copies && batch.copied)};
    if (auto sent = count(outlet_.send(pages, meter_)); !sent) return sent;
    counters().packets.add(1);
    counters().normal_pages.add(normal);
    counters().zero_pages.add(batch.size() - normal);
    return {};
  }

  /// Partitions the batch in place, zero pages behind the normal ones, keeping the order on both sides; gathers the
  /// normal pages into runs. Returns their number.
  std::size_t split(PageBatch& batch, const RamBlock& block) noexcept {
    const std::size_t page_bytes = shared_.map.page_bytes();
    const std::span<std::uint64_t> offsets = batch.offsets().first(batch.size() - batch.known_zeros);
    runs_.clear();
    if constexpr (Z::stage != ZeroStage::channel) {
      for (std::size_t i = 0; i < offsets.size(); ++i) runs_.add(From::page(block, batch, i, page_bytes), page_bytes);
      return offsets.size();
    }
    std::size_t normal = 0;
    std::size_t zeros = 0;
    for (std::size_t first = 0; first < offsets.size(); first += zero_mask_pages) {
      const auto group = offsets.subspan(first, std::min(zero_mask_pages, offsets.size() - first));
      std::array<std::byte*, zero_mask_pages> pages;
      for (std::size_t i = 0; i < group.size(); ++i) pages[i] = From::page(block, batch, first + i, page_bytes);
      const std::uint64_t zero = zero_mask(zero_, {batch.block, page_bytes, group, pages.data()});
      for (std::size_t i = 0; i < group.size(); ++i) {
        if ((zero >> i & 1) != 0) {
          zeros_[zeros++] = group[i];
        } else {
          offsets[normal++] = group[i];
          runs_.add(pages[i], page_bytes);
        }
      }
    }
    std::copy_n(zeros_.get(), zeros, offsets.begin() + static_cast<std::ptrdiff_t>(normal));
    return normal;
  }

  [[nodiscard]] Result<void> count(const Result<Sent>& sent) noexcept {
    if (!sent) return std::unexpected(sent.error());
    counters().payload_bytes.add(sent->payload_bytes);
    counters().wire_bytes.add(sent->wire_bytes);
    return {};
  }

  ChannelCounters& counters() noexcept { return meter_.counters(); }

  SendShared& shared_;
  const unsigned channel_;
  O outlet_;
  const Z& zero_;
  PageRuns runs_;
  std::unique_ptr<std::uint64_t[]> zeros_;
  std::uint64_t first_epoch_ = 0;  ///< of the connection that there is
  Meter meter_;
};

}  // namespace multifd::engine
