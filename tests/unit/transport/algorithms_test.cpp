// SPDX-License-Identifier: MIT
#include "multifd/transport/algorithms.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ostream>
#include <string>
#include <vector>

using namespace multifd;

namespace {

/// A stream in a variable: takes and gives `step` bytes a call, and looks at what it is called with.
struct Script {
  std::vector<std::byte> bytes = {};
  std::size_t step = 1;
  std::size_t most_iovecs = 0;
  int calls = 0;
  int fail_at_call = -1;
  bool writes_nothing = false;

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return move(buffers, [this](std::byte& b) { bytes.push_back(b); }, step);
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return move(
        buffers,
        [this](std::byte& b) {
          b = bytes.front();
          bytes.erase(bytes.begin());
        },
        std::min(step, bytes.size()));
  }
  Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}

  template <class Move>
  Result<std::size_t> move(std::span<const iovec> buffers, Move move_byte, std::size_t limit) noexcept {
    most_iovecs = std::max(most_iovecs, buffers.size());
    CHECK(buffers.size() <= max_iovecs);
    CHECK(total_bytes(buffers) > 0);
    if (calls++ == fail_at_call) return fail_errno(Stage::write, "script", ENOSPC);
    if (writes_nothing) return std::size_t{0};
    std::size_t done = 0;
    for (const iovec& buffer : buffers) {
      for (std::size_t i = 0; i < buffer.iov_len && done < limit; ++i, ++done) {
        move_byte(static_cast<std::byte*>(buffer.iov_base)[i]);
      }
    }
    return done;
  }
};
static_assert(Transport<Script>);

std::vector<std::byte> count_up(std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7 + 1);
  return bytes;
}

/// Buffers of these sizes over `bytes`, one after the other.
std::vector<iovec> cut(std::vector<std::byte>& bytes, const std::vector<std::size_t>& sizes) {
  std::vector<iovec> buffers;
  std::size_t at = 0;
  for (const std::size_t size : sizes) {
    buffers.push_back({size ? bytes.data() + at : nullptr, size});
    at += size;
  }
  REQUIRE(at == bytes.size());
  return buffers;
}

const std::vector<std::vector<std::size_t>> layouts = {
    {24}, {1, 23}, {8, 8, 8}, {0, 24}, {24, 0}, {0, 0, 5, 0, 0, 19, 0}, {1, 1, 1, 1, 20}, {23, 0, 1},
};

}  // namespace

TEST_CASE("write_all and read_exact move every byte, however little a call moves") {
  for (const auto& layout : layouts) {
    for (std::size_t step = 1; step <= 25; ++step) {
      CAPTURE(step);
      Script stream{.step = step};
      std::vector<std::byte> sent = count_up(24);
      std::vector<iovec> buffers = cut(sent, layout);
      REQUIRE(write_all(stream, std::span(buffers)).has_value());
      CHECK(stream.bytes == count_up(24));
      CHECK(stream.calls == static_cast<int>((24 + step - 1) / step));

      std::vector<std::byte> received(24);
      buffers = cut(received, layout);
      REQUIRE(read_exact(stream, std::span(buffers)).has_value());
      CHECK(received == sent);
    }
  }
}

TEST_CASE("write_all without bytes does not call the transport") {
  Script stream;
  CHECK(write_all(stream, std::span<iovec>()).has_value());
  std::vector<iovec> empty(3, iovec{nullptr, 0});
  CHECK(write_all(stream, std::span(empty)).has_value());
  CHECK(read_exact(stream, std::span(empty)).has_value());
  CHECK(stream.calls == 0);
}

TEST_CASE("no call gets more than max_iovecs buffers") {
  Script stream{.step = 100000};
  std::vector<std::byte> sent = count_up(2 * max_iovecs + 3);
  std::vector<iovec> buffers = cut(sent, std::vector<std::size_t>(sent.size(), 1));
  REQUIRE(write_all(stream, std::span(buffers)).has_value());
  CHECK(stream.most_iovecs == max_iovecs);
  CHECK(stream.calls == 3);
  std::vector<std::byte> received(sent.size());
  buffers = cut(received, std::vector<std::size_t>(sent.size(), 1));
  REQUIRE(read_exact(stream, std::span(buffers)).has_value());
  CHECK(received == sent);

  // A whole call's worth of empty buffers in front must not look like an end.
  std::vector<iovec> padded(max_iovecs + 5, iovec{nullptr, 0});
  padded.push_back({sent.data(), 4});
  REQUIRE(write_all(stream, std::span(padded)).has_value());
  CHECK(stream.bytes.size() == 4);
}

