// SPDX-License-Identifier: MIT
//
// A destination whose memory holds an older copy (DestinationOptions::base): only what differs is sent, whatever zeros and
// holes there are at either end, whatever the guest writes meanwhile, and whatever the other side says.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "multifd/format/base_digests.hpp"
#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "support/basics.hpp"
#include "support/migrate_ends.hpp"
#include "support/migrate_on_demand.hpp"
#include "support/source_by_hand.hpp"
#include "support/still_guest.hpp"
#include "support/test_digest.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::string_view_literals;
using test::test_digests;
using test::text;

namespace {

struct Stacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;
};

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 4 * 1024 + 37;  // several pieces, and a part of a bitmap's word

using Kind = test::MemoryKind;

struct StillGuest : test::StillGuest {
  explicit StillGuest(Kind kind = Kind::anonymous) : test::StillGuest(kind, pages) {}
};

test::MigrationEnds migrate_between(StillGuest& here, StillGuest& there, SourceOptions from,
                                    const DestinationOptions& to) {
  from.converge.rule = FixedRounds(2);
  return test::migrate_between<Stacks>(here, there, from, to);
}

bool are_equal(const StillGuest& here, const StillGuest& there) {
  return std::memcmp(here.memory.bytes().data(), there.memory.bytes().data(), pages * page) == 0;
}

/// What becomes of page `number`, of ten kinds.
enum class Fate {
  equal,           // data
  changed,         // other data
  zero_over_data,  // written zeros at the source
  untouched_over_data,
  data_over_zero,  // written zeros at the destination
  data_over_untouched,
  zero_over_untouched,
  untouched_over_zero,
  untouched,  // at both ends
  late,       // one byte differs, the last one
};
Fate fate_of(std::size_t number) { return static_cast<Fate>(number / 3 * 7 % 10); }

void fill(StillGuest& here, StillGuest& there) {
  for (std::size_t i = 0; i < pages; ++i) {
    const Fate fate = fate_of(i);
    const char old = static_cast<char>(1 + i % 100);
    if (fate == Fate::equal || fate == Fate::changed || fate == Fate::zero_over_data ||
        fate == Fate::untouched_over_data || fate == Fate::late)
      there.write(i, old);
    if (fate == Fate::data_over_zero || fate == Fate::untouched_over_zero) there.write(i, 0);
    if (fate == Fate::equal || fate == Fate::late) here.write(i, old);
    if (fate == Fate::changed || fate == Fate::data_over_zero || fate == Fate::data_over_untouched)
      here.write(i, static_cast<char>(old + 101));
    if (fate == Fate::zero_over_data || fate == Fate::zero_over_untouched) here.write(i, 0);
    if (fate == Fate::late) here.memory.bytes()[i * page + page - 1] ^= std::byte{0x80};
  }
}
std::size_t count(std::initializer_list<Fate> fates) {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < pages; ++i) sum += std::ranges::find(fates, fate_of(i)) != fates.end();
  return sum;
}

}  // namespace

