// SPDX-License-Identifier: MIT
//
// Gathers what a destination says of its older copy (format/extension.md section 19.12): many messages for one write.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/format/base_digests.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

/// Makes BASE_DIGESTS and BASE_ZEROS of digests that come page by page. A zero page is known by its digest: a few of them
/// adjacent are a BASE_ZEROS.
///
/// Errors (of each call): those of ReturnPathWriter.
/// Threads: one. Cost: 33 KiB; 17 bytes a page that is not zero.
template <Transport T>
class BaseWriter {
 public:
  /// Params `to`: outlives this object. `of_zeros`: the digest of a zero page.
  BaseWriter(ReturnPathWriter<T>& to, std::size_t page_bytes, const Digest128& of_zeros)
      : to_(to), page_bytes_(page_bytes), of_zeros_(of_zeros) {
    gathered_.reserve(most_gathered + wire::max_extension_answer_bytes + return_header_bytes);
  }

  [[nodiscard]] Result<void> key(const DigestKey& key) { return put(wire::encode_base_key(key).view()); }

  /// The digest of the next page. Params `block`: its place in START's list, from 0 on; `page`: from 0 on in each block.
  [[nodiscard]] Result<void> add(std::uint32_t block, std::uint64_t page, const Digest128& digest) {
    if (block != block_) {
      MULTIFD_TRY(end_run());
      block_ = block;
    }
    if (digest == of_zeros_) {
      ++zeros_;
      next_ = page + 1;
      return {};
    }
    if (zeros_ >= least_zeros) {
      MULTIFD_TRY(end_run());
    }
    // Too few zero pages for a message of their own.
    for (; zeros_ > 0; --zeros_) {
      MULTIFD_TRY(add_digest(page - zeros_, of_zeros_));
    }
    return add_digest(page, digest);
  }

  /// Writes what is gathered, behind the last page.
  [[nodiscard]] Result<void> finish() {
    MULTIFD_TRY(end_run());
    return push_out();
  }

  /// Bytes of all messages so far.
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  static constexpr std::uint64_t least_zeros = 3;
  static constexpr std::size_t most_gathered = 32 * 1024;

  [[nodiscard]] Result<void> add_digest(std::uint64_t page, const Digest128& digest) {
    if (count_ == 0) first_ = page;
    digests_[count_++] = digest;
    next_ = page + 1;
    return count_ == digests_.size() ? end_digests() : Result<void>{};
  }
  [[nodiscard]] Result<void> end_digests() {
    if (count_ == 0) return {};
    const auto digests = std::span<const Digest128>(digests_).first(count_);
    count_ = 0;
    return put(wire::encode_base_digests(block_, first_ * page_bytes_, digests).view());
  }
  /// Ends what is under way: digests, and zero pages behind them.
  [[nodiscard]] Result<void> end_run() {
    MULTIFD_TRY(end_digests());
    if (zeros_ == 0) return {};
    const std::uint64_t pages = zeros_;
    zeros_ = 0;
    return put(wire::encode_base_zeros(block_, (next_ - pages) * page_bytes_, pages).view());
  }

  [[nodiscard]] Result<void> put(std::span<const std::byte> data) {
    wire::FieldWriter<return_header_bytes> header;
    header.be(wire::extension_number).be(static_cast<std::uint16_t>(data.size()));
    const auto head = header.view();
    gathered_.insert(gathered_.end(), head.begin(), head.end());
    gathered_.insert(gathered_.end(), data.begin(), data.end());
    return gathered_.size() < most_gathered ? Result<void>{} : push_out();
  }
  [[nodiscard]] Result<void> push_out() {
    bytes_ += gathered_.size();
    const auto written = to_.base(gathered_);
    gathered_.clear();
    return written;
  }

  ReturnPathWriter<T>& to_;
  const std::size_t page_bytes_;
  const Digest128 of_zeros_;
  std::uint32_t block_ = 0;
  std::uint64_t next_ = 0;                                   ///< behind the last page that was added
  std::uint64_t zeros_ = 0;                                  ///< adjacent zero pages ahead of it
  std::array<Digest128, wire::max_base_digests> digests_{};  ///< ahead of the zero pages
  std::size_t count_ = 0;
  std::uint64_t first_ = 0;  ///< the page of the first one
  std::vector<std::byte> gathered_;
  std::uint64_t bytes_ = 0;
};

}  // namespace multifd::qemu
