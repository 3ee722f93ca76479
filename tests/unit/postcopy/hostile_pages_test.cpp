// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/zstd.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/postcopy/page_server.hpp"
#include "multifd/postcopy/remote_pages.hpp"
#include "support/page_ends.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

using Bytes = std::vector<std::byte>;

/// The errors that a server has told of.
class Told {
 public:
  std::function<void(const Error&)> hook() {
    return [this](const Error& error) { monitor_.update([&] { errors_.push_back(error); }); };
  }
  /// The first one, which may still be to come.
  Error first() {
    auto held = monitor_.lock();
    (void)monitor_.wait_until(held, std::chrono::steady_clock::now() + no_hang, [&] { return !errors_.empty(); });
    return errors_.empty() ? Error{} : errors_.front();
  }

 private:
  engine::Monitor monitor_;
  std::vector<Error> errors_;
};

template <class... Parts>
Bytes joined(const Parts&... parts) {
  Bytes bytes;
  (bytes.insert(bytes.end(), parts.begin(), parts.end()), ...);
  return bytes;
}

Bytes hello(wire::PageHello own = {.session = session_of(5), .page_bytes = 4096}) {
  return joined(wire::encode_page_hello(own));
}
Bytes ask(std::string_view idstr, std::uint64_t start, std::uint32_t bytes) {
  return joined(
      wire::encode_page_request({.kind = wire::PageRequestKind::pages, .idstr = idstr, .start = start, .bytes = bytes})
          .view());
}

/// Reads until the end of the stream.
template <Transport T>
Bytes read_all(T& link) {
  Bytes all;
  std::array<std::byte, 4096> some;
  const iovec buffer = mutable_buffer(std::span<std::byte>(some));
  for (;;) {
    const auto arrived = link.read_some(MutableBuffers(&buffer, 1));
    if (!arrived || *arrived == 0) return all;
    all.insert(all.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(*arrived));
  }
}

/// What a server says to a client of these bytes: the reason it gives, and what it tells its owner.
struct Refusal {
  Error told;
  std::string text;  ///< of FAILED
};

Refusal say(const Bytes& bytes) {
  const Watchdog watchdog("say");
  Told told;
  ServedGuest<NoComp> served(16, 4096, {.session = session_of(5), .on_error = told.hook()});
  auto links = memory_links(1);
  REQUIRE(served.server->add(std::move(links.receiver[0])).has_value());
  auto& link = links.sender[0];
  CHECK(write_all(link, std::span<const std::byte>(bytes)).has_value());
  (void)link.finish();  // the server may have broken it off by now
  const Bytes answer = read_all(link);
  Refusal refusal{.told = told.first(), .text = ""};
  for (std::size_t at = 32; at + 6 <= answer.size(); ++at) {
    if (wire::load_be<std::uint32_t>(&answer[at]) != wire::page_failed_magic) continue;
    const auto failure = wire::parse_page_failed(std::span(answer).subspan(at + 6));
    if (failure) refusal.text = failure->text();
  }
  return refusal;
}

/// A server that says these bytes to whoever connects, whatever it hears, and how a client that asks for a page takes it.
/// `links` keeps what is said behind them away.
template <Compressor C = NoComp>
Error hear(Bytes bytes, RemotePagesOptions<C> options = {}, std::uint64_t asked = 2 * 4096) {
  const Watchdog watchdog("hear");
  std::vector<MemoryTransport> kept;
  options.session = session_of(5);
  options.blocks = {{"pc.ram", 1 << 20}};
  options.page_bytes = 4096;
  auto client = RemotePages<MemoryTransport, C>::open(
      [&](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
        auto links = memory_links(1, 4 << 20);
        CHECK(write_all(links.receiver[0], std::span<const std::byte>(bytes)).has_value());
        CHECK(links.receiver[0].finish().has_value());
        kept.push_back(std::move(links.receiver[0]));
        return std::move(links.sender[0]);
      },
      options);
  REQUIRE_MESSAGE(client.has_value(), text(client));
  auto fetcher = (*client)->open(FetchKind::urgent);
  if (!fetcher) return fetcher.error();
  CHECK((*fetcher)->ask({BlockId{0}, 0, asked}).has_value());
  const auto fetched = (*fetcher)->take();
  if (fetched) return {};
  CHECK(!(*client)->may_return(fetched.error()));
  return fetched.error();
}

