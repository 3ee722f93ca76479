// SPDX-License-Identifier: MIT
#include "common/sparse_digest.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

// Code and state from one header, so that both are of one version.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace program {
namespace {

constexpr std::size_t stripe_bytes = 64;
constexpr std::size_t lanes = 8;

std::uint64_t word_at(const unsigned char* bytes) { return XXH_readLE64(bytes); }

/// What zeros from stripe `first` to `last` of a block add to a lane: the products of the secret's halves.
std::uint64_t sum_of(const unsigned char* secret, std::size_t lane, std::size_t first, std::size_t last) {
  std::uint64_t sum = 0;
  for (std::size_t stripe = first; stripe < last; ++stripe) {
    const std::uint64_t key = word_at(secret + 8 * stripe + 8 * lane);
    sum += (key & 0xffff'ffff) * (key >> 32);
  }
  return sum;
}

/// Hashes whole blocks of zeros into a state whose buffer has nothing but zeros: what is buffered stays as it is, and each
/// block is the same step of the eight lanes, whichever stripe of a block the state is at.
void hash_zero_blocks(XXH3_state_t& state, std::uint64_t blocks) {
  const unsigned char* const secret = state.extSecret != nullptr ? state.extSecret : state.customSecret;
  const unsigned char* const scramble = secret + state.secretLimit;
  std::array<std::uint64_t, lanes> before{}, after{}, keys{}, acc{};
  for (std::size_t i = 0; i < lanes; ++i) {
    before[i] = sum_of(secret, i, state.nbStripesSoFar, state.nbStripesPerBlock);
    after[i] = sum_of(secret, i, 0, state.nbStripesSoFar);
    keys[i] = word_at(scramble + 8 * i);
    acc[i] = state.acc[i];
  }
  for (std::uint64_t block = 0; block < blocks; ++block)
    for (std::size_t i = 0; i < lanes; ++i) {
      const std::uint64_t sum = acc[i] + before[i];
      acc[i] = (sum ^ sum >> 47 ^ keys[i]) * XXH_PRIME32_1 + after[i];
    }
  std::copy(acc.begin(), acc.end(), state.acc);
  state.totalLen += blocks * state.nbStripesPerBlock * stripe_bytes;
}

}  // namespace

struct SparseDigest::State {
  XXH3_state_t xxh;
};

SparseDigest::SparseDigest() : state_(std::make_unique<State>()) {
  XXH3_INITSTATE(&state_->xxh);
  XXH3_64bits_reset(&state_->xxh);
}

SparseDigest::~SparseDigest() = default;

void SparseDigest::add(std::uint64_t offset, std::span<const std::byte> bytes) {
  skip_to(offset);
  XXH3_64bits_update(&state_->xxh, bytes.data(), bytes.size());
  done_ += bytes.size();
}

void SparseDigest::skip_to(std::uint64_t offset) {
  if (offset <= done_) return;
  std::uint64_t left = offset - done_;
  const std::size_t block_bytes = state_->xxh.nbStripesPerBlock * stripe_bytes;
  // As many as the state has a memory of, on both sides of whole blocks.
  const std::uint64_t fill = 2 * block_bytes;
  if (left > 2 * fill) {
    add_zeros(fill);
    const std::uint64_t blocks = (left - 2 * fill) / block_bytes;
    hash_zero_blocks(state_->xxh, blocks);
    left -= fill + blocks * block_bytes;
  }
  add_zeros(left);
  done_ = offset;
}

void SparseDigest::add_zeros(std::uint64_t bytes) {
  static constexpr std::array<std::byte, 4096> zeros{};
  for (std::size_t step = 0; bytes > 0; bytes -= step) {
    step = std::min<std::uint64_t>(zeros.size(), bytes);
    XXH3_64bits_update(&state_->xxh, zeros.data(), step);
  }
}

std::string SparseDigest::text() const { return fmt::format("{:016x}", XXH3_64bits_digest(&state_->xxh)); }

}  // namespace program
