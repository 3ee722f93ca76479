# SPDX-License-Identifier: MIT
"""qemu_relay's memory has a bound, whatever the guest's size: a guest of 4 GiB that rewrites it migrates through it.

    python3 tests/interop/memory.py --programs build/dev/examples
"""

import argparse
import json
import os
import random
import re
import sys
import threading
import time
from pathlib import Path

from lab import MIB, PAGE, SKIPPED, Guest, Qemu, compare, find_qemu, pages_sent_again
from processes import Folder, LabError, Program

LIMIT_MIB = 128
MACHINE = "pc-i440fx-10.0"


def fill_quickly(file):
    """Memory that has been used: a third random bytes, a third text, a third zeros, in stretches of a megabyte."""
    dice = random.Random(1)
    noise, text = dice.randbytes(MIB), b"migrated page " * (MIB // 14)
    for at in range(1, os.fstat(file.fileno()).st_size // MIB):
        if at % 3:
            file.seek(at * MIB)
            file.write(noise if at % 3 == 1 else text)


class Peak(threading.Thread):
    """The largest VmHWM that a process was seen with, until it has gone."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.mib, self._pid = 0.0, pid
        self.start()

    def run(self):
        while True:
            try:
                status = Path(f"/proc/{self._pid}/status").read_text()
            except OSError:
                return
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            if not found:  # it has ended, and is not waited for yet
                return
            self.mib = max(self.mib, int(found[1]) / 1024)
            time.sleep(0.02)


def compare_in_pieces(source, destination, piece=64 * MIB):
    for name, here in source.blocks().items():
        there = destination.blocks()[name]
        for at in range(0, here.size, piece):
            size = min(piece, here.size - at)
            found = compare({name: source.read_memory(here.host + at, size)},
                            {name: destination.read_memory(there.host + at, size)})
            if found:
                raise LabError(f"{found} (after {at:#x})")


def migrate(folder, options, codecs, channels, zero_pages):
    path, result = folder.new("destination"), folder.new("relay.json")
    command = [options.programs.resolve() / "qemu_relay", "--listen", f"unix:{folder.new('relay')}",
               "--connect", f"unix:{path}", "--in-channels", channels[0], "--in-compression", codecs[0],
               "--out-channels", channels[1], "--out-compression", codecs[1], "--out-zero-pages", zero_pages[1],
               "--out-peer", "qemu-10.0", "--json", result]
    working_set = options.memory // 8
    with (Qemu(folder, "10.0", MACHINE, ram_mib=options.memory, incoming=True) as destination,
          Qemu(folder, "10.0", MACHINE, ram_mib=options.memory, paused=False, fill=fill_quickly,
               guest=Guest(working_set_kib=working_set * 1024)) as source):
        destination.configure(channels=channels[1], compression=codecs[1], return_path=True)
        destination.listen(f"unix:{path}")
        source.wait_heartbeats(1, 300)
        source.configure(channels=channels[0], compression=codecs[0], zero_pages=zero_pages[0], return_path=True)
        with Program(folder, command) as relay:
            peak = Peak(relay.pid)
            info = source.migrate_writing(relay.address, 600)
            destination.wait_migration("completed", 60)
            relay.finish(60)
        told = json.loads(result.read_text())["peak_rss_bytes"] / MIB
        compare_in_pieces(source, destination)
        at_switch = source.heartbeat()
        destination.cont()
        destination.wait_heartbeats(2, 300, after=at_switch)
    again = pages_sent_again(info) * PAGE / MIB
    says = (f"{options.memory} MiB, {again:.0f} MiB of it sent again in {info['ram']['dirty-sync-count']} rounds, "
            f"{info['total-time'] / 1000:.1f} s: peak {max(told, peak.mib):.1f} MiB "
            f"(VmHWM {peak.mib:.1f}, the relay's own count {told:.1f})")
    if max(told, peak.mib) >= LIMIT_MIB or peak.mib == 0:
        raise LabError(f"{says}, not under {LIMIT_MIB} MiB")
    return says


def main():
    parser = argparse.ArgumentParser(description="qemu_relay's peak memory")
    parser.add_argument("--programs", required=True, type=Path)
    parser.add_argument("--memory", type=int, default=4096, metavar="MIB", help="the guest's size")
    options = parser.parse_args()
    binary, why = find_qemu("10.0")
    if not binary:
        print(f"skipped: {why}")
        return SKIPPED
    # What a relay has to keep differs: pages as they come, and legacy zero pages until their epoch ends.
    cases = [(("none", "none"), (4, 2), ("multifd", "multifd")), (("none", "zstd"), (2, 8), ("multifd", "legacy"))]
    failed = 0
    with Folder() as folder:
        for case in cases:
            name = " ".join(f"{there}->{here}" for there, here in case)
            try:
                print(f"ok    {name}: {migrate(folder, options, *case)}", flush=True)
            except LabError as error:
                failed += 1
                print(f"FAIL  {name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
