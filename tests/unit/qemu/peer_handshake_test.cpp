// SPDX-License-Identifier: MIT
//
// Two ends of this library over a connection: the question, settings that fit and that do not, a text at both ends
// before a page travels; and peers that are none of ours, or of another version.
#include "multifd/qemu/peer_handshake.hpp"

#include <array>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "multifd/memory/ram_map.hpp"
#include "multifd/qemu/main_stream_reader.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace multifd::qemu;
using namespace std::chrono_literals;

namespace {

constexpr std::uint64_t page = 4096;

wire::PeerSettings all_settings() {
  wire::PeerSettings all;
  all.features.add({.name = wire::feature_resume}).add({.name = wire::feature_page_digests});
  all.channels = 4;
  all.page_bytes = page;
  all.compression = wire::flag_zstd;
  all.zero_pages = wire::ZeroPagesMode::multifd;
  all.digest = Digest::off;
  all.tls = false;
  all.paths = 1;
  all.uuid.emplace().fill(std::byte{7});
  return all;
}

/// What became of one side: "" when it was content.
struct Ends {
  std::string source, destination;
  std::optional<Error> source_error;
  wire::FeatureList common;
  bool asked_only = false;  ///< the peer is none of ours
};

/// A source that asks, announces and waits; at the other end `destination(link)`, which returns its failure's text.
template <class Destination>
Ends shake(const wire::PeerSettings& settings, std::span<const BlockInfo> blocks, Destination&& destination,
           const wire::ExtensionVersions& versions = {}) {
  test::FdPair links = test::unix_pair();
  Ends ends;
  std::thread other([&] { ends.destination = destination(links.second); });
  MainStreamWriter<FdTransport> writer(links.first);
  ReturnPathReader<FdTransport> reader(links.first);
  const auto migrate = [&]() -> Result<void> {
    MULTIFD_TRY(writer.begin_stream({.machine_type = "microvm"}));
    MULTIFD_TRY(writer.open_return_path());
    MULTIFD_TRY_ASSIGN(const auto version, ask_peer(writer, reader, 10s, nullptr, versions));
    ends.asked_only = !version;
    if (!version) return {};
    wire::PeerSettings announced = settings;
    announced.versions = versions;
    announced.versions.spoken = *version;
    MULTIFD_TRY(writer.settings(announced));
    MULTIFD_TRY(writer.start_ram(blocks));
    MULTIFD_TRY(writer.end_epoch());
    MULTIFD_TRY(writer.end_section());
    MULTIFD_TRY(writer.push_out());
    wire::PeerFailure theirs;
    const auto accepted = await_accepted(reader, announced, theirs, 10s);
    if (!accepted) {
      ends.source = theirs.text();
      return std::unexpected(accepted.error());
    }
    ends.common = *accepted;
    return {};
  };
  if (const auto done = migrate(); !done) {
    ends.source_error = done.error();
    if (ends.source.empty()) ends.source = describe(done.error());
  }
  links.first.shutdown();
  other.join();
  return ends;
}

/// An own destination with settings and RAM of its own.
std::string own_destination(FdTransport& link, const wire::PeerSettings& own, const RamMap& ram) {
  auto parser = MainStreamParser::create({.extension = true});
  REQUIRE(parser.has_value());
  MainStreamReader<FdTransport> main(link, std::move(*parser));
  ReturnPathWriter<FdTransport> answers(link);
  const auto receive = [&]() -> Result<void> {
    Result<void> good;
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto element, main.next(10s));
      if (!element) return fail(Errc::peer_closed, Stage::read);
      if (element->kind == ElementKind::command && element->command == command_ping) {
        MULTIFD_TRY(answers.pong(main.parser().commands().answer(wire::load_be<std::uint32_t>(element->data.data()))));
      }
      if (element->kind == ElementKind::extension) {
        MULTIFD_TRY_ASSIGN(const auto message, wire::parse_extension(element->data, wire::Towards::destination));
        if (const auto settings = check_settings(message, own); !settings) good = std::unexpected(settings.error());
      }
      if (!good) return good;
      if (element->kind == ElementKind::footer) break;
    }
    MULTIFD_TRY(compare_blocks(main.parser().blocks(), ram));
    return answers.accepted(own);
  };
  const auto done = receive();
  if (done) return "";
  const std::string text = describe(done.error());
  REQUIRE(answers.failed(done.error(), text).has_value());
  static_cast<void>(answers.shut(1));  // the source may have gone already: it has what it needs
  return text;
}

