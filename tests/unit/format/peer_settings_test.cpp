// SPDX-License-Identifier: MIT
//
// SETTINGS and ACCEPTED (format/extension.md section 19.4): each field's bounds, each setting that differs, and peers
// of an older and of a newer version, made by hand.
#include "multifd/format/peer_settings.hpp"

#include <doctest/doctest.h>

#include <ostream>  // lets doctest print a std::error_code
#include <string>

#include "multifd/format/compare_settings.hpp"
#include "unit/format/raw_bytes.hpp"

namespace wire = multifd::wire;
using multifd::Errc;
using wire::ExtensionKind;
using wire::ExtensionVersions;
using wire::FeatureList;
using wire::PeerSettings;

namespace {

/// A SETTINGS by hand.
struct ByHand {
  Bytes bytes;

  explicit ByHand(unsigned spoken = 1, unsigned newest = 1, unsigned oldest = 1, unsigned features = 0) {
    be(2, 1).be(1, spoken).be(1, newest).be(1, oldest).be(1, features);
  }
  ByHand& be(std::size_t size, std::uint64_t value) {
    bytes.resize(bytes.size() + size);
    put(bytes, bytes.size() - size, size, value);
    return *this;
  }
  ByHand& text(std::string_view text) {
    bytes.resize(bytes.size() + text.size());
    put_text(bytes, bytes.size() - text.size(), text);
    return *this;
  }
  ByHand& feature(std::string_view name, unsigned flags = 0) { return be(1, flags).be(1, name.size()).text(name); }
  ByHand& setting(unsigned number, std::size_t size, std::uint64_t value) {
    return be(2, number).be(2, size).be(size, value);
  }
  ByHand& setting(unsigned number, std::string_view value) { return be(2, number).be(2, value.size()).text(value); }
};

multifd::Result<PeerSettings> parse(const ByHand& by_hand, const ExtensionVersions& own = {}) {
  const auto message = wire::parse_extension(by_hand.bytes, wire::Towards::destination);
  REQUIRE(message.has_value());
  return wire::parse_settings(*message, own);
}

void check_refused(const ByHand& by_hand, Errc code, std::uint64_t detail, const ExtensionVersions& own = {}) {
  const auto parsed = parse(by_hand, own);
  REQUIRE_FALSE(parsed.has_value());
  CHECK(parsed.error().code == code);
  CHECK(parsed.error().detail == detail);
  CHECK(parsed.error().code == multifd::Condition::peer_protocol);
}

PeerSettings all_settings() {
  PeerSettings all;
  all.channels = 4;
  all.page_bytes = 4096;
  all.compression = wire::flag_zstd;
  all.zero_pages = wire::ZeroPagesMode::multifd;
  all.digest = multifd::Digest::off;
  all.tls = true;
  all.paths = 2;
  all.uuid.emplace().fill(std::byte{0x5a});
  all.session.emplace().fill(std::byte{0xc3});
  return all;
}

}  // namespace

