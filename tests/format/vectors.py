# SPDX-License-Identifier: MIT
"""Holds the test vectors of include/multifd/format/*.md against what the text says.

    python3 tests/format/vectors.py [--list] [NAME...]

Decodes every `vector` block with decoders of its own, written from the text and sharing nothing with the library, and
compares with the `decoded` block behind it. Then two changes to every byte: the decoder must notice, or the text calls
that byte ignored and nothing may change. A vector cut short must be refused. Vectors that name a capture are compared
with tests/golden, and a `memory` block with what the streams of a whole migration leave behind. Python's standard
library; libzstd.so.1, where there is one, for zstd and for the captures; libxxhash.so.0 for digests.
"""

import argparse
import ctypes
import json
import re
import struct
import sys
import uuid
import zlib
from pathlib import Path

import compressed_image
import extension
import page_requests
import rejoin
from reader import Reader, Refused, check

ROOT = Path(__file__).resolve().parent.parent.parent
TEXTS = ROOT / "include/multifd/format"
CAPTURES = ROOT / "tests/golden/captures"
PACKET_PAGES = 524288  # bytes of the pages of a full packet, section 3
METHODS = {"none": 0x00, "zlib": 0x02, "zstd": 0x04, "qpl": 0x08, "uadk": 0x10, "qatzip": 0x20}
COMMANDS = {1: "OPEN_RETURN_PATH", 2: "PING", 3: "POSTCOPY_ADVISE", 11: "SWITCHOVER_START"}


class NoLibrary(Exception):
    """Only libzstd or libxxhash could tell."""


# ---- bytes -----------------------------------------------------------------------------------------------------------


