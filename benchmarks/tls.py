#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What TLS costs: the same random memory over plain connections, under GnuTLS and under OpenSSL, with certificates and with
pre-shared keys, ram_send to ram_receive; and QEMU to QEMU with the same credentials. In one run and in turn; prints medians
of GiB/s and of both ends' CPU seconds per GiB, and ratios to QEMU with the same credentials and to the plain connection.

    python3 benchmarks/tls.py --build build/bench --json results.json
    python3 benchmarks/tls.py --build build/bench --ways ours-openssl-psk,ours-plain --system-calls

How each is measured: benchmarks/qemu/side_by_side.py. Ways: qemu-plain, qemu-psk, qemu-x509, ours-plain, ours-gnutls-psk,
ours-gnutls-x509, ours-openssl-psk, ours-openssl-x509. --system-calls counts them in two more transfers of each of ours, which
strace slows down; their time does not count.
"""
import argparse
import datetime
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/interop"), str(ROOT / "benchmarks/qemu")]

import side_by_side  # noqa: E402
from processes import Folder, LabError  # noqa: E402
from side_by_side import GIB, Case, commit, machine, progress, size_of  # noqa: E402


@dataclass(frozen=True)
class Way:
    """As side_by_side.Way, with what encrypts."""

    kind: str  # "qemu", "ours"
    credentials: str = "plain"  # or "psk", "x509"
    library: str = ""  # of ours: "gnutls", "openssl"
    compression: str = "none"
    level: int = 1
    backend: str = "ram"

    def __str__(self):
        return "-".join(part for part in (self.kind, self.library, self.credentials) if part)

    @property
    def plain(self):
        return Way(self.kind)


WAYS = [Way("qemu"), Way("ours"),
        *(way for credentials in ("psk", "x509")
          for way in (Way("qemu", credentials), Way("ours", credentials, "gnutls"), Way("ours", credentials, "openssl")))]
# Way -> (times QEMU's GiB/s, times QEMU's CPU, times our plain CPU): issue 18.
GOALS = {"psk": (5.0, 0.2, 3.0), "x509": (2.0, 0.5, 3.0)}


class Bench(side_by_side.Bench):
    def __init__(self, options, folder):
        super().__init__(options, folder)
        self.files = folder.path / "tls"
        subprocess.run([self.tls_program(), self.files], check=True, timeout=60)
        self.traced = None

    def tls_program(self):
        for folder in (self.arguments.build, *(self.arguments.build / sub for sub in ("tests/programs", "benchmarks"))):
            if (folder / "make_tls_files").is_file():
                return folder / "make_tls_files"
        raise LabError(f"make_tls_files: not in {self.arguments.build}: build the target make_tls_files")

    def qemu_words(self, way, endpoint):
        if way.credentials == "plain":
            return []
        if way.credentials == "x509":
            return ["-object", f"tls-creds-x509,id=tls0,dir={self.files / 'good'},endpoint={endpoint},verify-peer=on"]
        user = ",username=qemu" if endpoint == "client" else ""
        return ["-object", f"tls-creds-psk,id=tls0,dir={self.files},endpoint={endpoint}{user}"]

    def qemu_parameters(self, way, endpoint):
        if way.credentials == "plain":
            return {}
        return {"tls-creds": "tls0", **({"tls-hostname": "localhost"} if endpoint == "client" else {})}

    def program_words(self, way, endpoint):
        if way.credentials == "plain":
            return []
        files = ["--tls-dir", self.files / "good"] if way.credentials == "x509" else ["--tls-psk", self.files / "keys.psk"]
        return [*files, "--tls-library", way.library]

    def system_calls(self, case, way, size):
        """How many each end makes for one GiB more: what the programs' start and end take is in both runs, and cancels out."""
        less, more = self.all_calls(case, way, size), self.all_calls(case, way, 2 * size)
        return {end: round((more[end] - less[end]) * GIB / size) for end in less}

    def all_calls(self, case, way, size):
        names, counts = {"ram_send": "source", "ram_receive": "destination"}, {}
        kept = dict(self.programs)
        try:
            for name, end in names.items():
                script, log = self.folder.new(name), self.folder.new(f"{name}.strace")
                script.write_text(f"#!/bin/sh\nexec strace -f -c -o {log} {kept[name]} \"$@\"\n")
                script.chmod(0o755)
                self.programs[name], counts[end] = script, log
            self.run(case, way, size)
        finally:
            self.programs = kept
        return {end: int(re.search(r"^\s*100\.00\s.*?(\d+)(?:\s+\d+)?\s+total$", log.read_text(), re.M)[1])
                for end, log in counts.items()}


def figures(samples, ways, size):
    """By way: medians."""
    made = {}
    for way in ways:
        rates = [size / GIB / sample.wall for sample in samples[way]]
        source, destination = (statistics.median(getattr(sample, name) * GIB / size for sample in samples[way])
                               for name in ("cpu_source", "cpu_destination"))
        both = statistics.median((s.cpu_source + s.cpu_destination) * GIB / size for s in samples[way])
        made[way] = {"gib_per_s": statistics.median(rates), "slowest": min(rates), "fastest": max(rates),
                     "cpu_per_gib": both, "cpu_source": source, "cpu_destination": destination}
    return made


