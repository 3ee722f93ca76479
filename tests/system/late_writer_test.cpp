// SPDX-License-Identifier: MIT
//
// Connections that return where they must not (format/hardening.md section 16, row 30): an older one that goes on writing
// beside the newer one, and others that say REJOIN: no byte of theirs is taken, and the migration is undisturbed.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/receiver.hpp"
#include "support/leftovers.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/migrate_ends.hpp"
#include "support/raw_stream.hpp"
#include "support/source_by_hand.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

// ---- A receiver

/// The newer connection of one channel.
class Newer final : public packets::Rejoins<FdTransport> {
 public:
  void come(FdTransport link, std::uint32_t generation) {
    monitor_.update([&] { waiting_.emplace(Arrival{std::move(link), generation}); });
  }
  void joined(unsigned) noexcept override {}
  void stop() noexcept override {
    monitor_.update([this] { over_ = true; });
  }

 private:
  Result<Arrival> do_await(unsigned, const Error&) noexcept override {
    auto held = monitor_.lock();
    monitor_.wait(held, [&] { return waiting_ || over_; });
    if (!waiting_) return fail(Errc::cancelled, Stage::accept, "the test's connections");
    Arrival arrival = std::move(*waiting_);
    waiting_.reset();
    return arrival;
  }
  engine::Monitor monitor_;  ///< of all below
  std::optional<Arrival> waiting_;
  bool over_ = false;
};

constexpr std::byte old_content{1}, new_content{2};

Bytes page_of(std::byte content, std::size_t bytes = 4096) {
  return RawStream().packet({.normal = {0}, .payload = Bytes(bytes, content)}).bytes();
}
Bytes sync_packet() { return RawStream().sync().bytes(); }

/// Where the older connection is when the newer one comes.
enum class Late {
  silent,      ///< it has said what it had to say, and goes on later
  mid_packet,  ///< in the middle of a page
  waiting,     ///< at the barrier, with more behind its SYNC
  flooding,    ///< it writes all the time
};

/// Writes as long as somebody takes it: the other side may break the connection at any byte.
void go_on(FdTransport& link, const Bytes& bytes, unsigned times) {
  while (times-- > 0 && write_all(link, std::span<const std::byte>(bytes), no_hang, nullptr)) {
  }
}

/// How many SYNCs of channel 1 have arrived.
std::uint64_t synced(const Receiver<FdTransport, NoComp>& rx) {
  const auto stats = rx.stats();
  const auto found = std::ranges::find(stats.channels, 1u, &ChannelStats::id);
  return found == stats.channels.end() ? 0 : found->syncs;
}