RamMap two_blocks(std::uint64_t second = 2 * page, const char* name = "vga") {
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  REQUIRE(ram.add_elsewhere(name, second).has_value());
  return ram;
}

Ends shake_hands(const wire::PeerSettings& source, const wire::PeerSettings& destination, const RamMap& sources,
                 const RamMap& destinations) {
  const auto blocks = announced_blocks(sources);
  REQUIRE(blocks.has_value());
  return shake(source, *blocks, [&](FdTransport& link) { return own_destination(link, destination, destinations); });
}

/// A destination by hand: answers PING with `pong`, and then says `more`.
auto by_hand(std::uint32_t pong, std::vector<std::byte> more = {}) {
  return [pong, more = std::move(more)](FdTransport& link) -> std::string {
    std::array<std::byte, 8 + 12 + 5 + 9> front;  // header, configuration "microvm", OPEN_RETURN_PATH, PING
    REQUIRE(read_exact(link, std::span(front)).has_value());
    REQUIRE(write_all(link, std::span<const std::byte>(encode_pong(pong))).has_value());
    if (!more.empty()) REQUIRE(write_all(link, std::span<const std::byte>(more)).has_value());
    return "";
  };
}

}  // namespace

TEST_CASE("Two ends whose settings fit agree, and know which features both have") {
  wire::PeerSettings destination = all_settings();
  const Ends same = shake_hands(all_settings(), destination, two_blocks(), two_blocks());
  CHECK(same.source.empty());
  CHECK(same.destination.empty());
  CHECK(same.common.all().size() == 2);
  destination.features = wire::FeatureList().add({.name = "resume"}).add({.name = "of-its-own"});
  const Ends fewer = shake_hands(all_settings(), destination, two_blocks(), two_blocks());
  CHECK(fewer.source.empty());
  REQUIRE(fewer.common.all().size() == 1);
  CHECK(fewer.common.has("resume"));
  const Ends open = shake_hands(all_settings(), {}, two_blocks(), two_blocks());  // it takes whatever comes
  CHECK(open.source.empty());
  CHECK(open.common.all().empty());
}

TEST_CASE("Each setting that differs is a text at both ends, with both values, before a page travels") {
  const auto check = [](auto&& change, Errc code, std::string_view values) {
    CAPTURE(values);
    wire::PeerSettings destination = all_settings();
    change(destination);
    const Ends ends = shake_hands(all_settings(), destination, two_blocks(), two_blocks());
    CHECK(ends.destination.contains(values));
    CHECK(ends.source == ends.destination);
    REQUIRE(ends.source_error);
    CHECK(ends.source_error->code == Errc::peer_gave_up);
    CHECK(ends.source_error->peer_reason == code);
  };
  using wire::PeerSettings;
  check([](PeerSettings& s) { s.channels = 2; }, Errc::channel_count_mismatch, "source: 4, destination: 2");
  check([](PeerSettings& s) { s.page_bytes = 65536; }, Errc::page_size_mismatch, "source: 4096, destination: 65536");
  check([](PeerSettings& s) { s.compression = wire::flag_zlib; }, Errc::wrong_compression,
        "source: zstd, destination: zlib");
  check([](PeerSettings& s) { s.zero_pages = wire::ZeroPagesMode::none; }, Errc::setting_mismatch,
        "source: multifd, destination: none");
  check([](PeerSettings& s) { s.digest = Digest::on; }, Errc::setting_mismatch, "source: off, destination: on");
  check([](PeerSettings& s) { s.tls = true; }, Errc::setting_mismatch, "setting: TLS");
  check([](PeerSettings& s) { s.paths = 3; }, Errc::setting_mismatch, "source: 1, destination: 3");
  check([](PeerSettings& s) { s.uuid->fill(std::byte{8}); }, Errc::uuid_mismatch,
        "source: 07070707..., destination: 08080808...");
  check([](PeerSettings& s) { s.features.add({.name = "postcopy", .needed = true}); }, Errc::missing_feature,
        "postcopy");
}