def table(medians, ways):
    yield f"{'way':18} {'GiB/s':>6} {'min-max':>11} | {'CPU-s/GiB':>9} {'source':>6} {'dest.':>6} | {'QEMU':>6} {'CPU':>6} | {'plain':>6} {'CPU':>6}"
    for way in ways:
        mine = medians[way]
        ratios = []
        for base in (Way("qemu", way.credentials), Way(way.kind)):
            for name in ("gib_per_s", "cpu_per_gib"):
                ratios.append(f"{mine[name] / medians[base][name]:5.2f}x" if base in medians else f"{'':6}")
        yield (f"{str(way):18} {mine['gib_per_s']:6.2f} {mine['slowest']:5.2f}-{mine['fastest']:5.2f} | "
               f"{mine['cpu_per_gib']:9.3f} {mine['cpu_source']:6.3f} {mine['cpu_destination']:6.3f} | "
               f"{ratios[0]} {ratios[1]} | {ratios[2]} {ratios[3]}")


def goals(medians):
    for credentials, (rate, cpu, plain) in GOALS.items():
        ours, qemu = Way("ours", credentials, "openssl"), Way("qemu", credentials)
        if ours in medians and qemu in medians:
            yield (f"{credentials}: GiB/s / QEMU", medians[ours]["gib_per_s"] / medians[qemu]["gib_per_s"], rate, True)
            yield (f"{credentials}: CPU / QEMU", medians[ours]["cpu_per_gib"] / medians[qemu]["cpu_per_gib"], cpu, False)
        if ours in medians and Way("ours") in medians:
            yield (f"{credentials}: CPU / plain", medians[ours]["cpu_per_gib"] / medians[Way("ours")]["cpu_per_gib"], plain, False)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {str(way): way for way in WAYS}

    def ways(text):
        chosen = text.split(",")
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"{text}: of {','.join(known)}")
        return [known[name] for name in chosen]

    parser.add_argument("--build", type=lambda text: Path(text).resolve(), default=ROOT / "build/bench")
    parser.add_argument("--ways", type=ways, default=WAYS, help="some of them (default: all)")
    parser.add_argument("--qemu", default="10.0", help="10.0 or 7.2 (as tests/interop finds them), or a command")
    parser.add_argument("--machine", default="pc-i440fx-10.0", help="a versioned machine type (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--size", type=size_of, default=GIB, help="memory that is moved (default: 1G)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--system-calls", action="store_true", help="count those of ours, too: needs strace")
    parser.add_argument("--json", type=Path, help="every repetition, the medians, machine, versions and commit")
    parser.add_argument("--quick", action="store_true", help="256M, once: to see that all of it works")
    options = parser.parse_args()
    if options.quick:
        options.size, options.repeat = 256 << 20, 1
    # What side_by_side.Bench looks at.
    options.with_qemu = any(way.kind == "qemu" for way in options.ways)
    options.seed, options.limit, options.downtime_ms, options.socket_buffer = 1, 120, 2000, 0
    options.send_option, options.receive_option, options.cold_host = [], [], False
    return options


def main():
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` ends what it started
    case, samples, calls = Case("random", channels=options.channels), {way: [] for way in options.ways}, {}
    report = {"what": "tls", "command": " ".join(sys.argv), "commit": commit(), "machine": machine(options.build),
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "size": options.size,
              "channels": options.channels}
    with Folder() as folder:
        bench = Bench(options, folder)
        report["qemu"] = bench.binary.full_version if bench.binary else None
        for repeat in range(options.repeat):
            for way in options.ways:
                progress(f"{way} ({repeat + 1} of {options.repeat})")
                samples[way].append(bench.run(case, way, options.size))
        if options.system_calls and shutil.which("strace") is None:
            raise LabError("--system-calls: no strace")
        for way in options.ways:
            if options.system_calls and way.kind == "ours":
                progress(f"{way}: system calls")
                calls[str(way)] = bench.system_calls(case, way, options.size)
        progress("")
    medians = figures(samples, options.ways, options.size)
    print(f"random memory, {options.size / GIB:g} GiB, {options.channels} channels, median of {options.repeat}; QEMU "
          f"{report['qemu']}; commit {report['commit'][:12]}\n")
    print("\n".join(table(medians, options.ways)))
    for name, count in calls.items():
        print(f"{name}: system calls per GiB: source {count['source']}, destination {count['destination']}")
    rows = [{"figure": name, "value": value, "goal": goal, "reached": value >= goal if more else value <= goal}
            for name, value, goal, more in goals(medians)]
    for row in rows:
        print(f"{row['figure']}: {row['value']:.2f}, to reach {row['goal']:g}: {'reached' if row['reached'] else 'not reached'}")
    if options.json:
        report.update(medians={str(way): each for way, each in medians.items()}, rows=rows, system_calls=calls,
                      samples={str(way): [vars(sample) for sample in each] for way, each in samples.items()})
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LabError, subprocess.SubprocessError, OSError) as problem:
        print(f"tls.py: {problem}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
