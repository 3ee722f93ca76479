// SPDX-License-Identifier: MIT
//
// Plays migration source for a QEMU that waits for one: format/roles.md section 18, with a guest that stands still.
#pragma once

#include <multifd/image/pieces.hpp>
#include <multifd/qemu/main_stream_writer.hpp>
#include <multifd/qemu/return_path_reader.hpp>
#include <multifd/transport/connect.hpp>

#include <atomic>
#include <memory>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/out_memory.hpp"
#include "common/pipe.hpp"
#include "common/progress.hpp"
#include "common/stacks.hpp"
#include "common/tls.hpp"
#include "qemu_load/input.hpp"

namespace load {

struct Settings {
  std::string input, base;
  std::uint64_t page_bytes = 4096;
  std::uint64_t offset = 0;
  std::string connect;
  std::optional<program::PipeAddress> pipe;  ///< `connect`, where it is one
  program::StackOptions out;
  program::Tls tls;
  std::optional<multifd::PeerProfile> peer;  ///< none: derived from the machine type
  bool choose_zero_pages = false;            ///< by the peer's profile
  program::OutMemory memory = program::OutMemory::unknown;
  bool return_path = true;
  std::chrono::milliseconds timeout = std::chrono::seconds(30);  ///< 0: no limit
  unsigned threads = 2;                                          ///< that read the input
  std::string json_path;
};

class Load {
 public:
  Load(const Settings& settings, const Input& input, const multifd::Interrupt& interrupt);

  /// Sends everything, and returns the report when the guest is the destination's. Throws program::Failure.
  nlohmann::json run();

 private:
  using Writer = multifd::qemu::MainStreamWriter<program::Link>;

  void connect();
  void send();
  void send_ram();
  /// One piece of memory: what the input holds of it, and what it says is zero. Threads: several, one piece each.
  multifd::Result<void> send_piece(const multifd::image::RamPiece& piece, multifd::PageBuffer& buffer);
  multifd::Result<void> send_pages(std::size_t block, std::uint64_t offset, std::uint64_t bytes,
                                   multifd::PageBuffer& buffer);
  /// The same without channels, as records. Under mutex_.
  multifd::Result<void> write_pages(std::size_t block, std::uint64_t offset, std::span<const std::byte> bytes);
  multifd::Result<void> send_zeros(std::size_t block, std::uint64_t offset, std::uint64_t bytes);
  void send_devices();
  void await_loaded();
  bool asks_for_answer() const noexcept { return settings_.return_path && main_->is_two_way(); }
  /// The main connection, to a socket or to a pipe.
  void connect_main(const std::string& whom, const multifd::SocketOptions& options);
  void close_epoch();
  /// The failure of a connection, with what the destination has said, if it has.
  program::Failure failure(const multifd::Error& error);
  nlohmann::json report(double seconds) const;
  program::Snapshot look(double seconds) const;

  const Settings& settings_;
  const Input& input_;
  const multifd::Interrupt& interrupt_;
  program::StackOptions out_;
  multifd::RamMap ram_;
  std::vector<bool> fresh_;
  std::optional<program::Pipe> pipe_;
  std::optional<program::Link> main_;
  std::optional<Writer> writer_;
  std::mutex mutex_;                                       ///< of sender_ and writer_ while memory is sent
  std::unique_ptr<program::AnySender> sender_;             ///< none without multifd
  std::atomic<const program::AnySender*> seen_ = nullptr;  ///< sender_, for look()
  std::atomic<std::uint64_t> page_records_ = 0;
  std::atomic<std::uint64_t> zero_records_ = 0;
  std::atomic<std::uint64_t> left_out_ = 0;  ///< zero pages that the destination has already
};

}  // namespace load