TEST_CASE("What the older copy has is not sent again, whatever is zero or untouched at either end") {
  for (const Kind kind : {Kind::anonymous, Kind::memfd})
    for (const char* zero_pages : {"none", "legacy", "multifd"}) {
      CAPTURE(static_cast<int>(kind));
      CAPTURE(zero_pages);
      StillGuest here(kind), there(kind);
      fill(here, there);
      const bool all_as_bytes = zero_pages == "none"sv;
      const std::size_t untouched_here = pages - here.memory.resident();
      const std::size_t resident = there.memory.resident();
      const auto [moved, taken] =
          migrate_between(here, there, {.zero_pages = zero_pages, .verify = Verify::required, .base = test_digests()},
                          {.base = test_digests()});
      REQUIRE_MESSAGE(moved.has_value(), text(moved));
      REQUIRE_MESSAGE(taken.has_value(), text(taken));
      CHECK(moved->pages_verified == pages);
      const std::size_t data = count({Fate::changed, Fate::data_over_zero, Fate::data_over_untouched, Fate::late});
      const std::size_t zeros = count({Fate::zero_over_data, Fate::untouched_over_data});
      CHECK(moved->rounds[0].normal_pages == (all_as_bytes ? data + zeros : data));
      CHECK(moved->rounds[0].zero_pages == (all_as_bytes ? 0 : zeros));
      REQUIRE(moved->base.has_value());
      CHECK(moved->base->pages == pages);
      CHECK(moved->base->equal_pages == pages - data - zeros);
      CHECK(moved->base->digest_bytes < 20 * pages);
      REQUIRE(taken->base.has_value());
      CHECK(taken->base->pages == pages);
      CHECK(taken->base->digest_bytes == moved->base->digest_bytes);
      // What nobody has touched at the destination stays so, and at the source, but where all is to be read.
      CHECK(there.memory.resident() == resident + count({Fate::data_over_untouched}));
      if (!all_as_bytes) CHECK(pages - here.memory.resident() == untouched_here);
      CHECK(are_equal(here, there));
    }
}

