# SPDX-License-Identifier: MIT
"""kill -9 of ram_send or ram_receive at a random moment: the other one ends in time with an error that names the cause,
and no file is left that looks whole and is not.

    python3 tests/programs/kill.py build/dev/examples 100

The count may also be in MULTIFD_KILLS; each next one takes another victim, transport and compression.
"""

import argparse
import collections
import concurrent.futures
import filecmp
import os
import random
import time
from pathlib import Path

import survivors
from survivors import Folder, LabError

LIMIT = 20  # for what does not hang, also on a busy machine
IMAGE_MIB = 24


class Case:
    """What chance decides about one kill."""

    def __init__(self, seed, number, methods):
        dice = random.Random(f"{seed} {number}")
        self.victim = ("sender", "receiver")[number % 2]
        self.tcp = number // 2 % 2 == 0
        self.compression = methods[number % len(methods)]
        self.channels = dice.choice((1, 2, 4, 8))
        self.zero_pages = dice.choice(("none", "legacy", "multifd"))
        # From before it has connected to a little after its end.
        self.after = dice.uniform(0, 1.3)

    def __str__(self):
        return (f"{self.victim} killed after {self.after:.3f} s, {'tcp' if self.tcp else 'unix'}, {self.channels} channels, "
                f"{self.compression}, zero pages {self.zero_pages}")


def send_again(folder, programs, receiver, image):
    """A source that was killed before it said hello was none: the receiver waits for the next one, and takes it."""
    with survivors.sender(folder, programs, receiver.address, image) as again:
        survivors.seconds_to_end(again, 20, time.monotonic())
    survivors.seconds_to_end(receiver, LIMIT, time.monotonic())
    if receiver.popen.returncode != 0:
        raise LabError(f"the receiver does not take the next source: {receiver.message()[-300:]}")


def run(folder, programs, image, case):
    """(what became of it, seconds until the survivor had ended or None)"""
    home = folder.memory / folder.new("received").name
    home.mkdir()
    copy = home / "copy"
    listen = "tcp:127.0.0.1:0" if case.tcp else f"unix:{folder.new('socket')}"
    with survivors.receiver(folder, programs, listen, copy) as receiver:
        with survivors.sender(folder, programs, receiver.address, image, "--channels", case.channels, "--compression",
                              case.compression, "--zero-pages", case.zero_pages, "--bandwidth", f"{IMAGE_MIB}M") as sender:
            victim, survivor = (sender, receiver) if case.victim == "sender" else (receiver, sender)
            time.sleep(case.after)  # the moment is what is tested
            killed = time.monotonic()
            victim.kill()
            before_hello = case.victim == "sender" and not survivors.receiving(copy) and not copy.exists()
            try:
                seconds = survivors.seconds_to_end(survivor, 5 if before_hello else LIMIT, killed)
            except LabError:
                if not before_hello:
                    raise
                send_again(folder, programs, receiver, image)
                seconds = None
    whole = copy.exists() and filecmp.cmp(image, copy, shallow=False)
    names = survivors.leftovers(copy)
    if copy.exists() and not whole:
        raise LabError(f"copy looks whole and is not: {copy.stat().st_size} bytes")
    if case.victim == "sender" and names not in ([], ["copy"]):
        raise LabError(f"the receiver has left {names}")
    if seconds is None:
        return "had not said hello: the next source was taken", None
    if survivor.popen.returncode == 0:  # it was over
        if not whole:
            raise LabError("the survivor says that all went well; there is no whole file")
        return "too late to harm", None
    # Killed behind the verification, and ahead of the hand-over: the copy is whole and stays, and the receiver says so.
    if case.victim == "sender" and copy.exists() and "is whole and verified, and stays" not in receiver.stderr():
        raise LabError("the receiver has failed and left a file, without a word of it")
    line = survivors.check_failure(survivor, survivors.GONE)
    return f"{survivor.name}: {line.split(': ', 1)[1]}", seconds


def main():
    parser = argparse.ArgumentParser(description="kill -9 of one side")
    parser.add_argument("programs", type=Path, help="folder of ram_send and ram_receive")
    parser.add_argument("kills", type=int, nargs="?", default=int(os.environ.get("MULTIFD_KILLS", 8)))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=4)
    options = parser.parse_args()
    programs = options.programs.resolve()
    print(f"{options.kills} kills, --seed {options.seed}")
    methods = survivors.compressions(programs)
    times, ends, failures = collections.defaultdict(list), collections.Counter(), []
    with Folder() as folder:
        image = survivors.make_image(folder.memory / "image", IMAGE_MIB)

        def one(number):
            case = Case(options.seed, number, methods)
            try:
                return case, *run(folder, programs, image, case), None
            except LabError as error:
                return case, None, None, error

        # Its threads outlive their processes, as Process wants it.
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for case, end, seconds, error in pool.map(one, range(options.kills)):
                if error:
                    failures.append(error)
                    print(f"FAILED: {case}: {error}")
                    continue
                ends[end if seconds is None else f"{case.victim} killed: the other one failed in time"] += 1
                if seconds is not None:
                    times[case.victim].append(seconds)
                print(f"{case}: {end}" + (f", {1000 * seconds:.0f} ms" if seconds is not None else ""))
    for end, count in sorted(ends.items()):
        print(f"{count:5} {end}")
    for victim, seconds in sorted(times.items()):
        print(f"{victim} killed: the survivor's end came after (smallest, median, 90 %, largest of {len(seconds)}) "
              f"{survivors.spread(seconds)}; limit {LIMIT} s")
    print(f"{options.kills} kills, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