Bytes greeting(wire::PageHello own = {.session = session_of(5), .page_bytes = 4096}) {
  return joined(wire::encode_page_greeting(own));
}
Bytes block_list(std::vector<StoreBlock> blocks = {{"bios", 8192}, {"pc.ram", 1 << 20}}) {
  Bytes list;
  for (const StoreBlock& block : blocks) list = joined(list, wire::encode_page_block(block.idstr, block.bytes).view());
  return joined(wire::encode_page_accepted({.blocks = static_cast<std::uint32_t>(blocks.size()),
                                            .bytes = static_cast<std::uint32_t>(list.size())}),
                list);
}
Bytes packet(std::vector<std::uint64_t> normal, std::vector<std::uint64_t> zero, std::string_view idstr = "pc.ram",
             std::uint32_t flags = 0) {
  Bytes bytes(wire::header_bytes(4096));
  wire::encode_header(bytes.data(), {.flags = flags,
                                     .pages_alloc = 128,
                                     .normal_pages = static_cast<std::uint32_t>(normal.size()),
                                     .zero_pages = static_cast<std::uint32_t>(zero.size()),
                                     .next_packet_size = static_cast<std::uint32_t>(normal.size() * 4096),
                                     .idstr = idstr});
  std::size_t slot = 0;
  for (const auto offset : normal) wire::store_offset(bytes.data(), slot++, offset);
  for (const auto offset : zero) wire::store_offset(bytes.data(), slot++, offset);
  bytes.resize(bytes.size() + normal.size() * 4096, std::byte{7});
  return bytes;
}

}  // namespace

TEST_CASE("A page server refuses what a client must not ask for, and says so to both") {
  const auto refused = [](const Bytes& bytes, Errc code) {
    const Refusal refusal = say(joined(hello(), ask("pc.ram", 0, 4096), bytes));
    CHECK_MESSAGE(refusal.told.code == code, text(refusal.told));
    CHECK(refusal.text == text(refusal.told).substr(text(refusal.told).find(": ") + 2));  // all but "channel 1"
  };
  refused(ask("pc.ram", 1, 4096), Errc::bad_page_request);
  refused(ask("", 4096, 0), Errc::bad_page_request);
  refused(ask("", 0, 4095), Errc::bad_page_request);
  refused(ask("", 0, batch_bytes + 4096), Errc::bad_page_request);
  refused(ask("", 16 * 4096, 4096), Errc::bad_page_request);
  refused(ask("", 15 * 4096, 8192), Errc::bad_page_request);
  refused(ask("", ~std::uint64_t{4095}, 8192), Errc::bad_page_request);
  refused(ask("pc.rom", 0, 4096), Errc::unknown_block);
  refused(ask(std::string_view("pc.ram\0", 7), 0, 4096), Errc::unknown_block);
  refused(joined(std::array{std::byte{0}, std::byte{9}, std::byte{0}, std::byte{0}}), Errc::unknown_return_message);
  refused(joined(std::array{std::byte{0}, std::byte{4}, std::byte{2}, std::byte{1}}), Errc::bad_return_length);

  CHECK(say(joined(hello(), ask("", 0, 4096))).told.code == Errc::unknown_block);  // a request of no block
  // A client that gives up, or is cut inside a request, did nothing wrong that it could be told.
  const Bytes gave_up = joined(wire::encode_page_request({.kind = wire::PageRequestKind::gave_up}).view());
  CHECK(say(joined(hello(), gave_up)).told.code == Errc::peer_gave_up);
  Bytes cut = joined(hello(), ask("pc.ram", 0, 4096));
  cut.pop_back();
  CHECK(say(cut).told.code == Errc::peer_closed);
}