TEST_CASE("Settings survive the round trip, byte for byte as the tables have them") {
  PeerSettings settings = all_settings();
  settings.features.add({.name = wire::feature_resume}).add({.name = wire::feature_page_digests, .needed = true});
  const Bytes user(1024, std::byte{0xee});
  settings.user = user;
  const auto encoded = wire::encode_settings(settings);
  ByHand expected(1, 1, 1, 2);
  expected.feature("resume").feature("page-digests", 1).setting(1, 4, 4).setting(2, 4, 4096).setting(3, 4, 4);
  expected.setting(4, 1, 2).setting(5, 1, 0).setting(6, 1, 1).setting(7, 4, 2);
  expected.setting(8, std::string(16, '\x5a')).setting(10, std::string(16, '\xc3'));
  expected.setting(9, std::string(1024, '\xee'));
  CHECK(std::ranges::equal(encoded.view(), expected.bytes));

  const auto parsed = parse(expected);
  REQUIRE(parsed.has_value());
  CHECK(parsed->versions == ExtensionVersions{});
  REQUIRE(parsed->features.all().size() == 2);
  CHECK(parsed->features.has("resume"));
  CHECK_FALSE(parsed->features.all()[0].needed);
  CHECK(parsed->features.all()[1].needed);
  CHECK(wire::compare_settings(*parsed, settings).has_value());
  CHECK(parsed->channels == 4);
  CHECK(parsed->tls == true);
  CHECK(parsed->uuid == settings.uuid);
  CHECK(parsed->session == settings.session);
  CHECK(std::ranges::equal(parsed->user, user));

  const auto none = parse(ByHand());
  REQUIRE(none.has_value());
  CHECK_FALSE(none->channels);
  CHECK_FALSE(none->uuid);
  CHECK_FALSE(none->session);
  CHECK(none->user.empty());
  // ACCEPTED has the same fields.
  const auto accepted = wire::encode_settings({}, ExtensionKind::accepted);
  CHECK(accepted.view()[1] == std::byte{2});
  CHECK(accepted.view().size() == 6);
}

TEST_CASE("The most that a side can say fits: sixteen features to a source in one message") {
  PeerSettings most;
  std::vector<std::string> names;
  for (char c = 'a'; c < 'a' + 16; ++c) names.emplace_back(24, c);
  for (const std::string& name : names) most.features.add({.name = name, .needed = true});
  const auto accepted = wire::encode_settings(most, ExtensionKind::accepted);
  CHECK(accepted.view().size() <= wire::max_extension_answer_bytes);
  const auto message = wire::parse_extension(accepted.view(), wire::Towards::source);
  REQUIRE(message.has_value());
  const auto parsed = wire::parse_settings(*message);
  REQUIRE(parsed.has_value());
  CHECK(parsed->features.all().size() == 16);
  CHECK(wire::check_features(parsed->features, most.features).has_value());
}

TEST_CASE("Refused: settings out of their bounds, one by one") {
  constexpr Errc bad = Errc::bad_extension_message;
  const auto number = [&](unsigned setting, std::size_t size, std::uint64_t value) {
    CAPTURE(setting);
    check_refused(ByHand().setting(setting, size, value), bad, value);
  };
  for (const std::uint64_t channels : {0u, 256u, 0xffffffffu}) number(1, 4, channels);
  for (const std::uint64_t bytes : {0u, 512u, 4097u, 131072u, 0x80000000u}) number(2, 4, bytes);
  for (const std::uint64_t method : {0x01u, 0x40u, 0x80000002u}) number(3, 4, method);
  number(4, 1, 3);
  number(5, 1, 2);
  number(6, 1, 255);
  for (const std::uint64_t paths : {0u, 256u}) number(7, 4, paths);
  for (const unsigned setting : {8u, 10u})
    for (const std::size_t size : {0u, 15u, 17u})
      check_refused(ByHand().setting(setting, std::string(size, 'u')), bad, size);
  for (const std::size_t size : {0u, 1025u}) check_refused(ByHand().setting(9, std::string(size, 'v')), bad, size);
  // Every value with a byte too few, and one too many.
  for (const auto& [setting, size] : {std::pair(1u, 4u), {2u, 4u}, {3u, 4u}, {4u, 1u}, {5u, 1u}, {6u, 1u}, {7u, 4u}})
    for (const std::size_t wrong : {size - 1, size + 1}) {
      CAPTURE(setting);
      CHECK(parse(ByHand().setting(setting, std::string(wrong, '\0'))).error().code == bad);
    }
  for (unsigned setting = 1; setting <= 10; ++setting) {  // twice
    const std::string value = setting == 8 || setting == 10 ? std::string(16, 'u') : setting == 9 ? "x" : "";
    ByHand twice;
    for (int i = 0; i < 2; ++i) {
      if (!value.empty())
        twice.setting(setting, value);
      else
        twice.setting(setting, setting >= 4 && setting <= 6 ? 1 : 4, setting == 2 ? 4096 : setting == 3 ? 2 : 1);
    }
    check_refused(twice, bad, setting);
  }
  // Cut anywhere.
  const ByHand whole = ByHand(1, 1, 1, 1).feature("resume").setting(1, 4, 4).setting(9, "abc");
  for (std::size_t size = 6; size < whole.bytes.size(); ++size) {
    ByHand part = whole;
    part.bytes.resize(size);
    CAPTURE(size);
    CHECK(parse(part).has_value() == (size == 6 + 8 || size == 6 + 8 + 8));
  }
}

