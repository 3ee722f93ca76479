// SPDX-License-Identifier: MIT
//
// The first failure of a relayed migration, and the connections that it closes on both sides.
#pragma once

#include <multifd/qemu/return_path.hpp>

#include <atomic>
#include <exception>
#include <mutex>
#include <optional>

#include "common/stacks.hpp"

namespace relay {

/// Keeps the first failure, wherever it comes from, and closes every connection hard on both sides at once, so that
/// neither side waits for the other (section 16, row 26). Once the destination's confirmation is passed on nothing fails
/// any more: the guest has moved, and a failure only ends waits.
///
/// Threads: any.
class FirstFailure {
 public:
  /// `source`: its main connection.
  explicit FirstFailure(program::Link& source) : source_(source) {}

  /// Adds what a failure closes. Throws the failure that has come before.
  void add(program::Link& destination);
  void add(program::AnyReceiver& receiver, program::AnySender& sender);

  /// Makes `failure` the first one unless another came before, and closes everything.
  void fail(const program::Failure& failure) noexcept;
  void fail_with(const std::exception& error) noexcept;
  /// fail() for a signal. If the guest has moved, ends the wait for the source's channels.
  void cancel() noexcept;

  /// Throws the first failure, if there is one.
  void check() const;
  std::optional<program::Failure> get() const;

  /// Writes a message of the destination's to the source. Throws Failure.
  void pass_on(const multifd::qemu::ReturnMessage& message);
  /// Whether the confirmation was passed on.
  bool guest_moved() const noexcept { return guest_moved_; }

  /// Called before anything is destroyed that a failure closes: waits for a fail() that is closing. Later ones do
  /// nothing.
  void retire() noexcept;

 private:
  /// Guards the decision whether the migration has failed or the guest has moved, and what a failure closes.
  mutable std::mutex mutex_;
  /// Held while everything is closed, beyond mutex_, because cancel() of a sender or receiver calls on_error, which
  /// comes back to fail().
  std::mutex closing_;
  std::optional<program::Failure> failure_;
  std::atomic<bool> guest_moved_ = false;  ///< written under mutex_
  program::Link& source_;
  program::Link* destination_ = nullptr;
  program::AnyReceiver* receiver_ = nullptr;
  program::AnySender* sender_ = nullptr;
};

}  // namespace relay
