# SPDX-License-Identifier: MIT
"""A peer that falls silent, at each point at which it can: the program's deadline for that point ends it, and says so.

    python3 tests/programs/silence.py build/dev/examples
"""

import argparse
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import survivors
from survivors import Folder, LabError, Process, wait_for

FAKE = Path(__file__).resolve().parent / "fake_peer.py"
DEADLINE = 1.5
MARGIN = 60.0  # says only that the limit was heard at all: a busy machine may need long
# What the peer does, the program's option that is to notice it, and what is then said.
SENDER_CASES = (
    ("--full", "--connect-timeout", "connect the channels: .*time limit passed|connect to .*: time limit passed"),
    ("--deaf", "--result-timeout", r"other side is silent for 1.5 s \(--result-timeout\).*time limit passed"),
    ("", "--progress-timeout", "no channel took a byte.*time limit passed"),
    ("--read", "--result-timeout", r"other side is silent for 1.5 s \(--result-timeout\).*time limit passed"),
)
RECEIVER_CASES = (
    ("main", "--accept-timeout", "not all channels of the source came: time limit passed"),
    ("channels", "--hello-timeout", "hello: .*time limit passed"),
    ("hellos", "--progress-timeout", r"nothing has arrived for 1.5 s \(--progress-timeout\).*time limit passed"),
)


def fake(folder, *options):
    """A fake peer that has come as far as it is to come, and what it printed then. Its `out` is the file with all of it."""
    out = folder.new("fake")
    with open(out, "wb") as file:
        process = Process(folder, "fake_peer", [sys.executable, FAKE, *options], stdout=file)
    try:
        wait_for("the fake peer", 30, lambda: out.read_text().endswith("\n") or not process.alive())
        if not process.alive():
            raise LabError(f"fake peer: {process.stderr()[-300:]}")
    except BaseException:
        process.kill()
        raise
    process.out = out
    return process, out.read_text().strip()


def check_sender(folder, programs, image, tcp, peer, option, cause):
    listen = "tcp:127.0.0.1:0" if tcp else f"unix:{folder.new('socket')}"
    other, address = fake(folder, "--listen", listen, *peer.split())
    with other:
        began = time.monotonic()
        with survivors.sender(folder, programs, address, image, option, DEADLINE) as sender:
            seconds = survivors.seconds_to_end(sender, DEADLINE + MARGIN, began)
            return seconds, survivors.check_failure(sender, cause)


def check_receiver(folder, programs, _image, tcp, peer, option, cause):
    copy = folder.memory / folder.new("received").name / "copy"
    copy.parent.mkdir()
    listen = "tcp:127.0.0.1:0" if tcp else f"unix:{folder.new('socket')}"
    with survivors.receiver(folder, programs, listen, copy, option, DEADLINE) as receiver:
        other, _ = fake(folder, "--connect", receiver.address, "--until", peer)
        with other:
            seconds = survivors.seconds_to_end(receiver, DEADLINE + MARGIN, time.monotonic())
            line = survivors.check_failure(receiver, cause)
    if survivors.leftovers(copy):
        raise LabError(f"the receiver has left {survivors.leftovers(copy)}")
    return seconds, line


def check_stranger(folder, programs, image, tcp, *_):
    """Who connects and says nothing at all is no source: the next one is taken."""
    copy = folder.memory / folder.new("received").name / "copy"
    copy.parent.mkdir()
    listen = "tcp:127.0.0.1:0" if tcp else f"unix:{folder.new('socket')}"
    with survivors.receiver(folder, programs, listen, copy, "--hello-timeout", DEADLINE) as receiver:
        other, _ = fake(folder, "--connect", receiver.address, "--until", "nothing")
        began = time.monotonic()
        with other, survivors.sender(folder, programs, receiver.address, image, "--size", "1M") as sender:
            for each in (sender, receiver):
                survivors.seconds_to_end(each, DEADLINE + MARGIN, began)
                if each.popen.returncode != 0:
                    raise LabError(f"{each.name} ended with {each.popen.returncode}: {each.stderr()}")
        return time.monotonic() - began, "the next source was taken"


def check_patience(folder, programs, _image, tcp, *_):
    """What is whole is not thrown away because the source is long over its digest: when all channels have ended, several
    of the limits pass before it is given up."""
    limit = 1.0
    listen = "tcp:127.0.0.1:0" if tcp else f"unix:{folder.new('socket')}"
    command = [programs / "ram_receive", "--listen", listen, "--discard", "--progress-timeout", limit,
               "--hint-after", "0.4"]
    with survivors.Program(folder, command) as receiver:
        receiver.name = "ram_receive"
        other, _ = fake(folder, "--connect", receiver.address, "--until", "ended")
        with other:
            # A hint says for how long nothing has moved; each comes after twice the time.
            wait_for("three limits to pass", MARGIN,
                     lambda: any(float(each) >= 3 * limit for each in
                                 re.findall(r"nothing has moved for ([\d.]+) s", receiver.stderr()))
                     or not receiver.alive())
            seconds = 0.0
            if receiver.alive():
                other.popen.send_signal(signal.SIGUSR1)
                seconds = survivors.seconds_to_end(receiver, MARGIN, time.monotonic())
            # It has come to the digests, of which this peer's is none.
            return seconds, survivors.check_failure(receiver, "what arrived is not what the source's file holds now")


def main():
    parser = argparse.ArgumentParser(description="a peer falls silent")
    parser.add_argument("programs", type=Path, help="folder of ram_send and ram_receive")
    programs = parser.parse_args().programs.resolve()
    cases = [(check_sender, *case) for case in SENDER_CASES] + [(check_receiver, *case) for case in RECEIVER_CASES]
    cases.append((check_stranger, "nothing", "--hello-timeout", ""))
    cases.append((check_patience, "ended", "--progress-timeout", ""))
    with Folder() as folder:
        image = survivors.make_image(folder.memory / "image", 32)

        def run(check, peer, option, cause, tcp):
            seconds, line = check(folder, programs, image, tcp, peer, option, cause)
            return f"{seconds:.2f} s: {line}"

        def name_of(check, peer, option, _cause, tcp):
            side = "ram_send" if check is check_sender else "ram_receive"
            return (f"{side} {option} {DEADLINE} s, {'tcp' if tcp else 'unix'}, the other side: "
                    f"{shlex.quote(peer or 'reads nothing')}")

        everything = [(*case, tcp) for case in cases for tcp in (True, False)]
        return survivors.run_cases([(name_of(*case), lambda case=case: run(*case)) for case in everything],
                                   "silent peers", jobs=len(everything))


if __name__ == "__main__":
    raise SystemExit(main())
