// SPDX-License-Identifier: MIT
#include "multifd/memory/page_batch.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>

using multifd::PageBatch;

TEST_CASE("A batch without slots is empty and full at once") {
  const PageBatch batch;
  CHECK(batch.empty());
  CHECK(batch.full());
  CHECK(batch.capacity() == 0);
  CHECK(batch.room() == 0);
}

TEST_CASE("push() and push_run() append, in order, until the batch is full") {
  std::array<std::uint64_t, 8> slots{};
  PageBatch batch(slots);
  CHECK(batch.capacity() == 8);
  batch.push(0x9000);
  CHECK(batch.size() == 1);
  batch.push_run(0x10000, 5, 4096);
  CHECK(batch.room() == 2);
  CHECK_FALSE(batch.full());
  batch.push_run(0x7'0000'0000, 2, 65536);  // above 32 bits
  CHECK(batch.full());
  CHECK(batch.room() == 0);
  const std::array<std::uint64_t, 8> expected{0x9000,  0x10000, 0x11000,       0x12000,
                                              0x13000, 0x14000, 0x7'0000'0000, 0x7'0001'0000};
  CHECK(std::ranges::equal(batch.offsets(), expected));
}

TEST_CASE("A run of no pages changes nothing, also in a full batch") {
  std::array<std::uint64_t, 1> slots{};
  PageBatch batch(slots);
  batch.push_run(4096, 0, 4096);
  CHECK(batch.empty());
  batch.push(4096);
  batch.push_run(8192, 0, 4096);
  CHECK(batch.size() == 1);
}

TEST_CASE("clear() makes room again, in the same slots") {
  std::array<std::uint64_t, 2> slots{};
  PageBatch batch(slots);
  batch.push_run(0, 2, 4096);
  batch.clear();
  CHECK(batch.empty());
  CHECK(batch.room() == 2);
  batch.push(12288);
  CHECK(slots[0] == 12288);
  CHECK(batch.offsets().data() == slots.data());
}

TEST_CASE("offsets() can be reordered in place: normal pages first, zero pages after") {
  std::array<std::uint64_t, 4> slots{};
  PageBatch batch(slots);
  batch.push_run(0, 4, 4096);
  std::ranges::reverse(batch.offsets());
  CHECK(std::as_const(batch).offsets().front() == 3 * 4096);
}

TEST_CASE("Known zero pages count among the pages, and clear() forgets them") {
  std::array<std::uint64_t, 4> slots{};
  PageBatch batch(slots);
  batch.push(0);
  CHECK(batch.known_zeros == 0);
  batch.push_zero(8192);
  batch.push_zero(4096);
  CHECK(batch.size() == 3);
  CHECK(batch.known_zeros == 2);
  CHECK(batch.offsets().back() == 4096);
  batch.clear();
  CHECK(batch.empty());
  CHECK(batch.known_zeros == 0);
}

TEST_CASE("A batch with a message is not empty, and clear() frees the message but not the buffer of copies") {
  std::array<std::uint64_t, 2> slots{};
  PageBatch batch(slots);
  batch.copies = multifd::PageBuffer::create().value();
  const std::byte* const copies = batch.copies.data();
  CHECK(batch.empty());
  batch.message = {.bytes = std::make_unique<std::byte[]>(3), .size = 3};
  CHECK_FALSE(batch.empty());
  CHECK(batch.size() == 0);
  batch.clear();
  CHECK(batch.empty());
  CHECK(batch.message.bytes == nullptr);
  CHECK(batch.message.size == 0);
  CHECK(batch.copies.data() == copies);
}
