// SPDX-License-Identifier: MIT
#include "common/sparse_digest.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <vector>

#include "multifd/memory/page_digest.hpp"

namespace {

/// What XXH3 says of the whole, and what the class says that reads the data alone.
void check_same(const std::vector<std::byte>& memory, const std::vector<std::pair<std::size_t, std::size_t>>& data) {
  program::SparseDigest digest;
  for (const auto& [offset, bytes] : data) digest.add(offset, std::span(memory).subspan(offset, bytes));
  digest.skip_to(memory.size());
  CHECK(digest.done() == memory.size());
  CHECK(digest.text() == fmt::format("{:016x}", multifd::digest_of(memory)));
}

}  // namespace

TEST_CASE("A digest over zeros that nobody reads is that of the bytes, whatever their number") {
  for (const std::size_t size : {0u, 1u, 16u, 240u, 241u, 1023u, 1024u, 1025u, 4096u, 8191u, 8192u, 8193u,
                                 8192u + 1024u, 65536u, 1000000u, 1u << 20, (1u << 20) + 64u})
    check_same(std::vector<std::byte>(size), {});
}

TEST_CASE("Zeros before, between and behind data of any length, at any place, are hashed as if they were read") {
  std::mt19937_64 random(7);
  for (unsigned round = 0; round < 500; ++round) {
    CAPTURE(round);
    std::vector<std::byte> memory(1 + random() % 200'000);
    std::vector<std::pair<std::size_t, std::size_t>> data;
    for (std::size_t at = random() % 20'000; at < memory.size(); at += random() % 40'000) {
      const std::size_t bytes = std::min<std::size_t>(random() % (round % 2 != 0 ? 300 : 5000), memory.size() - at);
      std::generate_n(memory.begin() + static_cast<std::ptrdiff_t>(at), bytes, [&] { return std::byte(random()); });
      data.emplace_back(at, bytes);
      at += bytes;
    }
    check_same(memory, data);
  }
}
