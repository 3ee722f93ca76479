// SPDX-License-Identifier: MIT
//
// A migration over links of one kind: for each combination of compressor and zero policy.
#pragma once

#include <multifd/compress/nocomp.hpp>
#include <multifd/compress/zlib.hpp>
#include <multifd/compress/zstd.hpp>
#include <multifd/multifd.hpp>
#include <multifd/testing/fault_transport.hpp>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>

#include "soak/migration.hpp"

namespace soak {

using namespace multifd;

template <class T>
struct Ends {
  std::vector<T> sender;
  std::vector<T> receiver;
};

/// Calls an action after a time, unless stopped before: a cancel from outside at a random moment.
class Later {
 public:
  Later(std::chrono::microseconds after, std::function<void()> action)
      : thread_([this, after, action = std::move(action)] {
          {
            std::unique_lock lock(mutex_);
            if (changed_.wait_for(lock, after, [this] { return stopped_; })) return;
          }
          action();
        }) {}
  ~Later() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::thread thread_;
};

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The blocks of a plan, one after the other in an arena.
inline RamMap map_of(const Plan& plan, std::span<std::byte> memory) {
  RamMap map(plan.page_bytes);
  std::size_t at = 0;
  for (std::size_t i = 0; i < plan.block_bytes.size(); ++i) {
    const auto added = map.add("block" + std::to_string(i), memory.subspan(at, plan.block_bytes[i]));
    if (!added) throw std::runtime_error(describe(added.error()));
    at += plan.block_bytes[i];
  }
  return map;
}

/// The source's half: rounds of everything, then of what was written meanwhile. `zeros`: pages for the main stream.
template <class S>
Result<void> send(S& sender, const Plan& plan, const RamMap& map, std::vector<std::span<std::byte>>& zeros,
                  const RamMap& far) {
  Random random(plan.seed);
  for (unsigned round = 0; round < plan.rounds; ++round) {
    for (std::uint32_t b = 0; b < map.blocks().size(); ++b) {
      const BlockId block{b};
      const auto on_zero = [&](std::uint64_t offset) {
        zeros.push_back(far.block(block).host.subspan(offset, plan.page_bytes));
      };
      const std::span<std::byte> host = map.block(block).host;
      if (round == 0) {
        if (auto queued = sender.queue_range(block, 0, host.size(), on_zero); !queued)
          return std::unexpected(queued.error());
        continue;
      }
      std::vector<std::uint64_t> dirty((host.size() / plan.page_bytes + 63) / 64);
      for (std::size_t page = random() % 7; page < host.size() / plan.page_bytes; page += 1 + random() % 40) {
        dirty[page / 64] |= std::uint64_t{1} << page % 64;
        std::memset(&host[page * plan.page_bytes], static_cast<int>(1 + random() % 255), plan.page_bytes / 2);
      }
      if (auto queued = sender.queue_dirty(block, dirty, 0, on_zero); !queued) return std::unexpected(queued.error());
    }
    // A page that the main stream calls zero must not be overtaken by an older copy: one epoch after the other.
    if (auto synced = sender.close_epoch_and_wait(); !synced) return std::unexpected(synced.error());
  }
  if (plan.trouble == Trouble::destroy_sender) return {};
  return sender.close_channels();
}

template <class T, class C, class Z>
Outcome run(const Plan& plan, Arena& arena, Ends<T> ends) {
  using Link = testing::FaultTransport<T>;
  using clock = std::chrono::steady_clock;
  std::size_t all = 0;
  for (const std::size_t bytes : plan.block_bytes) all += bytes;
  std::memset(arena.destination.data(), plan.zeroed_destination ? 0 : 0xee, all);
  const RamMap near = map_of(plan, arena.source);
  const RamMap far = map_of(plan, arena.destination);

  std::atomic<std::uint64_t> operations = 0;
  const auto wrap = [&](std::vector<T> links, bool faulty) {
    std::vector<Link> wrapped;
    for (T& link : links) {
      testing::FaultOptions options;
      if (plan.max_io_bytes != 0) options.max_io_bytes = plan.max_io_bytes;
      if (faulty) {
        options.operations = &operations;
        options.fail_at = plan.operation;
      }
      if (plan.trouble == Trouble::cut && wrapped.empty()) options.cut_after_bytes = plan.cut_bytes;
      wrapped.emplace_back(std::move(link), options);
    }
    return wrapped;
  };
  auto sender_links = wrap(std::move(ends.sender), plan.trouble == Trouble::fail_sender);
  auto receiver_links = wrap(std::move(ends.receiver), plan.trouble == Trouble::fail_receiver);

  Outcome outcome;
  std::optional<clock::time_point> cancelled;
  const auto cancel = [&](auto& side) {
    const auto began = clock::now();
    side.cancel();
    outcome.cancel_seconds = seconds_since(began);
    cancelled = began;
  };

  std::optional<Result<void>> received;
  std::thread receiving([&, links = std::move(receiver_links)]() mutable {
    using R = Receiver<Link, C>;
    auto receiver = R::open(
        far, std::move(links),
        {.barrier = plan.manual_barrier ? Barrier::manual : Barrier::automatic,
         .into = {.destination = plan.zeroed_destination ? DestinationMemory::zeroed : DestinationMemory::unknown,
                  .populate = plan.populate_ahead ? Populate::ahead : Populate::off}});
    if (!receiver) {
      received = std::unexpected(receiver.error());
      return;
    }
    std::optional<Later> later;
    if (plan.trouble == Trouble::cancel_receiver) later.emplace(plan.after, [&] { cancel(*receiver); });
    for (unsigned round = 0; plan.manual_barrier && round < plan.rounds; ++round)
      if (auto synced = receiver->release_epoch(); !synced) {
        received = std::unexpected(synced.error());
        return;
      }
    received = receiver->finish();
  });

  Result<void> sent;
  std::vector<std::span<std::byte>> zeros;
  {
    auto sender = Sender<Link, C, Z>::open(
        near, std::move(sender_links), {.bandwidth = plan.bandwidth, .digest = plan.digest ? Digest::on : Digest::off});
    if (!sender) {
      sent = std::unexpected(sender.error());
    } else {
      std::optional<Later> later;
      if (plan.trouble == Trouble::cancel_sender) later.emplace(plan.after, [&] { cancel(*sender); });
      sent = send(*sender, plan, near, zeros, far);
    }
  }  // destroyed whatever has become of it
  receiving.join();
  if (cancelled) outcome.joined_seconds = seconds_since(*cancelled);

  if (plan.trouble == Trouble::none && !sent) throw std::runtime_error("sender: " + describe(sent.error()));
  if (plan.trouble == Trouble::none && !*received) throw std::runtime_error("receiver: " + describe(received->error()));
  if (!sent && sent.error().code == Condition::misuse) throw std::runtime_error("sender: " + describe(sent.error()));
  if (!*received && received->error().code == Condition::misuse)
    throw std::runtime_error("receiver: " + describe(received->error()));
  if (!sent || !*received) {
    outcome.end = End::failed;
    return outcome;
  }
  for (const std::span<std::byte> page : zeros) {
    // The last epoch's word counts: a page that was zero may have been written since.
    const std::size_t at = static_cast<std::size_t>(page.data() - arena.destination.data());
    if (buffer_is_zero(&arena.source[at], page.size())) std::memset(page.data(), 0, page.size());
  }
  if (std::memcmp(arena.source.data(), arena.destination.data(), all) != 0)
    throw std::runtime_error("the memory that arrived is not what was sent");
  return outcome;
}

template <class T>
Outcome run_stack(const Plan& plan, Arena& arena, Ends<T> ends) {
  auto done =
      with_policies(plan.compression, PolicyList<NoComp, Zlib, Zstd>{}, plan.zero_pages,
                    PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>{},
                    [&]<class C, class Z>() -> Result<Outcome> { return run<T, C, Z>(plan, arena, std::move(ends)); });
  if (!done) throw std::runtime_error(describe(done.error()));
  return *done;
}

/// One for each kind of link, in a file of its own, since each is much to compile.
Outcome run_sockets(const Plan& plan, Arena& arena);
Outcome run_memory(const Plan& plan, Arena& arena);

}  // namespace soak
