#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the ways of a packet through the kernel cost: kernel_ways over loopback TCP, UNIX sockets, and a veth pair between two
network namespaces (root only). All ways of one kind of connection in turn, in one process; prints medians and spreads. Then
a whole Sender and Receiver in one process by bench_pipeline, beside the raw pump, by FdTransport and by SpliceTransport.

    python3 benchmarks/kernel_ways.py build/bench [--repeat 5] [--size 512M] [--json FILE]

A way is worth a transport where it moves 1.05 times what sendmsg() and recvmsg() move, or takes 0.9 times their CPU time.
CPU time is the process's: both ends, and the kernel's threads that work for it. sendfile() needs a file: there the source's
memory is a memfd, for sendmsg() and splice(), too.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / each) for each in ("tests/programs", "tests/interop", "benchmarks/qemu", "benchmarks")]

from processes import Folder, LabError  # noqa: E402
from rows import run  # noqa: E402
from side_by_side import commit, machine, size_of  # noqa: E402
from two_links import TwoLinks  # noqa: E402

OF_A_FILE = ("sendmsg", "splice", "sendfile")
FASTER, CHEAPER = 1.05, 0.9


def measure(options, listen, *more, inside=()):
    command = [*inside, options.build / "benchmarks/kernel_ways", "--listen", listen, "--size", options.size, "--repeat", options.repeat, *more]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        raise LabError(f"kernel_ways: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    if report["memory"] != "memfd":
        report["refused"].pop("sendfile", None)
    return report


def kinds(options, folder):
    """(name, what kernel_ways says)"""
    file = [word for way in OF_A_FILE for word in ("--way", way)]
    places = {"TCP, loopback": "tcp:127.0.0.1:0", "UNIX": f"unix:{folder.new('socket')}"}
    for name, listen in places.items():
        yield name, measure(options, listen)
        yield f"{name}, memfd", measure(options, listen, "--memory", "memfd", *file)
    if os.geteuid() == 0:
        with TwoLinks() as links:
            yield "TCP, veth", measure(options, f"tcp:{links.address('far', 1)}:0", "--namespace", links.name("far"), inside=links.inside("near"))


def pipeline(options):
    """{run name: raw results}, of the pump and both transports"""
    os.environ["MULTIFD_BENCH_MIB"] = str(size_of(options.size) >> 20)
    found = run(options.build / "benchmarks/bench_pipeline", "pipeline/(pump|none|splice)/(tcp|unix)/channels:[1248]/", options.repeat)[1]
    for name in found:
        base = name.replace("/none/", "/pump/").replace("/splice/", "/pump/")
        speed, cpu = ([statistics.median(each[key] for each in found[which]) for which in (name, base)] for key in ("bytes_per_second", "cpu_s_per_gib"))
        print(f"{name:34} {speed[0] / 2**30:6.2f} GiB/s {speed[0] / speed[1]:5.2f}x the pump  CPU {cpu[0]:.3f} s/GiB {cpu[0] / cpu[1]:5.2f}x")
    return {name: [{key: run[key] for key in ("bytes_per_second", "cpu_s_per_gib", "switches")} for run in runs] for name, runs in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=lambda path: Path(path).resolve(), help="folder of the build (preset bench)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--size", default="512M", help="memory that is moved each time (default: %(default)s)")
    parser.add_argument("--parts", default="kinds,pipeline", help="what to measure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="every run, machine and commit")
    options = parser.parse_args()
    report = {"command": " ".join(sys.argv), "commit": commit(), "machine": machine(options.build), "kinds": {}}
    with Folder() as folder:
        for name, told in kinds(options, folder) if "kinds" in options.parts else ():
            report["kinds"][name] = told
            for connections in told["runs"]["sendmsg"]:
                base = told["runs"]["sendmsg"][connections]
                for way, runs in told["runs"].items():
                    median = {key: statistics.median(run[key] for run in runs[connections]) for key in base[0]}
                    ratio = {key: median[key] / statistics.median(run[key] for run in base) for key in ("gib_per_s", "cpu_s_per_gib")}
                    speeds = [run["gib_per_s"] for run in runs[connections]]
                    wins = way != "sendmsg" and (ratio["gib_per_s"] >= FASTER or ratio["cpu_s_per_gib"] <= CHEAPER)
                    print(f"{name:22} {connections} {way:22} {median['gib_per_s']:6.2f} GiB/s ({min(speeds):.2f} to {max(speeds):.2f}) "
                          f"{ratio['gib_per_s']:5.2f}x  CPU {median['cpu_s_per_gib']:.3f} s/GiB {ratio['cpu_s_per_gib']:5.2f}x  calls/GiB "
                          f"{median['sender_calls_per_gib']:6.0f} {median['receiver_calls_per_gib']:6.0f}{'  wins' if wins else ''}", flush=True)
            for way, why in told["refused"].items():
                print(f"{name:22}   {way:22} refused: {why}")
    if "pipeline" in options.parts:
        report["pipeline"] = pipeline(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LabError, subprocess.SubprocessError, OSError) as problem:
        print(f"kernel_ways.py: {problem}", file=sys.stderr)
        sys.exit(1)
