#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How long a guest waits for pages that are still at the source, beside QEMU's postcopy, in one run and in turn. Prints
medians, spreads and ratios.

    python3 benchmarks/postcopy.py --build build/bench
    python3 benchmarks/postcopy.py --build build/bench --channels 2 --repeat 3 --no-qemu

floor     ours, with nothing in the background: one thread touches pages in random order (fault_latency --channels 0)
off, on   ours, while all other pages come in the background at full speed, over 1, 2 and 4 connections; pages that are touched
          wait in the same connections (off), or have one of their own (on: the urgent lane). Timed by the guest's thread,
          from the touch to the word that it reads: the kernel's part and both wake-ups are in it.
qemu      QEMU 11.1 with postcopy-preempt, no bandwidth limit, a guest that touches its pages in another order than that of
          the addresses (tests/interop/guest.S, a stride without a common divisor); its own statistics (postcopy-latency and its
          distribution, query-migrate of the destination), which begin when its thread has read the fault. qemu-plain:
          without preempt.

All over loopback TCP, source and destination in processes of their own, 4 KiB pages, no page zero. Quantiles of QEMU are
from power-of-two buckets, within which latencies are taken to lie evenly.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/interop"), str(ROOT / "benchmarks/qemu")]

from lab import PAGE, Guest, Qemu, accelerator, find_qemu  # noqa: E402
from processes import Folder, LabError  # noqa: E402
from side_by_side import warm_host  # noqa: E402

MACHINE = "pc-i440fx-7.2"
VERSION = "11.1"
GOALS = {"p99, lane on / floor": 3.0, "QEMU's p99 / ours": 3.0}


def of_buckets(buckets, share):
    """Microseconds. Bucket i: 2^i to 2^(i+1)."""
    wanted, below = share * sum(buckets), 0
    for i, here in enumerate(buckets):
        if here and below + here >= wanted:
            return 2**i * (1 + (wanted - below) / here)
        below += here
    return 0.0


def qemu(folder, mib, preempt):
    working_set = mib - 2
    guest = Guest(working_set * 1024, 0, 0, 104729 * PAGE)
    common = dict(ram_mib=mib, paused=False, guest=guest)
    with Qemu(folder, VERSION, MACHINE, **common) as source, \
            Qemu(folder, VERSION, MACHINE, incoming=True, **common) as destination:
        source.wait_heartbeats(1, 300)
        capabilities = {"postcopy-ram": True, "postcopy-preempt": preempt}
        source.configure(multifd=False, return_path=True, capabilities=capabilities)
        destination.configure(multifd=False, return_path=True, capabilities={**capabilities, "postcopy-blocktime": True})
        destination.listen("tcp:127.0.0.1:0")
        source.migrate(destination.listening_on())
        source.wait_migration("active", 30)
        began = time.monotonic()
        source.qmp.call("migrate-start-postcopy")
        source.wait_migration("completed", 300, other=("failed", "cancelled"))
        seconds = time.monotonic() - began
        said = destination.migration()
        buckets = said["postcopy-latency-dist"]
        return {"faults": sum(buckets), "p50_us": of_buckets(buckets, 0.5), "p99_us": of_buckets(buckets, 0.99),
                "p999_us": of_buckets(buckets, 0.999), "mean_us": said["postcopy-latency"] / 1000, "seconds": seconds}


def ours(build, mib, *options):
    done = subprocess.run([build / "benchmarks/fault_latency", "--mib", str(mib), *map(str, options)], capture_output=True,
                          text=True, timeout=600)
    if done.returncode != 0:
        raise LabError(f"fault_latency {options}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="release build with the benchmarks")
    parser.add_argument("--mib", type=int, default=2048, help="guest memory (default 2048)")
    parser.add_argument("--channels", default="1,2,4", help="background connections (default 1,2,4)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--no-qemu", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    build = options.build.resolve()
    ways = {"floor": lambda folder: ours(build, options.mib, "--channels", 0, "--faults", 20000)}
    for channels in map(int, options.channels.split(",")):
        for lane in ("off", "on"):
            ways[f"{channels} {lane}"] = lambda folder, channels=channels, lane=lane: ours(
                build, options.mib, "--channels", channels, "--urgent-lane", int(lane == "on"))
    binary, why = find_qemu(VERSION)
    if options.no_qemu or not binary:
        print(f"without QEMU: {why or '--no-qemu'}")
    else:
        ways["qemu"] = lambda folder: qemu(folder, options.mib, True)
        ways["qemu-plain"] = lambda folder: qemu(folder, options.mib, False)
    samples = {name: [] for name in ways}
    with Folder() as folder:
        accel = accelerator(folder, VERSION) if "qemu" in ways else "none"
        for _ in range(options.repeat):
            for name, way in ways.items():
                warm_host(2 * options.mib << 20)
                samples[name].append(way(folder))
                print(f"{time.strftime('%H:%M:%S')} {name}: p99 {samples[name][-1]['p99_us']:.0f} us", file=sys.stderr, flush=True)
    print(f"{platform.machine()}, Linux {platform.release()}, QEMU: {accel}; {options.mib} MiB, medians of {options.repeat} "
          "(least to most)\n")
    print(f"{'':12}{'faults':>9}{'p50 us':>9}{'p99 us':>22}{'p99.9 us':>22}{'seconds':>9}")
    median = {name: {key: statistics.median(run[key] for run in runs) for key in ("faults", "p50_us", "p99_us", "p999_us", "seconds")}
              for name, runs in samples.items()}

    def spread(name, key):
        values = [run[key] for run in samples[name]]
        return f"{median[name][key]:.0f} ({min(values):.0f} to {max(values):.0f})"

    for name, row in median.items():
        print(f"{name:12}{row['faults']:9.0f}{row['p50_us']:9.1f}{spread(name, 'p99_us'):>22}{spread(name, 'p999_us'):>22}"
              f"{row['seconds']:9.2f}")
    print()
    for name in ways:
        if name.endswith(" on"):
            against = {"floor": median["floor"]["p99_us"], "lane off": median[name.replace(" on", " off")]["p99_us"]}
            text = f"{name}: p99 {median[name]['p99_us'] / against['floor']:.2f}x the floor, " \
                   f"{against['lane off'] / median[name]['p99_us']:.1f}x lower than without the lane"
            if "qemu" in ways:
                text += f", {median['qemu']['p99_us'] / median[name]['p99_us']:.1f}x lower than QEMU's"
            print(text)
    if options.json:
        options.json.write_text(json.dumps({"machine": platform.uname()._asdict(), "accelerator": accel, "mib": options.mib,
                                            "goals": GOALS, "samples": samples}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except LabError as error:
        print(f"postcopy.py: {error}", file=sys.stderr)
        raise SystemExit(1) from None
