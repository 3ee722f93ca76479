# SPDX-License-Identifier: MIT
"""Migrations over two networks that fail under way and come back: the guest arrives whole, and both networks carry again.

    python3 tests/programs/paths_die.py build/dev/examples
    python3 tests/programs/paths_die.py build/bench/examples --full --json FILE   each codec, zero mode and way, 108 moments;
                                                                                 both networks away for 20 s

Needs root and iproute2 for two network namespaces with two veth pairs (two_links.py), and is skipped without.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import survivors
from survivors import MIB, LabError, Process, run_cases
from two_links import LINKS, with_two_links

PATH_TIMEOUT = 2.0
TRIES = 4  # for a moment that is not behind the end
PAGE = 4096


class Standstill:
    """The longest time in which a process' network cards sent nothing, from the first sample on."""

    def __init__(self, pid):
        self._file, self._over, self.longest = f"/proc/{pid}/net/dev", threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _sent(self):
        lines = [line.split(":") for line in Path(self._file).read_text().splitlines() if "link" in line]
        return sum(int(numbers.split()[8]) for _, numbers in lines)

    def _run(self):
        last, since = None, time.monotonic()
        while not self._over.wait(0.02):
            try:
                now = self._sent()
            except (OSError, IndexError):
                return  # it has ended
            # Keepalive's questions are no pages.
            if last is None or now > last + 20_000:
                self.longest, last, since = max(self.longest, time.monotonic() - since), now, time.monotonic()

    def end(self):
        self._over.set()
        self._thread.join()
        return self.longest


class Lab:
    def __init__(self, folder, links, programs):
        self.folder, self.links, self.programs = folder, links, programs
        self.results = []

    def start(self, memory_mib, cap, compression="none", zero_pages="multifd", timeout="30s"):
        common = ("--resume-timeout", timeout, "--path-timeout", f"{PATH_TIMEOUT}s")
        self.destination = self.listen("tcp:0.0.0.0:0", memory_mib, *common)
        port = self.destination.address.rsplit(":", 1)[1]
        paths = [word for link in LINKS for word in ("--path", self.links.path(link, port, f",channels=2,cap={cap}"))]
        self.report = self.folder.new("here.json")
        self.source = Process(self.folder, "source", [
            *self.links.inside("near"), self.programs / "live_migration", *paths, "--resume", *common, "--memory",
            f"{memory_mib}M", "--working-set", "4M", "--dirty-rate", "2M", "--backend", "thread", "--run-before", "0.1",
            "--run-after", "0.2", "--max-downtime", "100", "--compression", compression, "--zero-pages", zero_pages, "--json",
            self.report])
        self.wait("the migration has begun", lambda: self.links.sent(1) - self.idle[0] > 8 * MIB, 30)

    def listen(self, address, memory_mib, *options):
        started = Process(self.folder, "destination", [
            *self.links.inside("far"), self.programs / "live_migration", "--listen", address, "--memory", f"{memory_mib}M",
            "--backend", "thread", *options], stdout=subprocess.PIPE)
        started.address = started.popen.stdout.readline().decode().strip()
        if not started.address:
            raise LabError(f"the destination does not listen: {started.stderr()}")
        return started

    def wait(self, what, done, limit):
        end = time.monotonic() + limit
        while not done():
            if self.source.popen.poll() is not None:
                return
            if time.monotonic() > end:
                raise LabError(f"{what}: not within {limit} s: {self.source.stderr()[-400:]}")
            time.sleep(0.02)

    def finish(self, limit):
        """Both reports, once both sides have said that all is well."""
        for process in (self.source, self.destination):
            status = process.wait_exit(limit)
            if status != 0:
                raise LabError(f"{process.name}: status {status}: {process.stderr()[-600:]}")
        report = json.loads(self.report.read_text())
        if report["guest"]["errors"] != 0 or report["pages_verified"] == 0:
            raise LabError(f"the guest: {report['guest']}, {report['pages_verified']} pages verified")
        return report

    def break_links(self, links, way, seconds):
        for link in links:
            if way == "drop":
                self.links.drop(link, True)
            else:
                self.links.set(link, "down")
        time.sleep(seconds)  # how long the network is away, and no condition
        for link in links:
            if way == "drop":
                self.links.drop(link, False)
            else:
                self.links.set(link, "up")

    @property
    def idle(self):
        if not hasattr(self, "_idle"):
            self._idle = [self.links.sent(link) for link in LINKS]
        return self._idle

    def forget(self):
        if hasattr(self, "_idle"):
            del self._idle


