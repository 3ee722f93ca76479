// SPDX-License-Identifier: MIT
//
// MainStreamReader and MainStreamWriter over connections.
#include <doctest/doctest.h>

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "multifd/qemu/main_stream_reader.hpp"
#include "multifd/qemu/main_stream_writer.hpp"
#include "unit/qemu/stream.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace multifd::qemu;
using namespace std::chrono_literals;
using test::Bytes;
using test::page;
using test::Stream;

namespace {

using Reader = MainStreamReader<FdTransport>;
using Writer = MainStreamWriter<FdTransport>;

MainStreamParser parser() {
  auto made = MainStreamParser::create({});
  REQUIRE(made.has_value());
  return std::move(*made);
}

void send(FdTransport& link, std::span<const std::byte> bytes) { REQUIRE(write_all(link, bytes).has_value()); }

/// Reads to the stream's end, and returns the elements' bytes again.
Bytes read_to_end(Reader& reader) {
  Bytes bytes;
  for (;;) {
    const auto element = reader.next(10s);
    REQUIRE_MESSAGE(element.has_value(), describe(element.error()));
    if (!*element) return bytes;
    bytes.insert(bytes.end(), (*element)->bytes.begin(), (*element)->bytes.end());
  }
}

/// All that arrives until the other end finishes.
Bytes all_of(FdTransport& link) {
  Bytes bytes;
  for (std::array<std::byte, 4096> part;;) {
    const iovec room = mutable_buffer(std::span(part));
    const auto got = link.read_some(std::span(&room, 1));
    REQUIRE(got.has_value());
    if (*got == 0) return bytes;
    bytes.insert(bytes.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(*got));
  }
}

/// Writes a stream anew, element by element; `keep` says which records of pages.
template <class Keep>
Bytes rewritten(const Stream& stream, Keep&& keep) {
  test::FdPair in = test::unix_pair();
  test::FdPair out = test::unix_pair();
  std::thread sending([&] {
    send(in.first, stream.bytes);
    REQUIRE(in.first.finish().has_value());
  });
  Bytes bytes;
  std::thread taking([&] { bytes = all_of(out.second); });
  Reader reader(in.second, parser());
  Writer writer(out.first);
  for (;;) {
    const auto element = reader.next(10s);
    REQUIRE(element.has_value());
    if (!*element) break;
    const Element& one = **element;
    Result<void> written;
    if (one.kind == ElementKind::zero_page) {
      if (keep(one)) written = writer.zero_page(one.name, one.offset);
    } else if (one.kind == ElementKind::page) {
      if (keep(one)) written = writer.page(one.name, one.offset, one.data);
    } else if (one.kind == ElementKind::footer) {
      written = writer.footer(one.section_id);
    } else if (one.kind == ElementKind::command && one.command == command_ping) {
      written = writer.ping(wire::load_be<std::uint32_t>(one.data.data()));
    } else {
      written = writer.forward(one);
    }
    REQUIRE(written.has_value());
  }
  REQUIRE(writer.push_out().has_value());
  REQUIRE(out.first.finish().has_value());
  sending.join();
  taking.join();
  return bytes;
}

}  // namespace

TEST_CASE("MainStreamReader returns every element of a connection, however its bytes arrive") {
  for (const Stream& stream : {test::per_section_stream(), test::per_round_stream()}) {
    for (const std::size_t at_once : {std::size_t{1}, std::size_t{7}, std::size_t{1000}, stream.bytes.size()}) {
      CAPTURE(at_once);
      test::FdPair links = test::unix_pair();
      std::thread sending([&] {
        for (std::size_t at = 0; at < stream.bytes.size(); at += at_once)
          send(links.first, std::span(stream.bytes).subspan(at, std::min(at_once, stream.bytes.size() - at)));
        REQUIRE(links.first.finish().has_value());
      });
      Reader reader(links.second, parser());
      CHECK(read_to_end(reader) == stream.bytes);
      sending.join();
      CHECK(reader.ended());
      CHECK(reader.bytes() == stream.bytes.size());
      CHECK(reader.parser().tail() == StreamTail::description);
      // The end stays the end.
      const auto again = reader.next(10s);
      REQUIRE(again.has_value());
      CHECK_FALSE(again->has_value());
    }
  }
}

TEST_CASE("MainStreamReader's waits end by their limit and by an Interrupt, and nothing is lost by that") {
  const Stream stream = test::per_round_stream();
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  interrupt->trigger();
  test::FdPair links = test::unix_pair();
  Reader reader(links.second, parser());
  Bytes bytes;
  for (std::size_t at = 0; at < stream.bytes.size(); at += 100) {
    send(links.first, std::span(stream.bytes).subspan(at, std::min<std::size_t>(100, stream.bytes.size() - at)));
    for (;;) {
      const auto element = reader.next(1ms);
      if (!element) {
        CHECK(element.error().code == Errc::timed_out);
        CHECK(reader.next(no_timeout, &*interrupt).error().code == Errc::cancelled);
        break;
      }
      REQUIRE(element->has_value());
      bytes.insert(bytes.end(), (*element)->bytes.begin(), (*element)->bytes.end());
    }
  }
  CHECK(bytes == stream.bytes);
  CHECK_FALSE(reader.ended());
}

