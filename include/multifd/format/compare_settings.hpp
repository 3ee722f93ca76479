// SPDX-License-Identifier: MIT
//
// Whether the other side's settings and features fit this side's (format/extension.md section 19.4). A difference is an
// error that names the setting and both values, for this side's user and, by FAILED, for the other's.
#pragma once

#include <charconv>
#include <cstdint>
#include <optional>
#include <string_view>

#include "multifd/format/constants.hpp"
#include "multifd/format/peer_settings.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

/// The value of a mode as users type it. Wire: format/packets.md section 5.1.
constexpr std::string_view zero_pages_name(ZeroPagesMode mode) noexcept {
  constexpr std::string_view names[] = {"none", "legacy", "multifd"};
  return names[static_cast<std::size_t>(mode)];
}

namespace detail {

inline void append_value(Subject& to, bool value) noexcept { to.append(value ? "on" : "off"); }
inline void append_value(Subject& to, Digest value) noexcept { append_value(to, value == Digest::on); }
inline void append_value(Subject& to, ZeroPagesMode value) noexcept { to.append(zero_pages_name(value)); }
inline void append_value(Subject& to, std::uint32_t value) noexcept {
  char digits[10];
  const auto written = std::to_chars(digits, digits + sizeof digits, value);
  to.append({digits, static_cast<std::size_t>(written.ptr - digits)});
}
inline void append_value(Subject& to, const Uuid& uuid) noexcept {
  constexpr char digits[] = "0123456789abcdef";
  for (std::size_t i = 0; i < 4; ++i) {  // enough to tell two apart in a line
    const auto byte = std::to_integer<unsigned>(uuid[i]);
    const char text[] = {digits[byte >> 4], digits[byte & 15]};
    to.append({text, 2});
  }
  to.append("...");
}

/// Compression bits, which are shown by their name.
struct Method {
  std::uint32_t bits;
  bool operator==(const Method&) const = default;
};
inline void append_value(Subject& to, Method method) noexcept { to.append(method_name(method.bits)); }
inline std::optional<Method> method_of(const std::optional<std::uint32_t>& bits) noexcept {
  return bits ? std::optional(Method{*bits}) : std::nullopt;
}

/// Compares one setting. Nothing is wrong where this side takes what comes.
template <class T>
[[nodiscard]] Result<void> compare_setting(const char* what, const std::optional<T>& sources,
                                           const std::optional<T>& own, Errc code = Errc::setting_mismatch) noexcept {
  if (!own || sources == own) return {};
  Subject both("source: ");
  sources ? append_value(both, *sources) : void(both.append("not said"));
  both.append(", destination: ");
  append_value(both, *own);
  return fail(code, Stage::hello, what, 0, 0, both);
}

}  // namespace detail

/// Compares what a source announces with this destination's settings; the features are check_features()'.
///
/// Params `own`: what this side insists on; an empty field takes whatever the source announces. `user` is not compared:
///   the VMM does that.
/// Errors (stage hello; op: the setting; subject: both values): Errc::channel_count_mismatch, page_size_mismatch,
///   wrong_compression, uuid_mismatch, setting_mismatch (zero pages, digest, TLS, paths).
/// Threads: any.
[[nodiscard]] inline Result<void> compare_settings(const PeerSettings& sources, const PeerSettings& own) noexcept {
  using detail::compare_setting;
  MULTIFD_TRY(compare_setting("setting: channels", sources.channels, own.channels, Errc::channel_count_mismatch));
  MULTIFD_TRY(compare_setting("setting: page size", sources.page_bytes, own.page_bytes, Errc::page_size_mismatch));
  MULTIFD_TRY(compare_setting("setting: compression", detail::method_of(sources.compression),
                              detail::method_of(own.compression), Errc::wrong_compression));
  MULTIFD_TRY(compare_setting("setting: zero pages", sources.zero_pages, own.zero_pages));
  MULTIFD_TRY(compare_setting("setting: digest", sources.digest, own.digest));
  MULTIFD_TRY(compare_setting("setting: TLS", sources.tls, own.tls));
  MULTIFD_TRY(compare_setting("setting: paths", sources.paths, own.paths));
  return compare_setting("setting: uuid", sources.uuid, own.uuid, Errc::uuid_mismatch);
}

/// Compares the features of two sides: each that one of them needs must be the other's, too. Used by both sides, each
/// with its own list second.
///
/// Errors (stage hello; subject: the feature's name): Errc::unknown_feature (the peer needs it), missing_feature (this
///   side needs it).
/// Threads: any.
[[nodiscard]] inline Result<void> check_features(const FeatureList& peers, const FeatureList& own) noexcept {
  for (const Feature& feature : peers.all())
    if (feature.needed && !own.has(feature.name))
      return fail(Errc::unknown_feature, Stage::hello, "features", 0, 0, feature.name);
  for (const Feature& feature : own.all())
    if (feature.needed && !peers.has(feature.name))
      return fail(Errc::missing_feature, Stage::hello, "features", 0, 0, feature.name);
  return {};
}

/// The features that both sides have, and so are used. Returns entries of `own`. Threads: any.
inline FeatureList common_features(const FeatureList& peers, const FeatureList& own) noexcept {
  FeatureList common;
  for (const Feature& feature : own.all())
    if (peers.has(feature.name)) common.add(feature);
  return common;
}

}  // namespace multifd::wire
