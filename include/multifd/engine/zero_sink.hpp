// SPDX-License-Identifier: MIT
//
// Who takes the zero pages that the producer finds.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "multifd/zero/policy.hpp"

namespace multifd::engine {

/// Stands for on_zero() where the policy reports no zero pages.
struct NoZeroSink {
  bool operator()(std::uint64_t) const noexcept { return true; }
};

/// A callable on_zero(offset). A policy that reports zero pages (ZeroPagesLegacy) needs one that takes them.
template <class OnZero, class Z>
concept ZeroSink = std::invocable<OnZero&, std::uint64_t> &&
                   (Z::stage != ZeroStage::producer || !std::same_as<std::remove_cvref_t<OnZero>, NoZeroSink>);

}  // namespace multifd::engine