TEST_CASE("A page server refuses strangers, other guests and other settings, and names both values") {
  wire::PageHello other{.session = session_of(6), .page_bytes = 4096};
  Refusal refusal = say(hello(other));
  CHECK(refusal.told.code == Errc::wrong_session);
  CHECK(refusal.text.contains("another migration"));
  other = {.session = session_of(5), .page_bytes = 16384};
  refusal = say(hello(other));
  CHECK(refusal.told.code == Errc::page_size_mismatch);
  CHECK(refusal.text.contains("16384"));
  CHECK(refusal.text.contains("4096"));
  other = {.session = session_of(5), .page_bytes = 0, .method = wire::flag_zstd};
  CHECK(say(hello(other)).told.code == Errc::wrong_compression);
  Bytes newer = hello();
  newer[7] = std::byte{2};
  CHECK(say(newer).told.code == Errc::extension_version_mismatch);
  // A stranger is told nothing, and is known by its first bytes.
  const std::string_view http = "GET / HTTP/1.1\r\n";
  refusal = say(joined(std::as_bytes(std::span(http))));
  CHECK(refusal.told.code == Errc::bad_magic);
  CHECK(refusal.text.empty());
  Bytes cut = hello();
  for (const std::size_t size : {0u, 3u, 4u, 35u}) {
    cut.resize(size);
    CHECK(say(cut).told.code == Errc::peer_closed);
    cut = hello();
  }
}

TEST_CASE("A client that asks and does not read is held up by its own connection, and cut in the end") {
  const Watchdog watchdog("flood");
  Told told;
  ServedGuest<NoComp, FdTransport> served(
      64, 4096, {.session = session_of(5), .progress_timeout = 300ms, .on_error = told.hook()});
  auto links = unix_links(1);
  REQUIRE(served.server->add(std::move(links.receiver[0])).has_value());
  REQUIRE(write_all(links.sender[0], hello()).has_value());
  Bytes requests;
  for (int i = 0; i < 64; ++i) requests = joined(requests, ask("pc.ram", 0, 64 * 4096));
  Result<void> written;
  std::size_t rounds = 0;
  while (written && rounds < 100'000) {  // 6 million requests, or until the server has had enough
    written = write_all(links.sender[0], std::span<const std::byte>(requests));
    ++rounds;
  }
  CHECK(!written.has_value());
  CHECK(told.first().code == Errc::timed_out);
  CHECK(served.server->stats().requests < 64);  // what the socket holds, and not what was asked for
  // Nobody else is disturbed.
  auto client = served.client({.session = session_of(5)});
  Rng rng(seed());
  std::string wrong;
  CHECK(fetch(*client, FetchKind::background, all_ranges(*client, 65536, rng), served.guest.map, wrong).has_value());
  CHECK(wrong == "");
}

