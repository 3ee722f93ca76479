#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What an older copy at the destination saves: a file of noise of which 30 % of the pages have changed, by ram_send to ram_receive,
whole and with --base. In turn, in one run; prints medians, spreads, and which goals are reached.

    sudo python3 benchmarks/base.py build/bench [--repeat 5] [--json FILE] [--size MIB] [--only WORD]...

whole     ram_receive --file
copy      ram_receive --base --file: the new file is made of the older one before it listens, and that is not in the seconds
in place  ram_receive --base --file of one name
equal     as copy, where nothing has changed

Over the loopback, where both ends share the cores and the memory, also with zstd; and between two network namespaces, over a veth pair with a token
bucket of 1 Gbit/s at both ends (tests/programs/two_links.py), which needs root. Files on tmpfs.

Seconds: from before the source connects until the destination has the last page (CLOCK_MONOTONIC of both programs). All: until
ram_send ends, when both ends have read their files for the digest. Wire: pages and digests, both ways, of the whole's.
Goals: 35 % of the whole's bytes, half of its time.
"""
import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / each) for each in ("tests/programs", "tests/interop", "benchmarks/qemu")]

import base  # noqa: E402
from side_by_side import commit, machine  # noqa: E402
from survivors import Folder, LabError, Process, Program  # noqa: E402
from two_links import TwoLinks  # noqa: E402


MIB = 1 << 20
CHANGED, WIRE_GOAL, TIME_GOAL = 0.3, 0.35, 0.5
LOOPBACK, GIGABIT = "loopback", "1 Gbit"


class Lab:
    """The files, and the two ends."""

    def __init__(self, folder, programs, size, links):
        self.folder, self.programs, self.size, self.links = folder, programs, size, links
        self.image, self.older = base.image_and_older(folder.memory, size, CHANGED)
        self.copy = folder.memory / "copy"

    def move(self, link, way, *options):
        near, far, address = [], [], "127.0.0.1"
        if link == GIGABIT:
            near, far, address = self.links.inside("near"), self.links.inside("far"), self.links.address("far", 1)
        older = {"whole": None, "equal": self.image, "in place": self.copy}.get(way, self.older)
        if way == "in place":
            shutil.copyfile(self.older, self.copy)
        sent, got = self.folder.new("sent.json"), self.folder.new("got.json")
        began = time.monotonic()
        try:
            with Program(self.folder, [*far, self.programs / "ram_receive", "--listen", f"tcp:{address}:0", "--file", self.copy, "--json", got,
                                       *(["--base", older] if older else [])]) as receiver:
                listening = time.monotonic()
                with Process(self.folder, "ram_send", [*near, self.programs / "ram_send", "--connect", receiver.address, "--file",
                                                       self.image, "--channels", 2, "--json", sent, *options]) as sender:
                    if sender.wait_exit(300) != 0:
                        raise LabError(f"ram_send: {sender.stderr()[-300:]}")
                    ended = time.monotonic()
                receiver.finish(60)
        finally:
            self.copy.unlink(missing_ok=True)
        here, there = json.loads(sent.read_text()), json.loads(got.read_text())
        told = here["base"] or {"equal_pages": 0, "digest_bytes": 0, "seconds": 0}
        return {"seconds": there["began"] + there["seconds"] - here["began"], "all_s": ended - listening, "before_s": listening - began,
                "compare_s": told["seconds"], "equal_pages": told["equal_pages"], "wire_bytes": base.wire_bytes(here),
                "digest_bytes": told["digest_bytes"], "cpu_s": here["cpu_seconds"] + there["cpu_seconds"]}


def ways(lab):
    for way in "whole", "copy", "in place", "equal":
        yield f"{LOOPBACK}, {way}", lambda way=way: lab.move(LOOPBACK, way)
    for way in "whole", "copy":
        yield f"{LOOPBACK}, zstd, {way}", lambda way=way: lab.move(LOOPBACK, way, "--compression", "zstd")
    for way in ("whole", "copy", "in place", "equal") if lab.links else ():
        yield f"{GIGABIT}, {way}", lambda way=way: lab.move(GIGABIT, way)


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=lambda path: Path(path).resolve(), help="folder of the build (preset bench)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024, help="MiB of the file (default 1024)")
    parser.add_argument("--only", action="append", default=[], help="only ways whose name has one of these words")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, failed = {}, {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder())
        links = None
        if os.geteuid() != 0 or not shutil.which("tc"):
            print("without 1 Gbit: needs root and iproute2", file=sys.stderr)
        else:
            links = stack.enter_context(TwoLinks())
            links.cap(1, "1gbit")
        lab = Lab(folder, options.build / "examples", options.size * MIB, links)
        chosen = [(name, way) for name, way in ways(lab) if not options.only or any(word in name for word in options.only)]
        for _ in range(options.repeat):
            for name, way in chosen:
                try:
                    results.setdefault(name, []).append(way())
                    print(f"{time.strftime('%H:%M:%S')} {name}: {results[name][-1]}", file=sys.stderr, flush=True)
                except LabError as error:
                    failed.setdefault(name, str(error))
    print(f"{platform.machine()}, Linux {platform.release()}, {os.cpu_count()} cores; {options.size} MiB, {options.repeat} times each\n")
    print("| link, way | seconds | of the whole's | all, s | comparing, s | CPU s | wire, % of the whole's | goals |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]} if runs else {}
        whole = results.get(name.rsplit(", ", 1)[0] + ", whole")
        if not runs or not whole:
            continue
        times = median["seconds"] / statistics.median(run["seconds"] for run in whole)
        wire = median["wire_bytes"] / statistics.median(run["wire_bytes"] for run in whole)
        goals = "" if name.endswith("whole") else (f"wire {'reached' if wire <= WIRE_GOAL else 'SHORT'}, "
                                                   f"time {'reached' if times <= TIME_GOAL else 'SHORT'}")
        print(f"| {name} | {spread([run['seconds'] for run in runs])} | {times:.2f}x | {median['all_s']:.2f} | {median['compare_s']:.2f} | "
              f"{median['cpu_s']:.2f} | {100 * wire:.1f} | {goals} |")
    for name, error in failed.items():
        print(f"FAILED: {name}: {error}")
    if options.json:
        options.json.write_text(json.dumps({"commit": commit(), "command": " ".join(sys.argv), "machine": machine(options.build.resolve()),
                                            "size_mib": options.size, "changed": CHANGED, "results": results, "failed": failed}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
