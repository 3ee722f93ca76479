// SPDX-License-Identifier: MIT
//
// The relay itself: one migration from a real QEMU source to a real QEMU destination. format/roles.md section 11.
//
//   source                       relay                          destination
//   main    ------->  MainStream -> (parse, barrier) -> MainStreamWriter -->
//           <-------  ReturnPath: unchanged, on a thread of its own  <------
//   channels ------>  AnyReceiver -> Pages -> AnySender             ------->
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>

#include "common/progress.hpp"
#include "common/report.hpp"
#include "qemu_relay/destination.hpp"
#include "qemu_relay/first_failure.hpp"
#include "qemu_relay/outcome.hpp"
#include "qemu_relay/pages.hpp"
#include "qemu_relay/settings.hpp"
#include "qemu_relay/style_check.hpp"

namespace relay {

/// One migration. Its main thread reads the source's main stream; the workers of the source's channels hand their
/// packets to Pages; the return path has a thread, and so has a signal. The first failure of any of them ends all
/// (FirstFailure).
class Relay {
 public:
  Relay(const Settings& settings, program::QemuSource& source, const multifd::Interrupt& interrupt);
  ~Relay();

  /// Returns the report. Throws Unfinished, with a text that says where the guest is.
  nlohmann::json run();
  /// The paths to the destination, as the end of a summary. Behind run().
  std::string paths_note() const { return destination_.connections().note(); }

 private:
  void forward();
  void take(const multifd::qemu::Element& element);
  void open_channels();
  bool give_up_on_silence();
  program::StackOptions out_options() const;
  void close_epoch(const multifd::qemu::Element& element);
  void finish();
  /// An error of one of the source's channels. Threads: the receiver's.
  void take_channel_error(const multifd::Error& error) noexcept;
  Outcome end() const;

  program::Snapshot look(double seconds) const;
  nlohmann::json report(double seconds) const;

  const Settings& settings_;
  program::QemuSource& source_;
  const multifd::Interrupt& interrupt_;
  FirstFailure failure_;
  Forwarded forwarded_;
  Destination destination_;
  program::MainStream main_;
  StyleCheck style_;
  multifd::RamMap ram_;  ///< the source's blocks, without memory
  std::uint64_t epochs_ = 0;
  unsigned silent_seconds_ = 0;                ///< time since the source's last byte
  bool last_section_ = false;                  ///< RAM's END has begun
  std::atomic<std::uint64_t> main_pages_ = 0;  ///< pages that came as records of the main stream
  /// An epoch of RAM's END has come whole; if another follows, it shows what is missing.
  std::atomic<bool> ram_over_ = false;
  std::atomic<bool> device_packets_ = false;      ///< devices' state comes on the channels, too
  std::mutex lost_mutex_;                         ///< guards channel_lost_
  std::optional<program::Failure> channel_lost_;  ///< of the source's, when its pages had all come

  // The members above are used by the threads of these two, which run until both are destroyed.
  std::unique_ptr<Pages> pages_;
  std::unique_ptr<program::AnyReceiver> receiver_;  // behind pages_, which its threads use until it is gone
  std::atomic<bool> channels_open_ = false;         ///< ram_, pages_ and receiver_ are complete, and stay as they are
  program::OnInterrupt on_signal_;                  // last: its action uses the others
};

}  // namespace relay
