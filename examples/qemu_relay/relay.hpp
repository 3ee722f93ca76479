// SPDX-License-Identifier: MIT
//
// The relay itself: one migration from a real QEMU source to a real QEMU destination. format/roles.md section 11.
//
//   source                       relay                          destination
//   main    ------->  MainStream -> (parse, barrier) -> MainStreamWriter -->
//           <-------  return path, unchanged, on a thread of its own  <-----
//   channels ------>  AnyReceiver -> Pages -> AnySender             ------->
#pragma once

#include <multifd/qemu/return_path.hpp>

#include <nlohmann/json_fwd.hpp>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "common/progress.hpp"
#include "common/qemu_source.hpp"
#include "common/report.hpp"
#include "qemu_relay/outcome.hpp"
#include "qemu_relay/pages.hpp"

namespace relay {

/// --out-peer: from the machine type.
inline constexpr const char* peer_auto = "auto";

struct Settings {
  program::SourceOptions source;
  std::string connect;
  program::StackOptions out;
  program::Tls out_tls;
  std::optional<multifd::PeerProfile> out_peer;  ///< none: derived from the machine type
  bool choose_zero_pages = false;                ///< by the peer's profile
  OutMemory out_memory = OutMemory::unknown;
  std::string json_path;
};

/// One migration. The first failure, anywhere, closes every connection hard on both sides at once, so that neither side
/// waits for the other (section 16, row 26). run() throws it, with a text that says where the guest is. Once the
/// destination's confirmation is passed on nothing fails any more: the guest has moved, and a failure only ends waits.
class Relay {
 public:
  Relay(const Settings& settings, program::QemuSource& source, const multifd::Interrupt& interrupt);
  ~Relay();

  /// Returns the report. Throws Unfinished.
  nlohmann::json run();

 private:
  void connect();
  void forward();
  void take(const multifd::qemu::Element& element);
  void open_channels();
  bool give_up_on_silence();
  program::StackOptions out_options() const;
  void close_epoch(const multifd::qemu::Element& element);

  // Checks that the destination ends epochs as the source does (section 6.1), which the stream does not say: the relay
  // sends a PING of its own behind the first section, and its PONG must come in time.
  bool has_to_prove_sections() const;
  void prove_sections(const multifd::qemu::Element& end_of_section);
  void ask_destination();
  std::chrono::milliseconds answer_limit() const;
  std::chrono::milliseconds question_limit() const;
  void check_answer_in_time() const;

  void forward_return_path() noexcept;
  void copy_return_path();
  void take_answer(const multifd::qemu::ReturnMessage& message);
  /// Waits for the destination; no value when it has sent nothing in time.
  std::optional<multifd::Result<std::size_t>> read_destination(std::span<std::byte> room);
  /// Whether the return path's thread has ended within that time.
  bool return_path_ends(std::chrono::milliseconds limit, const multifd::Interrupt* interrupt) const;
  void finish();
  /// An error of one of the source's channels. Threads: the receiver's.
  void take_channel_error(const multifd::Error& error) noexcept;

  Answer answer() const;
  Outcome end();

  /// Makes `failure` the first one unless another came before, and closes everything. Threads: any.
  void fail(const program::Failure& failure) noexcept;
  /// fail() for a broken connection of the destination's, with the destination's own reason if it sends one. Threads:
  /// any but the return path's.
  void lose_destination(const multifd::Error& error) noexcept;
  void take_signal() noexcept;
  void check() const;
  /// Throws a failure to write the destination's main stream as the destination's.
  void wrote(const multifd::Result<void>& written);
  /// Handles a failure of the destination's side on a channel thread: fails, and stops the source's channel, too.
  template <class T>
  multifd::Result<T> at_destination(multifd::Result<T> result);

  program::Snapshot look(double seconds) const;
  nlohmann::json report(double seconds) const;

  const Settings& settings_;
  program::QemuSource& source_;
  std::optional<program::Link> destination_;
  std::optional<MainStreamWriter> writer_;
  program::MainStream main_;
  std::vector<program::Link> out_links_;
  multifd::RamMap ram_;
  std::uint64_t epochs_ = 0;
  std::atomic<std::uint64_t> main_pages_ = 0;  ///< pages that came as records of the main stream
  std::uint64_t ram_pages_ = 0;                ///< pages in all blocks; valid once receiver_ is set
  unsigned silent_seconds_ = 0;                ///< time since the source's last byte
  std::uint32_t ram_section_ = 0;
  enum class FirstSection : std::uint8_t { open, ended, over } first_section_ = FirstSection::open;
  bool last_section_ = false;    ///< RAM's END has begun
  bool footer_written_ = false;  ///< ahead of the source's own
  std::thread return_path_;

  // The members above pages_ and receiver_ are used by their threads, which run until both are destroyed.
  const multifd::Interrupt& interrupt_;
  mutable std::mutex mutex_;
  std::mutex stopping_;  ///< held while everything is closed: nothing may be destroyed meanwhile
  std::optional<program::Failure> failure_;
  std::optional<program::Failure> channel_lost_;  ///< of the source's, when its pages had all come; under mutex_
  std::atomic<bool> connected_ = false;           ///< to the destination, with all channels
  std::atomic<bool> ram_over_ =
      false;  ///< an epoch of RAM's END has come whole; if another follows, it shows what is missing
  std::atomic<bool> device_packets_ = false;     ///< devices' state comes on the channels, too
  std::atomic<bool> all_forwarded_ = false;      ///< the destination may close its connection now
  std::atomic<bool> confirmed_ = false;          ///< the destination sent SHUT(0)
  std::atomic<bool> passed_on_ = false;          ///< the SHUT(0) was written to the source; set under mutex_
  std::atomic<bool> refused_ = false;            ///< the destination sent SHUT with another status
  std::atomic<bool> destination_ended_ = false;  ///< the destination closed its main connection in order
  std::atomic<bool> source_ended_ = false;       ///< the source closed its main connection in order
  std::atomic<bool> return_path_open_ = false;
  std::atomic<bool> losing_ = false;  ///< a connection of the destination's has broken, and its reason may still come
  std::atomic<bool> ending_ = false;  ///< the relay is closing its end of the destination's main connection
  std::atomic<bool> heard_ = false;   ///< the destination has answered a PING of the source before the relay's question
  std::atomic<std::uint32_t> ping_value_ = 0;  ///< of the source's first PING
  std::atomic<std::int64_t> pinged_ms_ = 0;    ///< when that PING was sent on; 0: never
  std::atomic<std::int64_t> round_trip_ms_ = 0;
  multifd::Interrupt first_ponged_;         ///< the destination has answered that PING
  std::atomic<std::int64_t> asked_ms_ = 0;  ///< when the relay's question was sent; 0: never
  multifd::Interrupt ponged_;               ///< the destination has answered the relay's question
  multifd::Interrupt return_path_ended_;
  std::unique_ptr<Pages> pages_;
  std::unique_ptr<program::AnyReceiver> receiver_;  // behind pages_, which its threads use until it is gone
  program::OnInterrupt on_signal_;                  // last: its action uses the others
};

}  // namespace relay
