#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What memory that was never touched costs: seconds, what both files take on their disks, and the peak of resident memory of
both processes (VmHWM). In turn, in one run; prints medians and spreads.

    python3 benchmarks/untouched.py build/bench [--repeat 5] [--json FILE] [--only WORD]... [--quick]

file      a file of 4 GiB with 8 MiB of data, ram_send to ram_receive --file, on tmpfs and on this folder's file system. Seconds:
          from the start of ram_send to its end; the copy is verified and has its name by then.
guest     a guest of 64 GiB that has used 200 MiB, all over its memory, moved by live_migration, without a comparison and with one;
          the KVM guest has 62 GiB, the most that it addresses.
ram_send  the same as a sparse file on tmpfs, to ram_receive --discard.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / each) for each in ("tests/programs", "tests/interop", "benchmarks/qemu")]

import untouched  # noqa: E402
from lab import kvm_opens  # noqa: E402
from side_by_side import machine  # noqa: E402
from survivors import Folder, LabError  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30
ROUND_GOAL, FILE_GOAL, RESIDENT_GOAL = 0.5, 0.3, 300


def send(folder, programs, where, size, data, discard, *options):
    image, copy = Path(where) / "image", Path(where) / "copy"
    try:
        untouched.sparse_file(image, size, data)
        os.sync()  # allocated late, blocks would be counted late
        sent, _, peaks = untouched.send_file(folder, programs, image, copy, *options, discard=discard)
        return {"seconds": sent["lifetime"], "first_round_s": sent["seconds"], "source_du_mib": untouched.du_mib(image),
                "copy_du_mib": 0 if discard else untouched.du_mib(copy), "source_peak_mib": peaks[0], "destination_peak_mib": peaks[1]}
    finally:
        for path in image, copy:
            path.unlink(missing_ok=True)


def move(folder, programs, backend, *options):
    began = time.monotonic()
    report, peaks = untouched.move_guest(folder, programs, backend, "62G" if backend == "kvm" else "64G", "200M", *options)
    return {"seconds": time.monotonic() - began, "first_round_s": report["rounds"][0]["send_s"], "source_peak_mib": peaks[0],
            "destination_peak_mib": peaks[1]}


def ways(folder, programs, disk, quick):
    zstd = ("--compression", "zstd")
    for compression in ((), zstd)[:1 if quick else 2]:
        for mode in ("multifd",) if quick else ("none", "legacy", "multifd"):
            options = ("--zero-pages", mode, *compression)
            text = f"{mode}{', zstd' if compression else ''}"
            for name, where in ("tmpfs", folder.memory), ("disk", disk):
                yield f"file, {name}, {text}", lambda where=where, options=options: send(folder, programs, where, 4 * GIB, 8 * MIB, False, *options)
            if mode == "none":
                continue  # all bytes of 64 GiB
            yield f"ram_send, {text}", lambda options=options: send(folder, programs, folder.memory, 64 * GIB, 200 * MIB, True, *options)
            for backend in ("thread", "kvm") if kvm_opens() else ("thread",):
                for verify in ("--no-verify", "--verify"):
                    yield f"guest, {backend}, {text}, {verify}", lambda backend=backend, options=options, verify=verify: move(
                        folder, programs, backend, *options, verify)


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=lambda path: Path(path).resolve(), help="folder of the build (preset bench)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], help="only ways whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="--zero-pages multifd without compression alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, failed = {}, {}
    with Folder() as folder, tempfile.TemporaryDirectory(dir=options.build) as disk:
        chosen = [(name, way) for name, way in ways(folder, options.build / "examples", disk, options.quick)
                  if not options.only or any(word in name for word in options.only)]
        for _ in range(options.repeat):
            for name, way in chosen:
                try:
                    results.setdefault(name, []).append(way())
                except LabError as error:
                    failed.setdefault(name, str(error))
    print(f"{platform.machine()}, Linux {platform.release()}, {os.cpu_count()} cores; {options.repeat} times each\n")
    print("| way | seconds | first round, s | du of source, copy, MiB | peaks, MiB | goal |\n| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        column = {key: [run[key] for run in runs] for key in runs[0]}
        median = {key: statistics.median(values) for key, values in column.items()}
        du = f"{median['source_du_mib']:.1f}, {median['copy_du_mib']:.1f}" if "source_du_mib" in median else ""
        if name.startswith("file"):
            reached = median["seconds"] <= FILE_GOAL and max(median["source_du_mib"], median["copy_du_mib"]) < 9
        else:
            reached = median["first_round_s"] < ROUND_GOAL and max(median["source_peak_mib"], median["destination_peak_mib"]) < RESIDENT_GOAL
        print(f"| {name} | {spread(column['seconds'])} | {spread(column['first_round_s'])} | {du} | "
              f"{median['source_peak_mib']:.0f}, {median['destination_peak_mib']:.0f} | {'reached' if reached else 'SHORT'} |")
    for name, error in failed.items():
        print(f"FAILED: {name}: {error}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.build.resolve()), "results": results, "failed": failed}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