TEST_CASE("the transport's errors get through untouched, at whichever call they come") {
  for (int call = 0; call < 4; ++call) {
    std::vector<std::byte> bytes = count_up(4);
    Script writing{.fail_at_call = call};
    iovec buffer = mutable_buffer(bytes);
    const auto written = write_all(writing, std::span(&buffer, 1));
    REQUIRE_FALSE(written.has_value());
    CHECK(written.error().code == std::error_code(ENOSPC, std::system_category()));
    CHECK(written.error().op == std::string("script"));
    CHECK(writing.bytes.size() == static_cast<std::size_t>(call));

    Script reading{.bytes = count_up(4), .fail_at_call = call};
    buffer = mutable_buffer(bytes);
    const auto read = read_at_least(reading, std::span(&buffer, 1), 4);
    REQUIRE_FALSE(read.has_value());
    CHECK(read.error().code.value() == ENOSPC);
  }
}

TEST_CASE("a transport that writes nothing is an error and no endless loop") {
  Script stream{.writes_nothing = true};
  const auto bytes = count_up(4);
  const auto written = write_all(stream, std::span<const std::byte>(bytes));
  REQUIRE_FALSE(written.has_value());
  CHECK(written.error().code.value() == EIO);
}

TEST_CASE("read_at_least takes what comes along, and no more calls than needed") {
  Script stream{.bytes = count_up(100), .step = 30};
  std::vector<std::byte> bytes(100);
  iovec buffer = mutable_buffer(bytes);
  const auto count = read_at_least(stream, std::span(&buffer, 1), 50);
  REQUIRE(count.has_value());
  CHECK(*count == 60);
  CHECK(stream.calls == 2);
  CHECK(std::equal(bytes.begin(), bytes.begin() + 60, count_up(60).begin()));
}

TEST_CASE("a transport that can wait for many bytes is asked to wait for what must come, and for no more") {
  struct Waiting : Script {
    std::vector<std::size_t> waited_for;
    Result<std::size_t> read_full(MutableBuffers buffers) noexcept {
      waited_for.push_back(total_bytes(buffers));
      step = total_bytes(buffers);
      return read_some(buffers);
    }
  };
  static_assert(HasReadFull<Waiting>);
  static_assert(!HasReadFull<Script>);
  constexpr std::size_t page = 32 * 1024;
  std::vector<std::byte> pages(2 * page);
  std::vector<std::byte> header(100);
  const auto read = [&](Waiting& stream, std::size_t least, std::size_t soon = 0) {
    iovec buffers[] = {mutable_buffer(std::span(pages).first(page)), mutable_buffer(std::span(pages).subspan(page)),
                       mutable_buffer(header)};
    return read_at_least(stream, std::span(buffers), least, detail::NotCounted{}, soon);
  };
  Waiting whole;
  whole.bytes.assign(2 * page + 40, std::byte{7});
  CHECK(read(whole, 2 * page) == 2 * page);  // the header's bytes are nobody's to wait for
  CHECK(whole.waited_for == std::vector<std::size_t>{2 * page});
  CHECK(pages.back() == std::byte{7});
  Waiting cut;
  cut.bytes.assign(page + 5, std::byte{7});
  CHECK(read(cut, 2 * page) == page + 5);
  Waiting small;
  small.bytes.assign(200, std::byte{7});
  CHECK(read(small, 100).value_or(0) == 100);
  CHECK(small.waited_for.empty());
  // The header is nearly sure to follow: one call asks for it, too, and none asks again when it has not come.
  Waiting soon;
  soon.bytes.assign(2 * page + 100, std::byte{7});
  CHECK(read(soon, 2 * page, 100) == 2 * page + 100);
  CHECK(soon.waited_for == std::vector<std::size_t>{2 * page + 100});
  Waiting late;
  late.bytes.assign(2 * page + 40, std::byte{7});
  CHECK(read(late, 2 * page, 100) == 2 * page + 40);
  CHECK(late.waited_for == std::vector<std::size_t>{2 * page + 100});
}

TEST_CASE("an end between two units and a truncated unit are told apart") {
  for (std::size_t available = 0; available <= 8; ++available) {
    CAPTURE(available);
    std::vector<std::byte> bytes(8);
    Script stream{.bytes = count_up(available), .step = 3};
    iovec buffer = mutable_buffer(bytes);
    const auto count = read_at_least(stream, std::span(&buffer, 1), 8);
    REQUIRE(count.has_value());
    CHECK(*count == available);

    stream.bytes = count_up(available);
    const auto exact = read_exact(stream, std::span<std::byte>(bytes), Errc::truncated_header);
    if (available == 8) {
      CHECK(exact.has_value());
      continue;
    }
    REQUIRE_FALSE(exact.has_value());
    CHECK(exact.error().code == (available == 0 ? Errc::peer_closed : Errc::truncated_header));
    CHECK(exact.error().detail == available);
  }
}
