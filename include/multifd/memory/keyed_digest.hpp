// SPDX-License-Identifier: MIT
//
// A digest of a page under a secret key: who does not know the key cannot make two pages of one digest. For the older copy
// that a destination holds (format/extension.md section 19.12). The model is migrate/gmac.hpp, by OpenSSL.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>

#include "multifd/memory/page_digest.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// The key: random, another one in each migration.
using DigestKey = std::array<std::byte, 16>;

/// Computes digests under one key. Models: Gmac (migrate/gmac.hpp).
///
/// Lifetime: the destructor waits for nothing. Threads: one at a time; each thread has its own.
class KeyedDigest {
 public:
  virtual ~KeyedDigest() = default;
  /// The digest of one page, which may be written to meanwhile. Errors: the model's; Gmac's Errc::not_supported.
  [[nodiscard]] Result<Digest128> of(std::span<const std::byte> page) noexcept { return do_digest(page); }

 protected:
  KeyedDigest() = default;
  KeyedDigest(const KeyedDigest&) = default;
  KeyedDigest& operator=(const KeyedDigest&) = default;

 private:
  [[nodiscard]] virtual Result<Digest128> do_digest(std::span<const std::byte> page) noexcept = 0;
};

/// Makes a KeyedDigest with a key, for one thread; called by the thread that called migrate_to() or migrate_from(). Both ends
/// of a migration need the same digest. Empty: none.
using KeyedDigests = std::function<Result<std::unique_ptr<KeyedDigest>>(const DigestKey&)>;

}  // namespace multifd
