// SPDX-License-Identifier: MIT
//
// One migration of the soak: what chance decides about it, and how it is carried out inside this process.
#pragma once

#include <chrono>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace soak {

using Random = std::mt19937_64;

/// What happens to a migration, at a random moment; destroy_sender: its destructor runs in place of close_channels().
enum class Trouble { none, cancel_sender, cancel_receiver, fail_sender, fail_receiver, cut, destroy_sender };
constexpr const char* names_of_trouble[] = {"none",          "cancel_sender", "cancel_receiver", "fail_sender",
                                            "fail_receiver", "cut",           "destroy_sender"};
enum class Wire { tcp, unix_socket, memory };
constexpr const char* names_of_wire[] = {"tcp", "unix", "memory"};

struct Plan {
  Wire wire = Wire::tcp;
  std::string compression;
  std::string zero_pages;
  unsigned channels = 1;
  std::size_t page_bytes = 4096;
  std::vector<std::size_t> block_bytes;
  unsigned rounds = 1;
  bool digest = false;
  bool manual_barrier = false;
  bool zeroed_destination = false;
  bool populate_ahead = false;
  std::size_t max_io_bytes = 0;  ///< 0: no limit
  std::uint64_t bandwidth = 0;
  Trouble trouble = Trouble::none;
  std::chrono::microseconds after{};  ///< of cancel_*
  std::uint64_t operation = 0;        ///< of fail_*: which read or write of the channels together
  std::uint64_t cut_bytes = 0;        ///< of cut: after how many of one channel
  std::uint64_t seed = 0;

  static Plan make(Random& random);
  std::string text() const;
};

enum class End { whole, failed };

struct Outcome {
  End end = End::whole;
  double cancel_seconds = 0;  ///< how long cancel() took
  double joined_seconds = 0;  ///< from there until all threads had ended
};

/// Memory that all migrations share, so that it does not come and go.
struct Arena {
  std::vector<std::byte> source;
  std::vector<std::byte> destination;
  Arena();
  /// Zero, text-like and random pages, in runs. Migrations write to it, and there would be no zero page left.
  void refill(Random& random);
};
inline constexpr std::size_t arena_bytes = std::size_t{24} << 20;

/// Throws std::runtime_error when something is not as it should be: wrong memory, a failure without a cause.
Outcome migrate(const Plan& plan, Arena& arena);

}  // namespace soak
