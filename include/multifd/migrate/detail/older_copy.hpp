// SPDX-License-Identifier: MIT
//
// A destination's part of format/extension.md section 19.12: it says what the older copy in its memory holds, when the source
// asks for it, ahead of the first page.
#pragma once

#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "multifd/format/extension.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/base_report.hpp"
#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/detail/base_comparison.hpp"
#include "multifd/migrate/detail/digest_crew.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/qemu/base_writer.hpp"
#include "multifd/result.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::migrate::detail {

/// Threads: the migration's. For one migration.
class OlderCopy {
 public:
  /// Adds the feature, where there is an older copy. Errors: Errc::bad_option: memory that is said to be zero besides.
  [[nodiscard]] static Result<void> offer(const DestinationOptions& options, wire::FeatureList& features) noexcept {
    if (!options.base) return {};
    if (options.into.destination == DestinationMemory::zeroed)
      return fail(Errc::bad_option, Stage::setup,
                  "DestinationOptions::base: an older copy in memory that is zeroed (DestinationOptions::into)");
    features.add({.name = wire::feature_base});
    return {};
  }

  /// The source has begun to send pages: from here on it cannot ask.
  void pages_come() noexcept { over_ = true; }

  /// Answers BASE_WANTED. Params `blocks`: of the map, in START's order. `writer`: a ReturnPathWriter.
  /// Errors: Errc::unexpected_extension_message: without the feature at the source, or too late; cancelled; those of the
  ///   digests, threads and the writer.
  template <class Writer>
  [[nodiscard]] Result<void> say(const DestinationOptions& options, const wire::FeatureList& sources, const RamMap& ram,
                                 std::span<const BlockId> blocks, MigrationReporter& reporter, Writer& writer) {
    if (over_ || !options.base || !sources.has(wire::feature_base))
      return fail(Errc::unexpected_extension_message, Stage::parse,
                  over_ ? "older copy: asked for behind pages" : "older copy, without the feature",
                  static_cast<std::uint64_t>(wire::ExtensionKind::base_wanted), 0, "BASE_WANTED");
    over_ = true;
    const Time began = reporter.now();
    DigestKey key;
    if (::getrandom(key.data(), key.size(), 0) != static_cast<ssize_t>(key.size()))
      return fail_errno(Stage::setup, "getrandom");
    MULTIFD_TRY_ASSIGN(const auto digest, options.base(key));
    MULTIFD_TRY_ASSIGN(const Digest128 of_zeros, digest_of_zero_page(*digest, ram.page_bytes()));
    const DirtyBitmaps zeros = untouched_in(ram);  // outlives the threads
    MULTIFD_TRY_ASSIGN(const auto crew, DigestCrew<Piece>::create(options.base, key));
    qemu::BaseWriter to(writer, ram.page_bytes(), of_zeros);
    MULTIFD_TRY(to.key(key));
    for (std::uint32_t b = 0; b < blocks.size(); ++b) {
      const std::uint64_t all = ram.pages(blocks[b]);
      for (std::uint64_t page = 0; page < all; page += pages_in_piece(ram.page_bytes())) {
        if (reporter.interrupt().triggered()) return fail(Errc::cancelled, Stage::write, "older copy");
        MULTIFD_TRY_ASSIGN(Piece* const piece, crew->next());
        MULTIFD_TRY(say(*piece, to));
        piece->block = b;
        piece->first = page;
        piece->pages = std::min(all - page, pages_in_piece(ram.page_bytes()));
        piece->page_bytes = ram.page_bytes();
        piece->memory = ram.block(blocks[b]).host.subspan(page * ram.page_bytes(), piece->pages * ram.page_bytes());
        piece->zeros = zeros[blocks[b]].subspan(page / 64);
        piece->of_zeros = of_zeros;
        piece->digests.resize(piece->pages);
        crew->give();
      }
    }
    for (std::size_t i = 0; i < DigestCrew<Piece>::pieces; ++i) {
      MULTIFD_TRY_ASSIGN(Piece* const piece, crew->next(i));
      MULTIFD_TRY(say(*piece, to));
    }
    MULTIFD_TRY(to.finish());
    report_ = {.pages = said(), .digest_bytes = to.bytes(), .time = reporter.now() - began};
    return {};
  }

  /// Pages that were said so far. Threads: any.
  std::uint64_t said() const noexcept { return said_.load(std::memory_order_relaxed); }
  /// Once the source has asked.
  const std::optional<BaseReport>& report() const noexcept { return report_; }

 private:
  struct Piece {
    std::uint32_t block = 0;
    std::uint64_t first = 0;
    std::uint64_t pages = 0;
    std::size_t page_bytes = 0;
    std::span<const std::byte> memory;
    std::span<const std::uint64_t> zeros;  ///< from the first page on: that are not read
    Digest128 of_zeros;
    std::vector<Digest128> digests;

    [[nodiscard]] Result<void> run(KeyedDigest& digest) noexcept {
      for (std::uint64_t i = 0; i < pages; ++i) {
        const auto bytes = memory.subspan(i * page_bytes, page_bytes);
        digests[i] = of_zeros;
        if (has_page(zeros, i) || buffer_is_zero(bytes.data(), bytes.size())) continue;
        MULTIFD_TRY_ASSIGN(digests[i], digest.of(bytes));
      }
      return {};
    }
  };

  /// Says a piece that is done, once.
  template <class T>
  [[nodiscard]] Result<void> say(Piece& piece, qemu::BaseWriter<T>& to) {
    for (std::uint64_t i = 0; i < piece.pages; ++i) {
      MULTIFD_TRY(to.add(piece.block, piece.first + i, piece.digests[i]));
    }
    said_.fetch_add(piece.pages, std::memory_order_relaxed);
    piece.pages = 0;
    return {};
  }

  bool over_ = false;
  std::atomic<std::uint64_t> said_ = 0;
  std::optional<BaseReport> report_;
};

}  // namespace multifd::migrate::detail
