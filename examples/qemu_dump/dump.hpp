// SPDX-License-Identifier: MIT
//
// A dump from the first byte of the source's main stream to the source's end: receives RAM, keeps the files, answers.
#pragma once

#include <nlohmann/json.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/images.hpp"
#include "common/progress.hpp"
#include "common/qemu_source.hpp"
#include "common/stacks.hpp"
#include "qemu_dump/output.hpp"

namespace dump {

struct Settings {
  program::SourceOptions source;
  std::string output;
  std::string format = "blocks";
  program::ConvertOptions convert;
  bool switchover_ack = false;
  std::string json_path;
};

class Dump {
 public:
  Dump(const Settings& settings, Output& output, program::QemuSource& source, const multifd::Interrupt& interrupt);

  /// Receives everything, and returns the report; throws the Failure that came first on any connection, or of a file.
  ///
  /// All steps that can fail come before the source is told that all is well. A failure behind that deletes nothing.
  nlohmann::json run();

 private:
  nlohmann::json receive();
  void cancel();

  void receive_ram();
  void take(const multifd::qemu::Element& element);
  void take_command(const multifd::qemu::Element& element);
  void take_page(const multifd::qemu::Element& element, std::span<const std::byte> bytes);
  void take_changes(const multifd::qemu::Element& element);
  void close_epoch();
  void open_blocks();
  std::unique_ptr<program::AnyReceiver> open_receiver();
  void drain();
  void close_memory();
  multifd::Result<void> end_epochs();
  void keep_files();

  void answer();
  /// Whether the source wants an answer, and can be given one.
  bool answers() const noexcept;
  void tell_source();
  void read_description();
  void reply(std::span<const std::byte> bytes);

  nlohmann::json manifest() const;
  nlohmann::json report(double seconds) const;
  program::Snapshot look(double seconds);

  const Settings& settings_;
  Output& output_;
  program::QemuSource& source_;
  const multifd::Interrupt& interrupt_;
  program::MainStream main_;
  multifd::RamMap ram_;  ///< the source's blocks, with the memory of output_
  std::mutex
      mutex_;  ///< guards receiver_ and opened_ while it comes to be, and what a signal may still end: whole_, answered_
  std::unique_ptr<program::AnyReceiver> receiver_;  ///< none for a source without multifd
  bool opened_ = false;                             ///< under mutex_: the blocks are known, and receiver_ is made
  nlohmann::json manifest_blocks_ = nlohmann::json::array();
  std::uint64_t epochs_ = 0;
  std::atomic<std::uint64_t> main_pages_ = 0;  ///< that came on the main stream, in whatever form
  std::uint64_t main_zero_pages_ = 0;
  std::uint64_t xbzrle_pages_ = 0;
  std::vector<std::byte> changed_page_;
  std::atomic<bool> cancelled_ = false;
  std::atomic<bool> whole_ = false;                ///< everything has arrived, and the dump is kept
  bool answered_ = false;                          ///< the source has got its answer
  std::optional<program::Stopwatch> still_since_;  ///< since RAM's last section came: the guest has stopped ahead of it
  std::optional<double> stood_still_;              ///< seconds from there to the answer
  std::vector<std::string> warnings_;
  program::OnInterrupt on_signal_;  // last: its action uses the others
};

}  // namespace dump
