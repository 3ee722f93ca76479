// SPDX-License-Identifier: MIT
//
// One guest: its VMM's connection, its userfaultfd, its memory. What happens to it happens to no other.
#pragma once

#include <multifd/postcopy/fault_latency.hpp>
#include <multifd/postcopy/lazy_memory_options.hpp>
#include <multifd/transport/interrupt.hpp>

#include <chrono>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "common/descriptor.hpp"
#include "multifd_pager/handshake.hpp"
#include "multifd_pager/memory_file.hpp"
#include "multifd_pager/recorder.hpp"
#include "multifd_pager/source.hpp"

namespace pager {

/// What all guests have in common.
struct Shared {
  const Source& source;
  const MemoryFile& memory;
  Recorder& recorder;
  const multifd::Interrupt& interrupt;
  ProtocolName protocol{};
  unsigned fault_threads = 1;
  unsigned workers = 1;
  std::chrono::milliseconds handshake_timeout{};
  bool quiet = false;  ///< --json -: nothing else on stdout
};

/// What became of a guest.
struct GuestReport {
  unsigned guest = 0;     ///< counted from 1
  int pid = 0;            ///< of its VMM; 0: unknown
  bool accepted = false;  ///< its handshake was good
  bool complete = false;  ///< all of its memory is there
  bool gone = false;      ///< it ended before that
  std::string error;      ///< neither
  std::uint64_t bytes = 0;
  double seconds = 0;
  multifd::postcopy::LazyMemoryStats stats;
  multifd::postcopy::FaultLatency latency;
};
nlohmann::json json_of(const GuestReport& report);

/// Serves a guest from its handshake until all of its memory is there, its VMM has ended, or a signal comes. A failure is
/// told on stderr, and to the VMM where its protocol has words for it. Where threads of the guest may wait for pages that
/// do not come any more, this waits for the VMM's end: closing the last userfaultfd would show them empty memory.
GuestReport serve_guest(program::Descriptor socket, unsigned number, Shared& shared) noexcept;

}  // namespace pager
