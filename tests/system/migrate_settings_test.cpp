// SPDX-License-Identifier: MIT
//
// Settings that differ, each of them, one by one: both ends say which, before a page travels, and the guest goes on
// undisturbed. And ends of other versions, made by hand.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "multifd/qemu/main_stream_writer.hpp"
#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/qemu/stream_style.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/connect.hpp"
#include "support/leftovers.hpp"
#include "support/migrate_ends.hpp"
#include "support/raw_stream.hpp"
#include "support/source_by_hand.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;
using namespace std::string_view_literals;

namespace {

constexpr std::size_t pages = 256;

constexpr Uuid uuid_of(unsigned byte) {
  Uuid uuid{};
  uuid.fill(std::byte(byte));
  return uuid;
}

/// One setting that differs.
struct Difference {
  const char* name;
  std::vector<std::string_view> said;  ///< in the text of both ends
  std::function<void(SourceOptions&, DestinationOptions&)> set = [](auto&, auto&) {};
  std::function<void(MigratingGuest&)> here = [](auto&) {};
  std::function<void(MigratingGuest&)> there = [](auto&) {};
  const char* idstr = "pc.ram";  ///< of the destination's block
};

bool untouched(MigratingGuest& guest) {
  return std::ranges::all_of(guest.memory(), [](std::byte each) { return each == std::byte{}; });
}

void check_refused(const Difference& difference) {
  CAPTURE(difference.name);
  const Watchdog watchdog("a setting that differs");
  const Leftovers leftovers;
  {
    SourceOptions source{.channels = 2, .uuid = uuid_of(1)};
    DestinationOptions destination{.retry_timeout = 50ms};
    difference.set(source, destination);
    MigratingGuest here(pages);
    here.boot();
    difference.here(here);
    here.run(16, 50us);
    There there(pages, std::move(destination), difference.idstr);
    difference.there(there.guest);
    Followed followed;
    const Tried tried = migrate_once(here, followed, there, source);
    REQUIRE_FALSE(tried.sent.has_value());
    REQUIRE_FALSE(tried.taken.has_value());
    for (const std::string_view part : difference.said) {
      CHECK_MESSAGE(text(tried.sent).contains(part), text(tried.sent));
      CHECK_MESSAGE(text(tried.taken).contains(part), text(tried.taken));
    }
    CHECK(followed.said() == "setup failed");
    CHECK(there.followed.said() == "setup failed");
    CHECK(followed->progress().moved.normal_pages == 0);
    CHECK(untouched(there.guest));
    CHECK(here.runs());
    CHECK(here.fetched() == 0);
    CHECK_FALSE(here.logging());
    CHECK_FALSE(there.guest.runs());
  }
  CHECK(leftovers.no_thread());
  CHECK(leftovers.no_descriptor());
}

const Difference differences[] = {
    {.name = "channels",
     .said = {"channels", "2", "3"},
     .set = [](auto&, auto& destination) { destination.channels = 3; }},
    {.name = "compression",
     .said = {"compression", "none", "zlib"},
     .set = [](auto&, auto& destination) { destination.compression = "zlib"; }},
    {.name = "zero pages",
     .said = {"zero pages", "multifd", "legacy"},
     .set = [](auto&, auto& destination) { destination.zero_pages = "legacy"; }},
    {.name = "page size",
     .said = {"page size", "4096", "8192"},
     .set = [](auto&, auto& destination) { destination.page_bytes = 8192; }},
    {.name = "digest",
     .said = {"digest", "off", "on"},
     .set = [](auto&, auto& destination) { destination.digest = Digest::on; }},
    {.name = "digest, the other way round",
     .said = {"digest", "off", "on"},
     .set =
         [](auto& source, auto& destination) {
           source.digest = Digest::on;
           destination.digest = Digest::off;
         }},
    {.name = "uuid",
     .said = {"uuid", "01010101", "02020202"},
     .set = [](auto&, auto& destination) { destination.uuid = uuid_of(2); }},
    {.name = "a RAM block that the destination does not have",
     .said = {"vga.vram"},
     .here = [](MigratingGuest& guest) { guest.add_block("vga.vram", 16); }},
    {.name = "a RAM block that the source does not have",
     .said = {"vga.vram"},
     .there = [](MigratingGuest& guest) { guest.add_block("vga.vram", 16); }},
    {.name = "a RAM block of another name", .said = {"pc.ram"}, .idstr = "ram0"},
    {.name = "a RAM block of another size",
     .said = {"vga.vram"},
     .here = [](MigratingGuest& guest) { guest.add_block("vga.vram", 16); },
     .there = [](MigratingGuest& guest) { guest.add_block("vga.vram", 32); }},
    {.name = "more RAM than the destination takes",
     .said = {"RAM"},
     .set = [](auto&, auto& destination) { destination.max_ram_bytes = 64 * 4096; }},
};

Bytes read_up_to_end(FdTransport& link) {
  Bytes all;
  std::array<std::byte, 4096> room;
  for (;;) {
    const iovec buffer = mutable_buffer(std::span(room));
    const auto got = link.read_some(std::span(&buffer, 1), 10s, nullptr);
    if (!got || *got == 0) return all;
    append(all, std::span(room).first(*got));
  }
}
bool contains(const Bytes& bytes, std::string_view text) {
  return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()).contains(text);
}