TEST_CASE("Silent connections are closed after the hello's time limit, and make way for others before it") {
  const Watchdog watchdog("silent");
  Told told;
  ServedGuest<NoComp> served(
      16, 4096, {.session = session_of(5), .max_connections = 3, .hello_timeout = 600'000ms, .on_error = told.hook()});
  std::vector<MemoryTransport> silent;
  const auto connect = [&] {
    auto links = memory_links(1);
    CHECK(served.server->add(std::move(links.receiver[0])).has_value());
    silent.push_back(std::move(links.sender[0]));
  };
  for (int i = 0; i < 3; ++i) connect();
  auto client = served.client({.session = session_of(5)});  // the oldest silent one gives way
  CHECK(told.first().code == std::error_code(ENOBUFS, std::system_category()));
  (void)read_all(silent[0]);  // it has ended
  // Three that have said hello keep their places.
  std::vector<std::unique_ptr<PageFetcher>> fetchers;
  for (int i = 0; i < 3; ++i) {
    auto opened = client->open(FetchKind::background);
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    fetchers.push_back(std::move(*opened));
  }
  auto links = memory_links(1);
  const auto crowded = served.server->add(std::move(links.receiver[0]));
  REQUIRE(!crowded.has_value());
  CHECK(crowded.error().code == std::error_code(ENOBUFS, std::system_category()));

  Told late;
  ServedGuest<NoComp> impatient(16, 4096, {.hello_timeout = 50ms, .on_error = late.hook()});
  auto mute = memory_links(1);
  REQUIRE(impatient.server->add(std::move(mute.receiver[0])).has_value());
  CHECK(late.first().code == Errc::timed_out);
}

TEST_CASE("A server whose only place has just become free has it for the next one") {
  const Watchdog watchdog("one place");
  ServedGuest<NoComp> served(16, 4096, {.session = session_of(5), .max_connections = 1});
  auto client = served.client({.session = session_of(5)});
  for (int i = 0; i < 50; ++i) {  // each closes its connection, which the server's thread has to notice
    CAPTURE(i);
    const auto opened = client->open(FetchKind::background);
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
  }
}

TEST_CASE("A client refuses a server of another guest, with other settings or without its blocks") {
  CHECK(hear(greeting({.session = session_of(6), .page_bytes = 4096})).code == Errc::wrong_session);
  CHECK(hear(greeting({.session = session_of(5), .page_bytes = 16384})).code == Errc::page_size_mismatch);
  CHECK(hear(greeting({.session = session_of(5), .page_bytes = 0})).code == Errc::page_size_mismatch);
  CHECK(hear(greeting({.session = session_of(5), .page_bytes = 4096, .method = wire::flag_zstd})).code ==
        Errc::wrong_compression);
  CHECK(hear(Bytes(32, std::byte{0x48})).code == Errc::bad_magic);
  CHECK(hear(joined(greeting(), Bytes(12, std::byte{0}))).code == Errc::bad_magic);
  CHECK(hear(joined(greeting(), block_list({{"bios", 8192}}))).code == Errc::block_list_mismatch);
  CHECK(hear(joined(greeting(), block_list({{"pc.ram", 8192}}))).code == Errc::block_list_mismatch);
  CHECK(hear(joined(greeting(), block_list({{"pc.ram", 1 << 20}, {"pc.ram", 1 << 20}}))).code ==
        Errc::repeated_block_name);
  CHECK(hear(joined(greeting(), block_list({{"pc.ram", 4097}}))).code == Errc::bad_used_length);
  CHECK(hear(joined(greeting(), wire::encode_page_accepted({.blocks = ~0u, .bytes = ~0u}))).code ==
        Errc::stream_limit_exceeded);
  CHECK(hear(joined(greeting(), wire::encode_page_accepted({.blocks = 1024, .bytes = 1024}))).code ==
        Errc::bad_block_list);
}

TEST_CASE("A client refuses every answer but the one that it has asked for") {
  const Bytes begun = joined(greeting(), block_list());
  const auto answered = [&](const Bytes& bytes) { return hear(joined(begun, bytes)).code; };
  CHECK(answered(packet({0, 4096}, {})) == std::error_code{});
  CHECK(answered(packet({4096}, {0})) == std::error_code{});
  CHECK(answered(packet({0}, {})) == Errc::unasked_pages);
  CHECK(answered(packet({0, 4096, 8192}, {})) == Errc::unasked_pages);
  CHECK(answered(packet({4096, 8192}, {})) == Errc::unasked_pages);
  CHECK(answered(packet({4096, 0}, {})) == Errc::unasked_pages);
  CHECK(answered(packet({0, 0}, {})) == Errc::unasked_pages);
  CHECK(answered(packet({0, 1}, {})) == Errc::unasked_pages);
  CHECK(answered(packet({0}, {0})) == Errc::unasked_pages);
  CHECK(answered(packet({}, {0, ~std::uint64_t{4095}})) == Errc::unasked_pages);
  CHECK(answered(packet({0, 4096}, {}, "bios")) == Errc::unasked_pages);
  CHECK(answered(packet({0, 4096}, {}, "")) == Errc::bad_block_name);
  CHECK(answered(packet({0, 4096}, {}, "pc.ram", wire::flag_sync)) == Errc::unasked_pages);
  CHECK(answered(packet({}, {}, "", wire::flag_sync)) == Errc::unasked_pages);
  CHECK(answered(packet({0, 4096}, {}, "pc.ram", wire::flag_zstd)) == Errc::wrong_compression);
  CHECK(answered(packet({0, 4096}, {}, "pc.ram", wire::flag_device_state)) == Errc::device_state_refused);
  Bytes bad = packet({0, 4096}, {});
  bad[22] = std::byte{0x10};  // next_packet_size
  CHECK(answered(bad) == Errc::bad_payload_size);
  bad = packet({0, 4096}, {});
  wire::store_be<std::uint32_t>(&bad[36], wire::digest_tag);
  CHECK(answered(bad) == Errc::digest_mismatch);
  CHECK(answered(Bytes(4096, std::byte{0x48})) == Errc::bad_magic);
  // Under compression: a payload that is none, or one over its bound.
  bad = packet({0, 4096}, {}, "pc.ram", wire::flag_zstd);
  Bytes zstd_begun =
      joined(greeting({.session = session_of(5), .page_bytes = 4096, .method = wire::flag_zstd}), block_list());
  CHECK(hear<Zstd>(joined(zstd_begun, bad)).code == Errc::corrupt_payload);
  wire::store_be<std::uint32_t>(&bad[20], wire::max_payload_bytes + 1);
  CHECK(hear<Zstd>(joined(zstd_begun, bad)).code == Errc::payload_too_large);
}

TEST_CASE("Why a server gives up is told in its own words, and is final") {
  const Error reason = fail(Errc::truncated_image, Stage::read, "page of the image", 17, 4096, "guest.img").error();
  const Bytes failed = joined(wire::encode_page_failed(reason, describe(reason)).view());
  for (const Bytes& begun : {greeting(), joined(greeting(), block_list())}) {
    const Error error = hear(joined(begun, failed));
    CHECK(error.code == Errc::peer_gave_up);
    CHECK(error.peer_reason == Errc::truncated_image);
    CHECK(text(error).contains("guest.img"));
    CHECK(error.detail == 17);
  }
  Bytes bad = failed;
  bad[4] = std::byte{0xff};
  CHECK(hear(joined(greeting(), bad)).code == Errc::bad_extension_message);
  bad = failed;
  bad[7] = std::byte{2};
  CHECK(hear(joined(greeting(), bad)).code == Errc::unexpected_extension_message);
}

TEST_CASE("A server that says nothing, or stops inside an answer, is lost after the time limit") {
  const Watchdog watchdog("silent server");
  const Bytes whole = joined(greeting(), block_list(), packet({0}, {}));
  for (const std::size_t size : {std::size_t{0}, std::size_t{10}, std::size_t{40}, whole.size() - 4096 - 1344,
                                 whole.size() - 4096, whole.size() - 1}) {
    CAPTURE(size);
    std::vector<MemoryTransport> kept;
    std::atomic<int> tries{0};
    auto client = RemotePages<MemoryTransport>::open(
        [&](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
          if (++tries > 1) return fail(Errc::not_supported, Stage::connect, "only once");
          auto links = memory_links(1, 1 << 20);
          CHECK(write_all(links.receiver[0], std::span(whole).first(size)).has_value());
          kept.push_back(std::move(links.receiver[0]));
          return std::move(links.sender[0]);
        },
        {.session = session_of(5),
         .blocks = {{"pc.ram", 1 << 20}},
         .page_bytes = 4096,
         .hello_timeout = 40ms,
         .progress_timeout = 40ms});
    REQUIRE(client.has_value());
    auto fetcher = (*client)->open(FetchKind::urgent);
    if (!fetcher) {
      CHECK(fetcher.error().code == Errc::not_supported);  // it has tried again
      CHECK(size < whole.size() - 4096 - 1344);
      continue;
    }
    REQUIRE((*fetcher)->ask({BlockId{0}, 0, 4096}).has_value());
    const auto fetched = (*fetcher)->take();
    REQUIRE(!fetched.has_value());
    CHECK(fetched.error().code == Errc::timed_out);
    CHECK((*client)->may_return(fetched.error()));
  }
}
