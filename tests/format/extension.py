# SPDX-License-Identifier: MIT
"""Decodes the messages of this library's own extension, from the text of include/multifd/format/extension.md alone."""

import uuid

from reader import Reader, check

NUMBER = 0x6D66
DESTINATION, SOURCE = "destination", "source"  # whom a message is for
MOST = {DESTINATION: 16384, SOURCE: 512}
KINDS = {
    1: ("SETTINGS", (DESTINATION,)), 2: ("ACCEPTED", (SOURCE,)), 3: ("FAILED", (DESTINATION, SOURCE)),
    4: ("USER_DATA", (DESTINATION, SOURCE)), 5: ("EPOCH_WHOLE", (SOURCE,)), 6: ("SECTION_SIZE", (DESTINATION,)),
    7: ("PAGE_DIGESTS", (DESTINATION,)), 8: ("STATE_WHOLE", (DESTINATION,)), 9: ("LOADED", (SOURCE,)),
    10: ("HAND_OVER", (DESTINATION,)), 11: ("RUNNING", (SOURCE,)), 12: ("MISSING_PAGES", (DESTINATION,)),
    13: ("MEMORY_FOLLOWS", (DESTINATION,)), 14: ("KNOWN_ZEROS", (DESTINATION,)), 15: ("BASE_WANTED", (DESTINATION,)),
    16: ("BASE_KEY", (SOURCE,)), 17: ("BASE_DIGESTS", (SOURCE,)), 18: ("BASE_ZEROS", (SOURCE,))}
METHODS = {0x00: "none", 0x02: "zlib", 0x04: "zstd", 0x08: "qpl", 0x10: "uadk", 0x20: "qatzip"}


def asked(value):
    """The version in a PING by which a source asks, or None."""
    return value & 0xFF if value >> 8 == NUMBER << 8 and value & 0xFF else None


def answered(value):
    """The version in a PONG by which an own destination answers, or None."""
    return value & 0xFF if value >> 8 == NUMBER << 8 | 0x80 and value & 0xFF else None


def flag(reader):
    value = reader.number(1)
    check(value < 2, "neither on nor off")
    return bool(value)


def in_range(reader, least, most):
    value = reader.number(4)
    check(least <= value <= most, "out of its range")
    return value


def page_size(reader):
    value = in_range(reader, 1024, 65536)
    check(value & (value - 1) == 0, "page size")
    return value


def compression(reader):
    value = reader.number(4)
    check(value & ~0x3E == 0, "compression")
    return METHODS.get(value, hex(value))


def zero_pages(reader):
    value = reader.number(1)
    check(value < 3, "zero pages")
    return ("none", "legacy", "multifd")[value]


def user(reader):
    check(0 < reader.left() <= 1024, "length of the VMM's own")
    return reader.take(reader.left()).hex()


SETTINGS = {
    1: ("channels", lambda reader: in_range(reader, 1, 255)), 2: ("page_size", page_size),
    3: ("compression", compression), 4: ("zero_pages", zero_pages), 5: ("digest", flag), 6: ("tls", flag),
    7: ("paths", lambda reader: in_range(reader, 1, 255)),
    8: ("uuid", lambda reader: str(uuid.UUID(bytes=reader.take(16)))), 9: ("user", user),
    10: ("session", lambda reader: reader.take(16).hex())}


def settings(reader, version):
    spoken, newest, oldest, count = (reader.number(1) for _ in range(4))
    check(0 < oldest <= spoken <= newest, "versions")
    check(spoken == version, "another version")
    check(count <= 16, "number of features")
    features = {}
    for _ in range(count):
        needed = reader.number(1) % 2 == 1
        name = reader.name()
        check(len(name) <= 24 and all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in name), "a feature's name")
        check(name not in features, "a feature twice")
        features[name] = "needed" if needed else "offered"
    result = {"versions": [spoken, newest, oldest], "features": features}
    while reader.left():
        number = reader.number(2)
        value = Reader(reader.take(reader.number(2)))
        if number not in SETTINGS:
            check(number < 0x8000, "an unknown setting that must not be ignored")
            continue
        name, decode = SETTINGS[number]
        check(name not in result, "a setting twice")
        result[name] = decode(value)
        check(value.left() == 0, "length of a setting")
    return result


