#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How long a guest stands still, and how long all takes, with memory that follows (postcopy) and without, at the same limit; in one
run and in turn. Prints medians and spreads.

    sudo python3 benchmarks/hybrid.py build/bench/examples [--repeat 5]

live_migration moves a guest of 512 MiB between two network namespaces over a link of 1.6 Gbit/s (a token bucket, tbf), under the
rule "priced" with --max-downtime 300. Three guests: one that converges; one that the rule can still stop, for longer than the
limit; and one that rewrites more than the link carries all the time, whose precopy ends when --timeout (20 s) gives up. precopy:
--postcopy never. hybrid: --postcopy fallback. at once: without a round. After each run the guest checks its memory.
"""
import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/programs"))

from network import Network  # noqa: E402

RATE = "1600mbit"
GUESTS = {"converges": ("--working-set", "32M", "--dirty-rate", "30M"), "is stopped for long": ("--working-set", "128M", "--dirty-rate", "400M"),
          "does not converge": ("--working-set", "384M", "--dirty-rate", "600M")}
WAYS = {"precopy": "never", "hybrid": "fallback", "at once": "at-once"}


def migrate(options, guest, strategy, network, folder, seed):
    here, there = network.inside("source"), network.inside("destination")
    report_path = folder / "report.json"
    report_path.unlink(missing_ok=True)
    program = options.programs / "live_migration"
    listening = subprocess.Popen([*there, program, "--listen", f"tcp:{Network.ADDRESS['destination']}:0", "--memory", "1G", "--backend",
                                  options.backend], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = listening.stdout.readline().strip()
        done = subprocess.run([*here, program, "--connect", address, "--memory", "512M", *guest, "--no-verify", "--channels", "2",
                               "--run-before", "0.5", "--run-after", "0", "--switch", "priced", "--max-downtime", "300", "--timeout", "20",
                               "--postcopy", strategy, "--backend", options.backend, "--seed", str(seed), "--json", report_path],
                              capture_output=True, text=True, timeout=120)
        listening.communicate(timeout=60)
    finally:
        listening.kill()
        listening.wait()
    report = json.loads(report_path.read_text()) if report_path.exists() else {}
    if done.returncode != 0:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-200:]}
    followed = report.get("postcopy")
    seconds = report["seconds"]  # of the rounds, the last one with it
    if followed:
        seconds += report["downtime_ms"] / 1000 + followed["seconds"]
    return {"downtime_ms": report["downtime_ms"], "seconds": seconds, "followed": bool(followed)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=lambda text: pathlib.Path(text).resolve(), help="the folder of the built programs")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=pathlib.Path, help="write all samples to this file")
    options = parser.parse_args()
    samples = {guest: {way: [] for way in WAYS} for guest in GUESTS}
    with Network() as network, tempfile.TemporaryDirectory() as name:
        subprocess.run([*network.inside("source"), "tc", "qdisc", "add", "dev", "up0", "root", "tbf", "rate", RATE, "burst", "1mb", "latency",
                        "50ms"], check=True)
        for run in range(options.repeat):
            for guest, flags in GUESTS.items():
                for way, strategy in WAYS.items():
                    sample = migrate(options, flags, strategy, network, pathlib.Path(name), run + 1)
                    samples[guest][way].append(sample)
                    print(f"{run + 1}: {guest}, {way}: {sample}", file=sys.stderr, flush=True)
    print(f"Linux {platform.release()}, {options.repeat} runs of each, medians (least to most)\n\n"
          "| guest | way | stands still, ms | all, s | memory followed | migrated |\n| --- | --- | --- | --- | --- | --- |")
    for guest, ways in samples.items():
        for way, runs in ways.items():
            good = [run for run in runs if "error" not in run]

            def cell(key, digits, good=good):
                values = sorted(run[key] for run in good)
                return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})" if values else "-"

            print(f"| {guest} | {way} | {cell('downtime_ms', 1)} | {cell('seconds', 2)} | {sum(run['followed'] for run in good)} | "
                  f"{len(good)} of {len(runs)} |")
    if options.json:
        options.json.write_text(json.dumps({"what": "hybrid", "command": " ".join(sys.argv), "samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
