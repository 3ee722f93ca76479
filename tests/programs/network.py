# SPDX-License-Identifier: MIT
"""The network between ram_send and ram_receive swallows every packet from one moment on: both end in time, with an error
that names the cause.

    python3 tests/programs/network.py build/dev/examples

Needs root and iproute2, and is skipped without. Three network namespaces, source - router - destination: when the
router stops forwarding, packets vanish without a word to either side.
"""

import argparse
import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import survivors
from silence import FAKE
from survivors import Folder, LabError, Process, wait_for

PEER = 3  # --peer-timeout
MARGIN = 60.0  # a probe's second, the last words to a peer that hears nothing, a busy machine
# The other limits are longer, so that none of them is what ends a program.
RECEIVER = ("--peer-timeout", PEER, "--accept-timeout", 600, "--hello-timeout", 600, "--progress-timeout", 600)
SENDER = ("--peer-timeout", PEER, "--result-timeout", 600, "--progress-timeout", 600)
UNREACHABLE = r"does not answer any more|time limit passed|the other side has gone"


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """source (10.77.1.2) - router - destination (10.77.2.2)."""

    PREFIX = "multifd-test-"
    ADDRESS = {"source": "10.77.1.2", "destination": "10.77.2.2"}

    def __enter__(self):
        self._remove_abandoned()
        self._made = []
        try:
            for name in ("source", "router", "destination"):
                ip("netns", "add", self._name(name))
                self._made.append(name)
            for number, side in enumerate(("source", "destination"), 1):
                ip("link", "add", "up0", "netns", self._name(side), "type", "veth", "peer", "name", side, "netns",
                   self._name("router"))
                self._ip("router", "addr", "add", f"10.77.{number}.1/24", "dev", side)
                self._ip("router", "link", "set", side, "up")
                self._ip(side, "addr", "add", f"{self.ADDRESS[side]}/24", "dev", "up0")
                self._ip(side, "link", "set", "up0", "up")
                self._ip(side, "link", "set", "lo", "up")
                self._ip(side, "route", "add", "default", "via", f"10.77.{number}.1")
            self.forward(True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self._made:
            with contextlib.suppress(LabError, subprocess.TimeoutExpired):
                ip("netns", "del", self._name(name))

    def forward(self, on):
        command = ["sh", "-c", f"echo {int(on)} >/proc/sys/net/ipv4/ip_forward"]
        subprocess.run([*self.inside("router"), *command], check=True, timeout=20)

    def inside(self, name):
        """What to put in front of a command to run it there."""
        return ["ip", "netns", "exec", self._name(name)]

    def _ip(self, name, *words):
        return ip("-n", self._name(name), *words)

    def _name(self, name):
        return f"{self.PREFIX}{os.getpid()}-{name}"

    def _remove_abandoned(self):
        """A run that was killed has left its namespaces."""
        for name in re.findall(rf"^{self.PREFIX}(\d+)-(\w+)", ip("netns", "list"), re.M):
            if not Path(f"/proc/{name[0]}").exists():
                ip("netns", "del", f"{self.PREFIX}{name[0]}-{name[1]}")


class Lab:
    def __init__(self, folder, network, programs, image):
        self.folder, self.network, self.programs, self.image = folder, network, programs, image

    def receiver(self, stack, *options):
        copy = self.folder.memory / self.folder.new("received").name / "copy"
        copy.parent.mkdir()
        return stack.enter_context(
            survivors.receiver(self.folder, self.programs, "tcp:10.77.2.2:0", copy, *RECEIVER, *options,
                               inside=self.network.inside("destination"))), copy

    def sender(self, stack, address, *options):
        return stack.enter_context(
            survivors.sender(self.folder, self.programs, address, self.image, *SENDER, *options,
                             inside=self.network.inside("source")))

    def fake_source(self, stack, address, *options):
        out = self.folder.new("fake")
        with open(out, "wb") as file:
            command = [*self.network.inside("source"), sys.executable, FAKE, "--connect", address, *options]
            stack.enter_context(Process(self.folder, "fake_peer", command, stdout=file))
        wait_for("the fake source", 30, lambda: "there" in out.read_text())


class Midway:
    """In the middle of a migration: both sides notice."""

    limit = PEER + MARGIN

    def __init__(self, compression):
        self.compression = compression

    def __str__(self):
        return f"the network goes in the middle of a migration, compression {self.compression}"

    def start(self, lab, stack):
        receiver, self.copy = lab.receiver(stack)
        sender = lab.sender(stack, receiver.address, "--compression", self.compression, "--bandwidth", "512K")  # a minute
        wait_for("the migration", 30, lambda: survivors.receiving(self.copy))
        return [sender, receiver]


class SourceGone:
    """The source's host goes ahead of a channel's hello."""

    limit = PEER + MARGIN

    def __init__(self, until):
        self.until = until

    def __str__(self):
        return f"the source's host goes when there is no more than: {self.until}"

    def start(self, lab, stack):
        receiver, self.copy = lab.receiver(stack)
        lab.fake_source(stack, receiver.address, "--until", self.until)
        return [receiver]


class DestinationGone:
    """The other side is missing from the start."""

    copy = None
    limit = 2 + MARGIN

    def __str__(self):
        return "the destination's host is gone before anybody connects"

    def start(self, lab, stack):
        receiver, self.copy = lab.receiver(stack)
        self.address = receiver.address
        self.lab, self.stack = lab, stack
        return []

    def after_cut(self):
        return [self.lab.sender(self.stack, self.address, "--connect-timeout", 2)]


def check(case, process, since):
    seconds = survivors.seconds_to_end(process, case.limit, since)
    return seconds, survivors.check_failure(process, UNREACHABLE)


def main():
    parser = argparse.ArgumentParser(description="the network swallows everything")
    parser.add_argument("programs", type=Path, help="folder of ram_send and ram_receive")
    programs = parser.parse_args().programs.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    if os.geteuid() != 0 or not shutil.which("ip"):
        print("skipped: needs root and iproute2")
        return survivors.SKIPPED
    failed = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder())
        try:
            network = stack.enter_context(Network())
        except (LabError, OSError, subprocess.SubprocessError) as error:
            print(f"skipped: no network namespaces here: {error}")
            return survivors.SKIPPED
        lab = Lab(folder, network, programs, survivors.make_image(folder.memory / "image", 32))
        cases = [Midway(each) for each in survivors.compressions(programs)]
        cases += [SourceGone("main"), SourceGone("channels"), SourceGone("hellos"), DestinationGone()]
        processes = [(case, process) for case in cases for process in case.start(lab, stack)]
        for case, process in processes:
            if not process.alive():
                raise LabError(f"{case}: {process.name} has ended before: {process.stderr()}")
        network.forward(False)
        cut = time.monotonic()
        processes += [(case, process) for case in cases if hasattr(case, "after_cut") for process in case.after_cut()]
        with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
            watched = [(case, process, pool.submit(check, case, process, cut)) for case, process in processes]
            for case, process, result in watched:
                try:
                    seconds, line = result.result()
                    if not isinstance(case, DestinationGone) and survivors.leftovers(case.copy):
                        raise LabError(f"left behind: {survivors.leftovers(case.copy)}")
                    print(f"{case}: after {seconds:.2f} s: {line}")
                except LabError as error:
                    failed += 1
                    print(f"FAILED: {case}: {error}")
    print(f"{len(processes)} programs without a network, {failed} failures; limits: --peer-timeout {PEER} s and {MARGIN} s")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except LabError as error:
        raise SystemExit(f"FAILED: {error}") from None
