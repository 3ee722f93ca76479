# SPDX-License-Identifier: MIT
"""Many migrations as one test: which combinations, on two threads, and what became of each.

A case is a dictionary of axis -> value; its name, "qemu=10.0 machine=pc-i440fx-8.1 ...", is what --only selects by.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import queue
import random
import sys
import threading
import time
import traceback
from pathlib import Path

from lab import SKIPPED, VERSIONS, find_qemu
from processes import Folder, GuestStoodStill, LabError


def name_of(case):
    return " ".join(f"{axis}={value}" for axis, value in case.items())


def covering(cases, *together, seed=1):
    """Few of the cases, in their order: whatever values meet in any of them on two axes meet in these too, and so on
    the axes of each tuple in `together`."""
    dice = random.Random(seed)
    meetings = [{*itertools.combinations(case.items(), 2),
                 *(tuple((axis, case[axis]) for axis in axes) for axes in together)} for case in cases]
    holders = {}
    for index, met in enumerate(meetings):
        for meeting in met:
            holders.setdefault(meeting, []).append(index)
    missing, taken = set(holders), set()
    for meeting in sorted(holders, key=lambda meeting: (len(holders[meeting]), str(meeting))):
        if meeting in missing:
            tried = dice.sample(holders[meeting], min(len(holders[meeting]), 80))
            best = max(tried, key=lambda index: len(meetings[index] & missing))
            taken.add(best)
            missing -= meetings[best]
    return [cases[index] for index in sorted(taken)]


def arguments(description, programs=True):
    parser = argparse.ArgumentParser(description=description)
    if programs:
        parser.add_argument("--programs", required=True, type=Path, help="folder of qemu_dump and qemu_relay")
    parser.add_argument("--quick", action="store_true", help="few cases (the default)")
    parser.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--qemu", default=",".join(VERSIONS), help="only with sources of these versions")
    parser.add_argument("--only", default="", metavar="WORDS", help="only cases whose names have all these words")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the cases and do nothing")
    parser.add_argument("--keep", action="store_true", help="keep the working folder in /tmp")
    parser.add_argument("--json", type=Path, help="results, for table.py")
    return parser


class Report:
    """Results as they come: one line each, then a summary, then the exit status."""

    def __init__(self, tool, options):
        self.tool, self.options = tool, options
        self.runs = []
        self.began = time.monotonic()
        self._lock = threading.Lock()

    def add(self, case, outcome, detail="", seconds=0.0):
        """outcome: "ok", "FAIL" or "skip", then with the reason in `detail`."""
        with self._lock:
            self.runs.append({**case, "outcome": outcome, "detail": detail, "seconds": round(seconds, 2)})
            if outcome != "skip":
                print(f"{outcome:5} {seconds:5.1f} s  {name_of(case)}  {detail}", flush=True)

    def finish(self):
        count = {outcome: sum(run["outcome"] == outcome for run in self.runs) for outcome in ("ok", "FAIL", "skip")}
        for reason in sorted({run["detail"] for run in self.runs if run["outcome"] == "skip"}):
            skipped = sum(run["outcome"] == "skip" and run["detail"] == reason for run in self.runs)
            print(f"skipped {skipped}: {reason}")
        print(f"{self.tool}: {count['ok']} passed, {count['FAIL']} failed, {count['skip']} skipped "
              f"in {time.monotonic() - self.began:.0f} s")
        if self.options.json:
            found = {version: find_qemu(version)[0] for version in VERSIONS}
            self.options.json.write_text(json.dumps({
                "tool": self.tool, "date": datetime.date.today().isoformat(),
                "qemu": {version: binary.full_version for version, binary in found.items() if binary},
                "runs": self.runs}, indent=1) + "\n")
        return 1 if count["FAIL"] else 0 if count["ok"] else SKIPPED


def run(tool, options, cases, group_of, run_group, versions_of=lambda case: (case["qemu"],)):
    """Runs the cases by group (cases that share QEMUs) on options.jobs threads. Exit status.

    run_group(folder, group, cases, report) adds one result for each case.
    """
    wanted = set(options.qemu.split(","))
    words = options.only.split()
    cases = [case for case in cases
             if versions_of(case)[0] in wanted and all(word in name_of(case).split() for word in words)]
    if options.list:
        for case in cases:
            print(name_of(case))
        print(f"{len(cases)} cases")
        return 0
    report = Report(tool, options)
    groups = {}
    for case in cases:
        missing = [find_qemu(version)[1] for version in versions_of(case) if not find_qemu(version)[0]]
        if missing:
            report.add(case, "skip", missing[0])
        else:
            groups.setdefault(group_of(case), []).append(case)
    waiting = queue.SimpleQueue()
    for group in sorted(groups, key=lambda group: -len(groups[group])):
        waiting.put(group)

    def work(folder):
        while True:
            try:
                group = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                run_group(folder, group, groups[group], report)
            except Exception as error:  # a group that cannot even start is its cases' failure
                if not isinstance(error, LabError):
                    traceback.print_exc()
                report.add({"group": group}, "FAIL", f"{type(error).__name__}: {error}")

    with Folder(keep=options.keep) as folder:
        if options.keep:
            print(f"working in {folder.path}")
        threads = [threading.Thread(target=work, args=(folder,)) for _ in range(options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return report.finish()


def timed(report, case, action):
    """Runs action() as this case; whether it passed. What it returns is printed. A case whose guest got no time to write
    is run again."""
    began = time.monotonic()
    for tries_left in reversed(range(5)):
        try:
            detail = action() or ""
        except LabError as error:
            if tries_left and isinstance(error, GuestStoodStill):
                continue
            report.add(case, "FAIL", str(error), time.monotonic() - began)
            return False
        report.add(case, "ok", detail, time.monotonic() - began)
        return True


@contextlib.contextmanager
def told_by(*processes):
    """Adds to a failure what these processes say about it. Who fails may be noticed before it has said why."""
    try:
        yield
    except LabError as error:
        for process in processes:
            with contextlib.suppress(LabError):
                process.wait_exit(5)
            said = process.stderr()[-400:].strip()
            state = "runs" if process.alive() else f"ended with {process.popen.returncode}"
            error.args = (f"{error.args[0]} | {process.name} {state}: {said}",)
        raise


def exit_with(status):
    sys.stdout.flush()
    sys.exit(status)
