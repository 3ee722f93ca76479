// SPDX-License-Identifier: MIT
//
// Runs a few threads' worth of real code in every order that a bounded number of preemptions can make, one step at a
// time: a step ends before each operation on an atomic, a mutex, a condition variable or a futex. What the library
// calls std::atomic and so on is replaced by the types below (instrument.hpp). All orders are sequentially consistent
// ones: what a weaker memory order allows in addition is TSan's and the stress tests' to find.
//
//   explore(2, [](Run& run) {           // a scenario is built anew for every order
//     auto shared = std::make_shared<Shared>();
//     run.spawn([shared] { ... });      // threads
//     run.spawn([shared] { ... });
//     run.at_end([shared] { expect(shared->done == 2, "both are done"); });
//   });
//
// A time limit never passes, so a wake-up that is lost is a deadlock here, and is reported with the order that led to
// it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace model {

/// Why an order is wrong. Not thrown: it ends the run.
struct Failure {
  std::string what;
  std::string order;
};

/// What a switch to another thread costs, where the one that runs cannot go on.
enum class Switches {
  free,     ///< nothing: any of the others
  counted,  ///< nothing for the first of the others, else as a preemption: for scenarios of many threads
};

/// How much was explored.
struct Explored {
  std::uint64_t orders = 0;
  std::uint64_t steps = 0;
  std::uint64_t longest = 0;  ///< steps of one order
  std::unique_ptr<Failure> failure;
};

/// One execution. Threads are contexts of one thread of the system, so nothing but the choices below decides the order.
class Run {
 public:
  explicit Run(std::vector<unsigned>& choices, std::vector<unsigned>& options, unsigned preemptions,
               Switches switches = Switches::free)
      : choices_(choices), options_(options), preemptions_(preemptions), switches_(switches) {}
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void spawn(std::function<void()> body) {
    auto thread = std::make_unique<Thread>();
    thread->body = std::move(body);
    thread->stack.reset(new char[stack_bytes]);
    threads_.push_back(std::move(thread));
  }

  /// Called when all threads have ended.
  void at_end(std::function<void()> check) { check_ = std::move(check); }

  /// Runs until all threads have ended, or something is wrong.
  void execute() {
    current_run = this;
    for (auto& thread : threads_) {
      ::getcontext(&thread->context);
      thread->context.uc_stack = {.ss_sp = thread->stack.get(), .ss_flags = 0, .ss_size = stack_bytes};
      thread->context.uc_link = nullptr;
      ::makecontext(&thread->context, &Run::entry, 0);
    }
    if (const auto first = choose(none); first != none) switch_to(first);
    current_run = nullptr;
    if (!failed() && check_) {
      checking = this;
      check_();
      checking = nullptr;
    }
  }

  /// A step ends here: another thread may go on before the caller does.
  void point() { reschedule(choose(running_)); }

  /// The caller cannot go on until wake(what).
  void block(const void* what) {
    threads_[running_]->waits_for = what;
    reschedule(choose(running_));
  }

  /// The caller waits for wake(what), or until nobody else can go on.
  void rest(const void* what) {
    threads_[running_]->rests = true;
    block(what);
    threads_[running_]->rests = false;
  }

  /// The caller has nothing to do but to let others go on.
  void yield() {
    threads_[running_]->yields = true;
    reschedule(choose(running_));
  }

  /// What the world does that no thread decides: each of the numbers below `count` is tried.
  unsigned pick(unsigned count) {
    const unsigned picked = take_choice(count);
    order_ += '[';
    order_ += static_cast<char>('0' + picked);
    order_ += ']';
    return picked;
  }

  void wake(const void* what, bool all) {
    for (auto& thread : threads_) {
      if (thread->waits_for != what) continue;
      thread->waits_for = nullptr;
      if (!all) return;
    }
  }

  /// Ends this run: it is not gone on with.
  void fail(std::string what) {
    if (!failed()) failure_ = std::make_unique<Failure>(Failure{std::move(what), order_});
    if (running_ != none) ::swapcontext(&threads_[running_]->context, &main_);
  }

  bool failed() const { return failure_ != nullptr; }
  std::unique_ptr<Failure> take_failure() { return std::move(failure_); }
  std::uint64_t steps() const { return steps_; }

  static inline Run* current_run = nullptr;  ///< while threads run
  static inline Run* checking = nullptr;     ///< while at_end() does

 private:
  struct Thread {
    ucontext_t context;
    std::function<void()> body;
    std::unique_ptr<char[]> stack;
    const void* waits_for = nullptr;
    bool yields = false;
    bool rests = false;
    bool ended = false;
  };

