// SPDX-License-Identifier: MIT
#include "soak/migration.hpp"

#include <fmt/format.h>

#include <array>
#include <cstring>

#include "soak/run.hpp"

namespace soak {
namespace {

std::size_t below(Random& random, std::size_t end) { return static_cast<std::size_t>(random() % end); }

template <std::size_t N>
const char* one_of(Random& random, const std::array<const char*, N>& names) {
  return names[below(random, N)];
}

}  // namespace

Plan Plan::make(Random& random) {
  Plan plan;
  plan.wire = static_cast<soak::Wire>(below(random, 3));
  plan.compression = one_of<5>(random, {"none", "none", "none", "zlib", "zstd"});
  plan.zero_pages = one_of<3>(random, {"none", "legacy", "multifd"});
  plan.channels = static_cast<unsigned>(1 + below(random, random() % 8 == 0 ? 32 : 6));
  plan.page_bytes = std::array<std::size_t, 6>{4096, 4096, 4096, 4096, 1024, 65536}[below(random, 6)];
  // A compressor is slow: what counts here is how often, not how much.
  const std::size_t most = plan.compression == "none" ? arena_bytes : arena_bytes / 8;
  const std::size_t blocks = 1 + below(random, 3);
  for (std::size_t i = 0; i < blocks; ++i)
    plan.block_bytes.push_back((1 + below(random, most / blocks / plan.page_bytes)) * plan.page_bytes);
  plan.rounds = static_cast<unsigned>(1 + below(random, 4));
  plan.digest = below(random, 4) == 0;
  plan.manual_barrier = below(random, 2) == 0;
  plan.zeroed_destination = below(random, 2) == 0;
  plan.populate_ahead = below(random, 4) == 0;
  if (below(random, 8) == 0) plan.max_io_bytes = 1000 + below(random, 5000);
  if (below(random, 8) == 0) plan.bandwidth = 50'000'000 + below(random, 400'000'000);
  if (below(random, 2) == 0) plan.trouble = static_cast<Trouble>(1 + below(random, std::size(names_of_trouble) - 1));
  plan.after = std::chrono::microseconds(below(random, 40'000));
  plan.operation = below(random, 600);
  plan.cut_bytes = below(random, std::size_t{6} << 20);
  plan.seed = random();
  return plan;
}

std::string Plan::text() const {
  std::size_t bytes = 0;
  for (const std::size_t each : block_bytes) bytes += each;
  std::string trouble_text = names_of_trouble[static_cast<int>(trouble)];
  if (trouble == Trouble::cancel_sender || trouble == Trouble::cancel_receiver)
    trouble_text += fmt::format(" after {} us", after.count());
  if (trouble == Trouble::fail_sender || trouble == Trouble::fail_receiver)
    trouble_text += fmt::format(" at operation {}", operation);
  if (trouble == Trouble::cut) trouble_text += fmt::format(" after {} bytes", cut_bytes);
  return fmt::format(
      "{} over {} channels, compression {}, zero pages {}, {} blocks with {} bytes in pages of {}, {} rounds{}{}{}{}, "
      "calls of {} bytes (0: any), bandwidth {}, trouble: {}, seed {}",
      names_of_wire[static_cast<int>(wire)], channels, compression, zero_pages, block_bytes.size(), bytes, page_bytes,
      rounds, digest ? ", digest" : "", manual_barrier ? ", manual barrier" : "", zeroed_destination ? ", zeroed" : "",
      populate_ahead ? ", populate ahead" : "", max_io_bytes, bandwidth, trouble_text, seed);
}

Arena::Arena() : source(arena_bytes), destination(arena_bytes) {}

void Arena::refill(Random& random) {
  for (std::size_t at = 0; at < source.size();) {
    const std::size_t run = std::min(source.size() - at, 4096 * (1 + below(random, 64)));
    const auto kind = below(random, 3);
    if (kind == 0) std::memset(&source[at], 0, run);
    for (std::size_t word = 0; kind != 0 && word < run; word += 8) {
      const std::uint64_t value = kind == 1 ? 0x2074786574207269 + word / 512 : random();
      std::memcpy(&source[at + word], &value, 8);
    }
    at += run;
  }
}

Outcome migrate(const Plan& plan, Arena& arena) {
  return plan.wire == Wire::memory ? run_memory(plan, arena) : run_sockets(plan, arena);
}

}  // namespace soak
