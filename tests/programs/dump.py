# SPDX-License-Identifier: MIT
"""How a migration into qemu_dump begins and ends, with sources made of bytes: no QEMU needed. Their formats:
format/packets.md sections 2 and 3, format/main_stream.md section 9.

    python3 tests/programs/dump.py build/dev/examples [NAME ...]

A dump is kept exactly when everything has arrived, the source hears of success exactly then, and what is late or cut after
that is a warning.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path

import survivors
from survivors import Folder, LabError, wait_for

PAGE, PAGES, CHANNELS = 4096, 8, 2
TIMEOUT = 2  # --timeout; also how long a source may be late at its end
NO_HANG = 30
SHUT_OK = bytes.fromhex("00010004 00000000")
FLUSH, EOS, ZERO = 0x200, 0x10, 0x02
LOST = "has gone in the middle of the migration"


def be(size, value):
    return value.to_bytes(size, "big")


def named(name):
    return bytes([len(name)]) + name.encode()


def hello(channel, uuid=0):
    return bytes.fromhex("1122334400000001") + bytes([uuid] * 16) + bytes([channel]) + bytes(39)


def packet(flags=0, block="", offsets=(), page=PAGE, payload=b"", slots=None):
    """A packet of normal pages, or a SYNC."""
    count = 524288 // page
    head = struct.pack(">IIIIIIQII24x256s", 0x11223344, 1, flags, count if slots is None else slots, len(offsets),
                       len(payload), 0, 0, 0, block.encode())
    return head + b"".join(be(8, offset) for offset in offsets).ljust(8 * count, b"\0") + payload


SYNC = packet(1)


class Stream:
    """The parts of a main stream. `described`: with a description; a number: how long it is at least."""

    def __init__(self, answers=True, footers=True, described=True, capabilities=(), blocks=(("pc.ram", PAGES),)):
        self.footers, self.described, self.blocks, self.capabilities = footers, described, blocks, capabilities
        self.opening = b"QEVM" + be(4, 3) + self.configuration() + (bytes.fromhex("0800010000") if answers else b"")

    def configuration(self):
        machine = b"pc-i440fx-10.0"
        text = b"\x07" + be(4, len(machine)) + machine
        if self.capabilities:
            text += b"\x05" + named("configuration/capabilities") + be(4, 1) + be(4, len(self.capabilities))
            text += b"".join(map(named, self.capabilities))
        return text

    def footer(self, section):
        return b"\x7e" + be(4, section) if self.footers else b""

    def section(self, kind, section, name=""):
        return bytes([kind]) + be(4, section) + (named(name) + be(4, 0) + be(4, 4) if name else b"")

    def start(self):
        gpa = be(8, 0) if "x-ignore-shared" in self.capabilities else b""
        total = sum(pages for _, pages in self.blocks) * PAGE
        text = self.section(1, 2, "ram") + be(8, total | 4)
        text += b"".join(named(name) + be(8, pages * PAGE) + gpa for name, pages in self.blocks)
        return text + be(8, FLUSH) + be(8, EOS) + self.footer(2)

    def end(self, left_out=()):
        """Page 1 of the first block has come on a channel, the others come here."""
        text = self.section(3, 2)
        for name, pages in self.blocks:
            if name not in left_out:
                text += be(8, ZERO) + named(name) + b"\0"
                text += b"".join(be(8, page * PAGE | ZERO | 0x20) + b"\0" for page in range(2, pages))
        return text + be(8, FLUSH) + be(8, EOS) + self.footer(2)

    def devices(self):
        text = b"".join(self.section(4, number, name) + state + self.footer(number) for number, name, state in (
            (0, "timer", bytes(16)), (7, "serial", b"\x7e\0\0\0\2\0" + bytes(8)), (9, "cpu", b"\1" * 40 + bytes(4))))
        text += b"\0"
        if self.described:
            description = b'{"page_size": 4096, "devices": []' + b" " * (self.described - 1) + b"}"
            text += b"\x06" + be(4, len(description)) + description
        return text


class Source:
    """A source's connections. Each method is a step of a migration."""

    def __init__(self, address, channels=CHANNELS, uuid=0):
        kind, rest = address.split(":", 1)
        host, port = rest.rsplit(":", 1)
        self.place = (host, int(port))
        self.main = self.connect()
        self.channels = [self.connect(hello(channel, uuid)) for channel in range(channels)]

    def connect(self, text=b""):
        link = socket.create_connection(self.place, timeout=NO_HANG)
        link.sendall(text)
        return link

    def ram(self, stream, left_out=()):
        self.main.sendall(stream.opening + stream.start())
        self.epochs(stream, left_out)

    def epochs(self, stream, left_out=()):
        for channel in self.channels:
            channel.sendall(SYNC)
        name = stream.blocks[0][0]
        self.channels[0].sendall(packet(0, name, [PAGE], payload=b"x" * PAGE))
        for channel in self.channels:
            channel.sendall(SYNC)
        self.main.sendall(stream.end(left_out))

    def answer(self):
        """What comes back, to the end of the connection."""
        text = b""
        with contextlib.suppress(ConnectionError):
            while more := self.main.recv(100):
                text += more
        return text

    def close(self, *links, reset=False):
        for link in links or [self.main, *self.channels]:
            if reset:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            link.close()