TEST_CASE("Refused: features out of their bounds") {
  constexpr Errc bad = Errc::bad_extension_message;
  check_refused(ByHand(1, 1, 1, 17), bad, 17);
  check_refused(ByHand(1, 1, 1, 1), bad, 0);
  check_refused(ByHand(1, 1, 1, 1).feature(""), bad, 0);
  check_refused(ByHand(1, 1, 1, 1).feature(std::string(25, 'a')), bad, 25);
  CHECK(parse(ByHand(1, 1, 1, 1).feature(std::string(24, 'a'))).has_value());
  for (const char* name : {"Resume", "a b", "a_b", "a\x1b", "caf\xc3\xa9", "a."})
    CHECK(parse(ByHand(1, 1, 1, 1).feature(name)).error().code == bad);
  check_refused(ByHand(1, 1, 1, 2).feature("resume").feature("resume"), bad, 1);
  // Other flags than "needed" are ignored.
  CHECK_FALSE(parse(ByHand(1, 1, 1, 1).feature("resume", 0xfe))->features.all()[0].needed);
}

TEST_CASE("Each setting that differs is refused by its name, with both values; what this side leaves open fits") {
  const PeerSettings source = all_settings();
  CHECK(wire::compare_settings(source, {}).has_value());
  CHECK(wire::compare_settings(source, source).has_value());
  const auto check = [&](auto PeerSettings::* field, auto value, Errc code, std::string_view op,
                         std::string_view values) {
    CAPTURE(op);
    PeerSettings own;
    own.*field = value;
    for (const PeerSettings& insisting : {own, [&] {
                                            PeerSettings all = source;
                                            all.*field = value;
                                            return all;
                                          }()}) {
      const auto compared = wire::compare_settings(source, insisting);
      REQUIRE_FALSE(compared.has_value());
      CHECK(compared.error().code == code);
      CHECK(compared.error().op == op);
      CHECK(compared.error().subject.view() == values);
      CHECK(multifd::describe(compared.error()).contains(values));
    }
    // A source that does not say it, where this side insists.
    PeerSettings silent = source;
    (silent.*field).reset();
    const auto compared = wire::compare_settings(silent, own);
    REQUIRE_FALSE(compared.has_value());
    CHECK(compared.error().subject.view().starts_with("source: not said, destination: "));
  };
  check(&PeerSettings::channels, 2u, Errc::channel_count_mismatch, "setting: channels", "source: 4, destination: 2");
  check(&PeerSettings::page_bytes, 65536u, Errc::page_size_mismatch, "setting: page size",
        "source: 4096, destination: 65536");
  check(&PeerSettings::compression, wire::flag_none, Errc::wrong_compression, "setting: compression",
        "source: zstd, destination: none");
  check(&PeerSettings::zero_pages, wire::ZeroPagesMode::legacy, Errc::setting_mismatch, "setting: zero pages",
        "source: multifd, destination: legacy");
  check(&PeerSettings::digest, multifd::Digest::on, Errc::setting_mismatch, "setting: digest",
        "source: off, destination: on");
  check(&PeerSettings::tls, false, Errc::setting_mismatch, "setting: TLS", "source: on, destination: off");
  check(&PeerSettings::paths, 1u, Errc::setting_mismatch, "setting: paths", "source: 2, destination: 1");
  multifd::Uuid other{};
  check(&PeerSettings::uuid, other, Errc::uuid_mismatch, "setting: uuid",
        "source: 5a5a5a5a..., destination: 00000000...");
  // The session is the source's choice, whatever the other side has in its place.
  PeerSettings own;
  own.session.emplace();
  CHECK(wire::compare_settings(source, own).has_value());
}