TEST_CASE("Each block that differs is named at both ends, before a page travels") {
  const auto check = [](const RamMap& sources, const RamMap& destinations, std::string_view text) {
    CAPTURE(text);
    const Ends ends = shake_hands(all_settings(), all_settings(), sources, destinations);
    CHECK(ends.destination.contains(text));
    CHECK(ends.source == ends.destination);
    CHECK(ends.source_error->peer_reason == Errc::block_list_mismatch);
  };
  check(two_blocks(2 * page), two_blocks(page), "vga, the peer's 8192, this side's 4096");
  check(two_blocks(page, "nic"), two_blocks(page), "nic");
  RamMap three = two_blocks();
  REQUIRE(three.add_elsewhere("pc.bios", page).has_value());
  check(three, two_blocks(), "pc.bios");
  check(two_blocks(), three, "pc.bios");
}

TEST_CASE("A feature that the source needs and the destination does not have is named at both ends") {
  wire::PeerSettings source = all_settings();
  source.features.add({.name = "time-travel", .needed = true});
  const Ends ends = shake_hands(source, all_settings(), two_blocks(), two_blocks());
  CHECK(ends.destination.contains("time-travel"));
  CHECK(ends.source == ends.destination);
  CHECK(ends.source_error->peer_reason == Errc::unknown_feature);
}

TEST_CASE("A source checks the features of a destination that has accepted it") {
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram", .used_length = page}};
  const auto accepted_with = [&](const wire::FeatureList& features, const wire::PeerSettings& source) {
    wire::PeerSettings accepted;
    accepted.features = features;
    const auto data = wire::encode_settings(accepted, wire::ExtensionKind::accepted);
    wire::FieldWriter<516> bytes;
    bytes.be(wire::extension_number).be(static_cast<std::uint16_t>(data.view().size())).bytes(data.view());
    const Ends ends =
        shake(source, blocks, by_hand(wire::extension_pong(), {bytes.view().begin(), bytes.view().end()}));
    return ends.source_error ? ends.source_error->code : std::error_code{};
  };
  wire::FeatureList needs;
  needs.add({.name = "time-travel", .needed = true});
  CHECK(accepted_with({}, all_settings()) == std::error_code{});
  CHECK(accepted_with(needs, all_settings()) == Errc::unknown_feature);
  wire::PeerSettings needing = all_settings();
  needing.features = needs;
  CHECK(accepted_with({}, needing) == Errc::missing_feature);
  CHECK(accepted_with(needs, needing) == std::error_code{});
}

TEST_CASE("A QEMU, or a version of ours without the extension, is shown none of it") {
  const Ends ends = shake(all_settings(), {}, by_hand(wire::extension_ping()));
  CHECK(ends.source.empty());
  CHECK(ends.asked_only);
}

TEST_CASE("A destination of another version is understood, or refused by its version") {
  const auto code = [](const Ends& ends) { return ends.source_error ? ends.source_error->code : std::error_code{}; };
  // A newer one, by hand: it speaks this side's version.
  std::vector<std::byte> accepted;
  for (const int byte : {0x6d, 0x66, 0, 6, 0, 2, 1, 9, 1, 0}) accepted.push_back(static_cast<std::byte>(byte));
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram", .used_length = page}};
  CHECK(shake(all_settings(), blocks, by_hand(wire::extension_pong(9), accepted)).source.empty());
  // It has agreed on version 1 and speaks 9.
  accepted[6] = std::byte{9};
  CHECK(code(shake(all_settings(), blocks, by_hand(wire::extension_pong(9), accepted))) ==
        Errc::extension_version_mismatch);
  // An older one, to a side that is made newer by hand.
  const Ends older =
      shake(all_settings(), blocks, by_hand(wire::extension_pong(1)), {.spoken = 5, .newest = 5, .oldest = 3});
  CHECK(code(older) == Errc::extension_version_mismatch);
  CHECK(older.source.contains("version of the peer 1, of this side 3"));
}

TEST_CASE("A destination that ends, or is silent, during the handshake is told as that") {
  const auto code = [](const Ends& ends) { return ends.source_error ? ends.source_error->code : std::error_code{}; };
  const auto shut = encode_shut(1);
  const std::array<BlockInfo, 1> blocks{BlockInfo{.idstr = "ram", .used_length = page}};
  CHECK(code(shake(all_settings(), blocks, by_hand(wire::extension_pong(), {shut.begin(), shut.end()}))) ==
        Errc::peer_closed);
  test::FdPair links = test::unix_pair();
  MainStreamWriter<FdTransport> writer(links.first);
  ReturnPathReader<FdTransport> reader(links.first);
  CHECK(ask_peer(writer, reader, 1ms).error().code == Errc::timed_out);
  REQUIRE(links.second.finish().has_value());
  CHECK(ask_peer(writer, reader, 10s).error().code == Errc::peer_closed);
}
