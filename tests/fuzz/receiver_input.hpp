// SPDX-License-Identifier: MIT
//
// An input of the receiver targets:
//
//   off  size  field
//     0     1  mode     bit 0: two channels; 1: memory is zeroed before; 2: FirstPacket::sync; 3: takes device state;
//                       4: PacketHook; 5: manual barrier; 6-7: reads at once (0, 1), in short reads (2), and then the
//                       peer falls silent instead of ending its streams (3)
//     1     1  more     bits 0-1: page size; 2: populate ahead; 3: any uuid; 4-7: calls of sync(), length of short reads
//     2     3  first    bytes of the first channel's stream, if there are two; the rest is the other's
//     5     -  bytes
#pragma once

#include <array>

#include "fuzz/channel_stream.hpp"

namespace fuzz {

struct ReceiverInput {
  enum : std::uint8_t { two_channels = 1, zeroed = 2, sync_first = 4, device_state = 8, packet_hook = 16, manual = 32 };
  enum class Reads : std::uint8_t { whole = 0, cut = 2, silence = 3 };

  std::uint8_t mode = 0;
  std::uint8_t more = 0;
  std::array<Bytes, 2> streams;

  static ReceiverInput read(Span input) {
    Reader in(input);
    ReceiverInput out;
    out.mode = in.u8();
    out.more = in.u8();
    const std::size_t first_bytes = in.number(3);
    const Span first = out.has(two_channels) ? in.take(first_bytes) : in.rest();
    out.streams[0].assign(first.begin(), first.end());
    const Span second = in.rest();
    out.streams[1].assign(second.begin(), second.end());
    return out;
  }

  Bytes write() const {
    Bytes bytes;
    append(bytes, mode, 1);
    append(bytes, more, 1);
    append(bytes, streams[0].size(), 3);
    append(bytes, streams[0]);
    if (has(two_channels)) append(bytes, streams[1]);
    return bytes;
  }

  bool has(std::uint8_t bit) const { return (mode & bit) != 0; }
  std::size_t channels() const { return has(two_channels) ? 2 : 1; }
  Reads reads() const { return mode >> 6 < 2 ? Reads::whole : static_cast<Reads>(mode >> 6); }
  std::size_t page_bytes() const { return page_bytes_of(more & 3); }
  unsigned count() const { return more >> 4; }
};

/// For a receiver of compression bits `method`.
inline void mutate_receiver_input(Bytes& bytes, std::size_t most_bytes, Rng& rng, std::uint32_t method) {
  ReceiverInput input = ReceiverInput::read(bytes);
  if (below(rng, 12) == 0) {
    input.mode ^= static_cast<std::uint8_t>(1u << below(rng, 8));
    if (below(rng, 8) != 0 && input.reads() == ReceiverInput::Reads::silence) input.mode &= 0x3f;  // it is slow
    if (input.has(ReceiverInput::two_channels) && input.streams[1].empty()) {
      input.streams[1] = input.streams[0];
      put(input.streams[1], 24, 1, 1);
    }
  } else if (below(rng, 24) == 0) {
    input.more ^= static_cast<std::uint8_t>(1u << below(rng, 8));
  } else {
    Bytes& stream = input.streams[below(rng, input.channels())];
    const Format format{.page_bytes = input.page_bytes(), .method = method};
    auto pieces = take_apart(stream, format);
    for (std::size_t i = 1 + below(rng, 3); i > 0; --i) mutate_channel(pieces, format, most_bytes, rng);
    Bytes changed = put_together(pieces);
    if (changed.size() + 5 > most_bytes) return;
    stream = std::move(changed);
  }
  bytes = input.write();
  if (bytes.size() > most_bytes) bytes.resize(most_bytes);
}

}  // namespace fuzz
