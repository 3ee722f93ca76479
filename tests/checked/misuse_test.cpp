// SPDX-License-Identifier: MIT
//
// A checking build (MULTIFD_CHECKED=1, this binary alone): misuse ends the program at the call, and says which RAM
// block and offset. Each case commits its misuse in a child process.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <thread>

#include "multifd/compress/nocomp.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

static_assert(MULTIFD_CHECKED == 1);

namespace {

constexpr std::uint64_t page = 4096;

/// A sender of which nobody reads the far end, so that pages stay where they are.
template <class Z = ZeroPagesNone>
struct Guest {
  explicit Guest(SenderOptions<NoComp, Z> options = {}, std::size_t room = 8 << 20) : links(memory_links(1, room)) {
    auto made = Sender<MemoryTransport, NoComp, Z>::open(ram.map, std::move(links.sender), std::move(options));
    REQUIRE(made.has_value());
    tx.emplace(std::move(*made));
  }
  GuestRam ram{256};
  Links<MemoryTransport> links;
  std::optional<Sender<MemoryTransport, NoComp, Z>> tx;
};

/// What a child that commits `act()` says on stderr before it is ended by abort(); "no misuse" when it comes through.
template <class Act>
std::string said_by(Act&& act) {
  int fds[2];
  REQUIRE(::pipe(fds) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);  // not doctest's
    ::alarm(60);
    ::dup2(fds[1], STDERR_FILENO);
    act();
    ::_exit(0);
  }
  ::close(fds[1]);
  std::string text;
  char part[256];
  for (ssize_t got; (got = ::read(fds[0], part, sizeof part)) > 0;) text.append(part, static_cast<std::size_t>(got));
  ::close(fds[0]);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "no misuse" + text;
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGABRT);
  return text;
}

void check_twice(const std::string& said, std::uint64_t offset) {
  CHECK(said == "multifd: misuse: a page is queued twice in an epoch: RAM block pc.ram, offset " +
                    std::to_string(offset) + "\n");
}

}  // namespace

TEST_CASE("A page that is queued twice in an epoch is named at the second call, whichever calls they are") {
  const std::uint64_t bitmap[] = {0, 0x10};  // page 68
  check_twice(said_by([] {
                Guest guest;
                (void)guest.tx->queue_page(guest.ram.block, 3 * page);
                (void)guest.tx->queue_page(guest.ram.block, 3 * page);
              }),
              3 * page);
  check_twice(said_by([] {  // far apart: the receiver would not notice
                Guest guest;
                (void)guest.tx->queue_range(guest.ram.block, 0, 256 * page);
                (void)guest.tx->queue_page(guest.ram.block, 200 * page);
              }),
              200 * page);
  check_twice(said_by([&] {
                Guest guest;
                (void)guest.tx->queue_dirty(guest.ram.block, bitmap);
                (void)guest.tx->queue_range(guest.ram.block, 64 * page, 8 * page);
              }),
              68 * page);
  check_twice(said_by([&] {
                Guest guest;
                (void)guest.tx->queue_zero(guest.ram.block, 68 * page);
                (void)guest.tx->queue_dirty(guest.ram.block, bitmap);
              }),
              68 * page);
  check_twice(said_by([] {  // a zero page on the main stream belongs to the epoch as well
                Guest<ZeroPagesLegacy> guest;
                std::memset(guest.ram.memory.data(), 0, page);
                (void)guest.tx->queue_page(guest.ram.block, 0);
                (void)guest.tx->queue_page(guest.ram.block, 0);
              }),
              0);
}

TEST_CASE("A page in two epochs, or refused in the first, is no misuse") {
  CHECK(said_by([] {
          Guest guest;
          (void)guest.tx->queue_range(guest.ram.block, 0, 256 * page);
          if (!guest.tx->close_epoch()) ::_exit(1);
          (void)guest.tx->queue_range(guest.ram.block, 0, 256 * page);
          if (guest.tx->queue_page(guest.ram.block, 256 * page)) ::_exit(1);
          if (guest.tx->queue_page(guest.ram.block, 256 * page)) ::_exit(1);
        }) == "no misuse");
}

TEST_CASE("Two threads in a sender's producer calls at once are reported, one after the other are not") {
  CHECK(said_by([] {
          Guest<ZeroPagesLegacy> guest;
          std::memset(guest.ram.memory.data(), 0, page);
          std::atomic<bool> inside = false, over = false;
          std::thread first([&] {
            (void)guest.tx->queue_range(guest.ram.block, 0, page, [&](std::uint64_t) {
              inside = true;
              inside.notify_all();
              over.wait(false);
            });
          });
          inside.wait(false);
          (void)guest.tx->queue_page(guest.ram.block, page);
          over = true;
          over.notify_all();
          first.join();
        }) == "multifd: misuse: two threads are in a Sender's producer calls at once\n");
  CHECK(said_by([] {
          Guest guest;
          std::thread([&] { (void)guest.tx->queue_page(guest.ram.block, 0); }).join();
          (void)guest.tx->queue_page(guest.ram.block, page);
        }) == "no misuse");
}

