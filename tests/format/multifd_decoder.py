# SPDX-License-Identifier: MIT
"""A decoder of multifd migrations, for decode_captures.py. Written from the text of the formats alone, to try whether
that is enough: it shares nothing with the library or with vectors.py.

Implements, as a destination:
    format/README.md section 1.3        what must be known beforehand: channels, compression, machine type, UUID
    format/packets.md section 2         initial packet
    format/packets.md section 3         packet header; 3.2 flags, 3.4 order of checks, 3.7 digest extension
    format/packets.md section 4         payloads: 4.1 none, 4.2 zlib, 4.3 zstd
    format/packets.md sections 5, 6, 7  zero pages, SYNC and epochs, the end of a channel
    format/packets.md section 13        device-state packets (skipped)
    format/main_stream.md section 9     9.1 to 9.7 and 9.9 to 9.11: elements, block list, records, commands, the end
    format/roles.md section 10          a destination, step by step
    format/hardening.md section 16      rows 1 to 10 and 12 to 21
Refuses: mapped-ram, postcopy, iterables other than RAM, streams without footers, qpl, uadk, qatzip.
"""
import ctypes
import json
import struct
import sys
import zlib

PAGE_SIZE = 4096                     # section 9.11: not in the stream on x86; the description confirms it at the end
MAX_STREAM, MAX_RAM, MAX_BLOCKS = 1 << 24, 1 << 28, 1024             # our caps, row 19
MAX_DEVICE_STATE, MAX_FOOTERS = 1 << 20, 1 << 16
MAX_PAYLOAD, MAX_WINDOW_LOG = 1 << 20, 27                            # section 4
PACKET, MAIN = (0x11223344, 1), (0x5145564D, 3)                      # magic and version
SYNC, COMPRESSION_MASK, DEVICE_STATE = 0x01, 0x3E, 0x40              # section 3.2
COMPRESSION = {"none": 0x00, "zlib": 0x02, "zstd": 0x04}
ZERO, MEM_SIZE, PAGE, EOS, CONTINUE, FLUSH = 0x02, 0x04, 0x08, 0x10, 0x20, 0x200     # section 9.6
EOF, START, PART, END, FULL, SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND, FOOTER = *range(9), 0x7E
OPEN_RETURN_PATH, PING, ADVISE, SWITCHOVER_START = 1, 2, 3, 11       # section 9.7; 4 to 10 are refused
COMMAND_LENGTHS = {OPEN_RETURN_PATH: (0,), PING: (4,), ADVISE: (0, 16), SWITCHOVER_START: (0,)}


class Bad(Exception):
    """The input is not what the text describes."""


class Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t)]


def load_function(library, name, result, *arguments):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def load_library(name):
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        print(f"skipped: {error}")       # no Bad: nothing can be said about any input
        sys.exit(77)


LIBZSTD, SIZE, POINTER = load_library("libzstd.so.1"), ctypes.c_size_t, ctypes.c_void_p
zstd_create = load_function(LIBZSTD, "ZSTD_createDStream", POINTER)
zstd_free = load_function(LIBZSTD, "ZSTD_freeDStream", SIZE, POINTER)
zstd_set = load_function(LIBZSTD, "ZSTD_DCtx_setParameter", SIZE, POINTER, ctypes.c_int, ctypes.c_int)
zstd_decompress = load_function(LIBZSTD, "ZSTD_decompressStream", SIZE, POINTER, POINTER, POINTER)
zstd_is_error = load_function(LIBZSTD, "ZSTD_isError", ctypes.c_uint, SIZE)
zstd_error_name = load_function(LIBZSTD, "ZSTD_getErrorName", ctypes.c_char_p, SIZE)
xxh3_64bits = load_function(load_library("libxxhash.so.0"), "XXH3_64bits", ctypes.c_uint64, ctypes.c_char_p, SIZE)
ZSTD_D_WINDOW_LOG_MAX = 100


def xxh3(data):
    return xxh3_64bits(bytes(data), len(data))


