# SPDX-License-Identifier: MIT
"""ram_send and ram_receive as child processes, and what must be true of the one that outlives the other."""

import concurrent.futures
import os
import random
import re
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "interop"))
from processes import Folder, LabError, Process, Program, wait_for  # noqa: E402, F401

MIB = 1 << 20
SKIPPED = 77  # exit status that ctest counts as "skipped"

# Every way to say that the other side is not there any more.
GONE = re.compile(r"closed the connection|connection ended inside|stream ended in the middle|reset by peer|Broken pipe|"
                  r"the other side has gone|SYNC is owed|not connected|refused|No such file")


def run_cases(cases, what="cases", jobs=1, quiet=False):
    """Runs [(name, function)], `jobs` at a time, and prints in their order what each returns, or why it failed. `quiet`:
    failures alone. Returns the program's exit status: 1 also when there was nothing to run."""
    def one(case):
        began = time.monotonic()
        try:
            said, ok = case[1](), True
        except (LabError, OSError, subprocess.SubprocessError) as error:
            said, ok = error, False
        return said, ok, time.monotonic() - began

    failures = 0
    # The pool's threads outlive what they start, as Process wants it.
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for (name, _), (said, ok, seconds) in zip(cases, (pool.map if jobs > 1 else map)(one, cases)):
            failures += not ok
            if not ok or not quiet:
                print(f"{'' if ok else 'FAILED: '}{name}: {said or 'as it should be'}, {seconds:.1f} s", flush=True)
    print(f"{len(cases)} {what}, {failures} failures")
    return 1 if failures or not cases else 0


def run_chosen(cases, words):
    """As run_cases(), those whose names have one of the words; all without words."""
    return run_cases([case for case in cases if not words or any(word in case[0] for word in words)])


def make_image(path, mib, seed=1):
    """Noise: no codec makes less of it, so that --bandwidth says how long it takes."""
    path.write_bytes(random.Random(seed).randbytes(mib * MIB))
    return path


def compressions(programs):
    """The names of --compression that this build has."""
    text = subprocess.run([programs / "ram_send", "--help"], capture_output=True, text=True, timeout=20).stdout
    return [name for name in ("none", "zlib", "igzip", "zstd") if name in text]


def receiver(folder, programs, listen, copy, *options, inside=()):
    found = Program(folder, [*inside, programs / "ram_receive", "--listen", listen, "--file", copy, *options])
    found.name = "ram_receive"
    return found


def sender(folder, programs, connect, image, *options, inside=()):
    return Process(folder, "ram_send", [*inside, programs / "ram_send", "--connect", connect, "--file", image, *options])


def seconds_to_end(process, limit, since):
    """Waits for a process's end; the seconds from `since` to it, or LabError."""
    poll = select.poll()
    pidfd = os.pidfd_open(process.pid)
    try:
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(max(0, since + limit - time.monotonic()) * 1000):
            raise LabError(f"{process.name} still runs {limit} s after: {process.stderr()[-300:]}")
        ended = time.monotonic()
    finally:
        os.close(pidfd)
    process.wait_exit(1)
    return ended - since


def told(process):
    """What a program said on stderr besides where it listens, whom it turned away, that TLS is off, why it may wait, and that a
    copy stays."""
    lines = process.stderr().splitlines()
    others = "listening on", "closed a ", "not encrypted", "hint: "
    return [line for line in lines if not line.startswith(others) and not line.endswith(" is whole and verified, and stays")]


def check_failure(process, cause):
    """Status 1 and one line that names the cause; that line."""
    status, lines = process.popen.returncode, told(process)
    if status != 1 or len(lines) != 1:
        raise LabError(f"{process.name} ended with status {status} and said {lines}, not with 1 and one line")
    if not re.search(cause, lines[0]):
        raise LabError(f"{process.name} does not name the cause ({cause}): {lines[0]}")
    return lines[0]


def receiving(copy):
    """Whether a source has said how much it sends: the file has its name reserved before, and its size from then on."""
    try:
        return copy.with_name(f"{copy.name}.part").stat().st_size > 0
    except FileNotFoundError:
        return False


def leftovers(copy):
    """Names in the receiver's folder."""
    return sorted(file.name for file in copy.parent.iterdir())


def spread(seconds):
    """"12 ms, 15 ms, 40 ms": smallest, median, 90 %, largest."""
    ordered = sorted(seconds)
    picks = (ordered[0], statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)], ordered[-1])
    return ", ".join(f"{1000 * each:.0f} ms" for each in picks)
