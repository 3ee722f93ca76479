// SPDX-License-Identifier: MIT
//
// SETTINGS and ACCEPTED (format/extension.md section 19.4): what a source is set to, and that the destination takes it.
// Both have the same fields; the first six bytes, and the features, are the same in every version.
//
//   off  size  field      refused
//     2     1  version    other than the common one (common_version())
//     3     1  newest     0, below `version`
//     4     1  oldest     0, above `version`
//     5     1  n          over 16
//   then n times:
//           1  flags      nothing; bit 0: the peer must have the feature
//           1  length     0, over 24
//           -  name       other bytes than a-z, 0-9 and '-'; one that is there already
//   then up to the end:
//           2  number     one that is there already; an unknown one with bit 15 set
//           2  length     other than the setting's
//           -  value      by the setting; of an unknown one: nothing
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/constants.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/limits.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t max_features = 16;
inline constexpr std::size_t max_feature_bytes = 24;
inline constexpr std::size_t max_user_setting_bytes = 1024;
inline constexpr std::size_t max_settings_bytes = 2048;

// Features of version 1.
inline constexpr std::string_view feature_resume = "resume";              ///< EPOCH_WHOLE, and lost connections return
inline constexpr std::string_view feature_page_digests = "page-digests";  ///< PAGE_DIGESTS
inline constexpr std::string_view feature_postcopy = "postcopy";          ///< MISSING_PAGES, MEMORY_FOLLOWS
inline constexpr std::string_view feature_known_zeros = "known-zeros";    ///< KNOWN_ZEROS
inline constexpr std::string_view feature_base = "base";                  ///< BASE_WANTED and what answers it

/// The versions of the extension that one side understands, and the one that it speaks.
struct ExtensionVersions {
  std::uint8_t spoken = extension_version;
  std::uint8_t newest = extension_version;
  std::uint8_t oldest = oldest_extension_version;
  friend bool operator==(const ExtensionVersions&, const ExtensionVersions&) = default;
};

/// The version that both sides speak: the lower one of their newest.
/// Params `peer`: the version in the peer's PING or PONG.
/// Errors: Errc::extension_version_mismatch (detail: the peer's newest, expected: this side's oldest).
[[nodiscard]] inline Result<std::uint8_t> common_version(std::uint8_t peer,
                                                         const ExtensionVersions& own = {}) noexcept {
  const std::uint8_t common = std::min(peer, own.newest);
  if (common < own.oldest) return fail(Errc::extension_version_mismatch, Stage::hello, "extension", peer, own.oldest);
  return common;
}

/// Something that a version may have or not, by its name.
struct Feature {
  std::string_view name;
  bool needed = false;  ///< the side that names it cannot do without
};

/// The features of one side. Threads: as a plain value.
class FeatureList {
 public:
  /// Contract: there is room, and the name is a feature's.
  FeatureList& add(const Feature& feature) noexcept {
    MULTIFD_ASSERT(size_ < max_features && !feature.name.empty() && feature.name.size() <= max_feature_bytes);
    features_[size_++] = feature;
    return *this;
  }
  void remove(std::string_view name) noexcept {
    const auto end = std::remove_if(features_.begin(), features_.begin() + static_cast<std::ptrdiff_t>(size_),
                                    [&](const Feature& each) { return each.name == name; });
    size_ = static_cast<std::size_t>(end - features_.begin());
  }
  std::span<const Feature> all() const noexcept { return std::span(features_).first(size_); }
  bool has(std::string_view name) const noexcept {
    return std::ranges::find(all(), name, &Feature::name) != all().end();
  }

 private:
  std::array<Feature, max_features> features_{};
  std::size_t size_ = 0;
};

/// How a source sends zero pages (format/packets.md section 5.1).
enum class ZeroPagesMode : std::uint8_t { none, legacy, multifd };

/// What one side is set to. A source announces all that it knows; at a destination an empty field takes whatever the
/// source announces. Names and `user` are the caller's, or part of the bytes that were parsed.
struct PeerSettings {
  ExtensionVersions versions{};
  FeatureList features{};
  std::optional<std::uint32_t> channels{};     ///< 1 to 255
  std::optional<std::uint32_t> page_bytes{};   ///< 1024 to 65536
  std::optional<std::uint32_t> compression{};  ///< flag bits of the packets (format/packets.md section 3.2)
  std::optional<ZeroPagesMode> zero_pages{};
  std::optional<Digest> digest{};
  std::optional<bool> tls{};             ///< of the channels and the main connection
  std::optional<std::uint32_t> paths{};  ///< 1 to 255
  std::optional<Uuid> uuid{};            ///< the VM's, as in the channels' hellos
  std::optional<Uuid> session{};         ///< of this migration alone: what connections say that come later (rejoin.hpp)
  std::span<const std::byte> user{};     ///< of the VMM's own, at most 1024 bytes; empty: none
};

