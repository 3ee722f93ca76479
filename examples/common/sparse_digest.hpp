// SPDX-License-Identifier: MIT
//
// XXH3-64 of bytes of which most are zeros that nobody reads, at a tenth of what hashing zeros costs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace program {

/// XXH3-64 of memory of which some runs are read and the rest is known to be zero. Threads: one.
class SparseDigest {
 public:
  SparseDigest();
  ~SparseDigest();
  SparseDigest(const SparseDigest&) = delete;
  SparseDigest& operator=(const SparseDigest&) = delete;

  /// Bytes at `offset`, not ahead of done(). What lies between is zero.
  void add(std::uint64_t offset, std::span<const std::byte> bytes);
  /// Zeros up to `offset`. Cost: 4 ns a KiB.
  void skip_to(std::uint64_t offset);
  std::uint64_t done() const { return done_; }
  /// 16 hexadecimal digits.
  std::string text() const;

 private:
  struct State;
  void add_zeros(std::uint64_t bytes);

  std::unique_ptr<State> state_;
  std::uint64_t done_ = 0;
};

}  // namespace program
