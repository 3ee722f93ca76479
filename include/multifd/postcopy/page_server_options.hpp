// SPDX-License-Identifier: MIT
//
// The run-time settings of a PageServer, and what it counts.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/options.hpp"

namespace multifd::postcopy {

template <Compressor C = NoComp>
struct PageServerOptions {
  /// What a client has to name: the migration's, or the guest's, uuid. No secret and no authentication.
  Uuid session{};
  C compressor{};               ///< the client's has to be of the same method
  Digest digest = Digest::off;  ///< a digest with every answer, which the client verifies
  /// Connections at once. One more makes the oldest give way that has not said hello, or is closed itself.
  unsigned max_connections = 64;
  std::chrono::milliseconds hello_timeout = std::chrono::seconds(10);  ///< for a connection's hello; 0: no limit
  /// How long a client may take no byte of an answer; 0: no limit. A client that asks for nothing may do so for ever.
  std::chrono::milliseconds progress_timeout = std::chrono::seconds(120);
  /// What a background connection writes before it looks again whether something urgent has come.
  std::size_t piece_bytes = 64 * 1024;
  /// Bytes per second that all background connections together may carry; 0: no cap. What a guest waits for is not held
  /// back by it, nor counted, unless the client has no urgent connection at the moment. PageServer::set_bandwidth() changes it.
  std::uint64_t bandwidth = 0;
  ThreadHook thread_hook{};  ///< in each new thread; role "page"
  /// Told of each connection that ends with an error, in its thread. Must return soon, must not throw, and must not call
  /// the server.
  std::function<void(const Error&)> on_error{};
};

/// What a server has done, on all connections, also on those that are gone.
struct PageServerStats {
  std::uint64_t requests = 0;            ///< that were answered
  std::uint64_t urgent_requests = 0;     ///< among them
  std::uint64_t normal_pages = 0;        ///< sent with their bytes
  std::uint64_t zero_pages = 0;          ///< sent as an offset
  std::uint64_t payload_bytes = 0;       ///< page data, as it travels
  std::uint64_t wire_bytes = 0;          ///< all bytes of answers
  std::uint64_t connections_seen = 0;    ///< since open()
  std::uint64_t connections_failed = 0;  ///< that ended with an error
  unsigned connections = 0;              ///< now, hello or not
  unsigned serving = 0;                  ///< now, behind their hello
};

}  // namespace multifd::postcopy