TEST_CASE("A feature that one side needs and the other does not have is refused by its name, by either") {
  FeatureList offers, needs, nothing;
  offers.add({.name = "resume"}).add({.name = "time-travel"});
  needs.add({.name = "time-travel", .needed = true});
  CHECK(wire::check_features(offers, nothing).has_value());
  CHECK(wire::check_features(nothing, offers).has_value());
  CHECK(wire::check_features(needs, offers).has_value());
  CHECK(wire::check_features(offers, needs).has_value());
  const auto unknown = wire::check_features(needs, nothing);
  REQUIRE_FALSE(unknown.has_value());
  CHECK(unknown.error().code == Errc::unknown_feature);
  CHECK(unknown.error().subject.view() == "time-travel");
  const auto missing = wire::check_features(nothing, needs);
  REQUIRE_FALSE(missing.has_value());
  CHECK(missing.error().code == Errc::missing_feature);
  CHECK(missing.error().subject.view() == "time-travel");
}

TEST_CASE("A newer peer is understood where it speaks an older version, and refused by its version where it does not") {
  // This side is of version 1. A newer source asks with 7, is answered with 1, and speaks 1.
  CHECK(wire::common_version(7) == 1);
  ByHand by_hand(1, 7, 1, 2);
  by_hand.feature("resume").feature("a-new-one").setting(0x0123, "something that may be ignored");
  by_hand.setting(1, 4, 4).setting(11, "");
  const auto newer = parse(by_hand);
  REQUIRE(newer.has_value());
  CHECK(newer->versions == ExtensionVersions{.spoken = 1, .newest = 7, .oldest = 1});
  CHECK(newer->channels == 4);
  CHECK(newer->features.has("a-new-one"));
  // It has something that must not be ignored.
  check_refused(ByHand(1, 7, 1).setting(0x8123, "x"), Errc::unknown_setting, 0x8123);
  // It speaks a version that this side has never heard of; what follows the front plays no part.
  check_refused(ByHand(7, 7, 5, 255).be(8, ~std::uint64_t{0}), Errc::extension_version_mismatch, 7);
  // Nonsense.
  for (const auto& [spoken, newest, oldest] :
       {std::tuple(0u, 1u, 1u), {1u, 0u, 1u}, {1u, 1u, 0u}, {1u, 1u, 2u}, {2u, 1u, 1u}})
    CHECK(parse(ByHand(spoken, newest, oldest)).error().code == Errc::bad_extension_message);
}

TEST_CASE("An older peer is understood by a side that still speaks its version, and refused by one that does not") {
  // This side is made newer by hand: versions 3 to 5, then 1 to 5. The peer is of version 1.
  const ExtensionVersions strict{.spoken = 5, .newest = 5, .oldest = 3};
  const auto refused = wire::common_version(1, strict);
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().code == Errc::extension_version_mismatch);
  CHECK(refused.error().detail == 1);
  CHECK(refused.error().expected == 3);
  CHECK(multifd::describe(refused.error()).contains("update the older one"));
  CHECK(wire::common_version(4, strict) == 4);
  CHECK(wire::common_version(9, strict) == 5);

  ExtensionVersions lenient{.spoken = 5, .newest = 5, .oldest = 1};
  CHECK(wire::common_version(1, lenient) == 1);
  check_refused(ByHand(1, 1, 1), Errc::extension_version_mismatch, 1, lenient);  // it has not spoken what was agreed on
  lenient.spoken = 1;
  CHECK(parse(ByHand(1, 1, 1).setting(1, 4, 4), lenient)->channels == 4);
}