TEST_CASE("Of an equal copy nothing is sent, of one of zeros all, and of a sparse one the holes cost nothing") {
  StillGuest here, equal, empty;
  for (std::size_t i = 0; i < pages; ++i) {
    here.write(i, static_cast<char>(i % 50 + 1));
    equal.write(i, static_cast<char>(i % 50 + 1));
  }
  const auto same = migrate_between(here, equal, {.base = test_digests()}, {.base = test_digests()});
  REQUIRE_MESSAGE(same.moved.has_value(), text(same.moved));
  CHECK(same.moved->rounds[0].wire_bytes < 10'000);
  CHECK(same.moved->base->equal_pages == pages);
  CHECK(are_equal(here, equal));

  const auto all = migrate_between(here, empty, {.base = test_digests()}, {.base = test_digests()});
  REQUIRE_MESSAGE(all.moved.has_value(), text(all.moved));
  CHECK(all.moved->rounds[0].normal_pages == pages);
  CHECK(all.moved->base->equal_pages == 0);
  CHECK(all.moved->base->digest_bytes < 100);
  CHECK(are_equal(here, empty));

  StillGuest sparse_here, sparse_there;
  const auto nothing = migrate_between(sparse_here, sparse_there, {.base = test_digests()}, {.base = test_digests()});
  REQUIRE_MESSAGE(nothing.moved.has_value(), text(nothing.moved));
  CHECK(nothing.moved->base->equal_pages == pages);
  CHECK(sparse_here.memory.resident() == 0);
  CHECK(sparse_there.memory.resident() == 0);
}

TEST_CASE("What is written while the pages are compared arrives") {
  StillGuest here, there;
  for (std::size_t i = 0; i < pages; ++i) {
    here.write(i, 'a');
    there.write(i, 'a');
  }
  test::DigestLog log;
  std::atomic<std::size_t> written = 0;
  log.behind = [&](std::span<const std::byte> bytes) {
    const auto number = static_cast<std::size_t>(bytes.data() - here.memory.bytes().data()) / page;
    if (number >= pages || number % 10 != 3) return;  // the page of zeros is not the guest's
    here.write(number, 'b');
    ++written;
  };
  const auto [moved, taken] =
      migrate_between(here, there, {.verify = Verify::required, .base = test_digests(&log)}, {.base = test_digests()});
  REQUIRE_MESSAGE(moved.has_value(), text(moved));
  CHECK(written > pages / 11);
  CHECK(moved->base->equal_pages == pages);
  std::uint64_t sent = 0;
  for (const Round& round : moved->rounds) sent += round.normal_pages;
  CHECK(sent == written);
  CHECK(are_equal(here, there));
}

TEST_CASE("Each migration has a key of its own, and other digests of the same pages") {
  StillGuest here, there;
  for (std::size_t i = 0; i < pages; ++i) {
    here.write(i, 'a');
    there.write(i, 'a');
  }
  std::array<test::DigestLog, 2> at_source, at_destination;
  for (std::size_t i = 0; i < 2; ++i) {
    const auto [moved, taken] =
        migrate_between(here, there, {.base = test_digests(&at_source[i])}, {.base = test_digests(&at_destination[i])});
    REQUIRE_MESSAGE(moved.has_value(), text(moved));
    REQUIRE_FALSE(at_source[i].keys.empty());
    // One key in a migration, the same at both ends.
    for (const auto* log : {&at_source[i], &at_destination[i]})
      CHECK(std::ranges::all_of(log->keys, [&](const DigestKey& key) { return key == at_source[i].keys[0]; }));
    CHECK(at_source[i].keys[0] != DigestKey{});
  }
  CHECK(at_source[0].keys[0] != at_source[1].keys[0]);
  // digests[0] is that of a page of zeros; all others are of one page.
  CHECK(at_destination[0].digests.at(1) != at_destination[1].digests.at(1));
}

TEST_CASE("A guest that goes back and forth five times is compared each time, and arrives whole") {
  const test::Watchdog watchdog("ping-pong");
  test::MigratingGuest first(2048), second(2048);
  first.boot();
  first.run(64, std::chrono::microseconds(100));
  test::MigratingGuest* from = &first;
  test::MigratingGuest* to = &second;
  for (int i = 0; i < 5; ++i) {
    CAPTURE(i);
    auto listener = Listener::listen({.host = "127.0.0.1"}, 64);
    REQUIRE(listener.has_value());
    auto taken =
        std::async(std::launch::async, [&] { return test::take_guest(*to, *listener, {.base = test_digests()}); });
    const auto moved = test::send_guest(*from, listener->local_address(),
                                        {.compression = "none", .verify = Verify::required, .base = test_digests()});
    const auto arrived = taken.get();
    REQUIRE_MESSAGE(moved.has_value(), text(moved));
    REQUIRE_MESSAGE(arrived.has_value(), text(arrived));
    REQUIRE(moved->base.has_value());
    CHECK(moved->pages_verified == 2048);
    // In the beginning only what is zero is equal; later all but what the guest has written.
    CHECK(moved->base->equal_pages >= (i == 0 ? 400 : 2048 - 64));
    CHECK(moved->base->equal_pages < 2048);
    CHECK(to->runs());
    CHECK(test::eventually([&] { return to->written() > from->written() + 70; }));
    std::swap(from, to);
  }
  from->stop();
  CHECK(from->torn() == 0);
}

TEST_CASE("Where one end has no digest, or no older copy, all is sent") {
  for (const bool at_source : {true, false}) {
    CAPTURE(at_source);
    StillGuest here, there;
    fill(here, there);
    const auto [moved, taken] =
        migrate_between(here, there, {.verify = Verify::required, .base = at_source ? test_digests() : KeyedDigests{}},
                        {.base = at_source ? KeyedDigests{} : test_digests()});
    REQUIRE_MESSAGE(moved.has_value(), text(moved));
    CHECK_FALSE(moved->base.has_value());
    CHECK_FALSE(taken->base.has_value());
    CHECK(moved->rounds[0].normal_pages + moved->rounds[0].zero_pages == pages);
    CHECK(are_equal(here, there));
  }
}

TEST_CASE("An older copy in memory that is said to be zeroed is refused") {
  StillGuest there;
  auto listener = Listener::listen({.host = "127.0.0.1"}, 64);
  REQUIRE(listener.has_value());
  const auto taken = migrate_from<Stacks>(there, *listener,
                                          {.into = {.destination = DestinationMemory::zeroed},
                                           .base = test_digests(),
                                           .first_timeout = std::chrono::seconds(1)});
  REQUIRE_FALSE(taken.has_value());
  CHECK(taken.error().code == Errc::bad_option);
}

TEST_CASE("A digest that fails at either end ends the migration with its error at both") {
  for (const bool at_source : {true, false}) {
    CAPTURE(at_source);
    StillGuest here, there;
    fill(here, there);
    test::DigestLog log;
    log.fails = true;
    const auto [moved, taken] = migrate_between(here, there, {.base = test_digests(at_source ? &log : nullptr)},
                                                {.base = test_digests(at_source ? nullptr : &log)});
    REQUIRE_FALSE(moved.has_value());
    REQUIRE_FALSE(taken.has_value());
    CHECK_MESSAGE(text(moved).contains("the test's digest"), text(moved));
    CHECK_MESSAGE(text(taken).contains("the test's digest"), text(taken));
  }
}

TEST_CASE("Cancelled by either side while pages are compared: both come back") {
  for (const bool by_source : {true, false}) {
    CAPTURE(by_source);
    StillGuest here, there;
    for (std::size_t i = 0; i < pages; ++i) there.write(i, 'a'), here.write(i, 'a');
    auto migration = Migration::create();
    REQUIRE(migration.has_value());
    test::DigestLog log;
    std::atomic<unsigned> seen = 0;
    log.behind = [&](std::span<const std::byte>) {
      if (++seen == 1000) migration->cancel();
    };
    SourceOptions from{.base = test_digests(by_source ? &log : nullptr)};
    DestinationOptions to{.base = test_digests(by_source ? nullptr : &log)};
    (by_source ? from.migration : to.migration) = &*migration;
    const auto [moved, taken] = migrate_between(here, there, from, to);
    REQUIRE_FALSE(moved.has_value());
    REQUIRE_FALSE(taken.has_value());
    CHECK((by_source ? moved.error().code : taken.error().code) == Errc::cancelled);
    CHECK((by_source ? taken.error().code : moved.error().code) == Errc::peer_gave_up);
  }
}

TEST_CASE("With memory that follows only what differs follows") {
  test::OnDemand vm(2048, {.base = test_digests()});
  vm.here.stop();
  for (std::size_t i = 512; i < 2048; ++i)
    if (i % 4 != 3) std::memcpy(vm.there.guest.memory().data() + i * page, vm.here.memory().data() + i * page, page);
  vm.here.run(test::OnDemand::working_set, std::chrono::microseconds(20));
  const test::Tried tried = vm.migrate({.postcopy = {.strategy = Postcopy::at_once}, .base = test_digests()});
  REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
  REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
  vm.check_whole();
  REQUIRE(tried.sent->base.has_value());
  CHECK(tried.sent->base->equal_pages >= (2048 - 512) / 4 * 3);
  REQUIRE(tried.taken->postcopy.has_value());
  CHECK(tried.taken->postcopy->missing_pages <=
        2048 + 64 - tried.sent->base->equal_pages + test::OnDemand::working_set);
}

TEST_CASE("Connections that break while pages are compared return, and the guest arrives whole") {
  const test::Watchdog watchdog("connections that break while pages are compared");
  for (const std::optional<unsigned> which : {std::optional(0u), std::optional(1u), std::optional<unsigned>()}) {
    CAPTURE(which.value_or(99));
    test::MigratingGuest here(8192);
    here.boot();
    here.run(64, std::chrono::microseconds(100));
    test::DigestLog log;
    std::atomic<unsigned> seen = 0;
    std::function<void()> break_links;
    log.behind = [&](std::span<const std::byte>) {
      if (++seen == 3000) break_links();
    };
    test::There there(8192, {.base = test_digests(&log), .resume = {.timeout = std::chrono::seconds(20)}});
    std::ranges::copy(here.memory(), there.guest.memory().begin());
    for (std::size_t i = 0; i < 8192; i += 5) there.guest.memory()[i * page + 17] ^= std::byte{1};
    test::Script script(there.address.port);
    break_links = [&] { script.break_links(which, true); };
    test::Followed followed;
    const test::Tried tried = test::migrate_once(
        here, followed, there,
        {.channels = 2, .resume = {.enabled = true}, .verify = Verify::required, .base = test_digests()});
    REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
    REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
    CHECK(seen > 3000);
    REQUIRE(tried.sent->base.has_value());
    CHECK(tried.sent->base->equal_pages > 6000);
    CHECK(tried.sent->pages_verified == 8192);
    there.guest.stop();
    CHECK(there.guest.torn() == 0);
  }
}

// ---- What the other side must not say

namespace {

using Messages = std::vector<std::vector<std::byte>>;

template <class Written>
std::vector<std::byte> bytes_of(const Written& written) {
  return {written.view().begin(), written.view().end()};
}

/// Lets a source of `pages` pages come to a destination that holds an older copy, and says these messages of it. Returns what
/// becomes of the source. Params `unasked`: they are said right behind ACCEPTED.
Result<MigrationReport> say_by_hand(const Messages& messages, bool asked = true) {
  const test::Watchdog watchdog("an older copy by hand");
  auto listener = Listener::listen({.host = "127.0.0.1"}, 8);
  REQUIRE(listener.has_value());
  std::thread answering([&] {
    auto links = listener->accept_channels(2, std::chrono::seconds(10));
    if (!links) return;
    FdTransport& main = links->front();
    qemu::ReturnPathWriter<FdTransport> writer(main);
    std::string said;
    const auto read_up_to = [&](std::string_view what) {
      while (!said.contains(what)) {
        char byte = 0;
        const iovec buffer{&byte, 1};
        const auto got = main.read_some(std::span(&buffer, 1), std::chrono::seconds(10), nullptr);
        if (!got || *got == 0) return false;
        said += byte;
      }
      return true;
    };
    if (!read_up_to("mf\0\1"sv)) return;
    static_cast<void>(writer.pong(wire::extension_pong()));
    wire::PeerSettings own;
    if (asked) own.features.add({.name = wire::feature_base});
    static_cast<void>(writer.accepted(own));
    if (asked && !read_up_to("mf\0\2\0\17"sv)) return;  // BASE_WANTED
    for (const auto& message : messages) {
      wire::FieldWriter<600> bytes;
      bytes.be(wire::extension_number).be(static_cast<std::uint16_t>(message.size())).bytes(message);
      static_cast<void>(writer.base(bytes.view()));
    }
    static_cast<void>(read_up_to("nothing ends like this"));
  });
  StillGuest here;
  here.write(1, 'x');
  auto sent = migrate_to<Stacks>(here, listener->local_address(),
                                 {.channels = 1, .base = test_digests(), .progress_timeout = std::chrono::seconds(2)});
  answering.join();
  return sent;
}

}  // namespace

TEST_CASE(
    "Refused: what a destination says of its older copy without having been asked, out of order, or out of bounds") {
  const auto key = bytes_of(wire::encode_base_key({std::byte{7}}));
  const auto zeros = [](std::uint32_t block, std::uint64_t first, std::uint64_t count) {
    return bytes_of(wire::encode_base_zeros(block, first * page, count));
  };
  const auto digests = [](std::uint32_t block, std::uint64_t first, std::size_t count) {
    return bytes_of(wire::encode_base_digests(block, first * page, std::vector<Digest128>(count)));
  };
  const auto refuse = [](const Messages& messages, Errc code, bool asked = true) {
    const auto sent = say_by_hand(messages, asked);
    REQUIRE_FALSE(sent.has_value());
    CHECK_MESSAGE(sent.error().code == code, text(sent));
  };
  refuse({key}, Errc::unexpected_extension_message, false);
  refuse({key, zeros(0, 0, pages)}, Errc::unexpected_extension_message, false);
  refuse({zeros(0, 0, pages)}, Errc::unexpected_extension_message);
  refuse({key, key}, Errc::unexpected_extension_message);
  refuse({key, zeros(1, 0, 1)}, Errc::bad_extension_message);  // a block that is not there
  refuse({key, zeros(~0u, 0, 1)}, Errc::bad_extension_message);
  refuse({key, zeros(0, 1, 1)}, Errc::bad_extension_message);                      // a page left out
  refuse({key, digests(0, 0, 3), digests(0, 2, 1)}, Errc::bad_extension_message);  // a page twice
  refuse({key, zeros(0, 0, pages + 1)}, Errc::bad_extension_message);              // more than there are
  refuse({key, zeros(0, 0, ~std::uint64_t{0})}, Errc::bad_extension_message);
  refuse({key, zeros(0, 0, pages - 1), digests(0, pages - 1, 2)}, Errc::bad_extension_message);
  refuse({key, zeros(0, 0, 0)}, Errc::bad_extension_message);
  auto misaligned = zeros(0, 0, 1);
  misaligned[13] = std::byte{1};
  refuse({key, misaligned}, Errc::bad_extension_message);
  auto half = digests(0, 0, 2);
  half.resize(half.size() - 8);
  refuse({key, half}, Errc::bad_extension_message);
  refuse({key, zeros(0, 0, pages), zeros(0, 0, 1)}, Errc::unexpected_extension_message);  // behind the last one
  auto long_key = key;
  long_key.push_back({});
  refuse({long_key}, Errc::bad_extension_message);
  // A destination that stops in the middle.
  refuse({key, zeros(0, 0, 5)}, Errc::timed_out);
  refuse({}, Errc::timed_out);
}

TEST_CASE(
    "Refused: a source that asks for the older copy twice, without the feature, of one that has none, or too late") {
  enum class Fault { none, no_feature, no_copy, twice, behind_zeros, behind_end };
  for (const Fault fault :
       {Fault::none, Fault::no_feature, Fault::no_copy, Fault::twice, Fault::behind_zeros, Fault::behind_end}) {
    CAPTURE(static_cast<int>(fault));
    const test::Watchdog watchdog("a source by hand");
    StillGuest there;
    there.map = RamMap();
    REQUIRE(there.map.add("pc.ram", there.memory.bytes().first(70 * page)).has_value());
    there.memory.bytes()[3 * page] = std::byte{1};
    auto listener = Listener::listen({.host = "127.0.0.1"}, 64);
    REQUIRE(listener.has_value());
    const DestinationOptions options{.base = fault == Fault::no_copy ? KeyedDigests{} : test_digests()};
    auto taken = std::async(std::launch::async, [&] { return migrate_from<Stacks>(there, *listener, options); });
    test::SourceByHand source(listener->local_address());
    source.ask();
    wire::FeatureList features;
    if (fault != Fault::no_feature) features.add({.name = wire::feature_base});
    features.add({.name = wire::feature_known_zeros});
    source.announce(70, {}, features);
    const auto accepted = source.answer();
    REQUIRE(accepted.message.kind == wire::ExtensionKind::accepted);
    if (fault == Fault::behind_zeros) source.known_zeros(0, 0, 1, true);
    if (fault == Fault::behind_end) source.end_ram();
    source.base_wanted();
    if (fault == Fault::none || fault == Fault::twice) {
      CHECK(source.answer().message.kind == wire::ExtensionKind::base_key);
      const auto zeros = source.answer().message;
      CHECK(zeros.kind == wire::ExtensionKind::base_zeros);
      CHECK(wire::parse_base_pages(zeros)->pages == 3);
      const auto one = source.answer().message;
      CHECK(one.kind == wire::ExtensionKind::base_digests);
      CHECK(wire::parse_base_pages(one)->pages == 1);
      CHECK(wire::parse_base_pages(source.answer().message)->pages == 66);
    }
    if (fault == Fault::twice) source.base_wanted();
    if (fault != Fault::none) {
      CHECK_FALSE(source.failure().empty());
      CHECK(test::code_of(taken.get()) == Errc::unexpected_extension_message);
      continue;
    }
    source.end_ram();
    source.state_whole();
    CHECK(source.answer().message.kind == wire::ExtensionKind::loaded);
    source.hand_over();
    const auto arrived = taken.get();
    REQUIRE(arrived.has_value());
    CHECK(arrived->base->pages == 70);
  }
}