class ZstdStream:
    def __init__(self):
        self.stream = zstd_create()
        zstd_set(self.stream, ZSTD_D_WINDOW_LOG_MAX, MAX_WINDOW_LOG)

    def __del__(self):
        zstd_free(self.stream)

    def decode(self, data, size):
        """All of `data`, which must not give more than `size` bytes; and whether the frame has ended."""
        output = ctypes.create_string_buffer(size + 1)       # one more, to see that there is no more
        target, source = Buffer(ctypes.addressof(output), size + 1, 0), Buffer(None, len(data), 0)
        source.data, left = ctypes.cast(ctypes.c_char_p(data), POINTER), 1
        while left and source.pos < len(data):
            left = zstd_decompress(self.stream, ctypes.byref(target), ctypes.byref(source))
            if zstd_is_error(left):
                raise Bad("zstd: " + zstd_error_name(left).decode())
            if target.pos > size:
                raise Bad("zstd: more output than expected")
        if source.pos < len(data):
            raise Bad("zstd: bytes behind the frame")
        return output.raw[:target.pos], left == 0


def zlib_decoder():
    """Section 4.2: one stream per channel; each payload ends in a sync flush."""
    stream = zlib.decompressobj()

    def decode(data, size):
        if not data.endswith(b"\x00\x00\xff\xff"):
            raise Bad("the zlib payload does not end in a sync flush")
        try:
            pages = stream.decompress(data, size + 1)
        except zlib.error as error:
            raise Bad(f"zlib: {error}") from None
        if stream.eof or stream.unconsumed_tail:
            raise Bad("the zlib stream ends, or has more output than expected")
        return pages
    return decode


def zstd_decoder():
    """Section 4.3: one frame per channel, without content size, checksum and dictionary (RFC 8878), never ended."""
    stream, begin = ZstdStream(), bytes.fromhex("28b52ffd00")

    def decode(data, size):
        nonlocal begin
        if not data.startswith(begin):
            raise Bad("the header of the zstd frame")
        begin, (pages, ended) = b"", stream.decode(data, size)
        if ended:
            raise Bad("the zstd frame ends")
        return pages
    return decode


DECODERS = {"none": lambda: lambda data, size: data, "zlib": zlib_decoder, "zstd": zstd_decoder}


