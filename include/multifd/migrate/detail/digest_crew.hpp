// SPDX-License-Identifier: MIT
//
// Threads that compute keyed digests piece by piece, while the migration's thread reads or writes those of other pieces.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"

namespace multifd::migrate::detail {

/// Adjacent pages of a block that one thread takes at once: so many that handing them over costs nothing, and whole words of a
/// bitmap.
constexpr std::uint64_t pages_in_piece(std::size_t page_bytes) noexcept {
  constexpr std::size_t piece_bytes = std::size_t{2} << 20;
  return std::max<std::uint64_t>(piece_bytes / page_bytes / 64 * 64, 64);
}

/// A ring of pieces that are given in order, and come back in that order.
///
/// Params `Piece`: has `Result<void> run(KeyedDigest&) noexcept`, by one of the threads.
/// Threads: the migration's.
template <class Piece>
class DigestCrew {
 public:
  /// As many threads as there are cores, up to four: two ends on one host get along with that, too.
  /// Errors: those of `digests`; threads.
  [[nodiscard]] static Result<std::unique_ptr<DigestCrew>> create(const KeyedDigests& digests, const DigestKey& key) {
    std::unique_ptr<DigestCrew> crew(new DigestCrew);
    const unsigned threads = std::clamp(std::thread::hardware_concurrency(), 1u, most_threads);
    for (unsigned i = 0; i < threads; ++i) {
      MULTIFD_TRY_ASSIGN(auto digest, digests(key));
      crew->workers_.push_back({crew.get(), std::move(digest)});
    }
    for (unsigned i = 0; i < threads; ++i) {
      MULTIFD_TRY_ASSIGN(Thread thread,
                         Thread::start(crew->workers_[i], crew->no_hook_, {.role = "base", .channel = i}));
      crew->threads_.push_back(std::move(thread));
    }
    return crew;
  }
  DigestCrew(const DigestCrew&) = delete;
  DigestCrew& operator=(const DigestCrew&) = delete;
  ~DigestCrew() { monitor_.stop(); }

  static constexpr std::size_t pieces = 16;

  /// The piece that is to be given next, which may have been given before: then it is done. Params `behind`: so many pieces
  /// behind that one, up to `pieces` - 1: to see all to their ends. Errors: its run()'s.
  [[nodiscard]] Result<Piece*> next(std::size_t behind = 0) noexcept {
    auto held = monitor_.lock();
    Slot& slot = slots_[(given_ + behind) % pieces];
    monitor_.wait(held, [&] { return !slot.busy; });
    if (!slot.done) return std::unexpected(slot.done.error());
    return &slot.piece;
  }
  /// Gives the piece that next() has returned to the threads.
  void give() noexcept {
    monitor_.update([&] { slots_[given_++ % pieces].busy = true; });
  }

 private:
  static constexpr unsigned most_threads = 4;

  struct Slot {
    Piece piece{};
    bool busy = false;
    Result<void> done{};
  };
  struct Worker {
    DigestCrew* crew;
    std::unique_ptr<KeyedDigest> digest;
    void run() noexcept { crew->work(*digest); }
  };

  DigestCrew() = default;

  void work(KeyedDigest& digest) noexcept {
    for (;;) {
      auto held = monitor_.lock();
      monitor_.wait(held, [&] { return taken_ < given_; });
      if (monitor_.stopped(held)) return;
      Slot& slot = slots_[taken_++ % pieces];
      held.unlock();
      auto done = slot.piece.run(digest);
      monitor_.update([&] {
        slot.done = std::move(done);
        slot.busy = false;
      });
    }
  }

  const ThreadHook no_hook_{};
  engine::Monitor monitor_;
  std::array<Slot, pieces> slots_{};
  std::uint64_t given_ = 0, taken_ = 0;
  std::vector<Worker> workers_;
  std::vector<Thread> threads_;  ///< go first
};

}  // namespace multifd::migrate::detail
