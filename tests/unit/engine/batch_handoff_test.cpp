// SPDX-License-Identifier: MIT
//
// What the hand-off promises, one call at a time in one thread (take() is only called where there is work).
// Its threads are tests/stress/handoff_test.cpp.
#include "multifd/engine/batch_handoff.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <ostream>  // lets doctest print a std::error_code
#include <set>
#include <thread>
#include <vector>

using multifd::Errc;
using multifd::PageBatch;
using multifd::engine::BatchHandoff;
using multifd::engine::Work;

namespace {

constexpr auto ignore_waits = [] {};

std::unique_ptr<BatchHandoff> make(unsigned channels, unsigned depth, std::size_t packet_pages = 4) {
  auto handoff = BatchHandoff::create(channels, depth, packet_pages);
  REQUIRE(handoff);
  return std::move(*handoff);
}

/// Puts one batch of one page, and gives the batch to fill next.
PageBatch* put_page(BatchHandoff& handoff, PageBatch* batch, std::uint64_t page) {
  batch->push(page);
  PageBatch* next = handoff.put(batch, ignore_waits);
  REQUIRE(next != nullptr);
  return next;
}

void check_batch(BatchHandoff& handoff, unsigned channel, std::uint64_t page, std::uint64_t epoch) {
  const Work work = handoff.take(channel);
  REQUIRE(work.kind == Work::Kind::batch);
  REQUIRE(work.batch != nullptr);
  CHECK(work.epoch == epoch);
  CHECK(work.batch->epoch == epoch);
  REQUIRE(work.batch->size() == 1);
  CHECK(work.batch->offsets()[0] == page);
  handoff.give_back(work.batch);
}

void check_sync(BatchHandoff& handoff, unsigned channel, std::uint64_t epoch) {
  const Work work = handoff.take(channel);
  REQUIRE(work.kind == Work::Kind::close_epoch);
  CHECK(work.epoch == epoch);
}

void check_refused(unsigned channels, unsigned depth, Errc code, std::uint64_t detail) {
  const auto handoff = BatchHandoff::create(channels, depth, 4);
  REQUIRE_FALSE(handoff.has_value());
  CHECK(handoff.error().code == code);
  CHECK(handoff.error().detail == detail);
}

}  // namespace

TEST_CASE("A hand-off has 1 to 255 channels and 2 to 16 batches for each") {
  check_refused(0, 4, Errc::bad_channel_count, 0);
  check_refused(256, 4, Errc::bad_channel_count, 256);
  check_refused(~0u, 4, Errc::bad_channel_count, ~0u);
  check_refused(2, 0, Errc::bad_option, 0);
  check_refused(2, 1, Errc::bad_option, 1);
  check_refused(2, 17, Errc::bad_option, 17);
  CHECK(make(1, 2)->channels() == 1);
  CHECK(make(255, 16)->channels() == 255);
}

TEST_CASE("Every batch is a whole packet, empty, with slots of its own") {
  constexpr unsigned channels = 3;
  constexpr unsigned depth = 5;
  const auto handoff = make(channels, depth, 128);
  std::set<const std::uint64_t*> slots;
  PageBatch* batch = handoff->first_batch();
  for (unsigned i = 0;; ++i) {
    CHECK(batch->empty());
    CHECK(batch->capacity() == 128);
    batch->push_run(0, 128, 4096);
    slots.insert(batch->offsets().data());
    if (i == channels * depth) break;
    batch = handoff->put(batch, ignore_waits);
    REQUIRE(batch != nullptr);
  }
  CHECK(slots.size() == channels * depth + 1);
}