class Scene:
    def __init__(self, folder, programs, stack):
        self.folder, self.programs, self.stack = folder, programs, stack
        self.output = folder.memory / folder.new("dump").name
        stack.callback(shutil.rmtree, self.output, ignore_errors=True)

    def dump(self, *options, timeout=TIMEOUT):
        self.result = self.folder.new("json")
        self.program = self.stack.enter_context(survivors.Program(self.folder, [
            self.programs / "qemu_dump", "--listen", "tcp:127.0.0.1:0", "--output", self.output, "--timeout", timeout,
            "--json", self.result, *options]))
        return self.program.address

    def source(self, *options, channels=CHANNELS, **settings):
        source = Source(self.dump(*options, **settings), channels)
        self.stack.callback(source.close)
        return source

    def kept(self, warning=None):
        """The dump is there, whole; what was said besides."""
        self.program.finish(NO_HANG)
        manifest = json.loads((self.output / "manifest.json").read_text())
        content = (self.output / manifest["blocks"][0]["file"]).read_bytes()
        if content != bytes(PAGE) + b"x" * PAGE + bytes((PAGES - 2) * PAGE):
            raise LabError("the dump is not what the source had")
        warnings = json.loads(self.result.read_text())["warnings"]
        said = self.program.message()
        if warning is None and (warnings or said):
            raise LabError(f"it said {said!r}, warnings {warnings}")
        if warning is not None and not (len(warnings) == 1 and warning in warnings[0] and warnings[0] in said):
            raise LabError(f"no warning of {warning!r}: {said!r}, {warnings}")
        return said

    def refused(self, *causes):
        """Exit 1 with one line that names the causes, and nothing is left; that line."""
        line = self.program.fail(NO_HANG).splitlines()[-1]
        for cause in causes:
            if cause not in line:
                raise LabError(f"it does not say {cause!r}: {line}")
        if self.output.exists() and any(self.output.iterdir()):
            raise LabError(f"left behind: {list(self.output.iterdir())}")
        return line


def expect(wanted, got):
    if wanted != got:
        raise LabError(f"{got!r} in place of {wanted!r}")


# ---- the end of a stream: kept exactly when it is whole

def whole_without_answer(scene, described, footers):
    stream = Stream(answers=False, described=described, footers=footers)
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    source.close()
    return scene.kept()


def whole_with_answer(scene, described, footers=True):
    stream = Stream(described=described, footers=footers)
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    source.close()
    return scene.kept()


def cut(scene, answers, described, reset):
    """Cut behind each byte of the devices' state that makes a difference, and some others; MULTIFD_TEST_FULL=1: all."""
    stream = Stream(answers=answers, described=described)
    devices = stream.devices()
    end_mark = devices.rindex(stream.footer(9)) + 6
    whole = {len(devices)} if answers else {len(devices), end_mark}
    places = {0, devices.index(b"timer") + 20, devices.index(b"\x7e\0\0\0\2\0") + 6, end_mark - 5, end_mark - 1,
              min(end_mark + 7, len(devices) - 1)}
    if os.environ.get("MULTIFD_TEST_FULL"):
        places = set(range(len(devices)))
    count = 0
    for place in sorted(places - whole):
        with contextlib.ExitStack() as stack:
            inner = Scene(scene.folder, scene.programs, stack)
            source = inner.source()
            source.ram(stream)
            source.main.sendall(devices[:place])
            source.close(source.main, *source.channels, reset=reset)
            inner.refused(LOST)
            count += 1
    return f"{count} places"


