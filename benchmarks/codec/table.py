#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""table.py FILE...: a table of what bench_codec --benchmark_out=FILE left: speed and bytes against the baselines."""

import json
import statistics
import sys


def medians(path):
    """{name: (bytes per second, ratio, bytes against plain)}, from the aggregates or from the single runs."""
    with open(path, encoding="utf-8") as file:
        runs = [run for run in json.load(file)["benchmarks"] if "bytes_per_second" in run]
    wanted = [run for run in runs if run.get("aggregate_name") == "median"]
    wanted = wanted or [run for run in runs if run["run_type"] == "iteration"]
    found = {}
    for run in wanted:
        name = run["run_name"].rsplit("/iterations:", 1)[0]
        found.setdefault(name, []).append([run[key] for key in ("bytes_per_second", "ratio", "bytes_vs_plain")])
    return {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}


def place(item):
    """Baselines before what is measured against them, slow levels before fast ones."""
    work, pattern, compressor, level = item[0].split("/")
    order = ["none", "zlib_plain", "zlib", "igzip", "zstd_plain", "zstd"]
    return work, pattern, order.index(compressor), -int(level) if compressor == "zstd" else int(level)


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    for path in sys.argv[1:]:
        found = medians(path)
        print(f"{'case':36} {'MB/s':>8} {'speed':>7} {'ratio':>7} {'bytes':>7}")
        for name, (speed, ratio, size) in sorted(found.items(), key=place):
            work, pattern, compressor, _ = name.split("/")
            family = "zlib" if compressor in ("zlib_plain", "zlib", "igzip") else "zstd"
            baseline = found.get(f"{work}/{pattern}/{family}_plain/1")
            against = f"{speed / baseline[0]:6.2f}x" if baseline else " " * 7
            print(f"{name:36} {speed / 1e6:8.0f} {against} {ratio:7.2f} {size:7.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