TEST_CASE("MainStreamReader tells an end inside the stream, in order or not, from one behind it") {
  const Stream whole = test::per_section_stream();
  const Stream half = Stream().up_to_start().part();
  for (const Stream& stream : {whole, half}) {
    for (const bool in_order : {true, false}) {
      const bool is_whole = stream.bytes == whole.bytes;
      CAPTURE(is_whole);
      CAPTURE(in_order);
      test::FdPair links = test::tcp_pair();
      send(links.first, stream.bytes);
      Reader reader(links.second, parser());
      // Everything is read before the end comes: a reset overtakes what nobody has read.
      Result<std::optional<Element>> element;
      while (reader.bytes() < stream.bytes.size()) REQUIRE((element = reader.next(10s)).has_value());
      while ((element = reader.arrived()) && *element) {
      }
      REQUIRE(element.has_value());
      if (in_order)
        REQUIRE(links.first.finish().has_value());
      else
        links.first.shutdown();
      element = reader.next(10s);
      CHECK(reader.ended() == is_whole);
      if (is_whole) {
        REQUIRE_MESSAGE(element.has_value(), describe(element.error()));
        CHECK_FALSE(element->has_value());
        continue;
      }
      REQUIRE_FALSE(element.has_value());
      if (in_order)
        CHECK(element.error().code == Errc::truncated_stream);
      else
        CHECK(element.error().code == Condition::peer_gone);
      CHECK(reader.arrived().error().code == Errc::truncated_stream);  // which names the place
    }
  }
}

TEST_CASE("MainStreamReader hands on what the parser refuses, and its subject") {
  test::FdPair links = test::unix_pair();
  send(links.first, Stream().header().configuration().full("virtio-mem", 3).bytes);
  Reader reader(links.second, parser());
  Result<std::optional<Element>> element;
  do element = reader.next(10s);
  while (element && *element);
  REQUIRE_FALSE(element.has_value());
  CHECK(element.error().code == Errc::early_device_refused);
  CHECK(reader.parser().subject() == "virtio-mem");
}

TEST_CASE("MainStreamWriter writes a stream anew to the same bytes") {
  for (const Stream& stream : {test::per_section_stream(), test::per_round_stream()})
    CHECK(rewritten(stream, [](const Element&) { return true; }) == stream.bytes);
}

TEST_CASE("MainStreamWriter names the block where records go: CONTINUE is of the record before it in its own stream") {
  const Stream stream = test::per_section_stream();
  const auto texts = [](const Bytes& bytes) {
    std::vector<std::string> pages;
    for (const std::string& event : test::parse(bytes).events)
      if (event.starts_with("zero")) pages.push_back(event);
    return pages;
  };
  using Texts = std::vector<std::string>;
  CHECK(texts(rewritten(stream, [](const Element& e) { return e.name == "ram.a"; })) ==
        Texts{"zero ram.a#0+0", "zero continued ram.a#0+4096", "zero continued ram.a#0+28672",
              "zero continued ram.a#0+8192"});
  CHECK(texts(rewritten(stream, [](const Element& e) { return e.continues; })) ==
        Texts{"zero ram.a#0+4096", "zero rom/b#1+4096", "zero ram.a#0+8192"});
}

TEST_CASE("MainStreamWriter gathers records until push_out(), and writes by itself when there are many") {
  test::FdPair links = test::unix_pair();
  Writer writer(links.first);
  const auto arrived = [&] {
    std::array<std::byte, 16> some;
    return ::recv(links.second.native_handle(), some.data(), some.size(), MSG_PEEK | MSG_DONTWAIT) > 0;
  };
  REQUIRE(writer.zero_page("ram.a", 0).has_value());
  REQUIRE(writer.footer(2).has_value());
  CHECK_FALSE(arrived());
  REQUIRE(writer.push_out().has_value());
  const Bytes first = Stream().zero(0, "ram.a").footer(2).bytes;
  Bytes got(first.size());
  REQUIRE(read_exact(links.second, std::span(got)).has_value());
  CHECK(got == first);
  REQUIRE(writer.push_out().has_value());  // nothing is there
  CHECK_FALSE(arrived());
  // More than it gathers, in small records and in one piece.
  Stream all;
  std::thread writing([&] {
    for (std::uint64_t i = 0; i < 20'000; ++i) {
      REQUIRE(writer.zero_page("ram.a", i * page).has_value());
      all.zero(i * page);
    }
    const Bytes large(300'000, std::byte{0x5a});
    REQUIRE(writer.forward({.kind = ElementKind::device_state, .bytes = large}).has_value());
    all.append(large);
    REQUIRE(writer.push_out().has_value());
    REQUIRE(links.first.finish().has_value());
  });
  const Bytes rest = all_of(links.second);
  writing.join();
  CHECK(rest == all.bytes);
}

TEST_CASE("MainStreamWriter's first error stays, and is what every later call says") {
  test::FdPair links = test::unix_pair();
  Writer writer(links.first);
  links.second.shutdown();
  REQUIRE(writer.ping(1).has_value());  // only gathered
  const auto first = writer.push_out();
  REQUIRE_FALSE(first.has_value());
  CHECK(first.error().code == Condition::peer_gone);
  for (const Result<void>& later : {writer.push_out(), writer.ping(2), writer.zero_page("ram.a", 0)}) {
    REQUIRE_FALSE(later.has_value());
    CHECK(later.error().code == first.error().code);
  }
}
