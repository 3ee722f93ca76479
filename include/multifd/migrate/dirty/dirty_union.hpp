// SPDX-License-Identifier: MIT
//
// Several dirty sources as one: what vCPUs write (KVM), what devices write (vhost logs, VFIO, the VMM's own code).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tuple>

#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// A page is dirty when one of the sources says so. A model of DirtySource.
///
///   DirtyUnion dirty(kvm_log, device_pages);
///
/// All sources are of one map. They are referred to, not owned, because others call them, too (KvmDirtyRing::harvest(),
/// DirtyPages::mark()). A source that fails to start leaves all off; one that fails to fetch() leaves what the sources
/// before it reported in the bitmap, where it counts.
///
/// Threads: as DirtySource. Cost: the sum.
/// Lifetime: the sources outlive the union, whose destructor leaves them as they are.
template <DirtySource... Sources>
  requires(sizeof...(Sources) > 0)
class DirtyUnion {
 public:
  static constexpr DirtyFetch fetches =
      ((Sources::fetches == DirtyFetch::complete) && ...) ? DirtyFetch::complete : DirtyFetch::complete_when_stopped;

  explicit DirtyUnion(Sources&... sources) noexcept : sources_(&sources...) {}

  [[nodiscard]] Result<void> start() noexcept {
    auto started = each([](auto& source) { return source.start(); });
    if (!started) static_cast<void>(stop());
    return started;
  }
  [[nodiscard]] Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    return each([&](auto& source) { return source.fetch(block, bitmap); });
  }
  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    return each([&](auto& source) { return source.rearm(block, first_page, bitmap); });
  }
  bool needs_rearm() const noexcept {
    return std::apply([](auto*... source) { return (source->needs_rearm() || ...); }, sources_);
  }
  [[nodiscard]] Result<void> stop() noexcept {
    Result<void> first;
    const auto end = [&first](auto& source) {
      if (auto stopped = source.stop(); !stopped && first) first = std::move(stopped);
    };
    std::apply([&](auto*... source) { (end(*source), ...); }, sources_);
    return first;
  }
  /// The largest.
  std::size_t page_bytes() const noexcept {
    return std::apply([](auto*... source) { return std::max({source->page_bytes()...}); }, sources_);
  }

 private:
  /// Up to the first error.
  template <class Call>
  [[nodiscard]] Result<void> each(Call&& call) noexcept {
    Result<void> done;
    std::apply([&](auto*... source) { static_cast<void>((static_cast<bool>(done = call(*source)) && ...)); }, sources_);
    return done;
  }

  std::tuple<Sources*...> sources_;
};

}  // namespace multifd::migrate
