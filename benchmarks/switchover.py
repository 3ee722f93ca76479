#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""When the rules for the switchover stop a real guest, and whether the downtime that they promise holds.

    python3 benchmarks/switchover.py build/bench/examples [--runs 10] [--rules priced fixed ramp stall]
    python3 benchmarks/switchover.py build/bench/examples --simulate build/bench/benchmarks/multifd_simulate
    sudo python3 benchmarks/switchover.py build/bench/examples --dip

live_migration migrates a guest with busy and quiet phases under a cap, the rules in turn. With --simulate, multifd_simulate plays the
guest that each run has recorded, for the rules' order in virtual time. With --dip the two sides are in network namespaces, and
behind the first round the link (a token bucket, tbf) carries a tenth for five seconds: a rule that takes what it sees then for what
there is would stop the guest at the wrong moment.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/programs"))

from network import Network  # noqa: E402

GUEST = ("--memory", "512M", "--working-set", "48M", "--dirty-rate", "150M", "--busy", "3", "--quiet", "2", "--quiet-rate", "8M",
         "--run-after", "0", "--no-verify", "--channels", "4", "--timeout", "60")
# A rule's --max-downtime, and its name in multifd_simulate. The ramp begins at 150 ms, as KubeVirt's.
RULES = {"priced": (300, "priced"), "fixed": (300, "cloud-hypervisor"), "ramp": (150, "ramp"), "stall": (300, "stall")}
LIMIT_S = 0.3
PRICE = (10.0, 67.0)  # seconds that a second of downtime is worth, below and above the limit: benchmarks/simulate/README.md


def cost(report):
    downtime = report["downtime_ms"] / 1000
    return report["seconds"] + PRICE[0] * min(downtime, LIMIT_S) + PRICE[1] * max(0.0, downtime - LIMIT_S)


