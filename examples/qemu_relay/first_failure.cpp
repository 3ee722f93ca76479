// SPDX-License-Identifier: MIT
#include "qemu_relay/first_failure.hpp"

#include "common/limits.hpp"

namespace relay {

using program::Failure;

void FirstFailure::add(program::Link& destination) {
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
  destination_ = &destination;
}

void FirstFailure::add(program::AnyReceiver& receiver, program::AnySender& sender) {
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
  receiver_ = &receiver;
  sender_ = &sender;
}

void FirstFailure::fail(const Failure& failure) noexcept {
  program::AnyReceiver* receiver = nullptr;
  program::AnySender* sender = nullptr;
  std::unique_lock<std::mutex> closing;
  {
    const std::lock_guard lock(mutex_);
    if (failure_ || guest_moved_) return;
    failure_ = failure;
    closing = std::unique_lock(closing_);
    source_.shutdown();
    if (destination_ != nullptr) destination_->shutdown();
    receiver = receiver_;
    sender = sender_;
  }
  if (receiver != nullptr) receiver->cancel();
  if (sender != nullptr) sender->cancel();
}

void FirstFailure::fail_with(const std::exception& error) noexcept {
  const auto* failure = dynamic_cast<const Failure*>(&error);
  fail(failure != nullptr ? *failure : Failure(program::text_of(error)));
}

void FirstFailure::cancel() noexcept {
  fail(Failure("cancelled by a signal"));
  program::AnyReceiver* receiver = nullptr;
  std::unique_lock<std::mutex> closing;
  {
    const std::lock_guard lock(mutex_);
    if (!guest_moved_) return;
    closing = std::unique_lock(closing_);
    receiver = receiver_;
  }
  if (receiver != nullptr) receiver->cancel();
}

void FirstFailure::check() const {
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
}

std::optional<Failure> FirstFailure::get() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void FirstFailure::pass_on(const multifd::qemu::ReturnMessage& message) {
  // Under the lock, because a failure meanwhile resets the source's connection and drops the bytes written to it.
  const std::lock_guard lock(mutex_);
  if (failure_) throw *failure_;
  program::need(multifd::write_all(source_, message.bytes), "source: return path");
  guest_moved_ = message.type == multifd::qemu::return_shut;
}

void FirstFailure::retire() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = Failure("the relay has ended");
  }
  const std::lock_guard closed(closing_);
}

}  // namespace relay
