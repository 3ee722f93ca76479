// SPDX-License-Identifier: MIT
//
// How long the programs wait for the other side, as options with the library's defaults. include/multifd/README.md,
// Bounds, says which limit notices what.
#pragma once

#include <multifd/multifd.hpp>
#include <multifd/qemu/accept_source.hpp>

#include <chrono>
#include <string>
#include <vector>

#include "common/program.hpp"

namespace program {

/// A time limit and the option that sets it, for the message when it has passed.
struct Limit {
  std::chrono::milliseconds time{};  ///< 0: no limit
  const char* option = "";           ///< "--result-timeout"; empty: the program's own

  /// "600 s (--result-timeout)".
  std::string text() const;
};

struct TimeLimits {
  std::chrono::milliseconds connect = multifd::SocketOptions{}.connect_timeout;
  std::chrono::milliseconds accept = multifd::AcceptSourceOptions{}.timeout;
  std::chrono::milliseconds hello = multifd::ReceiverOptions<multifd::NoComp>{}.hello_timeout;
  /// A sender's; add_to_receiver() makes it a receiver's.
  std::chrono::milliseconds progress =
      multifd::SenderOptions<multifd::NoComp, multifd::ZeroPagesNone>{}.progress_timeout;
  std::chrono::milliseconds result = std::chrono::minutes(10);
  std::chrono::milliseconds peer = multifd::SocketOptions{}.user_timeout;
  std::chrono::milliseconds hint = std::chrono::seconds(20);  ///< Progress: ends nothing

  /// --connect-timeout, --progress-timeout, --result-timeout, --peer-timeout, --hint-after.
  void add_to_sender(CLI::App& app);
  /// --accept-timeout, --hello-timeout, --progress-timeout, --peer-timeout, --hint-after.
  void add_to_receiver(CLI::App& app);
  /// Both, for a program that can be either.
  void add_to_both(CLI::App& app);
  /// --peer-timeout and --hint-after.
  void add_peer(CLI::App& app);

  Limit result_limit() const { return {result, "--result-timeout"}; }
  Limit progress_limit() const { return {progress, "--progress-timeout"}; }

  /// The options of add_to_both() with their values, for another program.
  std::vector<std::string> arguments() const;

  /// The limits that are settings of a socket.
  multifd::SocketOptions socket(const multifd::Interrupt* interrupt = nullptr) const;

 private:
  void add_connecting(CLI::App& app);
  void add_accepting(CLI::App& app);
};

}  // namespace program