/// Lets a source come to a destination that answers the question with `pong`, and SETTINGS with `accepted`, if any. Returns
/// what migrate_to() says, and what the source has said on its main connection.
std::pair<Result<MigrationReport>, Bytes> to_destination_by_hand(std::optional<std::uint32_t> pong,
                                                                 std::optional<wire::PeerSettings> accepted,
                                                                 const SourceOptions& options) {
  auto listener = Listener::listen({.host = "127.0.0.1"}, 8);
  REQUIRE(listener.has_value());
  Bytes said;
  std::thread answering([&] {
    auto links = listener->accept_channels(1 + options.channels, 10s);  // a source connects its main connection first
    if (!links) return;
    FdTransport& main = links->front();
    qemu::ReturnPathWriter<FdTransport> writer(main);
    Bytes room(1);
    while (!contains(said, "mf")) {  // the question
      const iovec buffer = mutable_buffer(std::span(room));
      const auto got = main.read_some(std::span(&buffer, 1), 10s, nullptr);
      if (!got || *got == 0) return;
      append(said, room);
    }
    if (pong) static_cast<void>(writer.pong(*pong));
    if (accepted) static_cast<void>(writer.accepted(*accepted));
    append(said, read_up_to_end(main));
  });
  MigratingGuest here(pages);
  here.boot();
  here.run(16, 50us);
  auto sent = send_guest(here, listener->local_address(), options);
  answering.join();
  CHECK(here.runs());
  CHECK_FALSE(here.logging());
  return {std::move(sent), std::move(said)};
}

}  // namespace

TEST_CASE("Settings that differ, one by one: both ends name the setting, before a page travels") {
  for (const Difference& difference : differences) check_refused(difference);
}

TEST_CASE("What only one side can know is refused by that side") {
  const Watchdog watchdog("a user's text that is too long");
  MigratingGuest here(pages);
  here.run(0);
  const std::vector<std::byte> user(1025, std::byte{'u'});
  Followed followed;
  There there(pages);
  const Tried tried = migrate_once(here, followed, there, {.channels = 1, .user = user});
  CHECK_MESSAGE(text(tried.sent).contains("SourceOptions::user"), text(tried.sent));
  CHECK(followed.said() == "setup failed");
  // The destination has not met a source, and goes on waiting for one.
  CHECK_MESSAGE(code_of(tried.taken) == Errc::cancelled, text(tried.taken));
}

TEST_CASE("The user's text of the longest size, and an announcement, arrive before memory has to be there") {
  const Watchdog watchdog("a user's text");
  MigratingGuest here(pages);
  here.run(0);
  const std::vector<std::byte> user(1024, std::byte{'u'});
  Followed followed;
  There there(pages);
  const Tried tried = migrate_once(here, followed, there, {.machine_type = "pc-q35-9.2", .user = user});
  CHECK_MESSAGE(tried.sent.has_value(), text(tried.sent));
  CHECK(there.guest.announced_user == user);
  CHECK(there.guest.announced_machine == "pc-q35-9.2");
}