def stalled(scene, described):
    """A stalled stream is not an ended one: no answer before its last byte."""
    stream = Stream(described=described)
    devices = stream.devices()
    for place in (17, devices.index(b"\x7e\0\0\0\2\0") + 6, devices.rindex(stream.footer(9)) + 5):
        with contextlib.ExitStack() as stack:
            inner = Scene(scene.folder, scene.programs, stack)
            source = inner.source()
            source.ram(stream)
            source.main.sendall(devices[:place])
            source.main.settimeout(1)
            try:
                raise LabError(f"answered {source.main.recv(100)!r} behind byte {place}")
            except TimeoutError:
                source.main.settimeout(NO_HANG)
            source.main.sendall(devices[place:])
            expect(SHUT_OK, source.answer())
            source.close()
            inner.kept()
    return ""


def late_description(scene, size=1):
    """The answer may come before the description, which is read nevertheless, whole: the source must not stick in it."""
    stream = Stream(described=size)
    devices = stream.devices()
    mark = devices.rindex(stream.footer(9)) + 6
    source = scene.source()
    source.ram(stream)
    source.main.sendall(devices[:mark])
    expect(SHUT_OK, source.answer())
    source.main.sendall(devices[mark:mark + size // 2])
    source.main.sendall(devices[mark + size // 2:])
    source.close()
    return scene.kept()


def nobody_can_tell(scene):
    """Neither footers nor a description: silence proves nothing, and the refusal says what to do."""
    stream = Stream(described=False, footers=False)
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    expect(b"", source.answer())
    return scene.refused("return-path off")


# ---- after everything has arrived, nothing takes the dump back

def late(scene, what, answers=True):
    stream = Stream(answers=answers)
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    if answers:
        expect(SHUT_OK, source.answer())
    if what == "main":
        source.close(*source.channels)
        return scene.kept(None if answers else "main connection open")
    if what == "one channel":
        source.close(source.main, source.channels[0])
    if what == "channels":
        source.close(source.main)
    return scene.kept("COLO")


def reset_at_end(scene):
    stream = Stream()
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    source.close(*source.channels, reset=True)
    return scene.kept("ask the source")


def gone_before_answer(scene):
    stream = Stream()
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    source.close()
    return scene.kept("could not be told")


def signal_after_whole(scene):
    stream = Stream()
    source = scene.source(timeout=600)
    source.ram(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    os.kill(scene.program.pid, signal.SIGINT)
    return scene.kept("a signal came")


def page_after_end(scene):
    """Before the answer it is an error; a page of it never reaches a file."""
    stream = Stream()
    source = scene.source()
    source.ram(stream)
    source.channels[1].sendall(packet(0, "pc.ram", [2 * PAGE], payload=b"y" * PAGE))
    # So that it is there first; else it is too late to matter, which the next case is about.
    wait_for("the page to be read", NO_HANG, lambda: all_read(source.channels[1]))
    source.main.sendall(stream.devices())
    expect(b"", source.answer())
    return scene.refused("behind the last epoch")


def all_read(link):
    """Whether the program has read everything that was sent to it here: the kernel's queues at both ends are empty."""
    here, there = link.getsockname()[1], link.getpeername()[1]
    queues = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, sizes = line.split()[:5]
        queues[int(local.split(":")[1], 16), int(remote.split(":")[1], 16)] = sizes.split(":")
    return int(queues[here, there][0], 16) == 0 and int(queues[there, here][1], 16) == 0


def page_after_answer(scene):
    stream = Stream()
    source = scene.source()
    source.ram(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    source.channels[1].sendall(packet(0, "pc.ram", [2 * PAGE], payload=b"y" * PAGE))
    source.close(*source.channels)
    return scene.kept("behind the last epoch")


def file_fails(scene):
    """Errors come before the answer: here another program removes the file."""
    stream = Stream()
    source = scene.source()
    source.ram(stream)
    part = scene.output / "pc.ram.ram.part"
    wait_for("the file", NO_HANG, part.exists)
    part.unlink()
    source.main.sendall(stream.devices())
    expect(b"", source.answer())
    return scene.refused("pc.ram.ram.part")


def name_taken(scene, name):
    """Another file takes a name meanwhile: every byte stays, the text says where, and its instruction makes a dump of it."""
    stream = Stream(blocks=(("pc.ram", PAGES), ("vga", 2), ("rom", 2)))
    source = begun(scene, stream)
    (scene.output / name).write_text("somebody else's")
    source.epochs(stream)
    source.main.sendall(stream.devices())
    expect(b"", source.answer())
    line = scene.program.fail(NO_HANG).splitlines()[-1]
    for text in (f"{name}: ", f"{name}.part", f"stays in {scene.output}", "its guest stays with it"):
        if text not in line:
            raise LabError(f"it does not say {text!r}: {line}")
    (scene.output / name).unlink()
    for part in scene.output.glob("*.part"):
        part.rename(part.with_suffix(""))
    manifest = json.loads((scene.output / "manifest.json").read_text())
    expect([8 * PAGE, 2 * PAGE, 2 * PAGE],
           [(scene.output / block["file"]).stat().st_size for block in manifest["blocks"]])
    if (scene.output / "pc.ram.ram").read_bytes() != bytes(PAGE) + b"x" * PAGE + bytes((PAGES - 2) * PAGE):
        raise LabError("the dump is not what the source had")
    return line


# ---- the beginning

def given_up(scene, order):
    """A try that is given up spoils nothing for the next, which follows at once; twice in a row."""
    address = scene.dump()
    for _ in range(2):
        links = []
        for what in order:
            link = Source.connect(place_of(address), hello(what - 1) if what else b"QEVM" + be(4, 3))
            links.append(link)
        Source.connect(place_of(address), b"GET / HTTP/1.1\r\n\r\n").close()
        for link in links:
            link.close()
    source = Source(address)
    stream = Stream()
    source.ram(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    source.close()
    scene.program.finish(NO_HANG)
    return scene.program.message()


class place_of:
    """Something to connect to, for Source.connect()."""

    def __init__(self, address):
        host, port = address.split(":", 1)[1].rsplit(":", 1)
        self.place = (host, int(port))


def given_up_for_good(scene):
    source = scene.source(timeout=600, channels=1)
    source.close()
    return scene.refused(LOST, "gave up")


def no_limit(scene, connected):
    """--timeout 0: what is not there yet is waited for, and with it no wait is over at once."""
    if connected == "all":
        source = scene.source("--hint-after", "100ms", timeout=0)
        source.main.sendall(b"QEVM" + be(4, 3))  # and not what RAM it has: --timeout's, too
    else:
        source = scene.source("--hint-after", "100ms", timeout=0, channels=connected)
        source.main.sendall(b"QEVM")
    survivors.wait_for("a hint", NO_HANG, lambda: "nothing has moved" in scene.program.stderr())
    if not scene.program.alive():
        raise LabError(f"it has given up: {scene.program.stderr()}")
    stream = Stream()
    source.channels += [source.connect(hello(channel)) for channel in range(len(source.channels), CHANNELS)]
    source.main.sendall(stream.opening[8 if connected == "all" else 4:] + stream.start())
    source.epochs(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.main.recv(8, socket.MSG_WAITALL))
    source.close()
    return scene.kept()


def says_nothing(scene):
    source = scene.source()
    source.main.sendall(b"QEVM" + be(4, 3))
    return scene.refused("--timeout")


# ---- a second source at the same address

def begun(scene, stream):
    """A source that has connected, and has been taken."""
    source = scene.source()
    source.main.sendall(stream.opening + stream.start())
    wait_for("the files", NO_HANG, (scene.output / "pc.ram.ram.part").exists)
    return source


def second_source(scene, uuid, channels, when):
    """It is turned away, or waits; the first one's dump is whole."""
    stream = Stream()
    source = begun(scene, stream)
    if when == "at the end":
        source.epochs(stream)
    second = Source(scene.program.address, channels, uuid)
    scene.stack.callback(second.close)
    with contextlib.suppress(ConnectionError):
        second.main.sendall(stream.opening + stream.start())
        for channel in second.channels:
            channel.sendall(SYNC)
    if when != "at the end":
        source.epochs(stream)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    source.close()
    return scene.kept()


def channel_too_many(scene, when):
    """One with the source's uuid and an id of its own, behind other connections."""
    stream = Stream()
    source = begun(scene, stream)
    if when == "at the end":
        source.epochs(stream)
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", hello(1), hello(CHANNELS, uuid=7), hello(CHANNELS)):
        scene.stack.callback(source.connect(text).close)
    if when != "at the end":
        source.epochs(stream)
    source.main.sendall(stream.devices())
    expect(b"", source.answer())
    return scene.refused("channel", f"{CHANNELS} channels")


# ---- one loss, one text; refusals by name

def lost(scene, how):
    stream = Stream()
    source = scene.source()
    source.main.sendall(stream.opening + stream.start())
    for channel in source.channels:
        channel.sendall(SYNC)
    if how == "main closed":
        source.close(source.main)
    elif how == "main reset":
        source.close(source.main, reset=True)
    elif how == "channel closed":
        source.main.sendall(stream.end())
        source.close(source.channels[1])
    elif how == "channel closed, main silent":
        source.close(source.channels[1])
    elif how == "channel reset":
        source.close(source.channels[1], reset=True)
    elif how == "channel cut in a packet":
        source.channels[1].sendall(packet(0, "pc.ram", [PAGE], payload=b"x" * PAGE)[:2000])
        source.close(source.channels[1])
    line = scene.refused(LOST, "noticed here: ")
    expect("qemu_dump: source: has gone in the middle of the migration; its query-migrate and its log say why ",
           line.split("(")[0])
    return line


def ignore_shared(scene, left_out):
    """A block of which nothing has come may be shared and left out, or not in use: kept, and named."""
    stream = Stream(capabilities=("x-ignore-shared",), blocks=(("pc.ram", PAGES), ("shared", 4)))
    source = scene.source()
    source.ram(stream, left_out)
    source.main.sendall(stream.devices())
    expect(SHUT_OK, source.answer())
    source.close()
    said = scene.kept("no page of RAM block shared has come" if left_out else None)
    blocks = json.loads((scene.output / "manifest.json").read_text())["blocks"]
    expect([PAGES, 0 if left_out else 3], [block["received_pages"] for block in blocks])
    return said


def foreign_section(scene, name, advice):
    stream = Stream()
    source = scene.source()
    source.main.sendall(stream.opening + stream.start() + stream.section(1, 3, name))
    for channel in source.channels:
        channel.sendall(SYNC)
    return scene.refused(name, advice)


def page_size(scene, theirs, size):
    source = scene.source("--page-size", size)
    stream = Stream()
    for channel in source.channels:
        channel.sendall(packet(1, page=theirs))
    source.main.sendall(stream.opening + stream.start())
    return scene.refused(f"--page-size {theirs}", str(theirs), "4096")


CASES = {
    "whole, answered": [(whole_with_answer, True), (whole_with_answer, False), (whole_with_answer, True, False)],
    "whole, no return path": [(whole_without_answer, described, footers) for described in (True, False)
                              for footers in (True, False)],
    "cut": [(cut, answers, described, reset) for answers in (True, False) for described in (True, False)
            for reset in (True, False)],
    "stalled": [(stalled, True), (stalled, False), (late_description,), (late_description, 12 << 20), (nobody_can_tell,)],
    "late": [(late, what) for what in ("channels", "one channel", "everything", "main")] + [(late, "main", False)],
    "after all is there": [(reset_at_end,), (gone_before_answer,), (signal_after_whole,), (page_after_end,),
                           (page_after_answer,), (file_fails,)] +
                          [(name_taken, name) for name in ("pc.ram.ram", "vga.ram", "rom.ram", "manifest.json")],
    "given up": [(given_up, order) for order in ((0, 1), (1, 2), (2, 0), (0,), (1,))] +
                [(given_up_for_good,), (says_nothing,)] + [(no_limit, connected) for connected in (0, 1, "all")],
    "second source": [(second_source, uuid, channels, when) for uuid, channels in ((0, CHANNELS), (7, CHANNELS),
                                                                                   (7, CHANNELS + 2), (0, 1))
                      for when in ("in the middle", "at the end")] +
                     [(channel_too_many, when) for when in ("in the middle", "at the end")],
    "lost": [(lost, how) for how in ("main closed", "main reset", "channel closed", "channel closed, main silent",
                                     "channel reset", "channel cut in a packet")],
    "refused": [(ignore_shared, ()), (ignore_shared, ("shared",)),
                (foreign_section, "dirty-bitmap", "capability dirty-bitmaps off"),
                (foreign_section, "s390-storage_attributes", "s390x"), (foreign_section, "spapr/htab", "pseries"),
                (foreign_section, "0000:00:03.0/vfio", "VFIO"),
                (page_size, 1024, "4096"), (page_size, 2048, "4K"), (page_size, 8192, "4K")],
}


def main():
    parser = argparse.ArgumentParser(description="beginnings and ends of a migration into qemu_dump")
    parser.add_argument("programs", type=Path, help="folder of qemu_dump")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    programs = options.programs.resolve()
    if not (programs / "qemu_dump").exists():
        print("skipped: no qemu_dump")
        return survivors.SKIPPED
    chosen = [case for name, cases in CASES.items() if not options.names or name in options.names for case in cases]
    with Folder() as folder:
        def run(case):
            with contextlib.ExitStack() as stack:
                return case[0](Scene(folder, programs, stack), *case[1:])

        return survivors.run_cases([(f"{case[0].__name__} {case[1:] or ''}", lambda case=case: run(case))
                                    for case in chosen], jobs=8)


if __name__ == "__main__":
    sys.exit(main())
