# SPDX-License-Identifier: MIT
"""Decodes compressed images, from the text of include/multifd/format/seekable_zstd.md alone."""

import ctypes

from reader import check


class XXH128(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


class Digests:
    def __init__(self):
        library = ctypes.CDLL("libxxhash.so.0")
        for name, result in (("XXH3_64bits", ctypes.c_uint64), ("XXH3_128bits", XXH128)):
            function = getattr(library, name)
            function.restype, function.argtypes = result, [ctypes.c_char_p, ctypes.c_size_t]
        library.XXH64.restype = ctypes.c_uint64
        library.XXH64.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
        self.library = library

    def of(self, data):
        return self.library.XXH3_64bits(data, len(data))

    def of128(self, data):
        digest = self.library.XXH3_128bits(data, len(data))
        return digest.low.to_bytes(8, "little") + digest.high.to_bytes(8, "little")

    def checksum(self, data):
        return self.library.XXH64(data, len(data), 0) & 0xFFFFFFFF


def le(data, at, size=4):
    return int.from_bytes(data[at : at + size], "little")


def decode(data, digests, decompress):
    """`decompress(frame, size)` gives the content. Returns what is in the file."""
    check(len(data) >= 17 and le(data, len(data) - 4) == 0x8F92EAB1, "no seek table")
    check(data[-5] == 0x80, "descriptor")
    entries = le(data, len(data) - 9)
    table = len(data) - 9 - 12 * entries - 8
    check(entries > 0 and table >= 0, "entries")
    check(le(data, table) == 0x184D2A5E and le(data, table + 4) == 12 * entries + 9, "frame of the seek table")
    rows = [(le(data, at), le(data, at + 4), le(data, at + 8)) for at in range(table + 8, len(data) - 9, 12)]
    check(sum(row[0] for row in rows) == table, "sum of the sizes")
    *rows, own = rows
    image = table - own[0]
    check(own[1:] == (0, 0x51D8E999), "entry of the image frame")
    check(own[0] >= 88 and le(data, image) == 0x184D2A5D and le(data, image + 4) == own[0] - 8, "image frame")
    check(data[image + 8 : image + 16] == data[table - 8 : table] == b"MfdImage", "mark")
    version, flags, frame_bytes, zero = (le(data, image + at) for at in (16, 20, 24, 28))
    check(version == 1 and flags <= 1 and zero == 0, "header")
    check(frame_bytes in (1 << bits for bits in range(16, 21)), "frame_bytes")
    image_bytes = le(data, image + 32, 8)
    frames = -(-image_bytes // frame_bytes)
    words = -(-frames // 64) if flags else 0
    check(own[0] == 8 + 64 + 16 * frames + 8 * len(rows) + 8 * words + 16, "size of the tables")
    digest, base = data[image + 40 : image + 56], data[image + 56 : image + 72]
    check(flags or base == bytes(16), "base")
    at = image + 72
    contents = [data[at + 16 * i : at + 16 * i + 16] for i in range(frames)]
    check(digests.of128(data[image + 32 : image + 40] + frame_bytes.to_bytes(8, "little") + b"".join(contents)) == digest,
          "digest of the image")
    at += 16 * frames
    of_frames = [le(data, at + 8 * i, 8) for i in range(len(rows))]
    at += 8 * len(rows)
    bits = le(data, at, 8 * words) if flags else (1 << frames) - 1
    stored = [i for i in range(max(frames, 64 * words)) if bits >> i & 1]
    check(len(stored) == len(rows) and all(i < frames for i in stored), "bitmap")
    check(digests.of(data[image : table - 16] + data[table:]) == le(data, table - 16, 8), "digest of the tables")
    result, at = {}, 0
    for i, (size, content_size, checksum), of_frame in zip(stored, rows, of_frames):
        frame = data[at : at + size]
        at += size
        check(content_size == min(frame_bytes, image_bytes - i * frame_bytes), "size of a content")
        check(digests.of(frame) == of_frame, "digest of a frame")
        content = decompress(frame, content_size)
        check(le(frame, size - 4) == checksum == digests.checksum(content), "checksum")
        check(digests.of128(content) == contents[i], "digest of a content")
        result[str(i)] = content
    return {"frame_bytes": frame_bytes, "image_bytes": image_bytes, "digest": digest.hex(),
            **({"base": base.hex()} if flags else {}), "frames": result}
