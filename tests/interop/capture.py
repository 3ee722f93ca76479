# SPDX-License-Identifier: MIT
"""Records what a real QEMU sends when a running guest migrates, for tests/golden/captured_test.cpp.

    python3 tests/interop/capture.py [--output tests/golden/captures] [NAME...]

Plays the destination just far enough: takes all connections, reads them to their ends, answers PING and the end of the
stream when there is a return path. It holds no barrier, which a source cannot notice (channels are one-way). After the
source has stopped, the digest of each of its RAM blocks goes to the manifest, together with how the capture was made.
Recorded again and again until the capture holds what its tests look for (Case.wants).
"""

import argparse
import contextlib
import ctypes
import datetime
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lab import MIB, PAGE, ROOT, Folder, Guest, LabError, Qemu, find_qemu, kvm_opens, wait_for

RAM_MIB = 2
ROUNDS = 5  # dirty-sync-count at which the guest may be stopped
DOWNTIME_MS = 1  # before that; with 0 QEMU takes no second round at all
GUEST = Guest(384, 500, 0)  # a sweep over 96 pages takes about 25 ms, so that most of them are dirty in each round
HEADER = 320 + 8 * 128


@dataclass(frozen=True)
class Case:
    name: str
    qemu: str
    machine: str
    channels: int
    compression: str
    zero_pages: str
    return_path: bool = False
    wants: tuple = ()  # facts that must not be 0, beside "zero after data"

    @property
    def bytes_per_second(self):
        """Slow enough that a round is cut into several PARTs, of 100 ms each. 7.2 counts compressed pages as full."""
        return MIB if self.qemu == "7.2" or self.compression == "none" else MIB // 8


CASES = (
    Case("7.2-none", "7.2", "pc-i440fx-7.2", 2, "none", "legacy",
         wants=("data+sync", "continued parts", "twice in an epoch")),
    Case("7.2-zlib", "7.2", "pc-i440fx-7.2", 3, "zlib", "legacy", True, wants=("data+sync", "continued parts")),
    Case("7.2-zstd", "7.2", "pc-q35-7.2", 2, "zstd", "legacy", wants=("data+sync", "continued parts")),
    Case("10.0-machine-7.2-none", "10.0", "pc-i440fx-7.2", 3, "none", "multifd"),
    Case("10.0-machine-7.2-zlib", "10.0", "pc-i440fx-7.2", 2, "zlib", "legacy", True),
    Case("10.0-machine-8.1-none", "10.0", "pc-i440fx-8.1", 2, "none", "legacy"),
    Case("10.0-machine-8.1-zstd", "10.0", "pc-q35-8.1", 3, "zstd", "legacy", True, wants=("continued parts",)),
    Case("10.0-none", "10.0", "pc-q35-10.0", 3, "none", "multifd", True),
    Case("10.0-zlib", "10.0", "pc-i440fx-10.0", 2, "zlib", "multifd"),
    Case("10.0-zstd", "10.0", "pc-i440fx-10.0", 3, "zstd", "multifd", True),
    Case("11.1-none", "11.1", "pc-q35-11.1", 3, "none", "multifd", True),
    Case("11.1-zlib", "11.1", "pc-i440fx-11.1", 2, "zlib", "multifd"),
    Case("11.1-zstd", "11.1", "pc-q35-11.1", 3, "zstd", "multifd", True),
)