void late_writer(Late late) {
  CAPTURE(static_cast<int>(late));
  GuestRam there{4, std::byte{0xaa}};
  Newer newer;
  auto links = tcp_links(2);
  FdTransport& old = links.sender[1];
  for (unsigned i = 0; i < 2; ++i) say(links.sender[i], RawStream().hello(i).bytes());
  auto rx = Receiver<FdTransport, NoComp>::open(there.map, std::move(links.receiver),
                                                {.barrier = Barrier::manual, .barrier_timeout = no_hang}, &newer);
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  const auto page = [&] { return there.memory.page(0, 4096); };
  const auto all_are = [&](std::byte content) {
    return std::ranges::all_of(page(), [=](auto b) { return b == content; });
  };
  std::uint64_t epoch = 0;
  const auto release = [&] {
    const auto released = rx->release_epoch();
    REQUIRE_MESSAGE(released.has_value(), text(released));
    REQUIRE(*released == epoch++);
  };

  say(old, page_of(old_content));
  say(old, sync_packet());
  say(links.sender[0], sync_packet());
  release();
  CHECK(all_are(old_content));

  std::thread flood;
  const Bytes whole = page_of(old_content);
  const auto half = static_cast<std::ptrdiff_t>(whole.size() - 2048);
  switch (late) {
    case Late::silent: say(old, whole); break;
    case Late::mid_packet: say(old, Bytes(whole.begin(), whole.begin() + half)); break;
    case Late::waiting:
      say(old, sync_packet());
      say(old, whole);
      say(links.sender[0], sync_packet());
      break;
    case Late::flooding: flood = std::thread([&] { go_on(old, whole, ~0u); }); break;
  }
  auto next = tcp_links(1);
  FdTransport& link = next.sender[0];
  newer.come(std::move(next.receiver[0]), 1);
  if (late == Late::waiting) CHECK(eventually([&] { return synced(*rx) == 2; }));
  rx->drop_older(1, 1);
  if (late == Late::waiting) release();
  std::array<std::byte, wire::rejoin_answer_bytes> said;
  REQUIRE(read_exact(link, std::span<std::byte>(said)).has_value());
  const auto answer = wire::parse_rejoin_answer(said);
  REQUIRE_MESSAGE(answer.has_value(), text(answer));
  CHECK(*answer == wire::RejoinAnswer{.verdict = wire::RejoinVerdict::joined, .generation = 1});

  // From here on nothing of the older one is taken, in whatever state it is.
  const Bytes rest = late == Late::mid_packet ? Bytes(whole.begin() + half, whole.end()) : whole;
  if (late != Late::flooding) go_on(old, rest, 1);
  say(link, wire::FieldWriter<wire::rejoin_epoch_bytes>().be(epoch).view());
  say(link, page_of(new_content));
  say(link, sync_packet());
  say(links.sender[0], sync_packet());
  release();
  CHECK((rx->arrived_channels()[0] & 3) == 3);
  CHECK(all_are(new_content));
  if (late != Late::flooding) go_on(old, whole, 200);
  if (late != Late::flooding) go_on(old, sync_packet(), 2);
  for (FdTransport* each : {&link, &links.sender[0]}) say(*each, sync_packet());
  release();
  CHECK(all_are(new_content));
  REQUIRE(rx->end_epochs().has_value());
  for (FdTransport* each : {&link, &links.sender[0]}) REQUIRE(each->finish().has_value());
  const auto finished = rx->finish(no_hang);
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(all_are(new_content));
  old.shutdown();
  if (flood.joinable()) flood.join();
}

// ---- A destination

constexpr std::size_t pages = 64;
constexpr Uuid session{std::byte{0xa0}, std::byte{1}}, another{std::byte{0xb0}, std::byte{2}};

/// What a destination has said of strangers.
struct Strangers {
  std::function<void(const char*)> hook() {
    return [this](const char* why) {
      const std::scoped_lock lock(mutex);
      said.push_back(why);
    };
  }
  std::size_t count(std::string_view part) const {
    const std::scoped_lock lock(mutex);
    return static_cast<std::size_t>(
        std::ranges::count_if(said, [&](const std::string& each) { return each.contains(part); }));
  }
  mutable std::mutex mutex;
  std::vector<std::string> said;
};

Bytes bytes_of(const wire::Rejoin& rejoin) {
  const auto bytes = wire::encode_rejoin(rejoin);
  return {bytes.view().begin(), bytes.view().end()};
}
wire::RejoinAnswer answer_to(FdTransport& link, const wire::Rejoin& rejoin) {
  say(link, bytes_of(rejoin));
  std::array<std::byte, wire::rejoin_answer_bytes> said;
  REQUIRE(read_exact(link, std::span<std::byte>(said)).has_value());
  const auto answer = wire::parse_rejoin_answer(said);
  REQUIRE_MESSAGE(answer.has_value(), text(answer));
  CHECK(answer->generation == rejoin.generation);
  return *answer;
}

/// A destination whose source has been accepted, and whose START is whole.
struct Accepted {
  Accepted() {
    there.begin();
    source.emplace(there.address);
    source->ask();
    source->announce(pages, {}, wire::FeatureList().add({.name = wire::feature_resume}), 1, session);
    CHECK(source->answer().message.kind == wire::ExtensionKind::accepted);
    CHECK(source->answer().message.kind == wire::ExtensionKind::epoch_whole);
  }
  /// Params `why`: a part of what the destination says of it.
  void check_refused(const wire::Rejoin& rejoin, wire::RejoinVerdict verdict, std::string_view why) {
    CAPTURE(why);
    const std::size_t before = strangers.count(why);
    FdTransport link = connect_by_hand(there.address);
    CHECK(answer_to(link, rejoin).verdict == verdict);
    check_link_closed(link);
    CHECK(eventually([&] { return strangers.count(why) == before + 1; }));
  }
  FdTransport joined(const wire::Rejoin& rejoin) {
    FdTransport link = connect_by_hand(there.address);
    CHECK(answer_to(link, rejoin).verdict == wire::RejoinVerdict::joined);
    return link;
  }

