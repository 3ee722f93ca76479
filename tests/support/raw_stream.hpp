// SPDX-License-Identifier: MIT
//
// Bytes as a peer sends them on one channel, made by hand: every field of every packet can be wrong. Written from
// format/packets.md sections 2 and 3, not with the library's own encoder, so that the two check each other.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/compress/policy.hpp"
#include "support/basics.hpp"

namespace test {

using Bytes = std::vector<std::byte>;

inline void put(Bytes& bytes, std::size_t at, std::uint64_t value, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) bytes[at + i] = std::byte(value >> (8 * (size - 1 - i)));
}
inline std::uint64_t get(std::span<const std::byte> bytes, std::size_t at, std::size_t size) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < size; ++i) value = value << 8 | std::to_integer<std::uint64_t>(bytes[at + i]);
  return value;
}
inline void append(Bytes& to, std::span<const std::byte> bytes) { to.insert(to.end(), bytes.begin(), bytes.end()); }
inline void append(Bytes& to, std::string_view chars) { append(to, std::as_bytes(std::span(chars))); }

/// One packet's header, all fields free.
struct Packet {
  std::uint32_t magic = 0x11223344;
  std::uint32_t version = 1;
  std::uint32_t flags = 0;
  std::optional<std::uint32_t> pages_alloc{};   ///< else page_count
  std::optional<std::uint32_t> normal_pages{};  ///< else the number of `normal` offsets
  std::optional<std::uint32_t> zero_pages{};
  std::optional<std::uint32_t> next_packet_size{};  ///< else the size of `payload`
  std::uint64_t packet_num = 0;
  std::string idstr = "pc.ram";
  std::vector<std::uint64_t> normal{};  ///< offsets
  std::vector<std::uint64_t> zero{};
  Bytes payload{};
  bool stale = false;  ///< unused slots, the name's tail and the reserved bytes hold remains of other packets
};

/// Writes the packets of one channel.
class RawStream {
 public:
  explicit RawStream(std::size_t page_bytes = 4096) : page_bytes_(page_bytes) {}

  std::size_t header_bytes() const { return 320 + 8 * page_count(); }
  std::size_t page_count() const { return 524288 / page_bytes_; }

  RawStream& hello(unsigned id, std::byte uuid = {}) {
    Bytes bytes(64);
    put(bytes, 0, 0x11223344, 4);
    put(bytes, 4, 1, 4);
    std::fill_n(bytes.begin() + 8, 16, uuid);
    bytes[24] = std::byte(id);
    append(bytes_, bytes);
    return *this;
  }

  RawStream& packet(const Packet& p) {
    Bytes bytes(header_bytes(), p.stale ? std::byte{0xa5} : std::byte{});
    put(bytes, 0, p.magic, 4);
    put(bytes, 4, p.version, 4);
    put(bytes, 8, p.flags, 4);
    put(bytes, 12, p.pages_alloc.value_or(static_cast<std::uint32_t>(page_count())), 4);
    put(bytes, 16, p.normal_pages.value_or(static_cast<std::uint32_t>(p.normal.size())), 4);
    put(bytes, 20, p.next_packet_size.value_or(static_cast<std::uint32_t>(p.payload.size())), 4);
    put(bytes, 24, p.packet_num, 8);
    put(bytes, 32, p.zero_pages.value_or(static_cast<std::uint32_t>(p.zero.size())), 4);
    std::memcpy(&bytes[64], p.idstr.data(), std::min<std::size_t>(p.idstr.size(), 256));
    if (p.idstr.size() < 256) bytes[64 + p.idstr.size()] = std::byte{};
    std::size_t slot = 0;
    for (const auto& list : {p.normal, p.zero})
      for (const std::uint64_t offset : list)
        if (slot < page_count()) put(bytes, 320 + 8 * slot++, offset, 8);
    append(bytes_, bytes);
    append(bytes_, p.payload);
    return *this;
  }

  /// As every sender since QEMU 9.0 writes it.
  RawStream& sync() { return packet({.flags = 1, .pages_alloc = 0, .idstr = ""}); }

  /// A device-state packet whose header says `said` bytes, with `sent` zero bytes behind it.
  RawStream& device_state(std::uint64_t said, std::size_t sent) {
    Bytes bytes(276 + sent);
    put(bytes, 0, 0x11223344, 4);
    put(bytes, 4, 1, 4);
    put(bytes, 8, 0x40, 4);
    bytes[12] = std::byte{'v'};
    put(bytes, 272, said, 4);
    return raw(bytes);
  }

  RawStream& raw(std::span<const std::byte> bytes) {
    append(bytes_, bytes);
    return *this;
  }
  RawStream& raw(std::string_view chars) {
    append(bytes_, chars);
    return *this;
  }

  const Bytes& bytes() const { return bytes_; }
  std::size_t size() const { return bytes_.size(); }

 private:
  std::size_t page_bytes_;
  Bytes bytes_;
};

/// A packet's payload by a channel's encoder.
template <multifd::Compressor C>
class Encoded {
 public:
  explicit Encoded(std::size_t page_bytes = 4096) : encoder_(open(page_bytes)) {}

  Bytes operator()(std::span<const std::byte> pages) {
    const iovec run = multifd::const_buffer(pages);
    const auto payload = encoder_.encode(std::span(&run, 1));
    REQUIRE(payload.has_value());
    Bytes bytes;
    for (const iovec& part : *payload)
      append(bytes, std::span(static_cast<const std::byte*>(part.iov_base), part.iov_len));
    return bytes;
  }

 private:
  static typename C::Encoder open(std::size_t page_bytes) {
    auto encoder = C::Encoder::open(C{}, {.page_bytes = page_bytes});
    REQUIRE(encoder.has_value());
    return std::move(*encoder);
  }
  typename C::Encoder encoder_;
};

/// A captured stream taken apart again.
struct SeenPacket {
  std::size_t at;  ///< where its header begins
  std::uint32_t flags, normal, zero, size;
  std::string idstr;
  std::vector<std::uint64_t> offsets;  ///< normal, then zero
};

inline std::vector<SeenPacket> packets_of(std::span<const std::byte> stream, std::size_t page_bytes = 4096) {
  std::vector<SeenPacket> seen;
  const std::size_t header = RawStream(page_bytes).header_bytes();
  std::size_t at = 64;
  while (at + header <= stream.size()) {
    SeenPacket p{at,
                 static_cast<std::uint32_t>(get(stream, at + 8, 4)),
                 static_cast<std::uint32_t>(get(stream, at + 16, 4)),
                 static_cast<std::uint32_t>(get(stream, at + 32, 4)),
                 static_cast<std::uint32_t>(get(stream, at + 20, 4)),
                 std::string(reinterpret_cast<const char*>(&stream[at + 64])),
                 {}};
    for (std::size_t i = 0; i < p.normal + p.zero; ++i) p.offsets.push_back(get(stream, at + 320 + 8 * i, 8));
    at += header + (p.normal > 0 ? p.size : 0);
    seen.push_back(std::move(p));
  }
  CHECK(at == stream.size());
  return seen;
}

}  // namespace test
