// SPDX-License-Identifier: MIT
#include "multifd/packets/hellos.hpp"

#include <doctest/doctest.h>

#include <future>
#include <ostream>  // lets doctest print a std::error_code
#include <thread>

using multifd::Errc;
using multifd::Result;
using multifd::Stage;
using multifd::Uuid;
using multifd::UuidCheck;
using multifd::packets::Hellos;
using namespace std::chrono_literals;

namespace {

Uuid uuid_of(unsigned char last) {
  Uuid uuid{};
  uuid.back() = std::byte{last};
  return uuid;
}

void check_refused(const Result<void>& result, Errc code, std::uint64_t detail = 0) {
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().code == code, multifd::describe(result.error()));
  CHECK(result.error().detail == detail);
  CHECK(result.error().stage == Stage::hello);
}

}  // namespace

TEST_CASE("All channels may report in any order, then open() goes on") {
  Hellos desk(3, {});
  for (const unsigned id : {2u, 0u, 1u}) CHECK(desk.admit({.uuid = uuid_of(9), .id = static_cast<std::uint8_t>(id)}));
  CHECK(desk.wait(0ms));
  CHECK(desk.uuid() == uuid_of(9));
}

TEST_CASE("open() waits for the last hello") {
  Hellos desk(2, {});
  CHECK(desk.admit({.id = 1}));
  std::jthread late([&] { (void)desk.admit({.id = 0}); });
  CHECK(desk.wait(60s));
}

TEST_CASE("Whoever is slow to say whether to go on holds up no channel") {
  Hellos desk(1, {});
  std::future<bool> admitted;
  unsigned polls = 0;
  const auto waited = desk.wait(60s, [&] {
    if (polls++ > 0) return false;
    admitted = std::async(std::launch::async, [&] { return desk.admit({.id = 0}).has_value(); });
    return admitted.wait_for(20s) != std::future_status::ready;  // true: the channel stands still, and the wait ends
  });
  CHECK(waited);
  CHECK(admitted.get());
  // Also when nothing has come for a while.
  Hellos later(1, {});
  polls = 0;
  CHECK(later.wait(60s, [&] {
    if (polls++ != 1) return false;
    admitted = std::async(std::launch::async, [&] { return later.admit({.id = 0}).has_value(); });
    return admitted.wait_for(20s) != std::future_status::ready;
  }));
  CHECK(admitted.get());
}

TEST_CASE("A repeated id is refused, and the channel that had it first keeps it") {
  Hellos desk(2, {});
  CHECK(desk.admit({.id = 1}));
  check_refused(desk.admit({.id = 1}), Errc::duplicate_channel_id, 1);
  CHECK_FALSE(desk.wait(0ms).has_value());  // it did not count as the other one
  CHECK(desk.admit({.id = 0}));
  CHECK(desk.wait(0ms));
  check_refused(desk.admit({.id = 0}), Errc::duplicate_channel_id, 0);
}

TEST_CASE("Uuids: same_on_all takes any one, but only one") {
  Hellos desk(3, {.kind = UuidCheck::Kind::same_on_all, .uuid = uuid_of(99)});
  CHECK(desk.admit({.uuid = uuid_of(1), .id = 0}));
  Uuid counting;
  for (std::size_t i = 0; i < counting.size(); ++i) counting[i] = static_cast<std::byte>(i * 0x11);
  const auto other = desk.admit({.uuid = counting, .id = 1});
  check_refused(other, Errc::uuid_mismatch);
  CHECK(other.error().subject.view() == "uuid 00112233-4455-6677-8899-aabbccddeeff");
  check_refused(desk.admit({.uuid = uuid_of(99), .id = 1}), Errc::uuid_mismatch);
  CHECK(desk.admit({.uuid = uuid_of(1), .id = 1}));
  CHECK(desk.admit({.uuid = uuid_of(1), .id = 2}));
  CHECK(desk.uuid() == uuid_of(1));
}

TEST_CASE("Uuids: same_on_all counts a first one that is all zero, too") {
  Hellos desk(2, {});
  CHECK(desk.admit({.uuid = Uuid{}, .id = 0}));
  check_refused(desk.admit({.uuid = uuid_of(1), .id = 1}), Errc::uuid_mismatch);
}

TEST_CASE("Uuids: exact takes the one that was set, byte for byte") {
  Hellos desk(2, {.kind = UuidCheck::Kind::exact, .uuid = uuid_of(5)});
  for (std::size_t at = 0; at < 16; ++at) {
    Uuid other = uuid_of(5);
    other[at] ^= std::byte{0x80};
    check_refused(desk.admit({.uuid = other, .id = 0}), Errc::uuid_mismatch);
  }
  check_refused(desk.admit({.id = 0}), Errc::uuid_mismatch);
  CHECK(desk.admit({.uuid = uuid_of(5), .id = 0}));
  CHECK(desk.admit({.uuid = uuid_of(5), .id = 1}));
  CHECK(desk.wait(0ms));
}

TEST_CASE("Uuids: any takes everything") {
  Hellos desk(2, {.kind = UuidCheck::Kind::any});
  CHECK(desk.admit({.uuid = uuid_of(1), .id = 0}));
  CHECK(desk.admit({.uuid = uuid_of(2), .id = 1}));
  CHECK(desk.wait(0ms));
}

TEST_CASE("A time-out names the lowest missing id") {
  Hellos desk(4, {});
  for (const auto& [admitted, missing] : {std::pair{3, 0u}, std::pair{0, 1u}, std::pair{1, 2u}}) {
    CHECK(desk.admit({.id = static_cast<std::uint8_t>(admitted)}));
    const Result<void> result = desk.wait(1ms);
    check_refused(result, Errc::timed_out);
    CHECK(result.error().channel == missing);
  }
  CHECK(desk.admit({.id = 2}));
  CHECK(desk.wait(0ms));
}

TEST_CASE("stop() ends the wait, now and later") {
  Hellos desk(2, {});
  {
    std::jthread stopper([&] { desk.stop(); });
    check_refused(desk.wait(60s), Errc::cancelled);
  }
  check_refused(desk.wait(60s), Errc::cancelled);
}

TEST_CASE("An Interrupt ends the wait, now and later, but takes nothing back") {
  Hellos desk(2, {});
  multifd::Interrupt interrupt = multifd::Interrupt::create().value();
  CHECK(desk.admit({.id = 0}));
  check_refused(desk.wait(1ms, &interrupt), Errc::timed_out);
  {
    std::jthread elsewhere([&] { interrupt.trigger(); });
    check_refused(desk.wait(60s, &interrupt), Errc::cancelled);
  }
  check_refused(desk.wait(60s, &interrupt), Errc::cancelled);
  CHECK(desk.admit({.id = 1}));
  CHECK(desk.wait(60s, &interrupt));
}

TEST_CASE("stop() after the last hello takes nothing back") {
  Hellos desk(1, {});
  CHECK(desk.admit({.id = 0}));
  desk.stop();
  CHECK(desk.wait(60s));
}
