#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What it costs that lost connections may return, while none is lost: ram_send with and without --resume, in turn, in one run.

    python3 benchmarks/journal.py build/bench [--old OTHER/build/bench] [--repeat 5] [--json FILE]

2 GiB of noise from memory to memory over loopback, three rounds each, TCP and UNIX sockets, 1, 2 and 4 channels. With --old
another build's ram_send and ram_receive run in turn with them. Prints medians of GiB/s and ratios.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS, GIB = 3, 2


def one(programs, options, address, channels, image, folder):
    """GiB/s of one transfer."""
    copy, report = folder / "copy", folder / "report.json"
    receiver = subprocess.Popen([programs / "ram_receive", "--listen", address, "--file", copy], stderr=subprocess.PIPE,
                                stdout=subprocess.DEVNULL, text=True)
    try:
        found = next(line.split()[-1] for line in receiver.stderr if "listening on" in line)
        subprocess.run([programs / "ram_send", "--connect", found, "--file", image, "--channels", str(channels), "--rounds",
                        str(ROUNDS), "--populate", "--json", report, *options], check=True, capture_output=True, timeout=120)
        if receiver.wait(60) != 0:
            sys.exit(f"ram_receive: {receiver.stderr.read()[-300:]}")
        return json.loads(report.read_text())["gib_per_s"]
    finally:
        receiver.kill()
        copy.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="What --resume costs while no connection is lost")
    parser.add_argument("build", type=Path)
    parser.add_argument("--old", type=Path, help="another build, in turn with this one")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    here = options.build.resolve() / "examples"
    ways = {"without": (here, []), "--resume": (here, ["--resume"])}
    if options.old:
        ways = {"old": (options.old.resolve() / "examples", []), **ways}
    results = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        image = folder / "image"
        with open(image, "wb") as file:
            for _ in range(GIB * 16):
                file.write(os.urandom(64 << 20))
        for wire, address in (("TCP", "tcp:127.0.0.1:0"), ("UNIX", f"unix:{folder}/socket")):
            for channels in (1, 2, 4):
                rates = {way: [] for way in ways}
                for _ in range(options.repeat):
                    for way, (programs, more) in ways.items():
                        rates[way].append(one(programs, more, address, channels, image, folder))
                median = {way: statistics.median(each) for way, each in rates.items()}
                ratios = [f"--resume / without {median['--resume'] / median['without']:.3f}"]
                if options.old:
                    ratios.append(f"without / old {median['without'] / median['old']:.3f}")
                print(f"{wire}, {channels} channels: " + ", ".join(f"{way} {rate:.2f}" for way, rate in median.items()) +
                      "; " + ", ".join(ratios), flush=True)
                results.append({"wire": wire, "channels": channels, "gib_per_s": rates})
    mean = statistics.geometric_mean(
        [statistics.median(row["gib_per_s"]["--resume"]) / statistics.median(row["gib_per_s"]["without"]) for row in results])
    print(f"--resume / without, geometric mean of all rows: {mean:.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
