// SPDX-License-Identifier: MIT
#include "multifd/memory/page_buffer.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

using multifd::PageBuffer;

static_assert(!std::is_copy_constructible_v<PageBuffer> && !std::is_copy_assignable_v<PageBuffer>);
static_assert(std::is_nothrow_move_constructible_v<PageBuffer> && std::is_nothrow_swappable_v<PageBuffer>);

TEST_CASE("A buffer holds the pages of one packet, aligned to 4096") {
  for (int i = 0; i < 3; ++i) {
    const auto buffer = PageBuffer::create();
    REQUIRE(buffer);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer->data()) % 4096 == 0);
    std::memset(buffer->data(), 0xff, 512 * 1024);  // AddressSanitizer looks whether it is so large
  }
}

TEST_CASE("A default buffer holds nothing") { CHECK(PageBuffer().data() == nullptr); }

TEST_CASE("Buffers are handed on by swapping and moving: the memory stays where it is") {
  PageBuffer a = PageBuffer::create().value();
  PageBuffer b = PageBuffer::create().value();
  std::byte* const at_a = a.data();
  std::byte* const at_b = b.data();
  REQUIRE(at_a != at_b);
  std::swap(a, b);
  CHECK(a.data() == at_b);
  CHECK(b.data() == at_a);
  const PageBuffer c = std::move(a);
  CHECK(c.data() == at_b);
  CHECK(a.data() == nullptr);
}