def describe(content):
    """Bytes as the text writes them: "1024 x 2a000000" when they are one word again and again."""
    word = content[:4]
    return f"{len(content) // 4} x {word.hex()}" if content == word * (len(content) // 4) else content.hex()


# ---- packets (sections 2 to 6, 13) -----------------------------------------------------------------------------------


def initial_packet(reader, given=None):
    """As QEMU reads it, or an own peer, which knows its blocks."""
    check(reader.number(4) == 0x11223344, "magic")
    check(reader.number(4) == 1, "version")
    result = {"uuid": str(uuid.UUID(bytes=reader.take(16))), "id": reader.number(1)}
    if not (given or {}).get("own_peer") or reader.data[28:33] != b"mfAN\x01":
        reader.ignore(39)
        return result
    reader.ignore(3)
    reader.take(5)
    channels, page_bits, flags, method = (reader.number(size) for size in (1, 1, 1, 4))
    check(result["id"] < channels and 10 <= page_bits <= 16, "id or page size")
    check(method in METHODS.values(), "compression")
    blocks = given["blocks"]
    check((reader.number(8), reader.number(4)) == (sum(blocks.values()), len(blocks)), "other blocks")
    reader.ignore(4)
    entries = [name.encode().ljust(256, b"\0") + size.to_bytes(8, "big") for name, size in blocks.items()]
    check(reader.number(8) == sum(map(xxh3, entries)) % (1 << 64), "digest of the blocks")
    names = {bits: name for name, bits in METHODS.items()}
    result["announced"] = {"channels": channels, "page_size": 1 << page_bits, "takes_answer": flags % 2 == 1,
                           "compression": names[method]}
    return result


def answer(reader, given):
    check(reader.take(4) == b"mfAW", "magic")
    check(reader.number(4) == 1, "version")
    kind = reader.number(4)
    if kind == 0:
        reader.ignore(116)
        return {"whole": True}
    code, last = reader.number(4), reader.number(4)
    result = {"whole": False}
    if kind == 2 or kind == 1 and last == given["last_code"]:
        result["code" if kind == 1 else "errno"] = code
    channel, detail, expected, number = (reader.number(size) for size in (4, 8, 8, 8))
    result |= {"detail": hex(detail), "expected": hex(expected)}
    result |= {"channel": channel} if channel != 0xFFFFFFFF else {}
    result |= {"packet": number} if number != 0xFFFFFFFFFFFFFFFF else {}
    reader.ignore(16)
    subject = reader.take(63).partition(b"\0")[0]
    reader.ignored.append(range(65 + len(subject), 128))
    reader.ignore(1)
    return result | {"subject": subject.decode(errors="backslashreplace")}


def xxh3(data):
    try:
        library = ctypes.CDLL("libxxhash.so.0")
    except OSError as error:
        raise NoLibrary from error
    library.XXH3_64bits.restype = ctypes.c_uint64
    library.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    return library.XXH3_64bits(data, len(data))


class ZstdStream:
    """A decompression stream of libzstd."""

    class Buffer(ctypes.Structure):
        _fields_ = [("place", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t)]

    def __init__(self):
        try:
            self.zstd = ctypes.CDLL("libzstd.so.1")
        except OSError as error:
            raise NoLibrary from error
        self.zstd.ZSTD_createDStream.restype = ctypes.c_void_p
        self.zstd.ZSTD_decompressStream.restype = ctypes.c_size_t
        self.zstd.ZSTD_decompressStream.argtypes = [ctypes.c_void_p] + 2 * [ctypes.POINTER(self.Buffer)]
        self.zstd.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
        self.stream = self.zstd.ZSTD_createDStream()

    def __del__(self):
        if hasattr(self, "stream"):
            self.zstd.ZSTD_freeDStream(self.stream)

    def decode(self, payload, size):
        """(at most `size` bytes, whether all input was used, whether the frame ended)"""
        source, target = ctypes.create_string_buffer(payload, len(payload)), ctypes.create_string_buffer(size)
        given = self.Buffer(ctypes.addressof(source), len(payload), 0)
        made = self.Buffer(ctypes.addressof(target), size, 0)
        while True:
            before = given.at, made.at
            hint = self.zstd.ZSTD_decompressStream(self.stream, ctypes.byref(made), ctypes.byref(given))
            check(not self.zstd.ZSTD_isError(ctypes.c_size_t(hint)), "zstd: corrupt")
            if hint == 0 or (given.at, made.at) == before:
                return target.raw[: made.at], given.at == given.size, hint == 0


def image_of(reader):
    try:
        digests = compressed_image.Digests()
    except OSError as error:
        raise NoLibrary from error

    def decompress(frame, size):
        content, used, ended = ZstdStream().decode(frame, size)
        check(used and ended and len(content) == size, "zstd: size")
        return content

    result = compressed_image.decode(reader.take(reader.left()), digests, decompress)
    return result | {"frames": {number: describe(content) for number, content in result["frames"].items()}}


class Payloads:
    """The payloads of one channel, in order."""

    def __init__(self, method):
        self.method = method
        self.stream = {"zlib": zlib.decompressobj, "zstd": ZstdStream}.get(method, lambda: None)()

    def decode(self, reader, size, pages, page_size):
        """The pages' contents. `size` is next_packet_size."""
        expected = pages * page_size
        if self.method == "none":
            check(size == expected, "payload size")
            content = reader.take(size)
        else:
            check(0 < size <= 1 << 20, "payload size")
            content = getattr(self, self.method)(reader, size, expected, page_size)
        return [content[at : at + page_size] for at in range(0, expected, page_size)]

    def zlib(self, reader, size, expected, _):
        payload = reader.take_coded(size)
        check(payload.endswith(b"\0\0\xff\xff"), "zlib: no sync flush")
        try:
            content = self.stream.decompress(payload, expected + 1)
        except zlib.error as error:
            raise Refused(str(error)) from None
        check(len(content) == expected and not self.stream.unconsumed_tail and not self.stream.eof, "zlib: size")
        return content

    def zstd(self, reader, size, expected, _):
        content, used, ended = self.stream.decode(reader.take_coded(size), expected + 1)
        check(len(content) == expected and used and not ended, "zstd: size")
        return content

    def qpl(self, reader, size, expected, page_size, window=-12):
        pages = expected // page_size
        check(4 * pages <= size, "length table")
        lengths = [reader.number(4) for _ in range(pages)]
        check(max(lengths) <= page_size and 4 * pages + sum(lengths) == size, "length table")
        content = b""
        for length in lengths:
            if length == page_size:
                content += reader.take(length)
                continue
            stream = zlib.decompressobj(window)
            try:
                page = stream.decompress(reader.take_coded(length), page_size + 1)
            except zlib.error as error:
                raise Refused(str(error)) from None
            check(len(page) == page_size and stream.eof and not stream.unused_data, "a page's size")
            content += page
        return content

    def uadk(self, reader, size, expected, page_size):
        return self.qpl(reader, size, expected, page_size, 12)


def packet(reader, page_size, payloads):
    slots = PACKET_PAGES // page_size
    check(reader.number(4) == 0x11223344, "magic")
    check(reader.number(4) == 1, "version")
    flags = reader.number(4)
    if flags & 0x40:
        return device_state(reader, flags)
    alloc, normal, size, number, zero = struct.unpack(">IIIQI", reader.take(24))
    reader.ignore(28)
    check(alloc <= slots, "pages_alloc")
    check(normal + zero <= alloc, "more pages than slots")
    result = {"flags": flags, "pages_alloc": alloc, "packet_num": number, "normal": {}, "zero": []}
    if normal + zero == 0:
        reader.ignore(256 + 8 * slots)
    else:
        result["block"] = reader.field_name(256)
        offsets = [reader.number(8) for _ in range(normal + zero)]
        reader.ignore(8 * (slots - normal - zero))
        check(not any(offset % page_size for offset in offsets), "alignment")
        check(len(set(offsets)) == len(offsets), "a page twice")
        check(flags & 0x3E == METHODS[payloads.method], "compression")
        result["zero"] = [hex(offset) for offset in offsets[normal:]]
    if normal == 0:
        # Only from 9.0 on, and only beside zero pages, is the size known to be 0; else it may be stale.
        at = reader.at - 320 - 8 * slots
        reader.ignored.append(range(at + 20, at + 24))
    else:
        contents = payloads.decode(reader, size, normal, page_size)
        result["normal"] = {hex(offset): describe(page) for offset, page in zip(offsets, contents)}
    return result


def device_state(reader, flags):
    check(flags & 0x3F == 0, "flags of device state")
    result = {"device": reader.field_name(256), "instance": reader.number(4), "flags": flags}
    size = reader.number(4)
    check(size > 0, "device state of no bytes")
    return result | {"data": reader.take(size).hex()}


# ---- main stream (section 9), mapped-ram (section 12) ----------------------------------------------------------------


class MainStream:
    def __init__(self, reader, page_size, sections=(), blocks=(), in_stream=True, given=None):
        self.reader, self.page_size, self.given = reader, page_size, given or {}
        self.asked = False  # whether a PING has asked for the extension
        self.ram = "ahead"
        self.own = extension.ToDestination()
        self.sections = {int(number): name for number, name in dict(sections).items()}
        self.blocks = dict(blocks)  # used_length by idstr
        self.block = None  # of the record before
        self.capabilities = []
        self.begun = in_stream

    def elements(self):
        result = []
        if not self.begun:
            check(self.reader.take(4) == b"QEVM", "magic")
            check(self.reader.number(4) == 3, "version")
            result.append({"header": 3})
        while self.reader.left():
            result.append(self.element(self.reader.number(1)))
            if "start" in result[-1] or "end" in result[-1]:
                self.ram = "inside" if "start" in result[-1] else "whole"
            if "eof" in result[-1] and self.reader.left():
                check(self.reader.number(1) == 0x06, "something else than the description behind EOF")
                result.append({"description": json.loads(self.reader.text(self.reader.number(4)))})
                check(self.reader.left() == 0, "bytes behind the description")
        return result

    def element(self, kind):
        reader = self.reader
        if kind == 0x00:
            check(not self.own.settings or self.own.last == "HAND_OVER", "EOF without HAND_OVER")
            return {"eof": True}
        if kind == 0x07:
            return self.configuration()
        if kind == 0x08:
            return self.command()
        if kind == 0x04 and self.own.settings:
            return self.device()
        check(kind in (1, 2, 3), f"element {kind:#x}")
        number = reader.number(4)
        if kind == 1:
            name, instance, version = reader.name(), reader.number(4), reader.number(4)
            check((name, instance, version) == ("ram", 0, 4), "a section that is not RAM's")
            self.sections[number] = name
            result = {"start": name, "id": number, **self.block_list()}
        else:
            check(number in self.sections, "a section without START")
            result = {{2: "part", 3: "end"}[kind]: self.sections[number], "id": number}
        result["records"] = self.records()
        check(reader.number(1) == 0x7E and reader.number(4) == number, "footer")
        return result

    def configuration(self):
        reader = self.reader
        result = {"configuration": reader.text(reader.number(4))}
        while reader.left() and reader.data[reader.at] == 0x05:
            reader.take(1)
            name = reader.name()
            check(reader.number(4) == 1, "subsection version")
            if name == "configuration/capabilities":
                self.capabilities = result["capabilities"] = [reader.name() for _ in range(reader.number(4))]
                check(set(self.capabilities) <= {"x-ignore-shared", "mapped-ram"}, "capability")
            elif name == "configuration/uuid":
                result["uuid"] = str(uuid.UUID(bytes=reader.take(16)))
            else:
                check(name == "configuration/target-page-bits", "subsection")
                result["page_bits"] = reader.number(4)
        return result

    def command(self):
        reader = self.reader
        command, length = reader.number(2), reader.number(2)
        if command == extension.NUMBER and self.asked:
            one = extension.take(reader, length, extension.DESTINATION, self.given)
            self.own.take(one, self.ram, list(self.blocks.values()), self.page_size)
            return one
        check(command in COMMANDS, "command")
        result = {"command": COMMANDS[command]}
        check(length in {1: (0,), 2: (4,), 3: (0, 16), 11: (0,)}[command], "length of a command")
        if command == 2:
            result["value"] = reader.number(4)
            if version := extension.asked(result["value"]):
                result["asks"] = version
                self.asked = True
        elif length:
            result |= {"backing": reader.number(8), "target": reader.number(8)}
        return result

    def device(self):
        """A device's section of an own source, which has announced the size of the state."""
        reader = self.reader
        number = reader.number(4)
        result = {"device": reader.name(), "id": number, "instance": reader.number(4), "version": reader.number(4)}
        result["state"] = reader.take(self.own.take_section()).hex()
        check(reader.number(1) == 0x7E and reader.number(4) == number, "footer")
        return result

    def block_list(self):
        reader = self.reader
        word = reader.number(8)
        check(word % self.page_size == 0x04, "no block list")
        total, blocks = word - 0x04, []
        while sum(self.blocks.values()) < total:
            name, used = reader.name(), reader.number(8)
            check(name not in self.blocks and used >= self.page_size and used % self.page_size == 0, "block")
            self.blocks[name] = used
            blocks.append({"idstr": name, "used_length": used})
            if "x-ignore-shared" in self.capabilities:
                blocks[-1]["gpa"] = hex(reader.number(8))
            if "mapped-ram" in self.capabilities:
                blocks[-1] |= self.mapped_block(used)
        check(sum(self.blocks.values()) == total, "blocks larger than their total")
        return {"total": total, "blocks": blocks}

    def mapped_bitmap(self, used):
        """Header and bitmap of section 12.1; the pages whose bits are set, and where page 0 stands."""
        reader = self.reader
        check(reader.number(4) == 1, "mapped-ram version")
        page_size, bitmap_at, pages_at = reader.number(8), reader.number(8), reader.number(8)
        check(page_size == self.page_size and pages_at % page_size == 0, "mapped-ram page size")
        bitmap_bytes = (used // page_size + 63) // 64 * 8
        check(reader.at == bitmap_at and bitmap_at + bitmap_bytes <= pages_at, "mapped-ram offsets")
        bitmap = reader.take(bitmap_bytes)
        pages = [i for i in range(8 * bitmap_bytes) if bitmap[i // 8] >> i % 8 & 1]
        check(not pages or pages[-1] < used // page_size, "a bit behind the last page")
        return pages, {"bitmap_offset": bitmap_at, "pages_offset": pages_at}

    def mapped_block(self, used):
        reader = self.reader
        pages, result = self.mapped_bitmap(used)
        reader.ignore(result["pages_offset"] - reader.at)
        contents = {}
        for i in range(used // self.page_size):
            if i in pages:
                contents[hex(i * self.page_size)] = describe(reader.take(self.page_size))
            else:
                reader.ignore(self.page_size)
        return result | {"pages": contents}

    def records(self):
        reader, result = self.reader, []
        while True:
            word = reader.number(8)
            flags, address = word % self.page_size, word - word % self.page_size
            if flags == 0x10:
                check(address == 0, "EOS with an address")
                return result + ["EOS"]
            if flags == 0x200:
                check(address == 0, "FLUSH with an address")
                result.append("MULTIFD_FLUSH")
                continue
            check(flags & ~0x20 in (0x02, 0x08), "record")
            if flags & 0x20 == 0:
                self.block = reader.name()
            check(self.block in self.blocks, "record of no block")
            check(address <= self.blocks[self.block] - self.page_size, "record behind its block")
            if flags & 0x02:
                check(reader.number(1) == 0, "fill byte")
                result.append(["ZERO", self.block, hex(address)])
            else:
                result.append(["PAGE", self.block, hex(address), describe(reader.take(self.page_size))])


# ---- return path (section 9.8) ---------------------------------------------------------------------------------------


def return_messages(reader, given):
    result = []
    while reader.left():
        kind, length = reader.number(2), reader.number(2)
        check(length <= 512, "length")
        if kind == extension.NUMBER and any("answers" in each for each in result):
            check(result[-1]["message"] != "SHUT", "a message behind SHUT")
            result.append({"message": "extension"} | extension.take(reader, length, extension.SOURCE, given))
            continue
        body = Reader(reader.take(length))
        if kind in (1, 2):
            message = {"message": {1: "SHUT", 2: "PONG"}[kind], "value": body.number(4)}
            if kind == 2 and (version := extension.answered(message["value"])):
                message["answers"] = version
        elif kind in (3, 4):
            message = {"message": {3: "REQ_PAGES_ID", 4: "REQ_PAGES"}[kind], "start": hex(body.number(8)),
                       "length": hex(body.number(4))}
            if kind == 3:
                message["block"] = body.name()
        elif kind == 5:
            message = {"message": "RECV_BITMAP", "block": body.name()}
            message["bitmap"] = reader.take(reader.number(8)).hex()
            check(reader.number(8) == 0x0123456789ABCDEF, "end of a bitmap")
        elif kind == 6:
            check(body.number(4) == 1, "value of RESUME_ACK")
            message = {"message": "RESUME_ACK"}
        else:
            check(kind == 7, "message")
            message = {"message": "SWITCHOVER_ACK"}
        check(body.left() == 0, "length")
        check(not result or result[-1]["message"] != "SHUT", "a message behind SHUT")
        result.append(message)
    extension.check_answers(result)
    return result


# ---- vectors ---------------------------------------------------------------------------------------------------------


def decode(kind, given, data):
    """(what the bytes mean, a Reader that knows which of them were ignored)"""
    reader = Reader(data)
    page_size = given.get("page_size", 4096)
    if kind == "initial_packet":
        result = initial_packet(reader, given)
    elif kind == "answer":
        result = answer(reader, given)
    elif kind == "packet":
        result = packet(reader, page_size, Payloads(given["compression"]))
    elif kind in ("packets", "channel"):
        result = {"initial": initial_packet(reader)} if kind == "channel" else {}
        payloads = Payloads(given["compression"])
        result["packets"] = []
        while reader.left():
            result["packets"].append(packet(reader, page_size, payloads))
    elif kind == "payload":
        pages = Payloads(given["compression"]).decode(reader, given["next_packet_size"], given["pages"], page_size)
        result = {"pages": [describe(page) for page in pages]}
    elif kind == "main_stream":
        stream = MainStream(reader, page_size, given.get("sections", {}), given.get("blocks", {}), "sections" in given,
                            given)
        result = {"elements": stream.elements()}
    elif kind == "mapped_ram_start":
        stream = MainStream(reader, page_size)
        check(reader.take(4) == b"QEVM" and reader.number(4) == 3 and reader.number(1) == 0x07, "header")
        result = stream.configuration()
        check(stream.capabilities == ["mapped-ram"] and reader.number(1) == 0x01, "START")
        result |= {"id": reader.number(4), "start": reader.name()}
        check((reader.number(4), reader.number(4)) == (0, 4), "RAM's version")
        result |= {"total": reader.number(8) - 0x04, "idstr": reader.name(), "used_length": reader.number(8)}
        pages, places = stream.mapped_bitmap(result["used_length"])
        result |= places | {"pages": pages}
    elif kind == "return_path":
        result = {"messages": return_messages(reader, given)}
    elif kind == "compressed_image":
        result = image_of(reader)
    elif kind == "rejoin":
        result = rejoin.rejoin(reader)
    elif kind == "rejoin_answer":
        result = rejoin.answer(reader, given)
    elif kind == "page_client":
        result = page_requests.client(reader)
    elif kind == "page_server":
        payloads = Payloads(given["compression"])
        result = page_requests.server(reader, given, lambda page_size: packet(reader, page_size, payloads))
    else:
        raise SystemExit(f"no decoder for {kind}")
    check(reader.left() == 0, f"{reader.left()} bytes behind the end")
    return result, reader


class Vector:
    def __init__(self, name, text):
        self.name, self.capture, self.given_bytes, size = name, None, [], None
        data = None
        for line in text.splitlines():
            line = line.partition("#")[0].strip()
            if line.startswith("capture "):
                self.capture = line.split()[1:]
            elif line.startswith("size "):
                data = bytearray(int(line.split()[1]))
            elif ":" in line:
                at, _, content = line.partition(":")
                count, times, word = content.partition(" x ")
                content = bytes.fromhex(word) * int(count) if times else bytes.fromhex(content)
                place = range(int(at), int(at) + len(content))
                if data is None or place.stop > len(data):
                    raise SystemExit(f"{name}: line {line!r} reaches past the vector's size")
                data[place.start : place.stop] = content
                self.given_bytes.append(place)
            elif line and not line.startswith("recorded "):
                raise SystemExit(f"{name}: cannot read the line {line!r}")
        if data is None:
            raise SystemExit(f"{name}: no size")
        self.data = bytes(data)


def read_texts():
    """[(vector, what it means)] in the order of the texts"""
    vectors, meanings = {}, {}
    for path in sorted(TEXTS.glob("*.md")):
        for kind, name, text in re.findall(r"^```(vector|decoded) (\w+)\n(.*?)^```$", path.read_text(), re.M | re.S):
            where = vectors if kind == "vector" else meanings
            if name in where:
                raise SystemExit(f"{path}: {kind} {name} is there twice")
            where[name] = Vector(name, text) if kind == "vector" else json.loads(text)
    if set(vectors) != set(meanings):
        raise SystemExit(f"without its other half: {', '.join(sorted(set(vectors) ^ set(meanings)))}")
    return [(vector, meanings[name]) for name, vector in vectors.items()]


def read_memories():
    """{name: what a whole migration leaves in memory, as the text says}"""
    return {name: json.loads(text) for path in sorted(TEXTS.glob("*.md"))
            for name, text in re.findall(r"^```memory (\w+)\n(.*?)^```$", path.read_text(), re.M | re.S)}


def memory_of(main, channels):
    """{block: {offset: content}} of all pages that are not zero, from a decoded main stream and decoded channels."""
    sections = [each for each in main["elements"] if "records" in each]
    closing = "MULTIFD_FLUSH" if "MULTIFD_FLUSH" in sections[0]["records"] else "EOS"
    records, epochs = [], []  # each: [(block, offset, content)] by epoch
    for record in (record for section in sections for record in section["records"]):
        if record == closing:
            epochs.append(records)
            records = []
        elif isinstance(record, list):
            _, block, offset, *content = record
            records.append((block, offset, *(content or ["zero"])))
    check(not records, "records behind the last epoch")
    for channel in channels:
        epoch = 0
        for each in channel["packets"]:
            check(epoch < len(epochs), "a packet behind the last SYNC")
            epochs[epoch] += [(each["block"], offset, content) for offset, content in each["normal"].items()]
            epochs[epoch] += [(each["block"], offset, "zero") for offset in each["zero"]]
            epoch += each["flags"] & 1
        check(epoch == len(epochs), "as many SYNCs as epochs")
    memory = {}
    for block, offset, content in (page for epoch in epochs for page in epoch):
        memory.setdefault(block, {})[offset] = content
    return {block: {offset: content for offset, content in sorted(pages.items()) if content != "zero"}
            for block, pages in memory.items()}


def touched(vector):
    """Positions to change: all bytes of a small vector; of a large one those that its lines give, and some others."""
    if len(vector.data) <= 8192:
        return range(len(vector.data))
    some = set(range(0, len(vector.data), 997))
    for place in vector.given_bytes:
        some.update(place if len(place) <= 64 else [*place[:8], *place[-8:]])
    return sorted(some)


def problems(vector, wanted):
    """What is wrong with a vector, as sentences. Raises NoLibrary where only a library could tell."""
    wanted = dict(wanted)
    kind, given = wanted.pop("kind"), wanted.pop("given", {})
    try:
        got, reader = decode(kind, given, vector.data)
    except Refused as error:
        return [f"refused: {error}"]
    if got != wanted:
        return [f"decoded as\n  {json.dumps(got)}\nand the text says\n  {json.dumps(wanted)}"]
    found = []
    if given.get("own_peer"):  # QEMU takes the same bytes, and ignores what only an own peer knows
        plain, qemu = decode(kind, {}, vector.data)
        if plain != {key: value for key, value in wanted.items() if key != "announced"}:
            found.append("QEMU would not ignore the extension")
        extension = [at for at in range(25, 64) if vector.data[at]]
        if not extension or any(not any(at in place for place in qemu.ignored) for at in extension):
            found.append("the extension is in bytes that QEMU reads")
    for at in touched(vector):
        if any(at in place for place in reader.coded):
            continue  # another encoder may write other bytes
        ignored = any(at in place for place in reader.ignored)
        for change in (0x01, 0xFF):
            changed = bytearray(vector.data)
            changed[at] ^= change
            try:
                same = decode(kind, given, bytes(changed))[0] == wanted
            except (Refused, json.JSONDecodeError):
                same = False
            if same != ignored:
                found.append(f"byte {at} changed by {change:#x} {'is not ignored' if ignored else 'is not noticed'}")
    try:
        if decode(kind, given, vector.data[:-1])[0] == wanted:
            found.append("a byte short, and not noticed")
    except (Refused, json.JSONDecodeError):
        pass
    return found


def captured(folder, stream, at, size):
    content = (CAPTURES / folder / f"{stream}.zst").read_bytes()
    whole, _, ended = ZstdStream().decode(content, 16 << 20)
    check(ended, "a damaged capture")
    return whole[int(at) : int(at) + size]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what the vectors are decoded as")
    parser.add_argument("names", nargs="*", metavar="NAME", help="these vectors only")
    options = parser.parse_args()
    everything = read_texts()
    if unknown := set(options.names) - {vector.name for vector, _ in everything}:
        parser.error(f"no vector called {', '.join(sorted(unknown))}")
    decoded, compared, failed, unchecked = 0, 0, 0, []
    chosen = [row for row in everything if not options.names or row[0].name in options.names]
    for vector, wanted in chosen:
        found = []
        try:
            if options.list:
                print(vector.name, json.dumps(decode(wanted["kind"], wanted.get("given", {}), vector.data)[0]))
            found += problems(vector, wanted)
            decoded += 1
            if vector.capture:
                if captured(*vector.capture, len(vector.data)) != vector.data:
                    found.append(f"not the bytes of the capture {' '.join(vector.capture)}")
                compared += 1
        except NoLibrary:
            unchecked.append(vector.name)
        for problem in found:
            print(f"{vector.name}: {problem}")
        failed += bool(found)
    meanings = {vector.name: wanted for vector, wanted in everything}  # as decoded: that was held against the bytes
    memories = {} if options.names else read_memories()
    for name, wanted in memories.items():
        got = memory_of(meanings[wanted["main"]], [meanings[channel] for channel in wanted["channels"]])
        if got != wanted["blocks"]:
            print(f"{name}: memory is\n  {json.dumps(got)}\nand the text says\n  {json.dumps(wanted['blocks'])}")
            failed += 1
    print(f"{decoded} of {len(chosen)} vectors decoded, {compared} compared with captures, {len(memories)} migrations; "
          f"{failed} failed")
    if unchecked:
        print(f"no libzstd.so.1 or libxxhash.so.0, so not (wholly) checked: {', '.join(unchecked)}")
    sys.exit(failed > 0 or not chosen)


if __name__ == "__main__":
    main()