TEST_CASE("Options that no migration can have are refused by their names") {
  const Watchdog watchdog("bad options");
  const auto refused = [](const SourceOptions& options) {
    MigratingGuest here(pages);
    here.run(0);
    Followed followed;
    There there(pages);
    const Tried tried = migrate_once(here, followed, there, options);
    CHECK(here.runs());
    CHECK(followed.said() == "setup failed");
    return text(tried.sent);
  };
  const auto contains = [](const std::string& said, std::string_view part) {
    CHECK_MESSAGE(said.contains(part), said);
  };
  contains(refused({.compression = "lzma"}), "lzma");
  contains(refused({.zero_pages = "some"}), "some");
  contains(refused({.converge = {.at_time_limit = Action::memory_on_demand}}), "memory on demand");
  contains(refused({.answer_timeout = -1ms}), "answer_timeout");
  contains(refused({.load_timeout = -1ms}), "load_timeout");
  contains(refused({.farewell_timeout = -1ms}), "farewell_timeout");
}

TEST_CASE(
    "A newer source is understood, as long as it speaks this version; one that does not is refused by its version") {
  const Watchdog watchdog("newer sources");
  {
    There there(pages, {.retry_timeout = 50ms});
    there.begin();
    SourceByHand source(there.address);
    CHECK(source.ask(9) == wire::extension_pong());
    source.announce(pages, {.spoken = 1, .newest = 9, .oldest = 1}, wire::FeatureList().add({.name = "of-version-9"}));
    CHECK(source.answer().message.kind == wire::ExtensionKind::accepted);
    there.followed->cancel();
    CHECK(code_of(there.result()) == Errc::cancelled);
  }
  const auto refused = [](const wire::ExtensionVersions& versions, const wire::FeatureList& features) {
    There there(pages, {.retry_timeout = 50ms});
    there.begin();
    SourceByHand source(there.address);
    source.ask(versions.newest);
    source.announce(pages, versions, features);
    const std::string said = source.failure();
    const auto taken = there.result();
    REQUIRE_FALSE(taken.has_value());
    CHECK(said == text(taken));
    CHECK(untouched(there.guest));
    return text(taken);
  };
  const std::string other = refused({.spoken = 9, .newest = 9, .oldest = 9}, {});
  CHECK_MESSAGE(other.contains("version"), other);
  const std::string needs = refused({.spoken = 1, .newest = 2, .oldest = 1},
                                    wire::FeatureList().add({.name = "of-version-2", .needed = true}));
  CHECK_MESSAGE(needs.contains("of-version-2"), needs);
}

TEST_CASE("A newer destination is understood; one without what was asked for, or of another version, is refused") {
  const Watchdog watchdog("destinations by hand");
  const SourceOptions options{.channels = 1, .answer_timeout = 10s};
  SourceOptions verifying = options;
  verifying.verify = Verify::required;
  const auto says = [](const Result<MigrationReport>& sent, std::string_view part) {
    CHECK_MESSAGE(text(sent).contains(part), text(sent));
  };

  const auto lacks = to_destination_by_hand(wire::extension_pong(), wire::PeerSettings{}, verifying);
  says(lacks.first, "page-digests");
  CHECK(test::Bytes(lacks.second).size() > 0);
  CHECK_MESSAGE(contains(lacks.second, "page-digests"), "the destination is told why");

  const auto other = to_destination_by_hand(
      wire::extension_pong(9), wire::PeerSettings{.versions = {.spoken = 9, .newest = 9, .oldest = 9}}, options);
  says(other.first, "version");
  CHECK_MESSAGE(contains(other.second, "version"), "the destination is told why");

  wire::PeerSettings demanding;
  demanding.features.add({.name = "of-version-2", .needed = true});
  const auto needs = to_destination_by_hand(wire::extension_pong(2), demanding, options);
  says(needs.first, "of-version-2");
  CHECK_MESSAGE(contains(needs.second, "of-version-2"), "the destination is told why");

  // One that does not answer may be a QEMU: it is shown nothing but the question.
  SourceOptions hasty = options;
  hasty.answer_timeout = 50ms;
  const auto silent = to_destination_by_hand(std::nullopt, std::nullopt, hasty);
  CHECK_MESSAGE(code_of(silent.first) == Errc::timed_out, text(silent.first));
  CHECK_FALSE(contains(silent.second, "limit"));
  CHECK(std::string_view(reinterpret_cast<const char*>(silent.second.data()), silent.second.size())
            .ends_with("mf\0\1"sv));

  // One without the extension answers as a QEMU does, and is shown none of it.
  const auto older = to_destination_by_hand(wire::extension_ping(), std::nullopt, verifying);
  says(older.first, "verify");
  CHECK_FALSE(contains(older.second, "verify"));
}
