// SPDX-License-Identifier: MIT
//
// Which pages of which RAM block were written: what a migration asks of KVM, of the kernel, of a device. The models are
// in migrate/dirty/, and none of them knows a VMM. The order of use:
//
//   start()                                 from here on every write is reported
//   each chunk of all memory:               rearm() it, then queue its pages             the first round
//   fetch() every block; each chunk of it:  rearm() what was fetched, then queue that    every later round
//   the guest stands still; the same once more                                           the last round
//   stop()                                  no page costs anything any more
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "multifd/memory/ram_block.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// Which writes a fetch has.
enum class DirtyFetch : std::uint8_t {
  complete,  ///< all that were made before it
  /// All that were made before it by vCPUs that have left the guest since; what a vCPU wrote that is still in the guest
  /// may come with a later fetch. Right for rounds, where late is not lost. The last fetch comes after the vCPUs have
  /// left KVM_RUN, and is complete.
  complete_when_stopped,
};

template <class S>
concept HasFetches = requires { typename std::integral_constant<DirtyFetch, S::fetches>; };

template <class S>
concept HasStart = requires(S& source) {
  { source.start() } noexcept -> std::same_as<Result<void>>;
};

template <class S>
concept HasFetch = requires(S& source, BlockId block, std::span<std::uint64_t> bitmap) {
  { source.fetch(block, bitmap) } noexcept -> std::same_as<Result<void>>;
};

template <class S>
concept HasRearm = requires(S& source, BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> bitmap) {
  { source.rearm(block, first_page, bitmap) } noexcept -> std::same_as<Result<void>>;
};

template <class S>
concept HasNeedsRearm = requires(const S& source) {
  { source.needs_rearm() } noexcept -> std::same_as<bool>;
};

template <class S>
concept HasStop = requires(S& source) {
  { source.stop() } noexcept -> std::same_as<Result<void>>;
};

template <class S>
concept HasLogPageBytes = requires(const S& source) {
  { source.page_bytes() } noexcept -> std::same_as<std::size_t>;
};

/// Reports which pages of a RamMap's blocks were written.
///
/// Semantics: bitmaps are those of queue_dirty(): bit i % 64 of word i / 64 is page i, in pages of the map. What a source
///   itself watches may be larger or smaller pages; it converts.
///   `start()` switches reporting on. Every write that begins after it has returned is reported by a later fetch();
///     earlier writes may be. A source that is on starts again.
///   `fetch(block, bitmap)` ORs the block's pages that were written since they were last reported into the caller's bitmap
///     (bitmap_words(pages) words; more are left alone, and so are bits past the block's end), and watches them again, or
///     leaves that to rearm(). A write is reported by this fetch or by a later one, never by none, also when it races with
///     the call. After an error the bits that are set are valid, and a page that was taken has its bit.
///   `rearm(block, first_page, bitmap)` comes right before the pages are read: bit 0 is page `first_page`, a multiple of
///     64. It clears the log of the pages whose bit is set, of no other, and watches them again before it returns. So:
///     clear, then read; a write in between is sent, and one after it is reported. Clearing a page that is not read
///     afterwards loses what was written to it, and so would clearing a whole chunk for the sake of one page in it.
///   `needs_rearm()`: whether rearm() does anything. If so, every page counts as dirty after start(), fetch() reports a
///     page again until it is re-armed, and a page that was dirtied twice before its turn is sent once. If not, the source
///     watches a page again in fetch(), and rearm() may be left out.
///   `stop()` ends reporting: writes cost what they cost before start(). Does nothing when the source is off.
///   `page_bytes()`: the unit in which writes are watched, a power of two. A write may report all of it, and chunks for
///     rearm() of 64 such pages or more cost least. KVM's is the host's page (4 KiB on x86), whatever the map's is.
///   `fetches`: see DirtyFetch.
///   A page that nobody writes is not reported for ever: once reported and re-armed it is silent. One that was not resident
///   may be reported once when it becomes so, and when a neighbour does.
/// Errors: an errno with the call that failed, block and slot; Errc::bad_range for a block that the map does not have, a
///   bitmap that is too short or goes past the block, a first_page that is no multiple of 64; Errc::already_closed for
///   fetch() and rearm() of a source that is off. After a failed start() the source is off. stop() tries everything and
///   returns the first error.
/// Threads: one at a time, the migration's. The guest and its devices write all the time.
/// Cost: fetch() and rearm() allocate nothing. One call each a block and a chunk; the models say what a call costs.
/// Lifetime: the destructor stops. The memory of the map has to stay where it is.
/// Models: KvmDirtyLog, KvmDirtyRing, VhostDirtyLog, UserfaultfdDirtyLog, DirtyPages, DirtyFromHooks, DirtyUnion.
///   Exemplar: tests/exemplar/dirty_source.hpp. Contract: multifd/testing/dirty_source_contract.hpp.
///
/// With UntouchedPages: a page that is untouched in the snapshot and written before it is re-armed would be sent as zero,
/// and reported by nobody. So the snapshot comes after start(), and where needs_rearm() is true after a rearm() of all
/// pages; forget() comes before the first fetch().
template <class S>
concept DirtySource =
    HasFetches<S> && HasStart<S> && HasFetch<S> && HasRearm<S> && HasNeedsRearm<S> && HasStop<S> && HasLogPageBytes<S>;

/// Fails to compile with a message that says which member to write.
template <class S>
consteval bool check_dirty_source() {
  static_assert(HasFetches<S>, "DirtySource: needs  static constexpr DirtyFetch fetches");
  static_assert(HasStart<S>, "DirtySource: needs  Result<void> start() noexcept");
  static_assert(HasFetch<S>, "DirtySource: needs  Result<void> fetch(BlockId, std::span<std::uint64_t>) noexcept");
  static_assert(HasRearm<S>,
                "DirtySource: needs  Result<void> rearm(BlockId, std::uint64_t first_page, "
                "std::span<const std::uint64_t>) noexcept");
  static_assert(HasNeedsRearm<S>, "DirtySource: needs  bool needs_rearm() const noexcept");
  static_assert(HasStop<S>, "DirtySource: needs  Result<void> stop() noexcept");
  static_assert(HasLogPageBytes<S>, "DirtySource: needs  std::size_t page_bytes() const noexcept");
  return DirtySource<S>;
}

}  // namespace multifd::migrate
