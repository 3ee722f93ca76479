// SPDX-License-Identifier: MIT
//
// The exemplar of a guest through its contract; and some with one fault each, to see that the contract notices.
#include <doctest/doctest.h>

#include <atomic>
#include <string>

#include "exemplar/guest.hpp"
#include "multifd/testing/guest_contract.hpp"
#include "support/basics.hpp"
#include "support/migrate_guest.hpp"

using namespace multifd;

namespace {

enum class Wrong { none, writes_on, unmarked, resume, unread };

/// A MigratingGuest with one fault.
template <Wrong wrong>
struct BadGuest : test::MigratingGuest {
  BadGuest() : MigratingGuest(512) {}
  ~BadGuest() {
    writing = false;
    if (writer.joinable()) writer.join();
  }

  Result<void> pause() {
    if (wrong == Wrong::writes_on && !writer.joinable())
      writer = std::thread([this] {
        while (writing) std::atomic_ref(memory()[0]).store(std::byte(++number), std::memory_order_relaxed);
      });
    MULTIFD_TRY(MigratingGuest::pause());
    if (wrong == Wrong::unmarked)
      memory()[300 * page] = std::byte(++number);  // the DMA of a device that nobody watches
    return {};
  }
  Result<void> resume() {
    if (wrong == Wrong::resume && paused++ == 0) return fail(Errc::bad_option, Stage::none, "no memory left");
    return MigratingGuest::resume();
  }
  Result<void> load(migrate::StateReader& from) {
    if (wrong != Wrong::unread) return MigratingGuest::load(from);
    MULTIFD_TRY(from.next());
    return {};
  }

  std::thread writer;
  std::atomic<bool> writing = true;
  unsigned number = 0;
  unsigned paused = 0;
};

template <Wrong wrong>
std::string found() {
  const test::Watchdog watchdog("a guest's contract");
  BadGuest<wrong> source;
  source.boot();
  source.run(16);
  BadGuest<wrong == Wrong::unread ? wrong : Wrong::none> destination;
  const ContractReport report = check_guest_contract(source, destination);
  source.stop();
  destination.stop();
  return report.ok() ? "" : report.text();
}

}  // namespace

TEST_CASE("The exemplar of a guest, and the tests' own, keep the contract") {
  const test::Watchdog watchdog("the exemplar's contract");
  exemplar::SmallGuest source;
  source.boot();
  exemplar::SmallGuest destination;
  const ContractReport report = check_guest_contract(source, destination);
  CHECK_MESSAGE(report.ok(), report.text());
  CHECK(found<Wrong::none>() == "");
}

TEST_CASE("The contract notices a guest that breaks it") {
  CHECK(found<Wrong::writes_on>().find("pause(): memory is written to behind it") != std::string::npos);
  CHECK(found<Wrong::unmarked>().find("a migration fails") != std::string::npos);
  CHECK(found<Wrong::resume>().find("resume(): fails") != std::string::npos);
  CHECK(found<Wrong::unread>().find("has not read all devices") != std::string::npos);
}