  Strangers strangers;
  There there{pages, {.on_stranger = strangers.hook()}};
  std::optional<SourceByHand> source;
};

using Role = wire::RejoinRole;
using Said = wire::RejoinVerdict;
constexpr std::uint64_t epoch_whole_bytes = 4 + wire::epoch_whole_bytes;

}  // namespace

TEST_CASE("An older connection that goes on writing beside the newer one changes no page any more") {
  const Watchdog watchdog("a late writer");
  for (const Late late : {Late::silent, Late::mid_packet, Late::waiting, Late::flooding}) late_writer(late);
}

TEST_CASE("Who says REJOIN and must not is refused by name, and the migration goes on") {
  const Watchdog watchdog("REJOINs that are refused");
  const Leftovers leftovers;
  {
    Accepted migration;
    const wire::Rejoin channel{.role = Role::channel, .channel = 0, .generation = 2, .session = session};
    const wire::Rejoin main{.generation = 5, .session = session, .received = epoch_whole_bytes};
    const auto changed = [](wire::Rejoin rejoin, auto member, auto value) {
      rejoin.*member = value;
      return rejoin;
    };
    migration.check_refused(changed(channel, &wire::Rejoin::session, another), Said::unknown_session,
                            "of another migration");
    migration.check_refused(changed(main, &wire::Rejoin::session, another), Said::unknown_session,
                            "of another migration");
    for (const std::uint8_t id : {std::uint8_t{1}, std::uint8_t{255}})
      migration.check_refused(changed(channel, &wire::Rejoin::channel, id), Said::unknown_channel,
                              "of a channel that the migration does not have");

    // Malformed: no answer, as for any stranger.
    for (const auto& [at, value] : {std::pair{4, 2}, {6, 1}, {11, 0}, {28, 1}, {39, 1}}) {
      CAPTURE(at);
      const std::size_t before = migration.strangers.count("malformed");
      Bytes bytes = bytes_of(channel);
      bytes[static_cast<std::size_t>(at)] = static_cast<std::byte>(value);
      FdTransport link = connect_by_hand(migration.there.address);
      say(link, bytes);
      check_link_closed(link);
      CHECK(eventually([&] { return migration.strangers.count("malformed") == before + 1; }));
    }
    FdTransport web = connect_by_hand(migration.there.address);
    say(web, "GET / HTTP/1.1\r\n\r\n");
    check_link_closed(web);
    // Who says half of it, or nothing, keeps nobody waiting.
    FdTransport half = connect_by_hand(migration.there.address);
    const Bytes begun = bytes_of(channel);
    say(half, std::span(begun).first(20));
    FdTransport silent = connect_by_hand(migration.there.address);

    FdTransport newer = migration.joined(channel);
    say(newer, wire::FieldWriter<wire::rejoin_epoch_bytes>().be(std::uint64_t{1}).view());
    check_link_closed(migration.source->channel(0));
    migration.source->replace_channel(0, std::move(newer));
    for (const std::uint32_t generation : {1u, 2u})
      migration.check_refused(changed(channel, &wire::Rejoin::generation, generation), Said::stale_generation,
                              "older than the one that is there");
    migration.source->replace_main(migration.joined(main));
    for (const std::uint32_t generation : {1u, 5u})
      migration.check_refused(changed(main, &wire::Rejoin::generation, generation), Said::stale_generation,
                              "older than the one that is there");

    say(migration.source->channel(0), page_of(new_content));
    migration.source->end_ram();
    CHECK(migration.source->answer().message.kind == wire::ExtensionKind::epoch_whole);
    migration.check_refused(changed(channel, &wire::Rejoin::session, another), Said::unknown_session,
                            "of another migration");
    REQUIRE(migration.source->channel(0).finish().has_value());
    migration.source->state_whole();
    CHECK(migration.source->answer().message.kind == wire::ExtensionKind::loaded);
    migration.source->hand_over();
    CHECK(migration.source->answer().message.kind == wire::ExtensionKind::running);
    const auto taken = migration.there.result();
    CHECK_MESSAGE(taken.has_value(), text(taken));
    CHECK(migration.there.guest.memory()[0] == new_content);
    check_link_closed(half);
    check_link_closed(silent);
  }
  CHECK(leftovers.no_thread());
  CHECK(leftovers.no_descriptor());
}