  static constexpr std::size_t stack_bytes = 64 * 1024;
  static constexpr unsigned none = ~0u;
  static constexpr std::size_t most_threads = 8;
  static constexpr std::uint64_t most_steps = 20'000;

  static void entry() {
    Run& run = *current_run;
    run.threads_[run.running_]->body();
    run.threads_[run.running_]->ended = true;
    run.reschedule(run.choose(run.running_));
  }

  bool can_run(unsigned i) const { return !threads_[i]->ended && threads_[i]->waits_for == nullptr; }

  /// The thread that goes on: by the choices that are given, then always the first. `from` itself comes first where it
  /// can go on, and going on with another one is a preemption then.
  unsigned choose(unsigned from) {
    if (++steps_ > most_steps) {
      fail_later("no end in sight: " + std::to_string(most_steps) + " steps");
      return none;
    }
    std::array<unsigned, most_threads> able;
    unsigned count = 0;
    const bool yields = from != none && std::exchange(threads_[from]->yields, false);
    const bool goes_on = from != none && can_run(from) && !yields;
    if (goes_on) able[count++] = from;
    if (!goes_on || preemptions_ > 0)
      for (unsigned i = 0; i < threads_.size(); ++i)
        if (i != from && can_run(i)) able[count++] = i;
    const bool counted = goes_on || switches_ == Switches::counted;
    if (counted && preemptions_ == 0) count = std::min(count, 1u);
    if (count == 0 && yields) able[count++] = from;
    if (count == 0) {
      const auto rests = std::ranges::find_if(threads_, [](const auto& each) { return !each->ended && each->rests; });
      if (rests != threads_.end()) {
        (*rests)->waits_for = nullptr;
        able[count++] = static_cast<unsigned>(rests - threads_.begin());
      }
    }
    if (count == 0) {
      for (const auto& thread : threads_)
        if (!thread->ended) fail_later("deadlock: nobody can go on");
      return none;
    }
    const unsigned taken = count > 1 ? take_choice(count) : 0;
    if (counted && taken != 0) --preemptions_;
    order_ += static_cast<char>('0' + able[taken]);
    return able[taken];
  }

  unsigned take_choice(unsigned count) {
    if (at_ == choices_.size()) {
      choices_.push_back(0);
      options_.push_back(count);
    }
    return choices_[at_++];
  }

  void fail_later(std::string what) {
    if (!failure_) failure_ = std::make_unique<Failure>(Failure{std::move(what), order_});
  }

  void switch_to(unsigned next) {
    running_ = next;
    ::swapcontext(&main_, &threads_[next]->context);
  }

  void reschedule(unsigned next) {
    const unsigned from = running_;
    if (next == from) return;
    running_ = next;
    ::swapcontext(&threads_[from]->context, next == none ? &main_ : &threads_[next]->context);
  }

  std::vector<unsigned>& choices_;
  std::vector<unsigned>& options_;
  unsigned preemptions_;
  const Switches switches_;
  std::size_t at_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::function<void()> check_;
  ucontext_t main_{};
  unsigned running_ = none;
  std::uint64_t steps_ = 0;
  std::string order_;
  std::unique_ptr<Failure> failure_;
};

/// What a scenario requires; the first that does not hold ends everything.
inline void expect(bool holds, const char* what) {
  if (holds) return;
  if (Run* const run = Run::current_run != nullptr ? Run::current_run : Run::checking) run->fail(what);
}

/// How many preemptions are worth it: each one more multiplies the orders by some hundreds.
/// MULTIFD_MODEL_PREEMPTIONS=2 takes minutes instead of seconds.
inline unsigned preemptions() {
  const char* const asked = std::getenv("MULTIFD_MODEL_PREEMPTIONS");
  return asked != nullptr ? static_cast<unsigned>(std::atoi(asked)) : 1;
}

/// Explores every order with at most so many preemptions; a switch away from a thread that cannot go on is none.
template <class Scenario>
Explored explore(unsigned preemptions, Scenario&& scenario, Switches switches = Switches::free) {
  Explored explored;
  std::vector<unsigned> choices;
  std::vector<unsigned> options;
  for (;;) {
    Run run(choices, options, preemptions, switches);
    scenario(run);
    run.execute();
    ++explored.orders;
    explored.steps += run.steps();
    explored.longest = std::max(explored.longest, run.steps());
    if (run.failed()) {
      explored.failure = run.take_failure();
      return explored;
    }
    // The last choice that has another option; what comes after it is chosen anew.
    while (!choices.empty() && choices.back() + 1 == options.back()) {
      choices.pop_back();
      options.pop_back();
    }
    if (choices.empty()) return explored;
    ++choices.back();
  }
}

}  // namespace model
