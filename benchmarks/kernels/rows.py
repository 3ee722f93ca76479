#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs bench_kernels and prints the zero check's figures as ratios: rows 4 to 7 of benchmarks/README.md.

    benchmarks/kernels/rows.py build/release/benchmarks/bench_kernels --json rows.json
    benchmarks/kernels/rows.py .../bench_kernels --quick        # a smoke test: seconds, and the figures mean nothing

What is compared runs interleaved, in random order, in one process; a ratio is of medians over the repetitions. It takes
some two minutes on a quiet machine and 2 GiB; the last row needs 10 GiB of free memory (--residency-mib for less).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys

# What is run together.
ALL = "{}/.*"  # every check, one thread and two
SOME = "{}/(avx2_loop|kernel_(avx.*|neon)|zero_page_mask|touch)(/threads1/.*|/min_time.*|)"

# (row, what, group, baseline, candidate, ratio to reach; None: no figure is asked for)
LOOP, MASK, READ = "avx2_loop", "zero_page_mask", "read"
ROWS = [
    (4, "cold, in order, against the loop", ("cold", "zero", "in_order"), LOOP, MASK, 1.3),
    (4, "cold, in order, share of read bandwidth", ("cold", "zero", "in_order"), READ, MASK, 0.95),
    (4, "cold, in order: what reading at full speed would be", ("cold", "zero", "in_order"), LOOP, READ, None),
    (4, "cold, random order", ("cold", "zero", "random"), LOOP, MASK, 1.5),
    (4, "cold, in order, two threads", ("cold", "zero", "in_order", 2), LOOP, MASK, None),
    (4, "cold, in order, two threads, share of read bandwidth", ("cold", "zero", "in_order", 2), READ, MASK, None),
    (4, "cold, random order, two threads", ("cold", "zero", "random", 2), LOOP, MASK, None),
    (4, "cold, 40 % zero pages, in order", ("cold", "mixed", "in_order"), LOOP, MASK, None),
    (4, "cold, 40 % zero pages, random order", ("cold", "mixed", "random"), LOOP, MASK, None),
    (4, "cold, guest data, in order", ("cold", "guest", "in_order"), LOOP, MASK, None),
    (4, "cold, guest data, random order", ("cold", "guest", "random"), LOOP, MASK, None),
    (4, "cold, last byte not zero, in order", ("cold", "last_byte", "in_order"), LOOP, MASK, None),
    (4, "cold, random byte not zero, in order", ("cold", "random_byte", "in_order"), LOOP, MASK, None),
    (4, "cold, random byte not zero, random order", ("cold", "random_byte", "random"), LOOP, MASK, None),
    (5, "hot in L1", ("hot", "zero", "L1"), LOOP, "best kernel", 1.7),
    (5, "hot in L1, a batch", ("hot", "zero", "L1"), LOOP, MASK, None),
    (5, "hot in L1: what reading at full speed would be", ("hot", "zero", "L1"), LOOP, READ, None),
    (5, "hot in L2", ("hot", "zero", "L2"), LOOP, "best kernel", 1.4),
    (5, "hot in L2, a batch", ("hot", "zero", "L2"), LOOP, MASK, None),
    (5, "hot in L2: what reading at full speed would be", ("hot", "zero", "L2"), LOOP, READ, None),
    (6, "first word not zero, hot", ("hot", "first_word", "L1"), LOOP, "best kernel", 1.0),
    (6, "first word not zero, hot, a batch", ("hot", "first_word", "L2"), LOOP, MASK, 1.0),
    (6, "first word not zero, cold, in order", ("cold", "first_word", "in_order"), LOOP, MASK, 2.5),
    (6, "first word not zero, cold, random order", ("cold", "first_word", "random"), LOOP, MASK, 2.5),
    (6, "the same, in order: what touching one word of each page would be", ("cold", "first_word", "in_order"), LOOP,
     "touch", None),
    (6, "the same, random order", ("cold", "first_word", "random"), LOOP, "touch", None),
    (7, "8 GiB, 90 % untouched, anonymous", ("residency", "anonymous"), "reading", "resident", 50),
    (7, "the same, a producer that skips runs", ("residency", "anonymous"), "reading", "runs", None),
    (7, "8 GiB, 90 % untouched, memfd", ("residency", "memfd"), "reading", "resident", 50),
    (7, "the same, a producer that skips runs", ("residency", "memfd"), "reading", "runs", None),
]