TEST_CASE("A new connection that begins with an epoch that has ended, or is too far ahead, is refused") {
  const Watchdog watchdog("a first epoch that is none");
  for (const std::uint64_t epoch : {std::uint64_t{0}, std::uint64_t{3}, ~std::uint64_t{0}}) {
    CAPTURE(epoch);
    Accepted migration;
    FdTransport link = migration.joined({.role = Role::channel, .channel = 0, .generation = 1, .session = session});
    say(link, wire::FieldWriter<wire::rejoin_epoch_bytes>().be(epoch).view());
    const std::string failure = migration.source->failure();
    CHECK_MESSAGE(failure.contains("first epoch of a new connection"), failure);
    check_link_closed(link);
    const auto taken = migration.there.result();
    CHECK_MESSAGE(code_of(taken) == make_error_code(Errc::sync_mismatch), text(taken));
    CHECK(taken.error().detail == epoch);
    CHECK_FALSE(migration.there.guest.runs());
  }
}

TEST_CASE("A source whose main connection has more bytes than were sent is refused") {
  const Watchdog watchdog("a number of bytes that is none");
  Accepted migration;
  FdTransport link = migration.joined({.generation = 1, .session = session, .received = epoch_whole_bytes + 1});
  const auto taken = migration.there.result();
  CHECK_MESSAGE(code_of(taken) == make_error_code(Errc::bad_extension_message), text(taken));
  CHECK_MESSAGE(text(taken).contains("bytes that the other side has"), text(taken));
  CHECK_FALSE(migration.there.guest.runs());
}

TEST_CASE("Strangers that come while connections are being made again disturb nobody") {
  const Watchdog watchdog("strangers during reconnect");
  // Once without, for the number of operations.
  std::uint64_t operations = 0;
  for (const bool breaks : {false, true}) {
    Strangers strangers;
    There there(pages, {.retry_timeout = no_hang, .on_stranger = strangers.hook()});
    MigratingGuest here(pages);
    here.boot();
    here.run(16, 50us);
    Followed followed;
    Script* running = nullptr;
    std::list<FdTransport> others;
    Script script(there.address.port, breaks ? operations / 2 : Script::never, [&] {
      running->break_links(std::nullopt, true);
      const Bytes rejoin = bytes_of({.role = Role::channel, .generation = 1, .session = another});
      Bytes malformed = rejoin;
      malformed[4] = std::byte{7};
      for (const Bytes& said : {rejoin, malformed, Bytes(rejoin.begin(), rejoin.begin() + 10), Bytes()}) {
        others.push_back(connect_by_hand(there.address));
        say(others.back(), said);
      }
      others.push_back(connect_by_hand(there.address));
      say(others.back(), "SSH-2.0-x\r\n");
      CHECK(eventually(
          [&] { return strangers.count("of another migration") == 1 && strangers.count("malformed") == 1; }));
    });
    running = &script;
    const Tried tried =
        migrate_once(here, followed, there, {.channels = 2, .resume = {.enabled = true}, .rearm_pages = 64});
    REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
    REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
    CHECK(there.guest.runs());
    CHECK(there.guest.torn_when_resumed == 0);
    operations = script.operations();
    for (FdTransport& other : others) {
      std::array<std::byte, 64> answer;
      const iovec buffer = mutable_buffer(std::span(answer));
      while (const auto got = other.read_some(std::span(&buffer, 1), no_hang, nullptr))
        if (*got == 0) break;
    }
  }
}
