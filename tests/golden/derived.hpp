// SPDX-License-Identifier: MIT
//
// Byte images of what QEMU generations put on a channel. DERIVED BY HAND from the tables and remarks of
// format/packets.md (sections 2, 3.1, 3.2, 3.5, 6.3), not captured; they use no code of the library. Page size
// 4096, so a header has 320 + 8 * 128 = 1344 bytes.
#pragma once

#include <string_view>

namespace golden {

/// Section 2: channel 1 of the VM 00112233-4455-6677-8899-aabbccddeeff.
inline constexpr std::string_view hello_channel_1 = R"(
    0: 11 22 33 44                                      # magic
    4: 00 00 00 01                                      # version
    8: 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff  # uuid, textual order
   24: 01                                               # id
)";

/// Sections 3.2 and 6.3: a SYNC from 9.2 on. Cleared, pages_alloc 0.
inline constexpr std::string_view sync_9_2 = R"(
    0: 11 22 33 44
    4: 00 00 00 01
    8: 00 00 00 01                # flags: SYNC, nothing else
   12: 00 00 00 00                # pages_alloc
   24: 00 00 00 00 00 00 00 2a    # packet_num 42
)";

/// Section 3.1: a SYNC of 7.2 that follows a zlib data packet in the same buffer: the counts are fresh, the
/// rest stale.
inline constexpr std::string_view sync_7_2_stale = R"(
    0: 11 22 33 44
    4: 00 00 00 01
    8: 00 00 00 01                # flags: SYNC; compression bits 0 although zlib is on
   12: 00 00 00 80                # pages_alloc 128
   16: 00 00 00 00                # normal_pages
   20: 00 02 c3 6b                # next_packet_size 181099: stale, no payload follows
   24: 00 00 00 00 00 00 00 09
   64: 70 63 2e 72 61 6d          # "pc.ram": stale
  320: 00 00 00 00 00 10 00 00    # offsets: stale
  328: 00 00 00 00 00 10 10 00
)";

/// Section 6.3: 7.2 with zlib, the SYNC rides on a data packet of two pages ...
inline constexpr std::string_view data_and_sync_7_2 = R"(
    0: 11 22 33 44
    4: 00 00 00 01
    8: 00 00 00 03                # flags: SYNC and zlib
   12: 00 00 00 80                # pages_alloc 128
   16: 00 00 00 02                # normal_pages
   20: 00 00 00 2c                # next_packet_size 44
   24: 00 00 00 00 00 00 00 07    # packet_num 7
   64: 70 63 2e 72 61 6d 00 69 6f 73  # "pc.ram", and the tail of an older "pc.bios": stale
  320: 00 00 00 00 00 00 10 00    # offset 0x1000
  328: 00 00 00 00 00 00 50 00    # offset 0x5000
  336: 00 00 00 00 00 00 60 00    # stale
)";

/// ... and an empty packet follows its payload: flags 0, the same packet_num, everything else stale.
inline constexpr std::string_view empty_after_sync_7_2 = R"(
    0: 11 22 33 44
    4: 00 00 00 01
    8: 00 00 00 00                # flags: none
   12: 00 00 00 80
   16: 00 00 00 00                # normal_pages
   20: 00 00 00 2c                # stale, no payload follows
   24: 00 00 00 00 00 00 00 07    # packet_num 7 again
   64: 70 63 2e 72 61 6d 00 69 6f 73
  320: 00 00 00 00 00 00 10 00
  328: 00 00 00 00 00 00 50 00
  336: 00 00 00 00 00 00 60 00
)";

/// Sections 3.1 and 3.6: from 9.2 on, no compression, one normal page and two zero pages, not sorted.
inline constexpr std::string_view data_9_2 = R"(
    0: 11 22 33 44
    4: 00 00 00 01
    8: 00 00 00 00                # flags: data without compression
   12: 00 00 00 80                # pages_alloc 128
   16: 00 00 00 01                # normal_pages
   20: 00 00 10 00                # next_packet_size: 1 x 4096
   24: 00 00 00 00 00 00 00 05    # packet_num
   32: 00 00 00 02                # zero_pages
   64: 70 63 2e 72 61 6d          # "pc.ram"
  320: 00 00 00 00 00 00 30 00    # the normal page, 0x3000
  328: 00 00 00 00 00 00 20 00    # zero pages, 0x2000
  336: 00 00 00 00 00 00 10 00    # and 0x1000
)";

}  // namespace golden
