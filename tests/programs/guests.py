# SPDX-License-Identifier: MIT
"""kill -9 of one of two live_migrations at a random moment: the other one ends in time, and says where the guest is.

    python3 tests/programs/guests.py build/dev/examples 100

The count may also be in MULTIFD_KILLS. Where each side is at every operation of its links, and two guests in memory that the
test can see: tests/system/migrate_kill_test.cpp.
"""

import argparse
import collections
import concurrent.futures
import os
import random
import re
import subprocess
import time
from pathlib import Path

import survivors
from survivors import Folder, LabError, Process, wait_for

LIMIT = 20  # for what does not hang, also on a busy machine
# What each side may say of the guest when the other one has gone (migrate/ownership.hpp).
OWNERS = {
    "source": {"at the source": "the guest is at the source, and runs there",
               "both whole": "the destination has been told to run it: look there",
               "at the destination": "the destination runs the guest, and has not said"},  # it died behind RUNNING
    "destination": {"at the source": "not all of the guest has arrived; it is at the source",
                    "both whole": "all of the guest has arrived, and the source has not let go of it",
                    "at the destination": "the guest runs here"},
}


class Listening(Process):
    """A destination, which says on stdout where it listens."""

    def __init__(self, folder, programs):
        self.out = folder.new("destination.stdout")
        with open(self.out, "wb") as out:
            super().__init__(folder, "destination", [programs / "live_migration", "--listen", "tcp:127.0.0.1:0", "--backend",
                                                     "thread", "--accept-timeout", "3s", "--progress-timeout", "5s",
                                                     "--result-timeout", "5s"], out)
        found = wait_for("that it listens", LIMIT, lambda: re.search(r"tcp:\S+", self.out.read_text(errors="replace")))
        self.address = found[0]


def start_source(folder, programs, address):
    return Process(folder, "source", [programs / "live_migration", "--connect", address, "--backend", "thread", "--memory", "24M",
                                      "--working-set", "1M", "--run-before", "0", "--run-after", "0", "--bandwidth", "64M",
                                      "--channels", "2", "--progress-timeout", "5s", "--result-timeout", "5s"])


def seconds_of_one(folder, programs):
    """How long a migration takes to which nothing happens."""
    began = time.monotonic()
    with Listening(folder, programs) as destination:
        with start_source(folder, programs, destination.address) as source:
            for side in source, destination:
                if side.wait_exit(LIMIT) != 0:
                    raise LabError(f"{side.name}: {side.stderr()[-300:]}")
    return time.monotonic() - began


def where(side, process):
    """Where the survivor says that the guest is."""
    status, text = process.popen.returncode, process.stderr()
    if status == 0:
        return "at the destination"
    found = [place for place, words in OWNERS[side].items() if words in text]
    if status != 1 or len(found) != 1:
        raise LabError(f"the {side} ended with status {status}, and does not say where the guest is: {text[-400:]}")
    return found[0]


def kill_one(folder, programs, victim, after):
    """What became of it."""
    with Listening(folder, programs) as destination:
        with start_source(folder, programs, destination.address) as source:
            sides = {"source": source, "destination": destination}
            time.sleep(after)  # the moment is what is tested
            was_alive = sides[victim].alive()
            sides[victim].kill()
            survivor = next(name for name in sides if name != victim)
            try:
                sides[survivor].wait_exit(LIMIT)
            except LabError:
                # Killed ahead of its main connection's first byte: what it had connected was a stranger to the destination.
                if survivor == "destination" and "gave up" not in destination.stderr():
                    return "source killed before it came: the destination waits for the next one"
                raise
            place = where(survivor, sides[survivor])
            return f"{victim} {'killed' if was_alive else 'had ended'}: the guest is {place}"


def main():
    parser = argparse.ArgumentParser(description="kill -9 of one of two live_migrations")
    parser.add_argument("programs", type=Path, help="folder of live_migration")
    parser.add_argument("kills", type=int, nargs="?", default=int(os.environ.get("MULTIFD_KILLS", 8)))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    programs = options.programs.resolve()
    print(f"{options.kills} kills, --seed {options.seed}", flush=True)
    ends, failures = collections.Counter(), 0
    with Folder() as folder:
        length = seconds_of_one(folder, programs)

        def one(number):
            dice = random.Random(f"{options.seed} {number}")
            victim, after = ("source", "destination")[number % 2], dice.uniform(0.05, 1.1) * length
            try:
                return kill_one(folder, programs, victim, after), f"{victim} after {after:.3f} s", None
            except (LabError, OSError, subprocess.SubprocessError) as error:
                return None, f"{victim} after {after:.3f} s", error

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for end, case, error in pool.map(one, range(options.kills)):
                failures += error is not None
                if error:
                    print(f"FAILED: {case}: {error}", flush=True)
                ends[end or "FAILED"] += 1
    for end, count in sorted(ends.items()):
        print(f"{count:5} {end}")
    print(f"{options.kills} kills, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
