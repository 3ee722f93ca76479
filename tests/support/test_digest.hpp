// SPDX-License-Identifier: MIT
//
// A keyed digest for tests that need no OpenSSL, and that see each page which is hashed.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "multifd/memory/keyed_digest.hpp"

namespace test {

/// What becomes of all digests of one side.
struct DigestLog {
  std::mutex mutex;
  std::vector<multifd::DigestKey> keys;  ///< with which digests were made
  std::vector<multifd::Digest128> digests;
  /// Called with each page behind its digest, by any thread; empty: nothing.
  std::function<void(std::span<const std::byte>)> behind{};
  bool fails = false;  ///< each digest is an error
};

/// XXH3-128 of the page, mixed with the key: as good as a keyed digest against tests.
class TestDigest final : public multifd::KeyedDigest {
 public:
  TestDigest(const multifd::DigestKey& key, DigestLog* log) : log_(log) {
    std::memcpy(key_, key.data(), sizeof key_);
    if (log == nullptr) return;
    const std::scoped_lock held(log->mutex);
    log->keys.push_back(key);
  }

 private:
  [[nodiscard]] multifd::Result<multifd::Digest128> do_digest(std::span<const std::byte> page) noexcept override {
    auto digest = multifd::digest128_of(page);
    digest.low = (digest.low ^ key_[0]) * 0x9e3779b97f4a7c15;
    digest.high = (digest.high ^ key_[1]) * 0x9e3779b97f4a7c15;
    if (log_ == nullptr) return digest;
    if (log_->behind) log_->behind(page);
    const std::scoped_lock held(log_->mutex);
    if (log_->fails) return multifd::fail(multifd::Errc::bad_option, multifd::Stage::parse, "the test's digest");
    log_->digests.push_back(digest);
    return digest;
  }
  std::uint64_t key_[2];
  DigestLog* log_;
};

inline multifd::KeyedDigests test_digests(DigestLog* log = nullptr) {
  return [log](const multifd::DigestKey& key) -> multifd::Result<std::unique_ptr<multifd::KeyedDigest>> {
    return std::make_unique<TestDigest>(key, log);
  };
}

}  // namespace test