namespace detail {

enum class SettingNumber : std::uint16_t {
  channels = 1,
  page_bytes,
  compression,
  zero_pages,
  digest,
  tls,
  paths,
  uuid,
  user,
  session
};
inline constexpr std::uint16_t last_setting = 10;
inline constexpr std::uint16_t must_understand = 0x8000;

using SettingsWriter = FieldWriter<max_settings_bytes>;

template <class T>
void put_setting(SettingsWriter& to, SettingNumber number, const std::optional<T>& value) noexcept {
  if (!value) return;
  to.be(static_cast<std::uint16_t>(number)).be(static_cast<std::uint16_t>(sizeof(T)));
  if constexpr (std::is_same_v<T, Uuid>)
    to.bytes(*value);
  else if constexpr (sizeof(T) == 1)
    to.be(static_cast<std::uint8_t>(*value));
  else
    to.be(*value);
}

[[nodiscard]] inline std::unexpected<Error> bad_setting(const char* what, std::uint64_t value) noexcept {
  return fail(Errc::bad_extension_message, Stage::parse, what, value, 0, "SETTINGS");
}

[[nodiscard]] inline Result<void> parse_features(FieldReader& in, std::size_t count, FeatureList& to) noexcept {
  if (count > max_features) return bad_setting("number of features", count);
  for (std::size_t i = 0; i < count; ++i) {
    const bool needed = in.be<std::uint8_t>() % 2 == 1;
    const auto length = in.be<std::uint8_t>();
    const std::string_view name = in.text(length);
    if (!in.good() || length == 0 || length > max_feature_bytes) return bad_setting("length of a feature", length);
    const auto of_a_name = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-'; };
    if (!std::ranges::all_of(name, of_a_name)) return bad_setting("name of a feature", length);
    if (to.has(name)) return bad_setting("feature that is there twice", i);
    to.add({.name = name, .needed = needed});
  }
  return {};
}

/// One setting of this version. `in` has its value and nothing else.
[[nodiscard]] inline Result<void> parse_setting(SettingNumber number, FieldReader& in, PeerSettings& to) noexcept {
  const std::size_t size = in.left();
  const auto flag = [&](const char* what, std::uint8_t most) -> Result<std::uint8_t> {
    const auto value = in.be<std::uint8_t>();
    if (!in.good() || in.left() != 0 || value > most) return bad_setting(what, value);
    return value;
  };
  const auto word = [&](const char* what, auto fits) -> Result<std::uint32_t> {
    const auto value = in.be<std::uint32_t>();
    if (!in.good() || in.left() != 0 || !fits(value)) return bad_setting(what, value);
    return value;
  };
  const auto up_to_255 = [](std::uint32_t value) { return value >= 1 && value <= max_channels; };
  switch (number) {
    case SettingNumber::channels: {
      MULTIFD_TRY_ASSIGN(to.channels, word("setting: channels", up_to_255));
      return {};
    }
    case SettingNumber::page_bytes: {
      MULTIFD_TRY_ASSIGN(to.page_bytes, word("setting: page size", valid_page_bytes));
      return {};
    }
    case SettingNumber::compression: {
      const auto of_the_mask = [](std::uint32_t value) { return (value & ~flag_compression_mask) == 0; };
      MULTIFD_TRY_ASSIGN(to.compression, word("setting: compression", of_the_mask));
      return {};
    }
    case SettingNumber::zero_pages: {
      MULTIFD_TRY_ASSIGN(const auto value, flag("setting: zero pages", 2));
      to.zero_pages = static_cast<ZeroPagesMode>(value);
      return {};
    }
    case SettingNumber::digest: {
      MULTIFD_TRY_ASSIGN(const auto value, flag("setting: digest", 1));
      to.digest = value == 1 ? Digest::on : Digest::off;
      return {};
    }
    case SettingNumber::tls: {
      MULTIFD_TRY_ASSIGN(const auto value, flag("setting: TLS", 1));
      to.tls = value == 1;
      return {};
    }
    case SettingNumber::paths: {
      MULTIFD_TRY_ASSIGN(to.paths, word("setting: paths", up_to_255));
      return {};
    }
    case SettingNumber::uuid:
      if (size != sizeof(Uuid)) return bad_setting("setting: uuid", size);
      std::ranges::copy(in.take(sizeof(Uuid)), to.uuid.emplace().begin());
      return {};
    case SettingNumber::session:
      if (size != sizeof(Uuid)) return bad_setting("setting: session", size);
      std::ranges::copy(in.take(sizeof(Uuid)), to.session.emplace().begin());
      return {};
    case SettingNumber::user:
      if (size < 1 || size > max_user_setting_bytes) return bad_setting("setting of the VMM's own", size);
      to.user = in.rest();
      return {};
  }
  return {};
}

}  // namespace detail