def migrate(programs, folder, rule, options, seed):
    path = folder / "report.json"
    command = [programs / "live_migration", *GUEST, "--switch", rule, "--bandwidth", options.bandwidth, "--max-downtime",
               str(RULES[rule][0]), "--backend", options.backend, "--seed", str(seed), "--run-before",
               str(0.3 + seed * 0.37 % 5), "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    if done.returncode != 0:
        raise RuntimeError(f"{rule}: {done.stdout[-600:]}{done.stderr[-600:]}")
    return json.loads(path.read_text())


def simulated(simulate, folder):
    """What the rules would have cost on the guest of the last report."""
    done = subprocess.run([simulate, "--trace", folder / "report.json", "--json", "-"], capture_output=True, text=True,
                          timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"multifd_simulate: {done.stderr}")
    return {each["rule"]: each["median_cost_s"] for each in json.loads(done.stdout)["rules"]}


def compare(options):
    rows = {rule: [] for rule in options.rules}
    virtual = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for run in range(options.runs):
            for rule in options.rules:
                report = migrate(options.programs, folder, rule, options, run + 1)
                rows[rule].append(report)
                if options.simulate:
                    virtual.append(simulated(options.simulate, folder))
            print(f"run {run + 1} of {options.runs}: " + ", ".join(
                f"{rule} {rows[rule][-1]['downtime_ms']:.0f} ms ({rows[rule][-1]['promised_downtime_ms']:.0f} promised)"
                for rule in options.rules), file=sys.stderr, flush=True)
    print(f"cap {options.bandwidth}/s, backend {rows[options.rules[0]][0]['backend']}; medians of {options.runs}, and how often the "
          f"downtime was at most 1.1 times what was promised")
    simulated_cost = f"{'simulated':>10}" if virtual else ""
    print(f"{'rule':<10} {'downtime':>10} {'promised':>10} {'total':>8} {'cost':>8} {simulated_cost} {'promise kept':>13}")
    for rule, reports in sorted(rows.items(), key=lambda row: statistics.median(map(cost, row[1]))):
        kept = sum(each["downtime_ms"] <= 1.1 * each["promised_downtime_ms"] for each in reports)
        print(f"{rule:<10} {statistics.median(each['downtime_ms'] for each in reports):>7.1f} ms "
              f"{statistics.median(each['promised_downtime_ms'] for each in reports):>7.1f} ms "
              f"{statistics.median(each['seconds'] for each in reports):>6.2f} s "
              f"{statistics.median(map(cost, reports)):>6.2f} s "
              + (f"{statistics.median(each[RULES[rule][1]] for each in virtual):>8.2f} s " if virtual else "")
              + f"{kept:>6} of {len(reports)}")
    if options.output:
        options.output.write_text(json.dumps({"options": {key: str(value) for key, value in vars(options).items()},
                                              "runs": rows, "simulated": virtual}, indent=1))


def dip(options):
    """One migration for each rule over a link that is a tenth for five seconds behind the first round."""
    def shape(here, verb, rate):
        subprocess.run([*here, "tc", "qdisc", verb, "dev", "up0", "root", "tbf", "rate", rate, "burst",
                        "1mb", "latency", "50ms"], check=True)

    print(f"{'rule':<10} {'dip':>14} {'stopped at':>11} {'downtime':>10} {'promised':>10}")
    wrong = 0
    for rule in options.rules:
        with Network() as network, tempfile.TemporaryDirectory() as name:
            here, there = network.inside("source"), network.inside("destination")
            report_path = pathlib.Path(name) / "report.json"
            shape(here, "add", "1600mbit")
            listening = subprocess.Popen([*there, options.programs / "live_migration", "--listen",
                                          f"tcp:{Network.ADDRESS['destination']}:0", "--memory", "1G", "--backend", options.backend],
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            source = None
            try:
                address = listening.stdout.readline().strip()
                # Busy all the time, and too much so for a tenth of the link: without the dip the guest is stopped at once.
                guest = ("--memory", "256M", "--working-set", "24M", "--dirty-rate", "60M", "--run-after", "0", "--run-before", "0.2",
                         "--no-verify", "--channels", "4", "--timeout", "60")
                began = time.monotonic()
                source = subprocess.Popen([*here, options.programs / "live_migration", "--connect", address,
                                           *guest, "--switch", rule, "--max-downtime", str(RULES[rule][0]), "--bandwidth",
                                           options.bandwidth, "--backend", options.backend, "--json", report_path],
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                for line in source.stdout:  # the dip begins as the first round is being sent
                    if line.split()[:1] == ["round"]:
                        break
                time.sleep(0.6)
                low_at = time.monotonic()
                shape(here, "change", "160mbit")
                restored = threading.Timer(5, shape, (here, "change", "1600mbit"))
                restored.start()
                source.stdout.read()
                status = source.wait(120)
                end = time.monotonic()
                restored.join()
                if status != 0:
                    raise RuntimeError(f"{rule}: status {status}")
                report = json.loads(report_path.read_text())
            finally:
                for process in (source, listening):
                    if process:
                        process.kill()
                        process.wait()
            in_dip = low_at < end - report["downtime_ms"] / 1000 < low_at + 5
            wrong += in_dip
            print(f"{rule:<10} {low_at - began:>5.1f} to {low_at - began + 5:>4.1f} s {end - began:>9.1f} s "
                  f"{report['downtime_ms']:>7.1f} ms {report['promised_downtime_ms']:>7.1f} ms"
                  f"{'  stopped in the dip' if in_dip else ''}", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=lambda text: pathlib.Path(text).resolve(), help="the folder of the built programs")
    parser.add_argument("--rules", nargs="+", default=[*RULES], choices=[*RULES])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--bandwidth", default="190M", help="200 MB/s by default (190 MiB)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--simulate", type=pathlib.Path, help="multifd_simulate")
    parser.add_argument("--output", type=pathlib.Path, help="a file for all reports")
    parser.add_argument("--dip", action="store_true")
    options = parser.parse_args()
    if options.dip:
        sys.exit(1 if dip(options) else 0)
    compare(options)


if __name__ == "__main__":
    main()
