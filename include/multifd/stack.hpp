// SPDX-License-Identifier: MIT
//
// From run-time names to compile-time stacks: a program lists the policies that it offers. One call picks policies by
// name, and instantiates the caller's code once for each combination.
//
//   using Compressors = PolicyList<NoComp, Zlib, Zstd>;
//   using ZeroPages   = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;
//
//   auto done = with_policies("zstd", Compressors{}, "multifd", ZeroPages{}, [&]<class C, class Z>() -> Result<void> {
//     auto tx = Sender<FdTransport, C, Z>::open(ram, std::move(links));
//     ...
//   });
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <utility>

#include "multifd/result.hpp"

namespace multifd {

/// The policies of one axis that a program offers, by their `name`.
template <class... Policies>
struct PolicyList {
  /// The names, in order: for --help and for messages.
  static constexpr std::array<std::string_view, sizeof...(Policies)> names{Policies::name...};
};

/// Calls `body.template operator()<P>()` for the policy P called `name`. All calls must return the same Result type.
///
/// Errors: Errc::unknown_policy when no policy has that name; whatever `body` returns.
template <class First, class... Rest, class Body>
[[nodiscard]] auto with_policy(std::string_view name, PolicyList<First, Rest...>, Body&& body)
    -> decltype(body.template operator()<First>()) {
  if (name == First::name) return body.template operator()<First>();
  if constexpr (sizeof...(Rest) > 0) {
    return with_policy(name, PolicyList<Rest...>{}, std::forward<Body>(body));
  } else {
    return fail(Errc::unknown_policy, Stage::setup, "pick a policy by name", 0, 0, name);
  }
}

/// with_policy() on two axes: calls `body.template operator()<C, Z>()`. Errors: as with_policy(), by the first name
/// that is not offered.
template <class... Cs, class... Zs, class Body>
[[nodiscard]] auto with_policies(std::string_view compressor, PolicyList<Cs...> compressors,
                                 std::string_view zero_pages, PolicyList<Zs...> zero_policies, Body&& body) {
  return with_policy(compressor, compressors, [&]<class C>() {
    return with_policy(zero_pages, zero_policies, [&]<class Z>() { return body.template operator()<C, Z>(); });
  });
}

/// The name of the compressor whose packets have these bits. Errors: Errc::wrong_compression (detail: the peer's bits).
template <class... Cs>
[[nodiscard]] Result<std::string_view> compressor_of(std::uint32_t method, PolicyList<Cs...>) {
  std::string_view name;
  static_cast<void>(((Cs::method == method && (name = Cs::name, true)) || ...));
  if (name.empty()) return fail(Errc::wrong_compression, Stage::hello, "setting: compression", method);
  return name;
}

}  // namespace multifd