/// Encodes SETTINGS or ACCEPTED. Contract: the fields are in their bounds; ACCEPTED has at most 512 bytes.
inline FieldWriter<max_settings_bytes> encode_settings(const PeerSettings& settings,
                                                       ExtensionKind kind = ExtensionKind::settings) noexcept {
  using detail::SettingNumber;
  detail::SettingsWriter to;
  to.be(static_cast<std::uint16_t>(kind)).be(settings.versions.spoken).be(settings.versions.newest);
  to.be(settings.versions.oldest).be(static_cast<std::uint8_t>(settings.features.all().size()));
  for (const Feature& feature : settings.features.all())
    to.be(std::uint8_t{feature.needed}).be(static_cast<std::uint8_t>(feature.name.size())).text(feature.name);
  put_setting(to, SettingNumber::channels, settings.channels);
  put_setting(to, SettingNumber::page_bytes, settings.page_bytes);
  put_setting(to, SettingNumber::compression, settings.compression);
  put_setting(to, SettingNumber::zero_pages, settings.zero_pages);
  put_setting(to, SettingNumber::digest, settings.digest);
  put_setting(to, SettingNumber::tls, settings.tls);
  put_setting(to, SettingNumber::paths, settings.paths);
  put_setting(to, SettingNumber::uuid, settings.uuid);
  put_setting(to, SettingNumber::session, settings.session);
  if (!settings.user.empty())
    to.be(static_cast<std::uint16_t>(SettingNumber::user)).be(static_cast<std::uint16_t>(settings.user.size()));
  to.bytes(settings.user);
  return to;
}

/// Parses a SETTINGS or an ACCEPTED that parse_extension() has returned.
///
/// Params `own`: the versions of this side; `own.spoken`: what common_version() has found.
/// Errors (stage parse): Errc::extension_version_mismatch (detail: the version that the peer speaks), unknown_setting
///   (detail: its number), bad_extension_message (detail: the refused value).
/// Threads: any.
[[nodiscard]] inline Result<PeerSettings> parse_settings(const ExtensionMessage& message,
                                                         const ExtensionVersions& own = {}) noexcept {
  FieldReader in(message.body);
  PeerSettings to;
  to.versions.spoken = in.be<std::uint8_t>();
  to.versions.newest = in.be<std::uint8_t>();
  to.versions.oldest = in.be<std::uint8_t>();
  const auto count = in.be<std::uint8_t>();
  if (!in.good()) return detail::bad_setting("length", message.body.size());
  if (to.versions.oldest == 0 || to.versions.oldest > to.versions.spoken || to.versions.spoken > to.versions.newest)
    return detail::bad_setting("versions", to.versions.spoken);
  if (to.versions.spoken != own.spoken)
    return fail(Errc::extension_version_mismatch, Stage::parse, "extension", to.versions.spoken, own.spoken);
  MULTIFD_TRY(detail::parse_features(in, count, to.features));
  std::uint32_t seen = 0;
  while (in.left() > 0) {
    const auto number = in.be<std::uint16_t>();
    const auto length = in.be<std::uint16_t>();
    const auto value = in.take(length);
    if (!in.good()) return detail::bad_setting("length of a setting", length);
    if (number == 0 || number > detail::last_setting) {
      if ((number & detail::must_understand) != 0)
        return fail(Errc::unknown_setting, Stage::parse, "extension", number);
      continue;
    }
    if ((seen >> number & 1) != 0) return detail::bad_setting("setting that is there twice", number);
    seen |= std::uint32_t{1} << number;
    FieldReader field(value);
    MULTIFD_TRY(detail::parse_setting(static_cast<detail::SettingNumber>(number), field, to));
  }
  return to;
}

}  // namespace multifd::wire
