// SPDX-License-Identifier: MIT
#include "multifd/stats.hpp"

#include <doctest/doctest.h>

#include <set>
#include <string>

using multifd::Bound;
using multifd::ChannelStats;
using multifd::SenderStats;

TEST_CASE("total() adds up every number of every channel") {
  const ChannelStats one{.id = 5,
                         .packets = 1,
                         .syncs = 2,
                         .normal_pages = 3,
                         .zero_pages = 4,
                         .payload_bytes = 5,
                         .wire_bytes = 6,
                         .idle_ns = 7,
                         .check_ns = 8,
                         .codec_ns = 9,
                         .capped_ns = 10,
                         .io_ns = 11,
                         .cpu_ns = 12};
  const ChannelStats ten{.id = 6,
                         .packets = 10,
                         .syncs = 20,
                         .normal_pages = 30,
                         .zero_pages = 40,
                         .payload_bytes = 50,
                         .wire_bytes = 60,
                         .idle_ns = 70,
                         .check_ns = 80,
                         .codec_ns = 90,
                         .capped_ns = 100,
                         .io_ns = 110,
                         .cpu_ns = 120};
  const ChannelStats sum = multifd::total({one, ten});
  CHECK(sum.packets == 11);
  CHECK(sum.syncs == 22);
  CHECK(sum.normal_pages == 33);
  CHECK(sum.zero_pages == 44);
  CHECK(sum.payload_bytes == 55);
  CHECK(sum.wire_bytes == 66);
  CHECK(sum.idle_ns == 77);
  CHECK(sum.check_ns == 88);
  CHECK(sum.codec_ns == 99);
  CHECK(sum.capped_ns == 110);
  CHECK(sum.io_ns == 121);
  CHECK(sum.cpu_ns == 132);
}

TEST_CASE("total() of no channels is zero") {
  CHECK(multifd::total({}).wire_bytes == 0);
  CHECK(multifd::total({}).packets == 0);
}

TEST_CASE("bounded_by() names the stage that took the most time") {
  CHECK(bounded_by(ChannelStats{}) == Bound::nothing);
  CHECK(bounded_by(ChannelStats{.idle_ns = 2, .check_ns = 1, .codec_ns = 1, .capped_ns = 1, .io_ns = 1}) ==
        Bound::producer);
  CHECK(bounded_by(ChannelStats{.idle_ns = 1, .check_ns = 2, .codec_ns = 1, .capped_ns = 1, .io_ns = 1}) ==
        Bound::zero_check);
  CHECK(bounded_by(ChannelStats{.idle_ns = 1, .check_ns = 1, .codec_ns = 2, .capped_ns = 1, .io_ns = 1}) ==
        Bound::compression);
  CHECK(bounded_by(ChannelStats{.idle_ns = 1, .check_ns = 1, .codec_ns = 1, .capped_ns = 2, .io_ns = 1}) ==
        Bound::bandwidth_cap);
  CHECK(bounded_by(ChannelStats{.idle_ns = 1, .check_ns = 1, .codec_ns = 1, .capped_ns = 1, .io_ns = 2}) ==
        Bound::transport);
}

TEST_CASE("CPU time is no share of its own") { CHECK(bounded_by(ChannelStats{.cpu_ns = 1000}) == Bound::nothing); }

TEST_CASE("A sender is bounded by its channels together, but by its producer only if that never waited") {
  SenderStats stats;
  CHECK(bounded_by(stats) == Bound::nothing);
  stats.channels = {{.idle_ns = 100, .io_ns = 30}, {.idle_ns = 0, .io_ns = 60}};
  CHECK(bounded_by(stats) == Bound::producer);
  stats.producer_waits = 1;
  CHECK(bounded_by(stats) == Bound::transport);
}

TEST_CASE("Every bound has a name of its own") {
  std::set<std::string> names;
  for (int value = 0; value <= static_cast<int>(Bound::bandwidth_cap); ++value)
    names.insert(multifd::to_string(static_cast<Bound>(value)));
  CHECK(names.size() == static_cast<std::size_t>(Bound::bandwidth_cap) + 1);
  CHECK(std::string(multifd::to_string(Bound::bandwidth_cap)) == "bandwidth cap");
}
