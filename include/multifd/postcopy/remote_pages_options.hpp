// SPDX-License-Identifier: MIT
//
// The run-time settings of RemotePages, and what it counts.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/options.hpp"
#include "multifd/postcopy/page_store.hpp"

namespace multifd::postcopy {

/// The most requests without an answer on one connection.
inline constexpr unsigned max_page_window = 16;

template <Compressor C = NoComp>
struct RemotePagesOptions {
  Uuid session{};  ///< the server's (PageServerOptions::session)
  C compressor{};  ///< the server's has to be of the same method
  /// The guest's RAM blocks, in the order of their BlockIds: the server has to have each of them, with this size. Empty:
  /// the server's, for which open() then makes a connection.
  std::vector<StoreBlock> blocks{};
  std::size_t page_bytes = 0;  ///< 0: the server's; not with `blocks`
  unsigned window = 4;         ///< requests without an answer on a background connection, 1 to max_page_window
  std::chrono::milliseconds hello_timeout = std::chrono::seconds(10);     ///< for the server's hello; 0: no limit
  std::chrono::milliseconds progress_timeout = std::chrono::seconds(10);  ///< without a byte of an answer; 0: no limit
  /// How long PageStore::open() tries to get a connection, before the error is Errc::memory_lost. 0: no limit.
  std::chrono::milliseconds reconnect_timeout{0};
  ThreadHook thread_hook{};  ///< in the thread that watches the time limits; role "page"
};

/// Threads: as a plain value.
struct RemotePagesStats {
  std::uint64_t connections_made = 0;  ///< with a whole hello
  std::uint64_t connections_lost = 0;  ///< that ended with an error
  std::uint64_t wire_bytes = 0;        ///< received on connections that are over
};

}  // namespace multifd::postcopy
