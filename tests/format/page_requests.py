# SPDX-License-Identifier: MIT
"""Decodes page connections, from the text of include/multifd/format/page_requests.md alone."""

import uuid

import extension
from reader import Reader, check

MOST = 524288  # bytes of one request


def front(reader, magic):
    check(reader.take(4) == magic, "magic")
    check(reader.number(4) == 1, "version")
    return {"session": str(uuid.UUID(bytes=reader.take(16))), "page_size": reader.number(4),
            "compression": reader.number(4)}


def client(reader):
    result = front(reader, b"mfPC")
    page_size = result["page_size"] or 1024
    kind = reader.number(1)
    check(kind < 2, "kind")
    reader.ignore(3)
    result |= {"urgent": kind == 0, "messages": []}
    named = shut = False
    while reader.left():
        check(not shut, "a message behind SHUT")
        kind, length = reader.number(2), reader.number(2)
        body = Reader(reader.take(length))
        if kind == 1:
            message, shut = {"message": "SHUT", "value": body.number(4)}, True
        else:
            check(kind in (3, 4) and (named or kind == 3), "message")
            start, size = body.number(8), body.number(4)
            check(start % page_size == 0 and size % page_size == 0 and 0 < size <= MOST, "range")
            message = {"message": {3: "REQ_PAGES_ID", 4: "REQ_PAGES"}[kind], "start": hex(start), "length": hex(size)}
            if kind == 3:
                message["block"], named = body.name(), True
        check(body.left() == 0, "length")
        result["messages"].append(message)
    return result


def failed(reader, given):
    size = reader.number(2)
    check(28 <= size <= 428, "length of a reason")
    result = extension.take(reader, size, extension.SOURCE, given)
    check(result["extension"] == "FAILED" and reader.left() == 0, "a reason that is not the last")
    return {"failed": result}


def blocks(reader, page_size):
    count, size = reader.number(4), reader.number(4)
    check(1 <= count <= 1024 and 10 * count <= size <= 264 * count, "block list")
    result, end = {}, reader.at + size
    for _ in range(count):
        used, name = reader.number(8), reader.name()
        check(used > 0 and used % page_size == 0 and "\0" not in name and name not in result, "block")
        result[name] = hex(used)
    check(reader.at == end, "length of the block list")
    return result


def server(reader, given, packet):
    """`packet(page_size)` decodes one. `given`: the requests that are answered."""
    result = front(reader, b"mfPS")
    page_size = result["page_size"]
    check(1024 <= page_size <= 65536 and page_size & (page_size - 1) == 0, "page size")
    magic = reader.take(4)
    if magic == b"mfPF":
        return result | failed(reader, given)
    check(magic == b"mfPA", "neither accepted nor failed")
    result |= {"blocks": blocks(reader, page_size), "packets": []}
    for block, start, size in given["requests"]:
        if reader.data[reader.at : reader.at + 4] == b"mfPF":
            reader.take(4)
            return result | failed(reader, given)
        one = packet(page_size)
        normal, zero = [[int(at, 16) for at in one[each]] for each in ("normal", "zero")]
        check(one.get("flags", 1) & 1 == 0 and one.get("block") == block, "an answer to something else")
        check(normal == sorted(normal) and zero == sorted(zero), "order of an answer's pages")
        check(sorted(normal + zero) == list(range(start, start + size, page_size)), "other pages than were asked for")
        result["packets"].append(one)
    if reader.left():
        check(reader.take(4) == b"mfPW", "last word")
        result["whole"] = True
    return result
