// SPDX-License-Identifier: MIT
//
// XXH3 digests of page data: for the packet digest extension, for comparing the two guests after a migration, and for
// images. Beside them the checksum of zstd's formats.
// The only header that includes <xxhash.h>. Not cryptographic: it finds accidents, not attackers.
#pragma once

#include <xxhash.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// XXH3-64 of one range of bytes.
inline std::uint64_t digest_of(std::span<const std::byte> bytes) noexcept {
  return XXH3_64bits(bytes.data(), bytes.size());
}

/// The same of zeros, 64 KiB at most: of pages that are not read because they are known to be zero.
inline std::uint64_t digest_of_zeros(std::size_t bytes) noexcept {
  static constexpr std::array<std::byte, std::size_t{64} << 10> zeros{};
  return digest_of(std::span(zeros).first(bytes));
}

/// An XXH3-128.
struct Digest128 {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  friend bool operator==(const Digest128&, const Digest128&) = default;
};

/// XXH3-128 of one range of bytes: where two pages are taken for equal because their digests are.
inline Digest128 digest128_of(std::span<const std::byte> bytes) noexcept {
  const XXH128_hash_t digest = XXH3_128bits(bytes.data(), bytes.size());
  return {.low = digest.low64, .high = digest.high64};
}

/// What zstd's frames and its seekable format have as checksum of a content: the low 32 bits of XXH64.
inline std::uint32_t zstd_checksum_of(std::span<const std::byte> bytes) noexcept {
  return static_cast<std::uint32_t>(XXH64(bytes.data(), bytes.size(), 0));
}

/// XXH3-64 over several ranges as if they were one. Threads: one at a time; a channel has its own.
class PageDigest {
 public:
  /// Errors: ENOMEM. Cost: one allocation; the other methods make none.
  [[nodiscard]] static Result<PageDigest> create() noexcept {
    PageDigest digest;
    digest.state_.reset(XXH3_createState());
    if (!digest.state_) return fail_errno(Stage::setup, "allocate digest state", ENOMEM);
    return digest;
  }

  /// The digest of all buffers, in order.
  std::uint64_t of(ConstBuffers buffers) noexcept {
    begin();
    for (const iovec& buffer : buffers) XXH3_64bits_update(state_.get(), buffer.iov_base, buffer.iov_len);
    return value();
  }

  /// The same piece by piece: begin(), add() any number of times, value().
  void begin() noexcept { XXH3_64bits_reset(state_.get()); }
  void add(std::span<const std::byte> bytes) noexcept { XXH3_64bits_update(state_.get(), bytes.data(), bytes.size()); }
  std::uint64_t value() const noexcept { return XXH3_64bits_digest(state_.get()); }

  /// The same as an XXH3-128: begin128(), add128() any number of times, value128().
  void begin128() noexcept { XXH3_128bits_reset(state_.get()); }
  void add128(std::span<const std::byte> bytes) noexcept {
    XXH3_128bits_update(state_.get(), bytes.data(), bytes.size());
  }
  Digest128 value128() const noexcept {
    const XXH128_hash_t digest = XXH3_128bits_digest(state_.get());
    return {.low = digest.low64, .high = digest.high64};
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const noexcept { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

}  // namespace multifd