def one(lab, way, broken, compression, zero_pages, rng, memory_mib=64):
    cap = "12M" if compression == "none" else "4M"

    def case():
        for _ in range(TRIES):
            said, hit = try_once()
            if hit:
                return said
        raise LabError(f"no moment of {TRIES} was in the migration: {said}")

    def try_once():
        lab.forget()
        lab.idle
        lab.start(memory_mib, cap, compression, zero_pages)
        standstill = Standstill(lab.source.pid)
        time.sleep(rng.uniform(0, 1.2))  # a random moment
        carried = [lab.links.sent(link) - was for link, was in zip(LINKS, lab.idle)]
        lab.break_links(broken, way, rng.uniform(2.2, 3.2))
        came_back = lambda: (len(re.findall(r"is back", lab.source.stderr())) >=  # noqa: E731
                             len(re.findall(r"is lost", lab.source.stderr())))
        lab.wait("all connections are back", came_back, 30)
        stood_still = standstill.end()
        at_return = [lab.links.sent(link) for link in LINKS]
        report = lab.finish(60)
        lost, resent = report["lost_connections"], report["resent_pages"] * PAGE
        again = [lab.links.sent(link) - was for link, was in zip(LINKS, at_return)]
        lab.results.append({"way": way, "links": list(broken), "compression": compression, "zero_pages": zero_pages,
                            "lost_connections": lost, "resent_bytes": resent, "carried_before": carried,
                            "carried_behind_return": again, "stood_still_s": round(stood_still, 3), "downtime_ms": report["downtime_ms"]})
        if lost == 0:
            del lab.results[-1]
        return f"{lost} connections lost, {resent / MIB:.1f} MiB sent again, stood still for {stood_still:.2f} s at most", lost > 0
    return case


def both_away(lab, seconds, memory_mib, cap):
    """No connection for a while: the migration pauses, goes on, and sends little again."""
    def case():
        lab.forget()
        lab.idle
        lab.start(memory_mib, cap, timeout="60s")
        lab.wait("half of the memory has gone",
                 lambda: sum(lab.links.sent(link) for link in LINKS) - sum(lab.idle) > memory_mib * MIB * 0.4, 120)
        before = sum(lab.links.sent(link) for link in LINKS) - sum(lab.idle)
        lab.break_links(LINKS, "drop", seconds)
        report = lab.finish(120)
        if report["lost_connections"] < 4:
            raise LabError(f"{report['lost_connections']} connections lost, of 4")
        resent = report["resent_pages"] * PAGE
        restart = memory_mib * MIB
        lab.results.append({"way": "both", "seconds": seconds, "sent_before": before, "resent_bytes": resent,
                            "restart_bytes": restart})
        if seconds >= 20 and resent > 0.1 * restart:
            raise LabError(f"{resent / MIB:.1f} MiB sent again, of {memory_mib} that a restart sends")
        return (f"{before / MIB:.0f} MiB sent before, {resent / MIB:.1f} MiB again: {100 * resent / restart:.1f} % of what a "
                "restart sends")
    return case


def destination_killed(lab):
    """It is told, the guest goes on at the source, and nothing begins again by itself."""
    def case():
        lab.forget()
        lab.idle
        lab.start(64, "12M")
        lab.destination.kill()
        if lab.source.wait_exit(30) == 0:
            raise LabError("the source has migrated to nobody")
        said = lab.source.stderr()
        if not re.search(r"lost this migration|runs here|at the source", said) or "start it again" not in said:
            raise LabError(f"the source said: {said[-500:]}")
        return said.strip().splitlines()[-1][:120]
    return case


def another_process(lab):
    """A destination that is another process by now says that it does not know the migration."""
    def case():
        lab.forget()
        lab.idle
        lab.start(64, "12M")
        port = lab.destination.address.rsplit(":", 1)[1]
        lab.destination.kill()
        second = lab.listen(f"tcp:0.0.0.0:{port}", 64)
        try:
            if lab.source.wait_exit(30) == 0:
                raise LabError("the source has migrated to a process that did not know it")
            said = lab.source.stderr()
            if "lost this migration" not in said:
                raise LabError(f"the source said: {said[-500:]}")
        finally:
            second.kill()
        return said.strip().splitlines()[-1][:120]
    return case


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", type=lambda text: Path(text).absolute())
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    return with_two_links(lambda folder, links: run_all(Lab(folder, links, options.programs), options))


def run_all(lab, options):
    rng = random.Random(options.seed)
    cases = []
    if options.full:
        for compression in survivors.compressions(options.programs):
            for zero_pages in ("none", "legacy", "multifd"):
                for way in ("down", "drop"):
                    for link in LINKS:
                        cases += [(f"{way} {link}, {compression}, {zero_pages}",
                                   one(lab, way, (link,), compression, zero_pages, rng))
                                  for _ in range(3 if compression == "none" else 2)]
        cases.append(("both away for 20 s", both_away(lab, 20, 1024, "16M")))
    else:
        for way, link, compression, zero_pages in (("down", 1, "none", "multifd"), ("drop", 2, "zstd", "legacy"),
                                                   ("drop", 1, "zlib", "none")):
            cases.append((f"{way} {link}, {compression}, {zero_pages}",
                          one(lab, way, (link,), compression, zero_pages, rng)))
        cases.append(("both away", both_away(lab, 4, 64, "6M")))
    cases += [("the destination is killed", destination_killed(lab)), ("another process listens there", another_process(lab))]
    status = run_cases(cases)
    if options.json:
        options.json.write_text(json.dumps(lab.results, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
