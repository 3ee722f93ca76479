#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs bench_handoff and bench_pipeline and prints their figures as ratios: rows 1, 2, 3, 12, 13 and 16 of
benchmarks/README.md. The other rows: kernels/rows.py (4 to 7) and qemu/side_by_side.py (8 to 11, 14, 15).

    benchmarks/rows.py build/bench --json rows.json

What is compared runs interleaved, in random order, in one process; a ratio is of medians over the repetitions. Two
minutes or so on a quiet machine, 2 GiB.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parent.parent


def run(program, pattern, repetitions):
    """All repetitions of the benchmarks that match: run name -> list of raw results."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [str(program), f"--benchmark_filter={pattern}", f"--benchmark_repetitions={repetitions}",
                   "--benchmark_enable_random_interleaving=true", f"--benchmark_out={out.name}",
                   "--benchmark_out_format=json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=1200)
        results = json.load(out)["benchmarks"]
    found = {}
    for result in results:
        if result["run_type"] == "iteration":
            name = result["run_name"].replace("/iterations:1", "").replace("/manual_time", "")
            found.setdefault(name, []).append(result)
    return command, found


def median(found, name, key="real_time"):
    return statistics.median(result[key] for result in found[name])


class Table:
    def __init__(self):
        self.rows = []

    def add(self, row, what, figure, unit, target, reached):
        verdict = "-" if reached is None else "yes" if reached else "NO"
        self.rows.append({"row": row, "what": what, "figure": figure, "unit": unit, "target": target,
                          "reached": verdict})
        print(f"{row:>3}  {what:66} {figure:9.3f} {unit:12} {target:24} {verdict}")


def producer(found, table):
    for what, name, target in (("runs", "runs", 5), ("dirty bitmap, every other page", "bitmap_half", 10),
                               ("dirty bitmap, 2 % of pages", "bitmap_2_percent", None),
                               ("single pages", "single_pages", 25)):
        for workers in (2, 4):
            cost = median(found, f"producer/{name}/workers:{workers}", "cpu_ns")
            table.add(1, f"producer, {what}, {workers} worker(s)", cost, "ns a page",
                      f"{target} ns" if target else "", cost <= target if target else None)


def handoff(found, table):
    for workers in (1, 2):
        case = f"work_us:0/workers:{workers}/slow:0"
        ours, theirs = f"handoff/shared_ring/{case}", f"handoff/semaphores/{case}"
        table.add(2, f"hand-off, no work, {workers} worker(s): time a batch", 1000 * median(found, ours), "ns", "", None)
        table.add(2, f"hand-off, no work, {workers} worker(s): semaphores", 1000 * median(found, theirs), "ns", "", None)
        ratio = median(found, theirs) / median(found, ours)
        table.add(2, f"hand-off, no work, {workers} worker(s): less time", ratio, "x", "10x", ratio >= 10)
        switches = median(found, ours, "switches")
        table.add(2, f"hand-off, no work, {workers} worker(s): context switches", switches, "a batch", "under 0.1",
                  switches < 0.1)
        tail = f"put_time/shared_ring/workers:{workers}"
        for share in ("p50_ns", "p99_ns", "p999_ns"):
            table.add(2, f"put(), {workers} worker(s): {share}", median(found, tail, share), "ns", "", None)
    for work in (20, 100, 300):
        for workers in (1, 2, 4):
            for slow in (0, 1):
                case = f"work_us:{work}/workers:{workers}/slow:{slow}"
                ours, theirs = f"handoff/shared_ring/{case}", f"handoff/semaphores/{case}"
                if ours not in found:
                    continue
                target = {20: 1.4, 100: 1.12}.get(work) if workers > 1 else None
                what = f"{work} us of work, {workers} worker(s)" + (", one channel 10x slower" if slow else "")
                ratio = median(found, theirs) / median(found, ours)
                table.add(3, f"{what}: throughput", ratio, "x", f"{target}x" if target else "",
                          ratio >= target if target else None)
                switches = median(found, ours, "switches")
                table.add(3, f"{what}: context switches", switches, "a batch", "under 0.5" if target else "",
                          switches < 0.5 if target else None)
                if slow:
                    table.add(3, f"{what}: its share", 100 * median(found, ours, "slow_share"), "%", "", None)


def pipeline(found, table):
    gib = {}
    for socket in ("tcp", "unix"):
        for channels in (1, 2, 4, 8, 16, 32):
            for what in ("pump", "none", "splice", "multifd"):
                name = f"pipeline/{what}/{socket}/channels:{channels}"
                gib[what, channels] = median(found, name, "bytes_per_second") / 2**30
            share = 100 * gib["none", channels] / gib["pump", channels]
            wanted = channels <= 8
            table.add(12, f"{socket}, {channels} channel(s): none, share of the pump's {gib['pump', channels]:.2f} GiB/s",
                      share, "%", "95 %" if wanted else "", share >= 95 if wanted else None)
            splice = 100 * gib["splice", channels] / gib["pump", channels]
            wanted = channels <= 8 and socket == "unix"
            table.add(12, f"{socket}, {channels} channel(s): none by SpliceTransport, share of the pump's", splice, "%",
                      "95 %" if wanted else "", splice >= 95 if wanted else None)
            table.add(12, f"{socket}, {channels} channel(s): zero pages looked for", gib["multifd", channels], "GiB/s",
                      "", None)
        best = max(gib["none", channels] for channels in (1, 2, 4, 8, 16, 32))
        for channels in (1, 2, 4, 8, 16, 32):
            share = 100 * gib["none", channels] / best
            table.add(13, f"{socket}, {channels} channel(s): {gib['none', channels]:.2f} GiB/s, share of the best", share,
                      "%", "90 %" if channels > 1 else "", share >= 90 if channels > 1 else None)
    for pattern in ("zero", "half", "mixed"):
        speed = median(found, f"pattern/{pattern}/channels:2", "bytes_per_second") / 2**30
        table.add("-", f"in process, {pattern}, 2 channels", speed, "GiB/s", "", None)


def compile_costs(compiler, table):
    """Row 16: the umbrella header, and one stack."""
    include = ["-std=c++23", "-I", str(SOURCE / "include")]
    umbrella = '#include "multifd/multifd.hpp"\nint main() {}\n'
    stack = """#include "multifd/compress/nocomp.hpp"