class Reader:
    """A stream. For the self-test: every field that is read, and the bytes whose value the text calls ignored."""
    def __init__(self, name, data):
        self.name, self.data, self.pos = name, data, 0
        self.fields, self.ignored = [], []

    def require(self, condition, message):
        if not condition:
            raise Bad(f"{self.name} at {self.pos}: {message}")

    def ended(self):
        return self.pos == len(self.data)

    def take(self, size, kind="field"):
        self.require(size <= len(self.data) - self.pos, f"the stream ends inside a field of {size} bytes")
        self.note(self.fields, (self.pos, size, kind))
        self.pos += size
        return self.data[self.pos - size:self.pos]

    def unpack(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def text(self):
        """u8 length and an idstr."""
        name = self.take(self.number(1))
        self.require(name, "an empty name")
        return name

    def note(self, notes, entry):
        if len(notes) < 1 << 17:                             # far more than a recording has
            notes.append(entry)

    def ignore(self, start, end, bits=0xFF):
        self.note(self.ignored, (start, end, bits))

    def is_ignored(self, position, bits=0xFF):
        return any(start <= position < end and not bits & ~mask for start, end, mask in self.ignored)

    def is_payload(self, position):
        return any(start <= position < start + size for start, size, kind in self.fields if kind == "payload")


class Ram:
    """The blocks, and for each page what came last: (epoch, digest, copies differ, hash of its whole history)."""
    def __init__(self):
        self.page_size, self.blocks, self.pages = PAGE_SIZE, {}, {}
        self.normal = self.zero = self.repeated = 0

    def write(self, reader, epoch, name, offset, content):
        """Sections 3.4 steps 7 and 8, 9.6. Without content the page is zero, and zeros are written: section 5.2."""
        block = self.blocks.get(name)
        reader.require(block is not None, f"unknown block {name!r}")
        reader.require(offset % self.page_size == 0, f"offset {offset:#x} is not a multiple of the page size")
        reader.require(offset <= len(block) - self.page_size, f"offset {offset:#x} is outside of the block")
        self.normal, self.zero = self.normal + bool(content), self.zero + (not content)
        content = content or bytes(self.page_size)
        block[offset:offset + self.page_size] = content
        before, old, differ, history = self.pages.get((name, offset), (None, 0, False, 0))
        digest, again = xxh3(content), before == epoch
        self.repeated += again
        self.pages[name, offset] = epoch, digest, again and (differ or digest != old), hash((history, epoch, digest))

    def check_copies(self):
        """Section 6: when the copies of a page in one epoch differ, it comes again in a later epoch."""
        for (name, offset), (epoch, _, differ, _) in self.pages.items():
            if differ:
                raise Bad(f"epoch {epoch} has different copies of page {offset:#x} of {name!r}, and none comes later")


class Channel:
    def __init__(self, reader, ram, compression):
        self.reader, self.ram, self.decode = reader, ram, DECODERS[compression]()
        self.method, self.packets, self.epoch = COMPRESSION[compression], 0, 0
        *magic, self.uuid, self.id = reader.unpack(">II16sB")            # section 2
        reader.require(tuple(magic) == PACKET, "not an initial packet of version 1")
        reader.take(39)
        reader.ignore(25, 64)

    def finish_epoch(self, epoch):
        """Section 6.5: reads up to the SYNC of this epoch, and no further."""
        self.epoch = epoch
        while not self.reader.ended():
            if self.packet():
                return
        self.reader.require(False, f"the channel ends before the SYNC of epoch {epoch}")

    def finish(self):
        """Behind the last SYNC: nothing but packets without pages. Sections 6.3, 7; rows 12, 13, 15."""
        begin, self.epoch = self.reader.pos, None
        while not self.reader.ended():
            self.reader.require(not self.packet(), "a SYNC too many")
        self.reader.ignore(begin, self.reader.pos)

    def packet(self):
        """Section 3.4. Returns whether it was a SYNC."""
        reader, at = self.reader, self.reader.pos
        *magic, flags = reader.unpack(">III")
        reader.require(tuple(magic) == PACKET, "not a packet of version 1")
        reader.ignore(at + 8, at + 11)                       # flag bits 7 to 31
        reader.ignore(at + 11, at + 12, 0x80)
        self.packets += 1
        if flags & DEVICE_STATE:
            self.device_state(flags)
            return False
        header = reader.unpack(">IIIQI28s256s") + (reader.unpack(f">{524288 // self.ram.page_size}Q"),)
        reader.ignore(at + 12, at + 16)                      # pages_alloc: every value that passes the checks
        reader.ignore(at + 24, at + 32)                      # packet_num
        reader.ignore(at + 36, at + 64)                      # reserved
        self.pages(at, flags, *header)
        return bool(flags & SYNC)

    def pages(self, at, flags, alloc, normal, size, _packet_num, zero, reserved, name, offsets):
        reader, end = self.reader, at + 320 + 8 * len(offsets)
        reader.require(alloc <= len(offsets), f"pages_alloc {alloc}")
        reader.require(normal + zero <= alloc, f"{normal} normal and {zero} zero pages in {alloc} slots")
        if normal == 0:
            reader.ignore(at + 20, at + 24)                  # next_packet_size may be stale: section 3.1
        if normal + zero == 0:
            reader.ignore(at + 11, at + 12, 0x80 | COMPRESSION_MASK)
            reader.ignore(at + 64, end)
            return
        reader.require(self.epoch, "pages before the first SYNC or behind the last one")
        name, nul, _ = name.partition(b"\0")
        reader.require(nul, "the block's name does not end")
        reader.ignore(at + 64 + len(name) + 1, at + 320)
        reader.ignore(at + 320 + 8 * (normal + zero), end)
        used = offsets[:normal + zero]
        reader.require(len(set(used)) == len(used), "a page twice in one packet")
        reader.require(flags & COMPRESSION_MASK == self.method, f"compression bits in flags {flags:#x}")
        for offset in used[normal:]:
            self.ram.write(reader, self.epoch, name, offset, None)
        if normal:
            self.normal_pages(name, used[:normal], size, reserved)

    def normal_pages(self, name, offsets, size, reserved):
        reader, page_size, expected = self.reader, self.ram.page_size, len(offsets) * self.ram.page_size
        possible = 0 < size <= MAX_PAYLOAD if self.method else size == expected
        reader.require(possible, f"next_packet_size {size} for {len(offsets)} pages")
        data = reader.take(size, "payload")
        try:
            content = self.decode(data, expected)
        except Bad as error:
            reader.require(False, error)
        reader.require(len(content) == expected, f"the payload has {len(content)} bytes and not {expected}")
        if reserved[:4] == b"mfDX":                          # section 3.7
            reader.require(xxh3(content) == int.from_bytes(reserved[4:12], "big"), "the digest of the pages differs")
        for index, offset in enumerate(offsets):
            self.ram.write(reader, self.epoch, name, offset, content[index * page_size:(index + 1) * page_size])

    def device_state(self, flags):
        """Section 13, behind the first 12 bytes. Read and dropped."""
        reader, at = self.reader, self.reader.pos
        reader.require(not self.method and not flags & (SYNC | COMPRESSION_MASK), f"device state, flags {flags:#x}")
        name, _instance, size = reader.unpack(">256sII")
        reader.require(b"\0" in name and name[0], "the device's name is empty or does not end")
        reader.require(0 < size <= MAX_DEVICE_STATE, f"device state of {size} bytes")
        reader.take(size)
        reader.ignore(at, reader.pos)


class Main:
    def __init__(self, reader, ram, channels, machine):
        self.reader, self.ram, self.channels, self.machine = reader, ram, channels, machine
        self.section = self.block = self.per_round = None
        self.return_path = self.ignore_shared = self.open_epoch = False
        self.epoch = self.devices = 0

    def run(self):
        reader = self.reader
        reader.require(reader.unpack(">II") == MAIN, "not a migration stream of version 3")
        reader.require(reader.number(1) == CONFIGURATION, "no CONFIGURATION")
        self.configuration()
        kind = None
        while kind != END:
            kind = reader.number(1)
            if kind == COMMAND:
                self.command()
                continue
            reader.require(kind in (START, PART, END), f"element {kind:#x} in front of RAM's END")
            section = reader.number(4)
            if kind == START:
                self.start(section)
            else:
                reader.require(section == self.section, f"unknown section {section}")
            self.records(kind)
        for channel in self.channels:
            channel.finish()
        self.ram.check_copies()
        self.find_end()

    def configuration(self):
        """Section 9.3."""
        reader = self.reader
        machine = reader.take(reader.number(4))
        reader.require(machine == self.machine, f"machine type {machine[:255]!r} and not {self.machine!r}")
        while reader.data[reader.pos:reader.pos + 1] == bytes([SUBSECTION]):
            reader.take(1)
            name, version = reader.text(), reader.number(4)
            reader.require(version == 1, f"version {version} of {name!r}")
            if name == b"configuration/target-page-bits":
                bits = reader.number(4)
                reader.require(10 <= bits <= 16, f"pages of 2^{bits} bytes")
                self.ram.page_size = 1 << bits
            elif name == b"configuration/capabilities":
                for _ in range(reader.number(4)):            # each has a name, so the end of the stream bounds this
                    capability = reader.text()
                    reader.require(capability == b"x-ignore-shared", f"capability {capability!r}")
                    self.ignore_shared = True
            else:
                reader.require(name == b"configuration/uuid", f"unknown subsection {name!r}")
                reader.require(reader.take(16) == self.channels[0].uuid, "the UUID is not that of the channels")

    def command(self):
        """Sections 9.7, 9.4 (steps 2 and 6)."""
        reader = self.reader
        command, length = reader.unpack(">HH")
        reader.require(length in COMMAND_LENGTHS.get(command, ()), f"command {command} of {length} bytes")
        reader.require((command == SWITCHOVER_START) == (self.section is not None), f"command {command} at this place")
        data = reader.take(length)
        if command == OPEN_RETURN_PATH:
            self.return_path = True
        elif command == PING:
            reader.ignore(reader.pos - length, reader.pos)   # its value is only sent back
        elif command == ADVISE and data:                     # section 9.5: with others the block list has more fields
            reader.require(data == struct.pack(">QQ", *[self.ram.page_size] * 2), "POSTCOPY_ADVISE with huge pages")

    def start(self, section):
        """Section 9.5."""
        reader, page_size, blocks = self.reader, self.ram.page_size, self.ram.blocks
        name = reader.text()
        reader.require(name == b"ram", f"iterable {name!r}: its payload is not known")
        reader.require(self.section is None, "RAM's START comes twice")
        self.section, identity, word = section, reader.unpack(">II"), reader.number(8)
        reader.require(identity == (0, 4), f"instance and version of RAM: {identity}")
        left = word & -page_size
        reader.require(word - left == MEM_SIZE and left <= MAX_RAM, f"the block list begins with {word:#x}")
        while left:
            name, length = reader.text(), reader.number(8)
            reader.require(0 < length <= left and length % page_size == 0, f"block {name!r} of {length} bytes")
            reader.require(name not in blocks and len(blocks) < MAX_BLOCKS, f"block {name!r} twice, or too many")
            if self.ignore_shared:
                reader.take(8)
                reader.ignore(reader.pos - 8, reader.pos)
            blocks[name] = bytearray(length)
            left -= length

    def records(self, kind):
        """Sections 9.6, 6.1, 6.2: the records of one RAM section, and its footer."""
        reader, flushes = self.reader, 0
        while (word := reader.number(8)) != EOS:
            if word == FLUSH:
                flushes += 1
                self.close_epoch()
            else:
                reader.require(kind != START, f"record {word:#x} in START")
                self.page_record(word)
        if kind == START:
            self.per_round = flushes > 0
        if not self.per_round:
            self.close_epoch()
        if kind == END:
            reader.require(flushes or not self.per_round, "END without MULTIFD_FLUSH")
            reader.require(not self.open_epoch, "records behind the last epoch")
        reader.require(reader.unpack(">BI") == (FOOTER, self.section), "not the footer of this section")

    def close_epoch(self):
        for channel in self.channels:
            channel.finish_epoch(self.epoch)
        self.epoch, self.open_epoch = self.epoch + 1, False

    def page_record(self, word):
        reader, flags = self.reader, word & (self.ram.page_size - 1)
        reader.require(flags & ~CONTINUE in (ZERO, PAGE), f"record {word:#x}")
        if not flags & CONTINUE:
            self.block = reader.text()
        reader.require(self.block is not None, "CONTINUE before a name")
        if flags & ZERO:
            reader.require(reader.number(1) == 0, "the fill byte of a ZERO record is not 0")
        content = reader.take(self.ram.page_size) if flags & PAGE else None
        self.ram.write(reader, self.epoch, self.block, word - flags, content)
        self.open_epoch = True

    def find_end(self):
        """Section 9.10: the chain of footers through the devices' states to the end mark. Retreats from false ones."""
        reader, data, begin = self.reader, self.reader.data, self.reader.pos
        chain, at, budget = [], begin, 16 * len(data)
        for _ in range(MAX_FOOTERS):
            if self.is_end(at):
                self.devices = len(chain)
                reader.ignore(begin, at)                     # the states are opaque
                return
            if data[at:at + 1] == bytes([FULL]) and len(data) - at > 6:
                chain.append((bytes([FOOTER]) + data[at + 1:at + 5], at + 6 + data[at + 5] + 8))
            while chain and budget > 0:
                footer, start = chain.pop()
                found = data.find(footer, start)
                budget -= (found if found >= 0 else len(data)) - start
                if found >= 0:
                    chain.append((footer, found + 1))
                    at = found + len(footer)
                    break
            reader.require(chain and budget > 0, "no chain of footers leads to the end of the stream")
        reader.require(False, "too many footers")

    def is_end(self, at):
        """Whether EOF and a whole description, or EOF alone (section 10 step 10), end the stream here."""
        reader, data = self.reader, self.reader.data
        size = len(data) - at - 6
        if size == -5 and data[at] == EOF:
            return True
        if size < 1 or data[at:at + 7] != struct.pack(">BBIB", EOF, DESCRIPTION, size, ord("{")):
            return False
        try:
            confirmed = json.loads(data[at + 6:].decode()).get("page_size") == self.ram.page_size
        except (ValueError, RecursionError) as error:
            raise Bad(f"{reader.name} at {at + 6}: the description is not JSON: {error}") from None
        reader.require(confirmed, "the description has another page size")
        reader.ignore(at + 1, len(data))                     # the description is not needed for RAM
        return True


def decode(streams, manifest):
    """A whole migration. Returns its Main."""
    ram, readers = Ram(), {name: Reader(name, data) for name, data in streams.items()}
    channels = [Channel(readers[name], ram, manifest["compression"]) for name in streams if name != "main"]
    if sorted(channel.id for channel in channels) != list(range(len(channels))):
        raise Bad("the channels' ids are not 0 to N - 1")
    if any(channel.uuid != bytes(16) for channel in channels):           # section 1.3, and the manifest names none
        raise Bad("the channels' UUID is not that of a VM without UUID")
    main = Main(readers["main"], ram, channels, manifest["machine"].encode())
    main.run()
    if main.return_path != (manifest["return-path"] == "on"):
        raise Bad("the return path is not as in the manifest")
    return main