def fill(file):
    """Guest RAM before the start: mostly pages that compress well, each different, some zero ones, a few that do not
    compress. More than two packets are full of them."""
    dice = random.Random(1)
    for page in range(16, RAM_MIB * MIB // PAGE):
        if page % 8 < 5:
            content = struct.pack("<I", page) * (PAGE // 4)
            if page % 128 == 100:
                content = dice.randbytes(PAGE)
            file.seek(page * PAGE)
            file.write(content)


# ---- the destination -------------------------------------------------------------------------------------------------


class Connection:
    """Reads one connection to its end."""

    def __init__(self, link, return_path):
        self.link, self.return_path = link, return_path
        self.data = bytearray()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        asked = done = False
        with self.link, contextlib.suppress(ConnectionError):
            while part := self.link.recv(1 << 16):
                self.data += part
                if not self.return_path or self.data[:4] != b"QEVM":
                    continue
                if not asked and (at := self.data.find(b"\x08\0\2\0\4", 0, 512)) >= 0 and len(self.data) >= at + 9:
                    asked = True
                    self.link.sendall(b"\0\2\0\4" + self.data[at + 5 : at + 9])  # PONG
                if not done and ends_with_description(self.data):
                    done = True
                    self.link.sendall(b"\0\1\0\4\0\0\0\0")  # SHUT: success


def ends_with_description(data):
    """Whether the stream's last element is here in whole: 0x00, 0x06, be32 length, JSON."""
    at = data.rfind(b"\0\6", max(0, len(data) - MIB))
    while at >= 0:
        if len(data) >= at + 7 and data[at + 6] == ord("{"):
            return len(data) == at + 6 + struct.unpack_from(">I", data, at + 2)[0]
        at = data.rfind(b"\0\6", 0, at + 1)
    return False


def receive(listener, count, return_path, limit):
    """The connections, the main one first and then by channel id."""
    listener.settimeout(limit)
    connections = [Connection(listener.accept()[0], return_path) for _ in range(count)]
    wait_for("first bytes of all connections", limit, lambda: all(len(each.data) >= 64 for each in connections))
    main = [each for each in connections if each.data[:4] == b"QEVM"]
    channels = sorted((each for each in connections if each.data[:4] != b"QEVM"), key=lambda each: each.data[24])
    if len(main) != 1 or [each.data[24] for each in channels] != list(range(count - 1)):
        raise LabError("not one main connection and channels 0, 1, 2...")
    return main + channels


# ---- one capture -----------------------------------------------------------------------------------------------------


def record(folder, case):
    """(bytes of main and each channel, {block: bytes} after the source stopped, rounds)"""
    path = folder.new("migration")
    with (socket.socket(socket.AF_UNIX) as listener,
          Qemu(folder, case.qemu, case.machine, ram_mib=RAM_MIB, paused=False, accel="kvm", fill=fill,
               guest=GUEST) as source):
        listener.bind(str(path))
        listener.listen(16)
        source.wait_heartbeats()
        source.configure(channels=case.channels, compression=case.compression, zero_pages=case.zero_pages,
                         return_path=case.return_path, max_bandwidth=case.bytes_per_second, downtime_ms=DOWNTIME_MS)
        source.migrate(f"unix:{path}")
        connections = receive(listener, 1 + case.channels, case.return_path, 20)
        wait_for(f"{ROUNDS} rounds", 60, lambda: rounds_of(source) >= ROUNDS)
        source.qmp.call("migrate-set-parameters", downtime_limit=2000, max_bandwidth=1 << 40)
        source.wait_migration("completed", 30)
        rounds = rounds_of(source)
        blocks = source.read_blocks()
        beat = source.heartbeat()
        if beat[1]:
            raise LabError(f"the guest counts {beat[1]} errors in its own memory")
    for each in connections:
        each.thread.join(10)
        if each.thread.is_alive():
            raise LabError("a connection did not end with its source")
    return [bytes(each.data) for each in connections], blocks, rounds


def rounds_of(source):
    info = source.migration()
    rounds = info.get("ram", {}).get("dirty-sync-count", 0)
    if info["status"] == "failed" or info["status"] == "completed" and rounds < ROUNDS:
        raise LabError(f"migration {info['status']} after {rounds} rounds: {info.get('error-desc', '')}")
    return rounds


def facts_of(streams, blocks):
    """What the streams hold; a parser of its own, simple and not the library's."""
    main, *channels = streams
    # A footer, a PART of the same section, and a record (8 bytes) with the flags CONTINUE and ZERO.
    facts = Counter({"continued parts": len(re.findall(rb"\x7e(.{4})\x02\1.{7}\x22", main, re.DOTALL))})
    pages = Counter()  # by epoch
    for data in channels:
        at, epoch = 64, 0
        while at < len(data):
            flags, alloc, normal, size = struct.unpack_from(">IIII", data, at + 8)
            zero = struct.unpack_from(">I", data, at + 32)[0]
            facts["packets"] += 1
            facts["normal"] += normal
            facts["zero"] += zero
            facts["full"] += normal + zero == 128
            facts["sync"] += flags & 1
            facts["data+sync"] += bool(flags & 1 and normal)
            facts["empty"] += not flags & 1 and not normal and not zero
            facts["stale size"] += bool(size and not normal)
            for offset in struct.unpack_from(f">{normal}Q", data, at + 320):
                name = data[at + 64 : at + 320].split(b"\0")[0].decode()
                facts["zero after data"] += not any(blocks[name][offset : offset + PAGE])  # what it is at the end
                pages[epoch, name, offset] += 1
            epoch += flags & 1
            at += HEADER + (size if normal else 0)
        if at != len(data):
            raise LabError("a channel does not end with a packet")
    facts["twice in an epoch"] = sum(count > 1 for count in pages.values())
    return facts


# ---- files -----------------------------------------------------------------------------------------------------------

_xxhash = ctypes.CDLL("libxxhash.so.0")
_xxhash.XXH3_64bits.restype = ctypes.c_uint64
_xxhash.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]


def digest(data):
    """XXH3-64, the same as multifd::digest_of()."""
    return f"{_xxhash.XXH3_64bits(data, len(data)):016x}"


def store(output, case, streams, blocks, rounds):
    """Writes the streams and the manifest's part of this capture. Returns the bytes on disk."""
    folder = output / case.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    lines = [
        f"capture {case.name}",
        f"qemu {find_qemu(case.qemu)[0].full_version}",
        f"machine {case.machine}",
        f"channels {case.channels}",
        f"compression {case.compression}",
        f"zero-pages {case.zero_pages}",
        f"return-path {'on' if case.return_path else 'off'}",
        f"rounds {rounds}",
        f"date {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        f"command python3 tests/interop/capture.py {case.name}",
    ]
    total = 0
    for name, data in zip(["main", *(f"channel{i}" for i in range(case.channels))], streams):
        file = folder / f"{name}.zst"
        subprocess.run(["zstd", "-q", "-19", "--no-check", "-o", str(file)], input=data, check=True, timeout=120)
        total += file.stat().st_size
        lines.append(f"stream {name} {len(data)} {digest(data)}")
    lines += [f"block {name} {len(content)} {digest(content)}" for name, content in sorted(blocks.items())]
    (folder / "manifest.txt").write_text("\n".join(lines) + "\n")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "tests/golden/captures")
    parser.add_argument("--attempts", type=int, default=20)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or: {', '.join(case.name for case in CASES)}")
    options = parser.parse_args()
    if unknown := set(options.names) - {case.name for case in CASES}:
        parser.error(f"no capture called {', '.join(sorted(unknown))}")
    if not kvm_opens():
        sys.exit("needs /dev/kvm: the TCG of QEMU 7.2 loses dirty pages, what it sends is not what the guest has")
    everything = 0
    with Folder() as folder:
        for case in CASES:
            if options.names and case.name not in options.names:
                continue
            for attempt in range(1, options.attempts + 1):
                try:
                    streams, blocks, rounds = record(folder, case)
                    facts = facts_of(streams, blocks)
                    lacking = ", ".join(each for each in ("zero after data", *case.wants) if not facts[each])
                except LabError as error:  # a guest that was still for a moment: the migration was over too early
                    lacking = f"useful end: {error}"
                if not lacking:
                    break
                print(f"{case.name}: attempt {attempt} has no {lacking}", flush=True)
            else:
                sys.exit(f"{case.name}: {options.attempts} attempts without {lacking}")
            size = store(options.output, case, streams, blocks, rounds)
            everything += size
            print(f"{case.name}: {rounds} rounds, {sum(map(len, streams))} bytes, {size} stored; "
                  f"{', '.join(f'{name} {count}' for name, count in facts.items() if count)}", flush=True)
    print(f"{everything} bytes stored")


if __name__ == "__main__":
    main()
