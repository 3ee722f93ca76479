// SPDX-License-Identifier: MIT
//
// What every example program does the same way: exit statuses, one error line on stderr, SIGINT/SIGTERM that cancel
// cleanly, sizes and addresses as options.
#pragma once

#include <multifd/result.hpp>
#include <multifd/time_limit.hpp>
#include <multifd/transport/address.hpp>
#include <multifd/transport/interrupt.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace CLI {  // most of what includes this header has no options to parse, and the parser is large
class App;
class Option;
}  // namespace CLI

namespace program {

enum ExitStatus { exit_done = 0, exit_failed = 1, exit_usage = 2 };

/// An Error on its way through a program's own functions; the library itself never throws.
class Failure : public std::runtime_error {
 public:
  explicit Failure(const multifd::Error& error, const std::string& context = {});
  /// A failure of the program's own, or one that the peer reported.
  explicit Failure(const std::string& message) : std::runtime_error(message) {}
  /// The text that the other side sent when it gave up.
  static Failure of_peer(const std::string& reason);

  /// The Error's code; empty for a failure of the program's own.
  std::error_code code() const noexcept { return code_; }

 private:
  std::error_code code_;
};

/// Wrong use that the option parser cannot see: exit status 2.
class Usage : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The value of a Result, or a Failure with `context` in front.
template <class T>
T need(multifd::Result<T> result, const std::string& context = {}) {
  if (!result) throw Failure(result.error(), context);
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

/// Runs a program: parses, calls `body`, turns exceptions into one line on stderr and an exit status.
int run(CLI::App& app, int argc, char** argv, const std::function<int()>& body);

/// Makes a thread of its own take SIGINT and SIGTERM, so that nothing else need be interruptible. The first signal
/// triggers the returned Interrupt; the second removes every RemovedBySignal and ends the process at once. Ignores
/// SIGPIPE and SIGXFSZ, and watches mapped files (mapped_file.hpp). Call once, before any other thread starts.
const multifd::Interrupt& catch_signals();

/// A path that a second signal removes while this object lives, because no destructor runs then.
class RemovedBySignal {
 public:
  explicit RemovedBySignal(std::string path);
  ~RemovedBySignal();
  RemovedBySignal(const RemovedBySignal&) = delete;
  RemovedBySignal& operator=(const RemovedBySignal&) = delete;

  /// From now on the file has another path. `rename`: gives the file that path, returns an errno or 0; no signal comes
  /// between the two.
  int renamed_to(std::string path, const std::function<int()>& rename);

 private:
  std::string path_;
};

/// While it lives: when `interrupt` triggers, `action` runs once on a thread of its own.
class OnInterrupt {
 public:
  OnInterrupt(const multifd::Interrupt& interrupt, std::function<void()> action);
  ~OnInterrupt();
  OnInterrupt(const OnInterrupt&) = delete;
  OnInterrupt& operator=(const OnInterrupt&) = delete;

 private:
  multifd::Interrupt done_;
  std::thread thread_;
};

/// While it lives: each time `signal`, SIGUSR1, comes, `action` runs on a thread of its own. Behind catch_signals(), without
/// which the signal ends the process.
class OnSignal {
 public:
  OnSignal(int signal, std::function<void()> action);
  ~OnSignal();
  OnSignal(const OnSignal&) = delete;
  OnSignal& operator=(const OnSignal&) = delete;

 private:
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

/// Waits until `fd` is readable, or has an error or an end. Returns whether that is so: not when `limit` has passed, or
/// `interrupt` (may be null) triggers.
bool wait_for(int fd, std::chrono::milliseconds limit, const multifd::Interrupt* interrupt);

/// Parses a number of bytes as users type it: "512M", "4G", "4096". Refuses signs, exponents and everything past 64
/// bits; run() does the same for every number. --help shows the value it has now.
CLI::Option* add_size(CLI::App& app, const std::string& name, std::uint64_t& bytes, const std::string& help);

/// Parses a time limit as users type it: "3", "1.5s", "500ms", "2min" or "2m"; up to a day, and 0 for no limit
/// (time_limit.hpp), which --help says. --help shows the value it has now.
CLI::Option* add_duration(CLI::App& app, const std::string& name, std::chrono::milliseconds& time,
                          const std::string& help);

/// "1.5 s".
std::string format_time(std::chrono::milliseconds time);

/// "1.5 GiB".
std::string format_bytes(double bytes);

/// Parses an address option; throws Usage.
multifd::Address address_of(const std::string& text, const char* option);

}  // namespace program
