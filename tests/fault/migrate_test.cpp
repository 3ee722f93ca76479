// SPDX-License-Identifier: MIT
//
// No memory and no threads for a migration: allocation, then pthread_create, 0, 1, 2 ... of migrate_to() or migrate_from()
// fails until the guest gets through. The error says so, the other side is told, one guest runs, and nothing is left behind.
#include <doctest/doctest.h>

#include <cerrno>
#include <concepts>
#include <future>
#include <memory>
#include <new>
#include <optional>

#include "fault/failing_threads.hpp"
#include "fault/tally.hpp"
#include "support/allocation_count.hpp"
#include "support/leftovers.hpp"
#include "support/migrate_ends.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 64;

/// For the way out there is none, either.
struct NoMemoryFromThenOn : FailAllocation {
  explicit NoMemoryFromThenOn(std::uint64_t good) noexcept : FailAllocation(good, Shortage::from_then_on) {}
};

/// In force in the thread that migrates, from its first event to its last.
template <class Fault>
struct Armed {
  std::function<void(const Event&)> at(std::uint64_t number) {
    return [this, number](const Event& event) {
      if (event.progress.status == MigrationStatus::setup && !fault) fault.emplace(number);
      if (!is_end(event.progress.status)) return;
      happened = fault && fault->happened();
      fault.reset();
    };
  }
  std::optional<Fault> fault;
  bool happened = false;
};

/// One migration, in which number `at` of one side is refused. Whether it was.
template <class Fault>
bool refuse(std::uint64_t at, bool at_source) {
  CAPTURE(at);
  CAPTURE(at_source);
  const Leftovers before;
  Armed<Fault> armed;
  {
    std::atomic<int> running = 0;
    MigratingGuest here(pages), there(pages);
    here.running_guests = there.running_guests = &running;
    here.boot();
    here.run(8, 50us);
    Followed source, destination;
    auto listener = Listener::listen({.host = "127.0.0.1"}, 8);
    REQUIRE(listener.has_value());
    const Address address = listener->local_address();
    const auto nothing = [](const Event&) {};
    const SourceOptions to{.channels = 2,
                           .converge = {.at_time_limit = Action::switch_now, .max_rounds = 3},
                           .verify = Verify::required,
                           .skip_unchanged = true,
                           .on_event = at_source ? armed.at(at) : nothing,
                           .migration = &*source.handle};
    const DestinationOptions from{
        .retry_timeout = 50ms, .on_event = at_source ? nothing : armed.at(at), .migration = &*destination.handle};
    auto taking = std::async(std::launch::async, [&] {
      auto taken = take_guest(there, *listener, from);
      if (!at_source) armed.fault.reset();
      const Listener gone = std::move(*listener);
      return taken;
    });
    const auto sent = send_guest(here, address, to);
    if (at_source) armed.fault.reset();
    if (!sent)
      for (const Stopwatch waiting; taking.wait_for(1ms) != std::future_status::ready;)
        if (waiting.elapsed() > 100ms && destination->progress().status == MigrationStatus::setup)
          destination->cancel();
    const auto taken = taking.get();
    CAPTURE(text(sent));
    CAPTURE(text(taken));
    CHECK_FALSE(here.ran_beside);
    CHECK_FALSE(there.ran_beside);
    if constexpr (std::same_as<Fault,
                               NoMemoryFromThenOn>)  // the guest of this test is not resumed without memory, either
      CHECK(here.runs() + there.runs() + source->not_resumed().has_value() == 1);
    else
      CHECK(here.runs() != there.runs());
    CHECK(there.runs() == taken.has_value());
    CHECK_FALSE(here.logging());
    CHECK(there.torn_when_resumed == 0);
    CHECK(is_end(source->progress().status));
    CHECK(is_end(destination->progress().status));
    if (!armed.happened) {
      CHECK_MESSAGE(sent.has_value(), text(sent));
    } else if (!there.runs()) {
      const std::error_code code = at_source ? code_of(sent) : code_of(taken);
      const std::string said = at_source ? text(sent) : text(taken);
      CHECK((code == std::error_code(ENOMEM, std::system_category()) ||
             code == std::error_code(EAGAIN, std::system_category()) || said.contains("resolve: Memory")));
      CHECK(source->owner() == Owner::source);
      CHECK(destination->owner() == Owner::source);
    }
  }
  CHECK(before.no_thread());
  CHECK(before.no_descriptor());
  if (armed.happened) count_fault();
  return armed.happened;
}

