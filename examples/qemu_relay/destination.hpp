// SPDX-License-Identifier: MIT
//
// The relay's connections to the destination: how they come to be, what is written to the main one, and how they are
// lost.
#pragma once

#include <multifd/qemu/main_stream_writer.hpp>

#include <optional>
#include <vector>

#include "qemu_relay/return_path.hpp"
#include "qemu_relay/settings.hpp"

namespace relay {

using MainStreamWriter = multifd::qemu::MainStreamWriter<program::Link>;

class Destination {
 public:
  /// `source`: its main connection.
  Destination(const Settings& settings, const program::Link& source, const Forwarded& forwarded, FirstFailure& failure,
              const multifd::Interrupt& interrupt)
      : settings_(settings),
        forwarded_(forwarded),
        failure_(failure),
        interrupt_(interrupt),
        // A QEMU waits for all of its channels.
        connections_(settings.out_paths, multifd::PathsNeeded::one_for_all),
        return_path_(source, forwarded, failure) {}

  /// Connects, and starts the return path. Params `on_silence`: as ReturnPath::start() has it. Throws Failure.
  /// Threads: the main one.
  void connect(std::function<void()> on_silence);
  /// Whether everything is connected. Threads: any.
  bool connected() const noexcept { return connected_; }

  // Behind connect(). Threads: the main one.
  program::Link& main() noexcept { return *main_; }
  const program::Link& main() const noexcept { return *main_; }
  std::vector<program::Link> take_channels() { return std::move(channels_); }
  MainStreamWriter& writer() noexcept { return *writer_; }
  const program::Connections& connections() const noexcept { return connections_; }
  ReturnPath& return_path() noexcept { return return_path_; }
  const ReturnPath& return_path() const noexcept { return return_path_; }

  /// Throws the failure when the main stream could not be written. Threads: the main one.
  void wrote(const multifd::Result<void>& written);
  /// What a call to the destination's channels has returned; lose() if it is an error. Threads: any but the return
  /// path's.
  template <class T>
  multifd::Result<T> noted(multifd::Result<T> result) {
    if (!result) lose(result.error());
    return result;
  }

  /// Fails for a broken connection, with the destination's own reason if it sends one. Threads: any but the return
  /// path's.
  void lose(const multifd::Error& error) noexcept;
  /// Waits while that reason may still come. Threads: any.
  void wait_for_reason() const noexcept { losing_.wait(true); }

 private:
  const Settings& settings_;
  const Forwarded& forwarded_;
  FirstFailure& failure_;
  const multifd::Interrupt& interrupt_;
  program::Connections connections_;
  std::optional<program::Link> main_;
  std::optional<MainStreamWriter> writer_;
  std::vector<program::Link> channels_;
  std::atomic<bool> connected_ = false;
  std::atomic<bool> losing_ = false;  ///< a connection has broken, and its reason may still come
  ReturnPath return_path_;            // last: its thread uses main_
};

}  // namespace relay
