// SPDX-License-Identifier: MIT
//
// The bytes of one channel taken apart into hello and packets, changed in ways that mean something, and put together
// again. Knows format/packets.md sections 2, 3 and 13, and nothing of the library, whose idea of them is on trial.
#pragma once

#include <cstring>
#include <string_view>

#include "fuzz/fuzz.hpp"

namespace fuzz {

/// Names of the blocks that targets have, their sizes in packets or pages are Destination's.
inline constexpr std::string_view block_names[] = {"ram0", "vga", "pc.bios"};
inline constexpr std::size_t packet_page_bytes = 512 * 1024;

inline void put(Bytes& bytes, std::size_t at, std::uint64_t value, std::size_t size) {
  if (at + size > bytes.size()) return;
  for (std::size_t i = 0; i < size; ++i) bytes[at + i] = std::byte(value >> (8 * (size - 1 - i)));
}
inline std::uint64_t get(Span bytes, std::size_t at, std::size_t size) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < size && at + i < bytes.size(); ++i) value = value << 8 | std::uint64_t(bytes[at + i]);
  return value;
}

/// A header, or the hello, and what follows it. Also what is no packet at all: then it is all head.
struct Piece {
  Bytes head;
  Bytes payload;
};

struct Format {
  std::size_t page_bytes = 4096;
  std::uint32_t method = 0;

  std::size_t slots() const { return packet_page_bytes / page_bytes; }
  std::size_t header_bytes() const { return 320 + 8 * slots(); }
};

namespace field {
inline constexpr std::size_t flags = 8, alloc = 12, normal = 16, size = 20, number = 24, zero = 32, digest_tag = 36,
                             name = 64, offsets = 320;
}

inline std::vector<Piece> take_apart(Span stream, const Format& format) {
  std::vector<Piece> pieces;
  Reader in(stream);
  const Span hello = in.take(64);
  pieces.push_back({.head = Bytes(hello.begin(), hello.end()), .payload = {}});
  while (!in.empty()) {
    // Device state has another header; its flag is where the other header has it.
    Reader ahead = in;
    ahead.take(field::flags);
    const bool device = (ahead.number(4) & 0x40) != 0;
    const Span head = in.take(device ? 276 : format.header_bytes());
    const std::size_t size = device                            ? get(head, 272, 4)
                             : get(head, field::normal, 4) > 0 ? get(head, field::size, 4)
                                                               : 0;
    const Span payload = in.take(size);
    pieces.push_back({Bytes(head.begin(), head.end()), Bytes(payload.begin(), payload.end())});
  }
  return pieces;
}

inline Bytes put_together(const std::vector<Piece>& pieces) {
  Bytes stream;
  for (const Piece& piece : pieces) {
    append(stream, piece.head);
    append(stream, piece.payload);
  }
  return stream;
}

inline Piece make_hello(unsigned id) {
  Piece piece{.head = Bytes(64), .payload = {}};
  put(piece.head, 0, 0x11223344, 4);
  put(piece.head, 4, 1, 4);
  put(piece.head, 24, id, 1);
  return piece;
}

/// A header without pages.
inline Piece make_packet(const Format& format, std::uint32_t flags) {
  Piece piece{.head = Bytes(format.header_bytes()), .payload = {}};
  put(piece.head, 0, 0x11223344, 4);
  put(piece.head, 4, 1, 4);
  put(piece.head, field::flags, flags, 4);
  return piece;
}

inline void set_name(Bytes& head, std::string_view name) {
  if (head.size() < field::name + 256) return;
  std::memset(&head[field::name], 0, 256);
  std::memcpy(&head[field::name], name.data(), std::min<std::size_t>(name.size(), 256));
}

/// Pages from `first` on, normal ones before zero ones; the payload is the caller's.
inline Piece make_pages(const Format& format, std::string_view name, std::size_t first, std::size_t normal,
                        std::size_t zero) {
  Piece piece = make_packet(format, format.method);
  put(piece.head, field::alloc, format.slots(), 4);
  put(piece.head, field::normal, normal, 4);
  put(piece.head, field::zero, zero, 4);
  set_name(piece.head, name);
  for (std::size_t i = 0; i < normal + zero; ++i)
    put(piece.head, field::offsets + 8 * i, (first + i) * format.page_bytes, 8);
  return piece;
}

inline Piece make_device_state(std::string_view name, std::uint32_t instance, Span bytes) {
  Piece piece{.head = Bytes(276), .payload = Bytes(bytes.begin(), bytes.end())};
  put(piece.head, 0, 0x11223344, 4);
  put(piece.head, 4, 1, 4);
  put(piece.head, field::flags, 0x40, 4);
  std::memcpy(&piece.head[12], name.data(), std::min<std::size_t>(name.size(), 255));
  put(piece.head, 268, instance, 4);
  put(piece.head, 272, bytes.size(), 4);
  return piece;
}

// ---- mutations -----------------------------------------------------------------------------------------------------

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

/// By whatever libFuzzer has learned so far.
inline void mutate_bytes(Bytes& bytes, std::size_t most) {
  const std::size_t size = bytes.size();
  bytes.resize(std::max(most, size));
  bytes.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(bytes.data()), size, bytes.size()));
}

/// Numbers at which a comparison may change its mind.
inline std::uint64_t pick_number(const Format& format, Rng& rng) {
  const std::uint64_t page = format.page_bytes;
  const std::uint64_t edges[] = {
      0,        1,           2,          3,          format.slots(), packet_page_bytes, page,
      2 * page, 1024 * 1024, 0x7fffffff, 0x80000000, 0xffffffff,     0x100000000,       ~std::uint64_t{0}};
  const std::uint64_t edge = edges[below(rng, std::size(edges))];
  switch (below(rng, 6)) {
    case 0: return edge + 1;
    case 1: return edge - 1;
    case 2: return edge - page;
    case 3: return below(rng, 256);
    default: return edge;
  }
}

