// SPDX-License-Identifier: MIT
//
// The daemon: accepts VMMs, each with a thread of its own, and adds up what became of their guests.
#pragma once

#include <multifd/transport/address.hpp>

#include <cstdint>
#include <list>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <thread>
#include <vector>

#include "multifd_pager/guest.hpp"

namespace pager {

struct Settings {
  SourceSettings source;
  std::string listen;
  ProtocolName protocol = ProtocolName::multifd;
  std::string prefetch, record;
  unsigned fault_threads = 1;
  unsigned workers = 1;
  unsigned max_guests = 64;
  std::uint64_t guests = 0;  ///< end when so many have come and gone; 0: at a signal
  std::chrono::milliseconds handshake_timeout = std::chrono::seconds(10);
  std::string json_path;
};

class Pager {
 public:
  /// Throws Failure.
  Pager(const Settings& settings, const multifd::Address& address, const multifd::Interrupt& interrupt);
  ~Pager();
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;

  /// Serves until a signal comes, or until Settings::guests have come and gone. Returns the report. Throws Failure.
  nlohmann::json run();

 private:
  /// One connection.
  struct Session {
    std::thread thread;
    bool over = false;  ///< under mutex_
  };
  void accept_all();
  void start(program::Descriptor socket);
  void end(Session& session, GuestReport report) noexcept;
  /// Joins who is over, or all.
  void reap(bool all);
  void refuse() noexcept;
  nlohmann::json report(double seconds) const;

  const Settings& settings_;
  const multifd::Interrupt& interrupt_;
  Source source_;
  MemoryFile memory_;
  Recorder recorder_;
  Shared shared_;
  multifd::Address address_;
  program::Descriptor changed_;  ///< an eventfd: a session is over
  std::uint64_t connections_ = 0;
  std::uint64_t refused_ = 0;  ///< too many at once

  mutable std::mutex mutex_;
  std::list<Session> sessions_;
  std::vector<GuestReport> reports_;  ///< of the last ones
  std::uint64_t over_ = 0;            ///< guests that were accepted, and are over
  std::uint64_t failed_ = 0;          ///< connections that ended with an error
  std::uint64_t ram_bytes_ = 0, normal_pages_ = 0, zero_pages_ = 0, faults_ = 0;
};

}  // namespace pager
