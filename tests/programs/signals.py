# SPDX-License-Identifier: MIT
"""SIGINT and SIGTERM in every state: the first cancels with a message and leaves nothing behind, the second ends the
program at once, and leaves nothing behind either.

    python3 tests/programs/signals.py build/dev/examples
"""

import argparse
import contextlib
import os
import signal
import time
from pathlib import Path

import survivors
from silence import fake
from survivors import Folder, LabError, wait_for

LIMIT = 20  # seconds for what does not hang, also on a busy machine


class Scene:
    """Brings one program into a state; `subject` gets the signals."""

    def __init__(self, folder, programs, image, stack):
        self.folder, self.programs, self.image, self.stack = folder, programs, image, stack
        self.copy = folder.memory / folder.new("received").name / "copy"
        self.copy.parent.mkdir()

    def receiver(self, *options):
        return self.stack.enter_context(
            survivors.receiver(self.folder, self.programs, "tcp:127.0.0.1:0", self.copy, *options))

    def sender(self, address, *options, image=None):
        return self.stack.enter_context(
            survivors.sender(self.folder, self.programs, address, image or self.image, *options))

    def fake(self, *options):
        process, text = fake(self.folder, *options)
        self.stack.enter_context(process)
        return text

    def part(self):
        wait_for("the file that is being received", LIMIT, lambda: survivors.receiving(self.copy))

    # ---- the states

    def waiting_for_a_source(self):
        return self.receiver()

    def waiting_for_channels(self):
        receiver = self.receiver()
        self.fake("--connect", receiver.address, "--until", "main")
        return receiver

    def waiting_for_hellos(self):
        receiver = self.receiver()
        self.fake("--connect", receiver.address, "--until", "channels")
        self.part()
        return receiver

    def receiving_nothing(self):
        receiver = self.receiver()
        self.fake("--connect", receiver.address, "--until", "hellos")
        self.part()
        return receiver

    def receiving(self):
        receiver = self.receiver()
        self.sender(receiver.address, "--bandwidth", "4M")
        self.part()
        return receiver

    def connecting(self):
        sender = self.sender(self.fake("--listen", "tcp:127.0.0.1:0", "--full"))
        return self.blocked_in(sender, "poll")

    def connecting_unix(self):
        sender = self.sender(self.fake("--listen", f"unix:{self.folder.new('socket')}", "--full"))
        return self.blocked_in(sender, "poll")

    def sending_to_a_full_peer(self):
        sender = self.sender(self.fake("--listen", "tcp:127.0.0.1:0"))
        return self.blocked_in(sender, "futex")

    def waiting_for_the_verdict(self):
        sender = self.sender(self.fake("--listen", "tcp:127.0.0.1:0", "--read"), "--size", "1M")
        return self.blocked_in(sender, "poll")

    def large_file(self, mib):
        path = self.folder.new("large")  # not a hole, which nobody reads
        self.stack.callback(path.unlink, missing_ok=True)
        survivors.make_image(path, 16)
        path.write_bytes(path.read_bytes() * (mib // 16))
        return path

    def computing_the_digest(self):
        process, address = fake(self.folder, "--listen", "tcp:127.0.0.1:0", "--read")
        self.stack.enter_context(process)
        sender = self.sender(address, image=self.large_file(256))
        # All memory has come: the digest is next. A look that misses this state sees a later one, which serves as well.
        wait_for("the end of the memory", LIMIT, lambda: "whole" in process.out.read_text(), every=0.001)
        return sender

    def populating(self):
        receiver = self.stack.enter_context(
            survivors.Process(self.folder, "ram_receive", [self.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0",
                                                           "--discard", "--populate", "--size", "4G"]))
        # As soon as it hears signals.
        wait_for("its thread for signals", LIMIT, lambda: len(os.listdir(f"/proc/{receiver.pid}/task")) > 1, every=0.001)
        return receiver

    @staticmethod
    def blocked_in(process, call):
        """Waits until the program's main thread sleeps in a system call of that name."""

        def sleeps():
            try:
                return call in Path(f"/proc/{process.pid}/wchan").read_text()
            except OSError:
                return False

        try:
            wait_for(f"{process.name}: to be in {call}", 3, sleeps)
        except LabError:
            if not process.alive():
                raise  # else: a kernel that does not say
        return process

    STATES = ("waiting_for_a_source", "waiting_for_channels", "waiting_for_hellos", "receiving_nothing", "receiving",
              "connecting", "connecting_unix", "sending_to_a_full_peer", "computing_the_digest",
              "waiting_for_the_verdict", "populating")


def send(process, *signals):
    for each in signals:
        os.kill(process.pid, each)
    return time.monotonic()


def first(scene, state):
    process = getattr(scene, state)()
    seconds = survivors.seconds_to_end(process, LIMIT, send(process, signal.SIGINT))
    survivors.check_failure(process, "cancelled")
    return seconds


def second(scene, state):
    """Two different ones, since the same twice may become one on the way."""
    process = getattr(scene, state)()
    seconds = survivors.seconds_to_end(process, LIMIT, send(process, signal.SIGINT, signal.SIGTERM))
    if process.popen.returncode != 1:
        raise LabError(f"status {process.popen.returncode} after the second signal")
    return seconds


def main():
    parser = argparse.ArgumentParser(description="signals in every state")
    parser.add_argument("programs", type=Path, help="folder of ram_send and ram_receive")
    parser.add_argument("--tries", type=int, default=1, help="how often in each state")
    options = parser.parse_args()
    programs = options.programs.resolve()
    failures = count = 0
    with Folder() as folder:
        image = survivors.make_image(folder.memory / "image", 16)
        for state in Scene.STATES:
            for what, act in (("first", first), ("second", second)):
                times = []
                try:
                    while len(times) < options.tries:
                        with contextlib.ExitStack() as stack:
                            scene = Scene(folder, programs, image, stack)
                            times.append(act(scene, state))
                            if survivors.leftovers(scene.copy):
                                raise LabError(f"left behind: {survivors.leftovers(scene.copy)}")
                    count += len(times)
                    print(f"{state}: {what} signal: {survivors.spread(times)}")
                except LabError as error:
                    failures += 1
                    print(f"FAILED: {state}: {what} signal: {error}")
    print(f"{count} times signalled, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
