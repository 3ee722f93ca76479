// SPDX-License-Identifier: MIT
//
// For the contract checks: a call that may never return, because what is checked is broken.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

namespace multifd::testing::detail {

/// Runs a call in a thread of its own and waits for it with a limit. A call that never returns keeps its thread and
/// what the thread owns: nothing can end it, and the check must go on to report it.
template <class Value>
class TimedCall {
 public:
  template <class Call>
  explicit TimedCall(Call call) : state_(std::make_shared<State>()) {
    std::thread([state = state_, call = std::move(call)]() mutable {
      Value value = call();
      const std::scoped_lock lock(state->mutex);
      state->value.emplace(std::move(value));
      state->done.notify_all();
    }).detach();
  }

  /// Waits for the call's result. Null: the call did not return in time.
  const Value* wait(std::chrono::milliseconds patience) {
    std::unique_lock lock(state_->mutex);
    const bool done = state_->done.wait_for(lock, patience, [&] { return state_->value.has_value(); });
    return done ? &*state_->value : nullptr;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable done;
    std::optional<Value> value;
  };
  std::shared_ptr<State> state_;
};

}  // namespace multifd::testing::detail