def failed(reader, last_code):
    kind = reader.number(1)
    check(1 <= kind <= 3, "kind of a reason")
    reader.ignore(1)
    code = reader.take(4) if kind != 3 else reader.ignore(4)
    result = {}
    if kind == 2:
        reader.ignore(4)
        result["errno"] = int.from_bytes(code, "big")
    else:
        last = reader.number(4) if kind == 1 else reader.ignore(4)
        if kind == 1 and last == last_code:
            result["code"] = int.from_bytes(code, "big")
    result |= {"detail": hex(reader.number(8)), "expected": hex(reader.number(8))}
    check(reader.left() <= 400, "length of the text")
    text = reader.take(reader.left())
    return result | {"text": "".join(chr(c) if 0x20 <= c < 0x7F else "?" for c in text)}


def page_bitmap(reader):
    result = {"block": reader.number(4), "offset": hex(reader.number(8))}
    check(reader.left() > 0 and reader.left() % 8 == 0, "length of the bitmap")
    words = [reader.number(8) for _ in range(reader.left() // 8)]
    return result | {"pages": [64 * w + i for w, word in enumerate(words) for i in range(64) if word >> i & 1]}


def take(reader, length, towards, given):
    """One message: the `length` bytes of data of the command, or of the return path's message."""
    at = reader.at
    body = Reader(reader.take(length))
    result = message(body, towards, given)
    reader.ignored += [range(at + each.start, at + each.stop) for each in body.ignored]
    return result


def message(reader, towards, given):
    check(reader.left() <= MOST[towards], "length of a message")
    kind = reader.number(2)
    check(kind in KINDS and towards in KINDS[kind][1], "kind of a message")
    name = KINDS[kind][0]
    result = {"extension": name}
    if name in ("SETTINGS", "ACCEPTED"):
        result |= settings(reader, given.get("version", 1))
    elif name == "FAILED":
        result |= failed(reader, given.get("last_code"))
    elif name == "USER_DATA":
        check(reader.left() > 0, "no byte")
        result["data"] = reader.take(reader.left()).hex()
    elif name in ("SECTION_SIZE", "LOADED"):
        result[{"SECTION_SIZE": "size", "LOADED": "pages"}[name]] = reader.number(8)
    elif name == "EPOCH_WHOLE":
        result |= {"epoch": reader.number(8), "received": reader.number(8)}
        channels = reader.take(32)
        result["channels"] = [i for i in range(256) if channels[i // 8] >> i % 8 & 1]
    elif name == "STATE_WHOLE":
        result["sections"] = reader.number(4)
    elif name == "PAGE_DIGESTS":
        result |= {"block": reader.number(4), "offset": hex(reader.number(8))}
        check(reader.left() > 0 and reader.left() % 8 == 0, "length of the digests")
        result["digests"] = [reader.take(8).hex() for _ in range(reader.left() // 8)]
    elif name in ("MISSING_PAGES", "KNOWN_ZEROS"):
        result |= page_bitmap(reader)
    elif name == "BASE_KEY":
        result["key"] = reader.take(16).hex()
    elif name in ("BASE_DIGESTS", "BASE_ZEROS"):
        result |= {"block": reader.number(4), "offset": hex(reader.number(8))}
        if name == "BASE_ZEROS":
            result["pages"] = reader.number(8)
            check(result["pages"] > 0, "number of zero pages")
        else:
            check(reader.left() > 0 and reader.left() % 16 == 0, "length of the digests")
            result["digests"] = [reader.take(16).hex() for _ in range(reader.left() // 16)]
    elif name == "MEMORY_FOLLOWS":
        result |= {"pages": reader.number(8), "connections": reader.number(2), "session": reader.take(16).hex()}
        check(1 <= result["connections"] <= 256, "number of connections")
    check(reader.left() == 0, "length of a message")
    return result


class ToDestination:
    """The order in which a source's messages come (section 19.3)."""

    def __init__(self):
        self.settings, self.last, self.size, self.sections = False, None, None, 0
        self.wanted = False  # BASE_WANTED has come, or what it must not come behind
        self.missing, self.follows = {}, False  # block: its missing pages, as numbers from the block's begin

    def take(self, one, ram, blocks, page_size):
        """`ram`: "ahead", "inside" or "whole". `blocks`: of START, their used lengths."""
        name = one["extension"]
        check(self.last != "FAILED" and self.size is None, f"{name} out of order")
        over = self.last in ("STATE_WHOLE", "HAND_OVER")
        naming = self.last == "MISSING_PAGES"
        behind_ram = self.settings and ram == "whole" and not over
        first = self.settings and ram == "whole" and self.last in ("SETTINGS", "MISSING_PAGES")
        check({"SETTINGS": not self.settings and ram == "ahead", "FAILED": True, "USER_DATA": self.settings,
               "SECTION_SIZE": behind_ram and not naming,
               "PAGE_DIGESTS": behind_ram and not naming and not self.follows,
               "MISSING_PAGES": first, "MEMORY_FOLLOWS": first, "KNOWN_ZEROS": self.settings and ram == "inside",
               "BASE_WANTED": self.settings and ram == "inside" and not self.wanted,
               "STATE_WHOLE": behind_ram and not naming and one.get("sections") == self.sections,
               "HAND_OVER": self.last == "STATE_WHOLE"}[name], f"{name} out of order")
        self.settings |= name == "SETTINGS"
        self.wanted |= name in ("BASE_WANTED", "KNOWN_ZEROS")
        self.follows |= name == "MEMORY_FOLLOWS"
        if name in ("MISSING_PAGES", "KNOWN_ZEROS"):
            first = int(one["offset"], 16)
            check(first % (64 * page_size) == 0, "offset of a bitmap")
            check(one["block"] < len(blocks) and first < blocks[one["block"]], "a bitmap outside of the block")
            pages = {first // page_size + page for page in one["pages"]}
            check(all(page * page_size < blocks[one["block"]] for page in pages), "a page outside of the block")
        if name == "MISSING_PAGES":
            self.missing.setdefault(one["block"], set()).update(pages)
        if name == "MEMORY_FOLLOWS":
            check(one["pages"] == sum(len(pages) for pages in self.missing.values()), "number of missing pages")
        self.size = one.get("size")
        if name not in ("USER_DATA", "KNOWN_ZEROS", "BASE_WANTED"):
            self.last = name

    def take_section(self):
        check(self.size is not None, "a section without SECTION_SIZE")
        size, self.size = self.size, None
        self.sections += 1
        return size


def check_answers(messages):
    """The order of an own destination's messages."""
    last, epoch, base = None, -1, None  # base: block and offset behind the last page of an older copy
    for one in messages:
        name = one.get("extension")
        if name is None:
            continue
        check({"FAILED": last != "FAILED", "ACCEPTED": last is None, "USER_DATA": last not in (None, "FAILED"),
               "EPOCH_WHOLE": last == "ACCEPTED" and one.get("epoch", 0) > epoch, "LOADED": last == "ACCEPTED",
               "RUNNING": last == "LOADED", "BASE_KEY": last == "ACCEPTED" and base is None,
               "BASE_DIGESTS": last == "ACCEPTED" and base is not None,
               "BASE_ZEROS": last == "ACCEPTED" and base is not None}[name], f"{name} out of order")
        if name == "EPOCH_WHOLE":
            epoch = one["epoch"]
        elif name == "BASE_KEY":
            base = 0, 0
        elif name.startswith("BASE_"):
            here = one["block"], int(one["offset"], 16)
            check(here == (base[0] + 1, 0) or here[0] == base[0] and here[1] >= base[1], f"{name} of no next page")
            base = here[0], here[1] + 1
        elif name != "USER_DATA":
            last = name