inline void mutate_hello(Bytes& head, Rng& rng) {
  switch (below(rng, 4)) {
    case 0: put(head, 24, below(rng, 4), 1); return;
    case 1: put(head, 8 + below(rng, 16), rng(), 1); return;
    case 2: head.resize(below(rng, 64)); return;  // what follows moves up
    default: mutate_bytes(head, 64); return;
  }
}

/// Changes one thing in a packet's header.
inline void mutate_header(Bytes& head, const Format& format, Rng& rng) {
  const auto count = [&] { return get(head, field::normal, 4) + get(head, field::zero, 4); };
  switch (below(rng, 12)) {
    case 0: put(head, field::flags, get(head, field::flags, 4) ^ 1u << below(rng, 8), 4); return;
    case 1: put(head, field::alloc, pick_number(format, rng), 4); return;
    case 2: put(head, field::normal, pick_number(format, rng), 4); return;
    case 3: put(head, field::zero, pick_number(format, rng), 4); return;
    case 4: put(head, field::size, pick_number(format, rng), 4); return;
    case 5: put(head, field::size, get(head, field::normal, 4) * format.page_bytes, 4); return;
    case 6: set_name(head, block_names[below(rng, std::size(block_names))]); return;
    case 7:  // empty, unknown, or without an end
      if (head.size() < field::name + 256) return;
      std::memset(&head[field::name], "\0xa"[below(rng, 3)], 1 + below(rng, 256));
      return;
    case 8:
      put(head, field::offsets + 8 * below(rng, std::min<std::size_t>(count() + 1, format.slots())),
          pick_number(format, rng), 8);
      return;
    case 9: {  // a page of some block, perhaps one that is there already
      const std::size_t slot = below(rng, std::min<std::size_t>(count() + 1, format.slots()));
      put(head, field::offsets + 8 * slot, below(rng, format.slots() + 2) * format.page_bytes, 8);
      return;
    }
    case 10:  // our digest, most likely a wrong one
      put(head, field::digest_tag, 0x6d664458, 4);
      put(head, field::digest_tag + 4, rng(), 8);
      return;
    default: put(head, below(rng, 2) == 0 ? 0 : below(rng, head.size() + 1), rng(), 1); return;
  }
}

/// As a well-behaved sender would have announced the payload that is there.
inline void make_consistent(Piece& piece, const Format& format, Rng& rng) {
  const std::size_t room = format.slots();
  std::size_t normal = std::min<std::size_t>(get(piece.head, field::normal, 4), room);
  const std::size_t zero = std::min<std::size_t>(get(piece.head, field::zero, 4), room - normal);
  if (format.method == 0) normal = std::min(normal, 1 + 8192 / format.page_bytes);  // inputs are to stay small
  const Piece good = make_pages(format, block_names[0], below(rng, room - normal - zero + 1), normal, zero);
  piece.head = good.head;
  if (format.method == 0) piece.payload.resize(normal * format.page_bytes, std::byte{0x5a});
  put(piece.head, field::size, piece.payload.size(), 4);
  if (normal == 0) piece.payload.clear();
}

inline Piece make_any(const Format& format, Rng& rng) {
  switch (below(rng, 4)) {
    case 0: {
      const std::byte state[] = {std::byte{1}, std::byte{2}, std::byte{3}};
      return make_device_state("vfio", 0, std::span(state).first(1 + below(rng, 3)));
    }
    case 1: return make_packet(format, 1);
    default: {
      Piece piece = make_pages(format, block_names[0], 0, below(rng, 3), below(rng, 4));
      piece.payload.resize(get(piece.head, field::normal, 4) > 0 ? 16 : 0);
      make_consistent(piece, format, rng);
      return piece;
    }
  }
}

/// Changes one thing in a channel's bytes.
inline void mutate_channel(std::vector<Piece>& pieces, const Format& format, std::size_t most_bytes, Rng& rng) {
  if (pieces.empty()) pieces.push_back(make_hello(0));
  const std::size_t packets = pieces.size() - 1;
  const std::size_t at = packets == 0 ? 0 : 1 + below(rng, packets);
  const auto position = [&](std::size_t i) { return pieces.begin() + static_cast<std::ptrdiff_t>(i); };
  Piece& piece = pieces[at];
  if (at == 0 || below(rng, 24) == 0) {
    if (below(rng, 2) == 0) return mutate_hello(pieces[0].head, rng);
    pieces.push_back(make_any(format, rng));
    return;
  }
  switch (below(rng, 12)) {
    case 0: pieces.insert(position(1 + below(rng, packets + 1)), make_any(format, rng)); return;
    case 1: pieces.erase(position(at)); return;
    case 2: {
      const Piece copy = piece;
      pieces.insert(position(1 + below(rng, packets + 1)), copy);
      return;
    }
    case 3: std::swap(piece, pieces[1 + below(rng, packets)]); return;
    case 4:  // ends here, inside of it or right behind
      if (below(rng, 2) == 0) piece.payload.resize(below(rng, piece.payload.size() + 1));
      if (piece.payload.empty() && below(rng, 2) == 0) piece.head.resize(below(rng, piece.head.size() + 1));
      pieces.resize(at + 1);
      return;
    case 5: make_consistent(piece, format, rng); return;
    case 6:
    case 7:
      mutate_bytes(piece.payload, std::min<std::size_t>(piece.payload.size() + 64, most_bytes));
      if (below(rng, 4) != 0 && piece.head.size() == format.header_bytes())
        put(piece.head, field::size, piece.payload.size(), 4);
      return;
    default: mutate_header(piece.head, format, rng); return;
  }
}

}  // namespace fuzz