TEST_CASE("allocate_copies gives every batch a buffer of its own, which stays with it") {
  constexpr unsigned channels = 3;
  constexpr unsigned depth = 2;
  const auto handoff = make(channels, depth);
  CHECK(handoff->first_batch()->copies.data() == nullptr);
  REQUIRE(handoff->allocate_copies());
  std::set<const std::byte*> buffers;
  PageBatch* batch = handoff->first_batch();
  for (unsigned i = 0;; ++i) {
    REQUIRE(batch->copies.data() != nullptr);
    buffers.insert(batch->copies.data());
    if (i == channels * depth) break;
    batch = put_page(*handoff, batch, i);
  }
  CHECK(buffers.size() == channels * depth + 1);
  for (unsigned channel = 0; channel < channels; ++channel)
    for (unsigned i = 0; i < depth; ++i) {
      const Work work = handoff->take(channel);
      REQUIRE(work.kind == Work::Kind::batch);
      const std::byte* const buffer = work.batch->copies.data();
      CHECK(buffers.erase(buffer) == 1);
      handoff->give_back(work.batch);
      CHECK(work.batch->copies.data() == buffer);
    }
  CHECK(buffers.size() == 1);  // the one that is being filled
}

TEST_CASE("Batches of an epoch come before the SYNC that ends it, in the order they were put") {
  const auto handoff = make(1, 8);
  PageBatch* batch = handoff->first_batch();
  for (std::uint64_t page = 0; page < 3; ++page) batch = put_page(*handoff, batch, page);
  CHECK(handoff->close_epoch() == 0);
  for (std::uint64_t page = 3; page < 5; ++page) batch = put_page(*handoff, batch, page);
  CHECK(handoff->close_epoch() == 1);
  put_page(*handoff, batch, 5);
  handoff->end();

  for (std::uint64_t page = 0; page < 3; ++page) check_batch(*handoff, 0, page, 0);
  check_sync(*handoff, 0, 0);
  for (std::uint64_t page = 3; page < 5; ++page) check_batch(*handoff, 0, page, 1);
  check_sync(*handoff, 0, 1);
  check_batch(*handoff, 0, 5, 2);
  CHECK(handoff->take(0).kind == Work::Kind::end);
}

TEST_CASE("An epoch that is still open gets no SYNC, although its batches are all taken") {
  const auto handoff = make(1, 4);
  PageBatch* batch = put_page(*handoff, handoff->first_batch(), 1);
  CHECK(handoff->close_epoch() == 0);
  put_page(*handoff, batch, 2);
  check_batch(*handoff, 0, 1, 0);
  check_sync(*handoff, 0, 0);
  check_batch(*handoff, 0, 2, 1);
  handoff->end();
  CHECK(handoff->take(0).kind == Work::Kind::end);  // and no SYNC of epoch 1
}

TEST_CASE("Idle channels get every SYNC, too") {
  const auto handoff = make(3, 4);
  put_page(*handoff, handoff->first_batch(), 7);
  for (std::uint64_t epoch = 0; epoch < 4; ++epoch) CHECK(handoff->close_epoch() == epoch);
  handoff->end();
  check_batch(*handoff, 0, 7, 0);
  for (unsigned channel = 0; channel < 3; ++channel) {
    for (std::uint64_t epoch = 0; epoch < 4; ++epoch) check_sync(*handoff, channel, epoch);
    CHECK(handoff->take(channel).kind == Work::Kind::end);
  }
}

TEST_CASE("A batch of a later epoch waits until all SYNCs before it were given") {
  const auto handoff = make(1, 4);
  for (int epoch = 0; epoch < 3; ++epoch) handoff->close_epoch();
  put_page(*handoff, handoff->first_batch(), 9);
  for (std::uint64_t epoch = 0; epoch < 3; ++epoch) check_sync(*handoff, 0, epoch);
  check_batch(*handoff, 0, 9, 3);
}

TEST_CASE("Finished comes after everything, and stays") {
  const auto handoff = make(2, 4);
  put_page(*handoff, handoff->first_batch(), 1);
  handoff->close_epoch();
  handoff->end();
  check_batch(*handoff, 0, 1, 0);
  for (const unsigned channel : {0u, 1u}) {
    check_sync(*handoff, channel, 0);
    for (int i = 0; i < 3; ++i) CHECK(handoff->take(channel).kind == Work::Kind::end);
  }
}

