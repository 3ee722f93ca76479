// SPDX-License-Identifier: MIT
//
// ReturnPathReader and ReturnPathWriter over connections.
#include <chrono>
#include <span>
#include <string_view>

#include "multifd/qemu/return_path_reader.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "support/format_vector.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace multifd::qemu;
using namespace std::chrono_literals;
using Bytes = std::vector<std::byte>;

namespace {

/// A connection whose first write fails, and no other.
struct FailsOnce : FdTransport {
  explicit FailsOnce(FdTransport below) : FdTransport(std::move(below)) {}
  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    if (std::exchange(failed, true)) return FdTransport::write_some(buffers);
    return fail_errno(Stage::write, "write", EIO);
  }
  bool failed = false;
};

}  // namespace

TEST_CASE("ReturnPathWriter writes the vectors, and ReturnPathReader reads them; waits end, and an end is one") {
  test::FdPair links = test::unix_pair();
  ReturnPathWriter<FdTransport> writer(links.first);
  ReturnPathReader<FdTransport> reader(links.second);
  CHECK(reader.next(1ms).error().code == Errc::timed_out);
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  interrupt->trigger();
  CHECK(reader.next(no_timeout, &*interrupt).error().code == Errc::cancelled);

  REQUIRE(writer.pong(wire::extension_pong(1)).has_value());
  const auto pong = reader.next(10s);
  REQUIRE((pong && *pong));
  CHECK(wire::version_in_pong((*pong)->value) == 1);
  reader.take_extension();
  wire::PeerSettings own;
  own.features.add({.name = wire::feature_resume}).add({.name = wire::feature_page_digests});
  REQUIRE(writer.accepted(own).has_value());
  for (const std::uint64_t epoch : {0u, 1u, 2u})
    REQUIRE(writer.epoch_whole({.epoch = epoch, .received = 26 * epoch, .channels = {3}}).has_value());
  REQUIRE(writer.loaded(2).has_value());
  REQUIRE(writer.user_data(std::as_bytes(std::span(std::string_view("ok")))).has_value());
  REQUIRE(writer.running().has_value());
  REQUIRE(writer.shut(0).has_value());
  REQUIRE(links.first.finish().has_value());
  Bytes bytes((*pong)->bytes.begin(), (*pong)->bytes.end());
  const auto accepted = reader.next(10s);
  REQUIRE((accepted && *accepted));
  const auto settings = wire::parse_settings((*accepted)->message);
  REQUIRE(settings.has_value());
  CHECK(settings->features.has("page-digests"));
  bytes.insert(bytes.end(), (*accepted)->bytes.begin(), (*accepted)->bytes.end());
  for (;;) {
    const auto message = reader.next(10s);
    REQUIRE(message.has_value());
    if (!*message) break;
    bytes.insert(bytes.end(), (*message)->bytes.begin(), (*message)->bytes.end());
  }
  CHECK(reader.shut());
  CHECK(bytes == test::format_vector("extension.md", "extension_answers"));
}

TEST_CASE(
    "ReturnPathWriter's FAILED is the vector; ReturnPathReader tells an end inside a message; first errors stay") {
  test::FdPair links = test::unix_pair();
  ReturnPathWriter<FdTransport> writer(links.first);
  ReturnPathReader<FdTransport> reader(links.second);
  reader.take_extension();
  REQUIRE(writer.failed({.code = Errc::wrong_compression}, "setting: compression: set the same on both").has_value());
  const auto message = reader.next(10s);
  REQUIRE((message && *message));
  Bytes vector = test::format_vector("extension.md", "extension_failed");
  const auto failure = wire::parse_failed((*message)->message);
  REQUIRE(failure.has_value());
  CHECK(failure->reason == Errc::wrong_compression);
  CHECK(failure->text() == "setting: compression: set the same on both");
  Bytes got((*message)->bytes.begin(), (*message)->bytes.end());
  REQUIRE(got.size() == 74);
  std::fill_n(got.begin() + 12, 4, std::byte{});  // the number of the last code: of each version's own
  std::fill_n(vector.begin() + 20, 4, std::byte{});
  CHECK(std::equal(got.begin(), got.end(), vector.begin() + 8));

  const Bytes half(3);
  REQUIRE(write_all(links.first, std::span<const std::byte>(half)).has_value());
  REQUIRE(links.first.finish().has_value());
  CHECK(reader.next(10s).error().code == Errc::truncated_stream);

  // Half a message may have gone out: nothing may follow it.
  test::FdPair others = test::unix_pair();
  FailsOnce once(std::move(others.first));
  ReturnPathWriter<FailsOnce> unheard(once);
  for (const Result<void>& written : {unheard.shut(1), unheard.running(), unheard.pong(1)}) {
    REQUIRE_FALSE(written.has_value());
    CHECK(written.error().code == std::error_code(EIO, std::system_category()));
  }
}