template <class Fault>
void sweep(bool at_source, std::uint64_t step, std::uint64_t least) {
  const Watchdog watchdog("a migration without", 280s);
  std::uint64_t at = 0;
  while (refuse<Fault>(at, at_source)) {
    at += step;
    REQUIRE(at < 5000);
  }
  MESSAGE("refused up to number ", at);
  CHECK(at >= least);
}

/// Throws in the n-th event of one side. Whether there were so many.
bool throw_in_hook(unsigned number, bool at_source) {
  CAPTURE(number);
  CAPTURE(at_source);
  const Leftovers before;
  unsigned left = number;
  bool thrown = false;
  {
    std::atomic<int> running = 0;
    MigratingGuest here(pages);
    There there(pages, {.retry_timeout = 50ms});
    here.running_guests = there.guest.running_guests = &running;
    here.boot();
    here.run(8, 50us);
    Followed source;
    const auto hook = [&](const Event&) {
      if (thrown || left-- > 0) return;
      thrown = true;
      throw std::bad_alloc();
    };
    SourceOptions options{.channels = 2, .converge = {.at_time_limit = Action::switch_now, .max_rounds = 3}};
    if (at_source)
      options.on_event = hook;
    else
      there.on_event = hook;
    const Tried tried = migrate_once(here, source, there, std::move(options));
    CAPTURE(text(tried.sent));
    CAPTURE(text(tried.taken));
    CHECK_FALSE(here.ran_beside);
    CHECK_FALSE(there.guest.ran_beside);
    CHECK(here.runs() != there.guest.runs());
    CHECK_FALSE(here.logging());
    CHECK(here.runs() == (source->owner() == Owner::source));
    CHECK(here.runs() != tried.sent.has_value());
    CHECK(there.guest.runs() == tried.taken.has_value());
    CHECK(is_end(source->progress().status));
    CHECK(is_end(there.followed->progress().status));
    CHECK(there.guest.runs() == (there.followed->owner() == Owner::destination));
  }
  CHECK(before.no_thread());
  CHECK(before.no_descriptor());
  return thrown;
}

/// Clang's ThreadSanitizer brings an operator new that does not fail.
const doctest::skip needs_failing_new(under_tsan);

}  // namespace

TEST_CASE("A source that gets no memory resumes the guest, and tells the destination" * needs_failing_new) {
  sweep<FailAllocation>(true, full() ? 1 : 3, 30);
}

TEST_CASE("A destination that gets no memory tells the source" * needs_failing_new) {
  sweep<FailAllocation>(false, full() ? 1 : 3, 30);
}

TEST_CASE("A source that gets no memory any more resumes the guest" * needs_failing_new) {
  sweep<NoMemoryFromThenOn>(true, full() ? 1 : 7, 30);
}

TEST_CASE("A destination that gets no memory any more leaves the guest to the source" * needs_failing_new) {
  sweep<NoMemoryFromThenOn>(false, full() ? 1 : 7, 30);
}

TEST_CASE("A source that gets no thread resumes the guest, and tells the destination") {
  sweep<FailThread>(true, 1, 3);
}

TEST_CASE("A destination that gets no thread tells the source") { sweep<FailThread>(false, 1, 3); }

TEST_CASE("A hook that gets no memory, at any event of either side, leaves one guest running") {
  const Watchdog watchdog("hooks that throw", 280s);
  for (const bool at_source : {true, false}) {
    unsigned number = 0;
    while (throw_in_hook(number, at_source)) ++number;
    CHECK(number >= 4);
  }
}

TEST_CASE("A hook that gets no memory when a migration is cancelled keeps nobody from resuming the guest") {
  const Watchdog watchdog("hooks that throw behind a cancel", 60s);
  MigratingGuest here(pages);
  There there(pages, {.retry_timeout = 50ms});
  here.boot();
  here.run(8, 50us);
  Followed source;
  SourceOptions options{.channels = 2};
  options.on_event = [&](const Event& event) {
    if (event.progress.status == MigrationStatus::active) source->cancel();
    if (event.progress.status >= MigrationStatus::failed) throw std::bad_alloc();
  };
  const Tried tried = migrate_once(here, source, there, std::move(options));
  CHECK(code_of(tried.sent) == Errc::cancelled);
  CHECK_FALSE(tried.taken.has_value());
  CHECK(here.runs());
  CHECK_FALSE(here.logging());
  CHECK(source->progress().status == MigrationStatus::cancelled);
}