TEST_CASE("An end without any epoch or batch is just an end") {
  const auto handoff = make(2, 2);
  handoff->end();
  CHECK(handoff->take(0).kind == Work::Kind::end);
  CHECK(handoff->take(1).kind == Work::Kind::end);
}

TEST_CASE("Each batch goes to the channel that asks for one first, in the order they were put") {
  const auto handoff = make(3, 2);
  PageBatch* batch = handoff->first_batch();
  for (std::uint64_t page = 0; page < 6; ++page) batch = put_page(*handoff, batch, page);
  check_batch(*handoff, 1, 0, 0);
  check_batch(*handoff, 1, 1, 0);
  check_batch(*handoff, 0, 2, 0);
  for (std::uint64_t page = 6; page < 9; ++page) batch = put_page(*handoff, batch, page);
  for (std::uint64_t page = 3; page < 9; ++page) check_batch(*handoff, 1, page, 0);  // 2 asks for none
}

TEST_CASE("A channel that has written its SYNC leaves no batch of that epoch behind, and takes the later ones") {
  const auto handoff = make(2, 4);
  PageBatch* batch = put_page(*handoff, handoff->first_batch(), 1);
  handoff->close_epoch();
  put_page(*handoff, batch, 2);
  check_batch(*handoff, 1, 1, 0);
  check_sync(*handoff, 0, 0);  // 1 may still be sending
  check_batch(*handoff, 0, 2, 1);
  check_sync(*handoff, 1, 0);
}

TEST_CASE("A batch that comes back is empty, and is the next that put() gives") {
  const auto handoff = make(1, 2);
  PageBatch* batch = handoff->first_batch();
  batch = put_page(*handoff, batch, 1);
  batch = put_page(*handoff, batch, 2);
  const Work work = handoff->take(0);
  REQUIRE(work.kind == Work::Kind::batch);
  handoff->give_back(work.batch);
  PageBatch* next = put_page(*handoff, batch, 3);
  CHECK(next == work.batch);
  CHECK(next->empty());
}

TEST_CASE("stop() comes before everything that is queued, for put() and take(), and stays") {
  const auto handoff = make(2, 4);
  PageBatch* batch = put_page(*handoff, handoff->first_batch(), 1);
  handoff->close_epoch();
  handoff->end();
  handoff->stop();
  for (int i = 0; i < 2; ++i) {
    CHECK(handoff->take(0).kind == Work::Kind::stopped);
    CHECK(handoff->take(1).kind == Work::Kind::stopped);
    CHECK(handoff->put(batch, ignore_waits) == nullptr);
  }
  handoff->stop();
  handoff->close_epoch();
  handoff->push_out();
  CHECK(handoff->take(0).kind == Work::Kind::stopped);
}

TEST_CASE("put() without a wait does not report one, and a wait is reported before and after") {
  const auto handoff = make(1, 2);
  int reports = 0;
  const auto count = [&] { ++reports; };
  PageBatch* batch = handoff->first_batch();
  for (int i = 0; i < 2; ++i) {
    batch->push(0);
    batch = handoff->put(batch, count);
  }
  CHECK(reports == 0);

  // No room until the worker, which starts on the first report, gives one back.
  batch->push(0);
  std::jthread worker;
  std::atomic<int> reports_when_started{0};
  batch = handoff->put(batch, [&] {
    if (++reports > 1) return;
    reports_when_started = reports;
    worker = std::jthread([&] {
      const Work work = handoff->take(0);
      handoff->give_back(work.batch);
    });
  });
  CHECK(batch != nullptr);
  CHECK(reports_when_started == 1);
  CHECK(reports == 2);
}

TEST_CASE("stop() wakes a producer that waits for room") {
  const auto handoff = make(2, 2);
  PageBatch* batch = handoff->first_batch();
  for (std::uint64_t page = 0; page < 4; ++page) batch = put_page(*handoff, batch, page);
  std::jthread stopper;
  int reports = 0;
  CHECK(handoff->put(batch, [&] {
    if (++reports == 1) stopper = std::jthread([&] { handoff->stop(); });
  }) == nullptr);
  CHECK(reports == 1);
}
