# SPDX-License-Identifier: MIT
"""Holds the main streams that MainStreamWriter writes against the formats' text.

    python3 tests/format/written.py build/dev/tests/play_source

Plays a destination by the text alone, for a source that is made of the library (tests/support/play_source.cpp): once as
a QEMU answers, once as an own destination does. Then decodes what came with the decoders of vectors.py, and compares
the memory that the streams of the migration leave behind.
"""

import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import extension
import vectors
from reader import Refused

PAGE = 4096
LIMIT = 60  # seconds for everything; no measure
BLOCKS = {"ram0": 40, "/rom@etc/acpi/tables": 7, "pc.bios": 16}
ANSWER = struct.Struct(">HHI")


def page_of(block, page):
    """What play_source has there, as vectors.py describes it; None: a page of zeros."""
    return None if page % 3 == 0 else f"1024 x {(block + 1 << 24 | page).to_bytes(4, 'little').hex()}"


def expected_memory():
    memory = {}
    for number, (name, pages) in enumerate(BLOCKS.items()):
        contents = {hex(i * PAGE): page_of(number, i) for i in range(pages)}
        memory[name] = {offset: content for offset, content in contents.items() if content}
    return memory


class Destination:
    """Takes the connections of one source, and answers on the main one."""

    def __init__(self, path, channels, own):
        self.own, self.main, self.channels, self.problem = own, bytearray(), {}, None
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(16)
        self.listener.settimeout(LIMIT)
        self.thread = threading.Thread(target=self.run, args=(1 + channels,), daemon=True)
        self.thread.start()

    def run(self, connections):
        threads = []
        for _ in range(connections):
            link, _ = self.listener.accept()
            link.settimeout(LIMIT)
            first = link.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)
            read = self.read_main if first == b"QEVM" else self.read_channel
            threads.append(threading.Thread(target=read, args=(link,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(LIMIT)

    def read_channel(self, link):
        data = bytearray()
        while part := link.recv(1 << 16):
            data += part
        if len(data) > 24:  # a source that gives up may cut a channel ahead of its hello
            self.channels[data[24]] = bytes(data)

    def read_main(self, link):
        """Each answer once, when the bytes so far call for it: a destination that waits for whole elements."""
        answered = set()
        try:
            while part := link.recv(1 << 16):
                self.main += part
                for name, answer in self.answers(bytes(self.main)):
                    if name not in answered:
                        answered.add(name)
                        link.sendall(answer)
        except OSError as error:
            self.problem = error

    def answers(self, data):
        """What the stream so far calls for, by the text."""
        def has(sought):
            return sought in data
        ping = b"\x08\x00\x02\x00\x04"
        question = ping + b"\x6d\x66\x00\x01"
        if has(ping + b"\0\0\0\1"):
            yield "pong", ANSWER.pack(2, 4, 1)
        if has(question):
            yield "own", ANSWER.pack(2, 4, 0x6D668001 if self.own else 0x6D660001)
        if self.own:
            def message(kind, body=b""):
                return struct.pack(">HHH", 0x6D66, 2 + len(body), kind) + body
            if has(b"\x7e\0\0\0\1"):  # START's footer
                features = b"\x00\x0cpage-digests"
                yield "accepted", message(2, bytes([1, 1, 1, 1]) + features)
                yield "epoch", message(5, struct.pack(">QQ32s", 0, 0, b"\1"))  # channel 0 has arrived
            if has(b"\x08\x6d\x66\x00\x06\x00\x08"):  # STATE_WHOLE
                yield "loaded", message(9, struct.pack(">Q", sum(BLOCKS.values())))
            if has(b"\x08\x6d\x66\x00\x02\x00\x0a") and data.endswith(b"}"):
                yield "running", message(11)
        if data.endswith(b"]}"):
            yield "shut", ANSWER.pack(1, 4, 0)


def check(condition, why):
    if not condition:
        raise Refused(why)


def kinds(main):
    """The elements, one word each."""
    words = []
    for each in main["elements"]:
        words.append(each.get("extension") or next(iter(each)))
    return words


def case(program, folder, number, machine, peer, channels, own):
    path = str(Path(folder, f"{number}"))
    destination = Destination(path, channels, own)
    blocks = [f"{name}={pages}" for name, pages in BLOCKS.items()]
    done = subprocess.run([program, f"unix:{path}", machine, peer, str(channels), *blocks], capture_output=True,
                          text=True, timeout=LIMIT)
    destination.thread.join(LIMIT)
    check(done.returncode == 0, f"play_source ended with {done.returncode}: {done.stdout} {done.stderr}")
    check(destination.problem is None, f"the main connection: {destination.problem}")
    main, reader = vectors.decode("main_stream", {"page_size": PAGE}, bytes(destination.main))
    check(not reader.ignored, "a byte of the main stream that means nothing")
    check(main["elements"][1] == {"configuration": machine}, "the machine type")
    decoded = [vectors.decode("channel", {"page_size": PAGE, "compression": "none"}, destination.channels[i])[0]
               for i in range(channels)]
    check(vectors.memory_of(main, decoded) == expected_memory(), "the memory that arrives")
    start = next(each for each in main["elements"] if "start" in each)
    sizes = [each["used_length"] for each in start["blocks"]]
    check(sizes == sorted(sizes, reverse=True) and len(sizes) == len(BLOCKS), "the order of the blocks")
    version = [int(word) for word in machine.rpartition("-")[2].split(".")] if machine[-1].isdigit() else [9, 0]
    check(("MULTIFD_FLUSH" in start["records"]) == (version >= [8, 1]), "the style of SYNC")
    words = kinds(main)
    rest = ["start", "part", *(["command"] if version >= [10, 0] else []), "end"]
    front = ["header", "configuration", "command", "command"]
    if peer == "multifd":
        front.append("command")
    if not own:
        check(words == front + rest + ["eof", "description"], f"the order of elements: {words}")
        return done.stdout
    check(words == front + ["SETTINGS"] + rest + ["SECTION_SIZE", "device"] + ["PAGE_DIGESTS"] * len(BLOCKS)
          + ["STATE_WHOLE", "HAND_OVER", "eof", "description"], f"the order of elements: {words}")
    settings = next(each for each in main["elements"] if each.get("extension") == "SETTINGS")
    wanted = {"versions": [1, 1, 1], "features": {"page-digests": "needed"}, "channels": channels, "page_size": PAGE,
              "compression": "none", "zero_pages": "legacy", "digest": False, "tls": False, "paths": 1}
    check(settings == {"extension": "SETTINGS", **wanted}, f"settings: {settings}")
    device = next(each for each in main["elements"] if "device" in each)
    check(device == {"device": "cpu", "id": 2, "instance": 1, "version": 2, "state": b"state".hex()}, f"{device}")
    description = main["elements"][-1]["description"]["devices"][0]
    check((description["name"], description["instance_id"], description["version"]) == ("cpu", 1, 2)
          and description["fields"][0]["size"] == len("state"), f"description: {description}")
    numbers = {name: number for number, name in enumerate(BLOCKS)}
    for block, each in enumerate(each for each in main["elements"] if each.get("extension") == "PAGE_DIGESTS"):
        name = start["blocks"][block]["idstr"]
        contents = [page_of(numbers[name], i) for i in range(BLOCKS[name])]
        pages = [bytes.fromhex(content.partition(" x ")[2]) * 1024 if content else bytes(PAGE) for content in contents]
        try:
            digests = [f"{vectors.xxh3(page):016x}" for page in pages]
        except vectors.NoLibrary:
            digests = each["digests"]
        check(each == {"extension": "PAGE_DIGESTS", "block": block, "offset": "0x0", "digests": digests}, "digests")
    return done.stdout


def refusal(program, folder):
    """An own destination that refuses: its text is what the source's user sees, and no page has travelled."""
    class Refusing(Destination):
        def answers(self, data):
            yield from (each for each in super().answers(data) if each[0] in ("pong", "own"))
            if b"\x7e\0\0\0\1" in data:
                body = struct.pack(">HBBIIQQ", 3, 3, 0, 0, 0, 0, 0) + b"zlib \x1b[31mhere\n"
                yield "failed", struct.pack(">HH", extension.NUMBER, len(body)) + body + ANSWER.pack(1, 4, 1)
    path = str(Path(folder, "refusing"))
    destination = Refusing(path, 1, True)
    done = subprocess.run([program, f"unix:{path}", "microvm", "multifd", "1", "ram=4"], capture_output=True, text=True,
                          timeout=LIMIT)
    destination.thread.join(LIMIT)
    check(done.returncode == 1 and "failed: the destination: zlib ?[31mhere?" in done.stdout, done.stdout)
    for data in destination.channels.values():
        check(all(not each["normal"] for each in vectors.decode(
            "channel", {"page_size": PAGE, "compression": "none"}, data)[0]["packets"]), "a page has travelled")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    program = sys.argv[1]
    cases = [("pc-i440fx-7.2", "qemu-7.2", 2, False), ("pc-q35-8.0", "qemu-8.0", 1, False),
             ("pc-q35-8.1", "qemu-8.1", 3, False), ("pc-q35-10.0", "qemu-10.0", 2, False),
             ("microvm", "multifd", 2, False), ("pc-q35-10.0", "multifd", 2, True), ("microvm", "multifd", 4, True)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="multifd-written-", dir="/tmp") as folder:
        for number, (machine, peer, channels, own) in enumerate(cases):
            name = f"{machine} to {peer}, {channels} channels, {'an own destination' if own else 'as a QEMU answers'}"
            try:
                case(program, folder, number, machine, peer, channels, own)
                print(f"ok    {name}")
            except (Refused, KeyError, StopIteration, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"FAIL  {name}: {error!r}")
        try:
            refusal(program, folder)
            print("ok    a refusal's text arrives ahead of any page")
        except (Refused, KeyError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAIL  a refusal: {error!r}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