TEST_CASE("Two threads in a receiver's calls at once are reported, whichever the calls") {
  using Rx = Receiver<MemoryTransport, NoComp>;
  const auto meet = [](auto&& call) {
    GuestRam target(1);
    auto links = memory_links(1);
    const auto hello = wire::encode(wire::InitPacket{});
    (void)write_all(links.sender[0], std::span<const std::byte>(hello));
    const Bytes sync = RawStream().sync().bytes();
    (void)write_all(links.sender[0], std::span<const std::byte>(sync));
    auto rx = Rx::open(target.map, std::move(links.receiver), {.barrier = Barrier::manual});
    std::atomic<bool> inside = false, over = false;
    std::thread first([&] {
      (void)rx->release_epoch([&]() -> Result<void> {
        inside = true;
        inside.notify_all();
        over.wait(false);
        return {};
      });
    });
    inside.wait(false);
    call(*rx);
    over = true;
    over.notify_all();
    first.join();
  };
  const std::string told =
      "multifd: misuse: two threads are in a Receiver's release_epoch(), finish() or end_epochs() at once\n";
  CHECK(said_by([&] { meet([](Rx& rx) { (void)rx.release_epoch(); }); }) == told);
  CHECK(said_by([&] { meet([](Rx& rx) { (void)rx.finish(); }); }) == told);
  CHECK(said_by([&] { meet([](Rx& rx) { (void)rx.finish(std::chrono::milliseconds(0)); }); }) == told);
  CHECK(said_by([&] { meet([](Rx& rx) { (void)rx.end_epochs(); }); }) == told);
  CHECK(said_by([&] { meet([](Rx& rx) { (void)rx.stats(); }); }) == "no misuse");
}

namespace {

/// Runs `call` in a thread, and `destroy` when that thread sleeps in it.
template <class Call, class Destroy>
void destroy_during(Call&& call, Destroy&& destroy) {
  std::atomic<pid_t> id = 0;
  std::thread caller([&] {
    id = ::gettid();
    call();
  });
  const auto asleep = [&] {
    if (id == 0) return false;
    std::ifstream stat("/proc/self/task/" + std::to_string(id) + "/stat");
    const std::string line((std::istreambuf_iterator<char>(stat)), std::istreambuf_iterator<char>());
    const std::size_t name_end = line.rfind(')');
    return name_end != std::string::npos && line.substr(name_end, 3) == ") S";
  };
  while (!asleep()) std::this_thread::yield();
  destroy();
  caller.join();
}

/// A hook of the first error that never returns.
void block(const Error&) {
  static std::atomic<bool> never = false;
  never.wait(false);
}

}  // namespace

TEST_CASE("A Sender that is destroyed while another thread is in a call of it is reported, whichever the call") {
  const std::string told = "multifd: misuse: a Sender is destroyed while another thread is in one of its calls\n";
  CHECK(said_by([] {
          Guest guest({}, page);  // a packet has no room
          (void)guest.tx->queue_page(guest.ram.block, 0);
          (void)guest.tx->close_epoch();
          destroy_during([&] { (void)guest.tx->wait(0); }, [&] { guest.tx.reset(); });
        }) == told);
  CHECK(said_by([] {
          Guest guest({.on_error = block});
          destroy_during([&] { guest.tx->cancel(); }, [&] { guest.tx.reset(); });
        }) == told);
  CHECK(said_by([] {
          Guest guest({}, page);
          (void)guest.tx->queue_page(guest.ram.block, 0);
          destroy_during([&] { (void)guest.tx->close_channels(); }, [&] { guest.tx.reset(); });
        }) == told);
  CHECK(said_by([] {  // a producer's call, when no batch is left
          Guest guest({.depth = 2}, page);
          const auto all = [&] {
            return guest.tx->queue_range(guest.ram.block, 0, guest.ram.memory.size()).has_value();
          };
          destroy_during(
              [&] {
                while (all() && guest.tx->close_epoch()) continue;
              },
              [&] { guest.tx.reset(); });
        }) == told);
  CHECK(said_by([] {
          Guest guest;
          std::thread([&] {
            (void)guest.tx->stats();
            guest.tx->cancel();
          }).join();
        }) == "no misuse");
}

TEST_CASE("A Receiver that is destroyed while another thread is in a call of it is reported, whichever the call") {
  using Rx = Receiver<MemoryTransport, NoComp>;
  const auto during = [](auto&& call, ErrorHook hook) {
    GuestRam target(1);
    auto links = memory_links(1);
    const auto hello = wire::encode(wire::InitPacket{});
    (void)write_all(links.sender[0], std::span<const std::byte>(hello));
    std::optional<Rx> rx(
        Rx::open(target.map, std::move(links.receiver), {.barrier = Barrier::manual, .on_error = std::move(hook)})
            .value());
    destroy_during([&] { call(*rx); }, [&] { rx.reset(); });
  };
  const std::string told = "multifd: misuse: a Receiver is destroyed while another thread is in one of its calls\n";
  CHECK(said_by([&] { during([](Rx& rx) { (void)rx.release_epoch(); }, {}); }) == told);
  CHECK(said_by([&] { during([](Rx& rx) { (void)rx.finish(); }, {}); }) == told);
  CHECK(said_by([&] { during([](Rx& rx) { rx.cancel(); }, block); }) == told);
}

TEST_CASE("The use of a moved-from Sender or Receiver is reported") {
  CHECK(said_by([] {
          Guest guest;
          auto other = std::move(*guest.tx);
          (void)guest.tx->queue_page(guest.ram.block, 0);
        }) == "multifd: misuse: a Sender is used that was moved from\n");
  CHECK(said_by([] {
          Guest guest;
          auto other = std::move(*guest.tx);
          guest.tx->cancel();
        }) == "multifd: misuse: a Sender is used that was moved from\n");
  CHECK(said_by([] {
          GuestRam target(1);
          auto links = memory_links(1);
          const auto hello = wire::encode(wire::InitPacket{});
          (void)write_all(links.sender[0], std::span<const std::byte>(hello));
          auto rx = Receiver<MemoryTransport, NoComp>::open(target.map, std::move(links.receiver));
          auto other = std::move(*rx);
          (void)rx->finish();
        }) == "multifd: misuse: a Receiver is used that was moved from\n");
}
