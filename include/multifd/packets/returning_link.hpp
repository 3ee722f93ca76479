// SPDX-License-Identifier: MIT
//
// A receiving channel's connection, which another one may take the place of (format/extension.md section 19.10).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <utility>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/packets/epoch_barrier.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::packets {

/// The channel's worker reads one connection to its end before it takes the next one: so no byte of an older connection can
/// come behind one of a newer.
///
/// Threads: the worker; but shutdown(), drop_older() and with() from any.
template <Transport T>
class ReturningLink {
 public:
  /// Params `rejoins`: null: none takes its place; else it outlives this object.
  ReturningLink(T link, Rejoins<T>* rejoins) : rejoins_(rejoins), link_(std::move(link)) {}

  T& operator*() noexcept { return link_; }
  bool returns() const noexcept { return rejoins_ != nullptr; }
  /// Whether an error says that the connection is lost. The other side may break one, too, in order to make another: then it is
  /// drop_older() that ends it here.
  bool is_lost(const Error& error) const noexcept {
    return returns() && (is_lost_link(error) || error.code == Errc::cancelled);
  }

  /// Ends all connections, now and from now on.
  void shutdown() noexcept {
    if (rejoins_ != nullptr) rejoins_->stop();
    drop();
  }
  /// Breaks the connection where it is an older one: that of this generation takes its place.
  void drop_older(std::uint32_t generation) noexcept {
    const std::lock_guard held(mutex_);
    newest_ = std::max(newest_, generation);
    if (generation_ < newest_) link_.shutdown();
  }
  /// Calls `use(link)` while nobody replaces it.
  template <class Use>
  void with(Use&& use) noexcept {
    const std::lock_guard held(mutex_);
    use(link_);
  }

  /// Breaks the connection: the worker reads nothing more from it.
  void drop() noexcept {
    with([](T& link) { link.shutdown(); });
  }
  /// The connection is lost. Waits for the next one. False: none is needed behind the last epoch.
  /// Params `ended`: whether that is over. Errors: of Rejoins, which are no lost connection's.
  [[nodiscard]] Result<bool> find(std::uint32_t channel, const Error& why, EpochBarrier& barrier,
                                  const std::atomic<bool>& ended) noexcept {
    drop();
    if (ended.load(std::memory_order_seq_cst)) return false;
    barrier.leave(channel);
    auto arrival = rejoins_->await(channel, why);
    if (!arrival && arrival.error().code == Errc::cancelled && ended.load(std::memory_order_seq_cst)) return false;
    if (!arrival) return std::unexpected(arrival.error());
    const std::lock_guard held(mutex_);
    link_ = std::move(arrival->link);
    generation_ = arrival->generation;
    if (generation_ < newest_) link_.shutdown();
    return true;
  }
  /// Lets the connection in that find() has found. Returns the epoch that it begins with, once that has begun.
  /// Errors: of the connection, and of EpochBarrier::join().
  [[nodiscard]] Result<std::uint64_t> join(std::uint32_t channel, EpochBarrier& barrier) noexcept {
    barrier.admit(channel);  // ahead of the answer, behind which the source says an epoch that is open
    const auto answer =
        wire::encode_rejoin_answer({.verdict = wire::RejoinVerdict::joined, .generation = generation_, .received = 0});
    if (auto told = write_all(link_, answer.view()); !told) return std::unexpected(told.error());
    std::array<std::byte, wire::rejoin_epoch_bytes> said;
    if (auto read = read_exact(link_, std::span<std::byte>(said)); !read) return std::unexpected(read.error());
    const auto epoch = wire::load_be<std::uint64_t>(said.data());
    if (auto joined = barrier.join(channel, epoch); !joined) return std::unexpected(joined.error());
    rejoins_->joined(channel);
    return epoch;
  }

 private:
  Rejoins<T>* const rejoins_;
  std::mutex mutex_;  ///< of all below, while the worker replaces the link and others shut it down
  T link_;
  std::uint32_t generation_ = 0;  ///< of link_
  std::uint32_t newest_ = 0;      ///< that has come
};

}  // namespace multifd::packets
