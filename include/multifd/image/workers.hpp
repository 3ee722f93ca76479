// SPDX-License-Identifier: MIT
//
// Work on an image in pieces, by several threads: each takes the next piece that nobody has.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>

#include "multifd/engine/crew.hpp"
#include "multifd/engine/first_error.hpp"
#include "multifd/limits.hpp"
#include "multifd/options.hpp"

namespace multifd::image {

/// Options of everything that reads or writes an image as a whole.
struct WorkOptions {
  unsigned threads = 2;                 ///< 1 to 255
  ThreadHook thread_hook{};             ///< runs in each new thread
  std::function<bool()> interrupted{};  ///< polled ahead of each piece, by all threads; true: ends with Errc::cancelled
  /// Called behind each piece, by all threads. Params: bytes of the image that the piece was. Default: nothing.
  std::function<void(std::uint64_t)> on_progress{};
};

/// Calls `work(piece, worker)` for the pieces from 0 on, in order of their starts, on `options.threads` threads: a thread
/// has one number as `worker`, from 0 on. `on_stop`: called once, as soon as a piece has failed: ends what other workers
/// wait for.
///
/// Errors: the first one of a piece; later pieces do not begin then. Errc::bad_channel_count; out of memory or threads.
/// Threads: the caller's waits.
template <class Work, class OnStop>
[[nodiscard]] Result<void> in_threads(const WorkOptions& options, std::uint64_t pieces, Work&& work, OnStop&& on_stop) {
  if (options.threads == 0 || options.threads > max_channels)
    return fail(Errc::bad_channel_count, Stage::setup, "image: threads", options.threads);
  return catch_bad_alloc(Stage::setup, "image: threads", [&]() -> Result<void> {
    std::atomic<std::uint64_t> next{0};
    engine::FirstError error(on_stop);
    struct Worker {
      const WorkOptions& options;
      std::atomic<std::uint64_t>& next;
      engine::FirstError& error;
      std::uint64_t pieces;
      std::remove_reference_t<Work>& work;
      unsigned number;

      void run() noexcept {
        while (!error.failed()) {
          if (options.interrupted && options.interrupted())
            return error.raise({.code = Errc::cancelled, .op = "image"});
          const std::uint64_t piece = next.fetch_add(1, std::memory_order_relaxed);  // a number each, no order
          if (piece >= pieces) return;
          if (auto done = work(piece, number); !done) return error.raise(done.error());
        }
      }
      void shutdown() noexcept {}
    };
    engine::Crew<Worker> crew;
    for (unsigned i = 0; i < std::min<std::uint64_t>(options.threads, pieces); ++i)
      crew.add(std::unique_ptr<Worker>(new Worker{options, next, error, pieces, work, i}));
    // Its failure is the first error.
    static_cast<void>(crew.start("image", options.thread_hook, error));
    crew.join();
    error.wait_stopped();
    return error.failed() ? Result<void>(std::unexpected(error.get())) : Result<void>{};
  });
}

/// The same for pieces that do not wait for each other. Errors: as above: Errc::cancelled, bad_channel_count.
template <class Work>
[[nodiscard]] Result<void> in_threads(const WorkOptions& options, std::uint64_t pieces, Work&& work) {
  return in_threads(options, pieces, work, [] {});
}

}  // namespace multifd::image
