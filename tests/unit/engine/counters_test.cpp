// SPDX-License-Identifier: MIT
#include "multifd/engine/counters.hpp"

#include <doctest/doctest.h>

#include <thread>

using multifd::ChannelStats;
using multifd::engine::ChannelCounters;
using multifd::engine::Counter;
using multifd::engine::StageClock;

TEST_CASE("A snapshot takes every counter into the field of its name") {
  ChannelCounters counters;
  std::uint64_t value = 100;
  for (Counter* counter : {&counters.packets, &counters.syncs, &counters.normal_pages, &counters.zero_pages,
                           &counters.payload_bytes, &counters.wire_bytes, &counters.idle_ns, &counters.check_ns,
                           &counters.codec_ns, &counters.capped_ns, &counters.io_ns, &counters.cpu_ns}) {
    counter->set(value);
    counter->add(1);
    value += 100;
  }
  const ChannelStats stats = counters.snapshot(9);
  CHECK(stats.id == 9);
  CHECK(stats.packets == 101);
  CHECK(stats.syncs == 201);
  CHECK(stats.normal_pages == 301);
  CHECK(stats.zero_pages == 401);
  CHECK(stats.payload_bytes == 501);
  CHECK(stats.wire_bytes == 601);
  CHECK(stats.idle_ns == 701);
  CHECK(stats.check_ns == 801);
  CHECK(stats.codec_ns == 901);
  CHECK(stats.capped_ns == 1001);
  CHECK(stats.io_ns == 1101);
  CHECK(stats.cpu_ns == 1201);
}

TEST_CASE("One thread counts while another reads: values only grow, and the last one is right") {
  Counter counter;
  bool grew = true;
  {
    std::jthread writer([&] {
      for (int i = 0; i < 100'000; ++i) counter.add(2);
    });
    std::uint64_t last = 0;
    while (last < 200'000) {
      const std::uint64_t now = counter.get();
      grew = grew && now >= last && now % 2 == 0;
      last = now;
    }
  }
  CHECK(grew);
  CHECK(counter.get() == 200'000);
}

TEST_CASE("A stage clock gives each stage the time since the last lap, none twice") {
  const auto start = std::chrono::steady_clock::now();
  StageClock clock;
  Counter one;
  Counter two;
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  clock.lap(one);
  clock.lap(two);
  clock.lap(one);
  const auto all = static_cast<std::uint64_t>((std::chrono::steady_clock::now() - start).count());
  CHECK(one.get() >= 5'000'000);
  CHECK(one.get() + two.get() <= all);
}

TEST_CASE("Progress changes with each part of a packet, and with what an outlet counts only as a whole") {
  ChannelCounters counters;
  const auto before = counters.progress();
  counters.moved_bytes.add(1);
  const auto part = counters.progress();
  counters.wire_bytes.add(1);
  CHECK(before != part);
  CHECK(part != counters.progress());
}