#include "multifd/multifd.hpp"
template class multifd::Sender<multifd::FdTransport, multifd::NoComp, multifd::ZeroPagesMultifd>;
template class multifd::Receiver<multifd::FdTransport, multifd::NoComp>;
int main() {}
"""
    with tempfile.TemporaryDirectory() as folder:
        for what, text, flags in (("umbrella header", umbrella, ["-O0", "-fsyntax-only"]),
                                  ("one stack, both ends, -O2", stack, ["-O2", "-c"])):
            source = pathlib.Path(folder) / "one.cpp"
            source.write_text(text)
            times = []
            for _ in range(5):
                began = time.monotonic()
                subprocess.run([compiler, *include, *flags, str(source), "-o", f"{folder}/one.o"], check=True, timeout=120)
                times.append(time.monotonic() - began)
            table.add(16, f"compile time, {what}", statistics.median(times), "s", "stated", None)
        subprocess.run([compiler, *include, "-O2", f"{folder}/one.cpp", "-o", f"{folder}/one", "-lxxhash", "-pthread"],
                       check=True, timeout=120)
        size = subprocess.run(["size", f"{folder}/one"], check=True, capture_output=True, text=True, timeout=10)
        table.add(16, "text of a program that is one stack", int(size.stdout.split()[6]) / 1024, "KiB", "stated", None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path, help="a build tree of preset bench")
    parser.add_argument("--repetitions", type=int, default=5,
                        help="of each benchmark, three times as many of whole migrations (default: %(default)s)")
    parser.add_argument("--parts", default="producer,handoff,pipeline,compile", help="(default: %(default)s)")
    parser.add_argument("--compiler", default="g++", help="for row 16 (default: %(default)s)")
    parser.add_argument("--json", help="write the raw results and the table there")
    arguments = parser.parse_args()
    began = datetime.datetime.now(datetime.timezone.utc)

    table = Table()
    raw = {}
    commands = []
    parts = arguments.parts.split(",")
    for name, pattern, evaluate in (("bench_pipeline", "producer", producer), ("bench_handoff", ".*", handoff),
                                    ("bench_pipeline", "pipeline|pattern", pipeline)):
        if evaluate.__name__ not in parts:
            continue
        # Where the scheduler puts the threads of a whole migration makes a tenth: more of those.
        repetitions = arguments.repetitions * (3 if evaluate is pipeline else 1)
        command, found = run(arguments.build / "benchmarks" / name, pattern, repetitions)
        commands.append(" ".join(command))
        raw.update(found)
        evaluate(found, table)
    if "compile" in parts:
        compile_costs(arguments.compiler, table)

    if arguments.json:
        commit = subprocess.run(["git", "-C", str(SOURCE), "describe", "--always", "--dirty"], capture_output=True,
                                text=True, timeout=10).stdout.strip()
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
        compiler = subprocess.run([arguments.compiler, "--version"], capture_output=True, text=True, timeout=10).stdout
        costs = subprocess.run([arguments.build / "benchmarks" / "machine_costs"], capture_output=True, text=True, timeout=60,
                               check=True).stdout
        with open(arguments.json, "w") as out:
            json.dump({"machine": json.loads(costs), "command": sys.argv, "began": began.isoformat(), "commit": commit, "cpu": cpu,
                       "cores": os.cpu_count(), "kernel": platform.release(), "compiler": compiler.splitlines()[0],
                       "benchmarks": commands, "rows": table.rows, "raw": raw}, out, indent=1)


if __name__ == "__main__":
    main()