def run(program, pattern, repetitions, environment):
    """Returns {benchmark name: [one dict of counters for each repetition]}."""
    command = [program, f"--benchmark_filter=^{pattern}", f"--benchmark_repetitions={repetitions}",
               "--benchmark_enable_random_interleaving=true", "--benchmark_format=json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
                          timeout=1200)
    runs = {}
    for one in json.loads(done.stdout or '{"benchmarks": []}')["benchmarks"]:
        if one["run_type"] == "iteration":
            if one.get("error_occurred"):
                sys.exit(f"{one['run_name']}: {one['error_message']}")
            runs.setdefault(one["run_name"], []).append(one)
    return runs


def collect(options):
    environment = os.environ | {"MULTIFD_BENCH_MIB": str(options.mib),
                                "MULTIFD_BENCH_RESIDENCY_MIB": str(options.residency_mib)}
    runs = {}
    for group in sorted({row[2][:3] for row in ROWS}):
        if group[0] not in options.groups:
            continue
        if group[0] == "residency":
            pattern, repetitions = "/".join(group), max(1, options.repetitions // 2)
        else:
            pattern = (ALL if group[1] == "zero" else SOME).format("/".join(group))
            repetitions = options.repetitions if group[0] == "cold" else 3 * options.repetitions
        print(f"{' '.join(group)} ...", file=sys.stderr, flush=True)
        runs |= run(options.program, pattern, repetitions, environment)
    return runs


def median_ns(runs, group, check):
    """Median ns per page of a check; of the fastest where the name stands for several. None: not measured here."""
    threads = group[3] if len(group) == 4 else 1
    found = {}
    for name, repetitions in runs.items():
        parts = name.split("/")
        depth = min(len(group), 3)
        if tuple(parts[:depth]) != tuple(group[:depth]):
            continue
        if group[0] == "cold" and f"threads{threads}" not in parts:
            continue
        who = parts[depth]
        if who == check or (check == READ and who.startswith("read_")) or \
                (check == "best kernel" and who.startswith("kernel_")):
            found[who] = statistics.median(one["ns_per_page"] for one in repetitions)
    return min(found.values(), default=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="bench_kernels")
    parser.add_argument("--json", metavar="FILE", help="rows and all medians")
    parser.add_argument("--mib", type=int, default=2048, help="size of cold memory")
    parser.add_argument("--residency-mib", type=int, default=8192, help="size of the mostly untouched guest")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--groups", default="cold,hot,residency", help="what to run of these")
    parser.add_argument("--quick", action="store_true", help="64 MiB, 256 MiB, once")
    options = parser.parse_args()
    options.groups = options.groups.split(",")
    if options.quick:
        options.mib, options.residency_mib, options.repetitions = 64, 256, 1

    runs = collect(options)
    rows = []
    for row, what, group, baseline, candidate, target in ROWS:
        before, after = median_ns(runs, group, baseline), median_ns(runs, group, candidate)
        if before is None or after is None:
            continue
        rows.append({"row": row, "what": what, "baseline": baseline, "candidate": candidate,
                     "baseline_ns_per_page": round(before, 2), "ns_per_page": round(after, 2),
                     "ratio": round(before / after, 3), "to_reach": target,
                     "reached": None if target is None else before / after >= target})
    for row in rows:
        target = "" if row["to_reach"] is None else f"to reach {row['to_reach']:g}" + ("" if row["reached"] else "  NOT")
        print(f"{row['row']}  {row['what']:66}{row['baseline_ns_per_page']:10.1f} {row['ns_per_page']:9.1f} ns"
              f" {row['ratio']:8.2f}x  {target}")
    if options.json:
        keep = ("ns_per_page", "cpu_ns_per_page", "resident_growth_mib", "page_table_growth_kib", "zero_share")
        medians = {name: {key: statistics.median(one[key] for one in all_runs) for key in keep if key in all_runs[0]}
                   for name, all_runs in sorted(runs.items())}
        report = {"command": sys.argv, "machine": platform.processor() or platform.machine(),
                  "kernel": platform.release(), "cold_mib": options.mib, "residency_mib": options.residency_mib,
                  "repetitions": options.repetitions, "rows": rows, "medians": medians}
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump(report, out, indent=1)
            out.write("\n")


if __name__ == "__main__":
    main()
