#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A guest whose memory comes on demand from an image, beside one that waits for all of it; in one run and in turn. Prints medians,
spreads and ratios.

    python3 benchmarks/lazy_restore.py --build build/bench

The image is one that a real QEMU 10.0 wrote of a paused guest of --size, a third of it zero, a third text, a third noise, and the
same as mapped-ram-zst; both lie in the page cache. first: from opening the image until a page in the middle of memory has been
read. all: until every page is there, while a thread of the guest reads pages at random. "full load" is load_ram() with two
threads; "eager loop" the same with one. After each run memory is compared with the guest's. Needs QEMU 10.0
(sh tests/interop/install_qemu.sh 10.0 build/qemu-10.0), userfaultfd, and room for three times --size in /dev/shm.
"""
import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from images import MIB, Bench, Folder, LabError, mixed, size, warm_host

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"full load": ("--threads", 2), "eager loop": ("--threads", 1), "lazy, 1 worker": ("--lazy", "--threads", 1),
        "lazy, 2 workers": ("--lazy", "--threads", 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/bench", help="the folder of the built programs")
    parser.add_argument("--size", type=size, default=size("2G"), help="of the guest's memory (2G)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path("/tmp"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` ends what it started
    samples = {}
    with Folder() as folder:
        bench = Bench(options, folder)
        try:
            data, image, packed = bench.shm / "data", bench.shm / "image", bench.shm / "packed"
            mixed(data, bench.total)
            bench.qemu_save(data, image)
            subprocess.run([bench.program("ram_image"), "convert", "--to", "mapped-ram-zst", image, packed], check=True,
                           stdout=subprocess.DEVNULL)
            for number in range(options.repeat):
                for file, name in ((image, "mapped-ram"), (packed, "mapped-ram-zst")):
                    for way, flags in WAYS.items():
                        warm_host(bench.total * 3 // 2)
                        command = [bench.program("lazy_restore"), file, "--compare", data, "--first", 131_072 + 997 * number, *flags]
                        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
                        if done.returncode:
                            raise LabError(done.stderr.strip())
                        samples.setdefault(name, {}).setdefault(way, []).append(json.loads(done.stdout))
                        print(f"{number + 1}: {name}, {way}: {done.stdout.strip()}", file=sys.stderr, flush=True)
            version = bench.binary.full_version
        finally:
            bench.close()
    print(f"QEMU {version}, {os.cpu_count()} cores, Linux {platform.release()}, {options.size // MIB} MiB, median of "
          f"{options.repeat} (least to most)\n\n| image | way | first page, ms | all pages, s |\n| --- | --- | --- | --- |")
    rows = []
    for name, ways in samples.items():
        medians = {}
        for way, runs in ways.items():
            spread = {key: sorted(run[key] for run in runs) for key in ("first", "seconds")}
            medians[way] = {key: statistics.median(values) for key, values in spread.items()}
            rows.append({"image": name, "way": way, **medians[way], "samples": runs})
            cells = [f"{scale * medians[way][key]:.{digits}f} ({scale * spread[key][0]:.{digits}f} to {scale * spread[key][-1]:.{digits}f})"
                     for key, scale, digits in (("first", 1000, 2), ("seconds", 1, 3))]
            print(f"| {name} | {way} | {cells[0]} | {cells[1]} |")
        for way in ("lazy, 1 worker", "lazy, 2 workers"):
            sooner = medians["full load"]["first"] / medians[way]["first"]
            print(f"| {name} | {way}, ratio | {sooner:.0f}x sooner than the full load (goal 10: "
                  f"{'reached' if sooner >= 10 else 'missed'}) | {medians['eager loop']['seconds'] / medians[way]['seconds']:.2f}x "
                  "the eager loop's speed |")
    if options.json:
        options.json.write_text(json.dumps({"what": "lazy_restore", "command": " ".join(sys.argv), "qemu": version,
                                            "size": options.size, "repeat": options.repeat, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"lazy_restore.py: {error}")
