# SPDX-License-Identifier: MIT
"""Two hosts with two network cards each and no bond, as network namespaces with two veth pairs. Needs root and iproute2."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from processes import Folder, LabError

LINKS = (1, 2)


SKIPPED = 77  # exit status that ctest counts as "skipped"


def with_two_links(body):
    """The exit status that `body(folder, links)` returns; SKIPPED, and why on stdout, where there are no such links."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    if os.geteuid() != 0 or not shutil.which("ip"):
        print("skipped: needs root and iproute2")
        return SKIPPED
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder())
        try:
            links = stack.enter_context(TwoLinks())
        except (LabError, OSError, subprocess.SubprocessError) as error:
            print(f"skipped: no network namespaces here: {error}")
            return SKIPPED
        return body(folder, links)


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise LabError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


class TwoLinks:
    """near (10.78.1.1, 10.78.2.1) and far (10.78.1.2, 10.78.2.2); IPv6: fd78:1::1 and so on. Interfaces: link1, link2."""

    PREFIX = "multifd-two-"

    def __enter__(self):
        self._remove_abandoned()
        self._made = []
        try:
            for side in ("near", "far"):
                run("ip", "netns", "add", self.name(side))
                self._made.append(side)
                self._ip(side, "link", "set", "lo", "up")
            for link in LINKS:
                run("ip", "link", "add", f"link{link}", "netns", self.name("near"), "type", "veth", "peer", "name", f"link{link}",
                    "netns", self.name("far"))
                for side in ("near", "far"):
                    self._ip(side, "addr", "add", f"{self.address(side, link)}/24", "dev", f"link{link}")
                    with contextlib.suppress(LabError):  # a kernel without IPv6
                        self._ip(side, "addr", "add", f"{self.address6(side, link)}/64", "dev", f"link{link}", "nodad")
                    self._ip(side, "link", "set", f"link{link}", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for side in self._made:
            with contextlib.suppress(LabError, subprocess.TimeoutExpired):
                run("ip", "netns", "del", self.name(side))

    def name(self, side):
        return f"{self.PREFIX}{os.getpid()}-{side}"

    def inside(self, side):
        """What to put in front of a command to run it there."""
        return ["ip", "netns", "exec", self.name(side)]

    @staticmethod
    def address(side, link):
        return f"10.78.{link}.{1 if side == 'near' else 2}"

    @staticmethod
    def address6(side, link):
        return f"fd78:{link}::{1 if side == 'near' else 2}"

    def path(self, link, port, options=""):
        """As --path takes it, from near to far."""
        return f"{self.address('near', link)}=tcp:{self.address('far', link)}:{port}{options}"

    def cap(self, link, rate):
        """A token bucket at both ends. Params `rate`: as tc has it, "1gbit"."""
        for side in ("near", "far"):
            run(*self.inside(side), "tc", "qdisc", "replace", "dev", f"link{link}", "root", "tbf", "rate", rate, "burst", "256kb",
                "latency", "50ms")

    def set(self, link, state, side="near"):
        """Params `state`: "up" or "down". `side`: near, whose routes go with it, or far, which near only finds silent."""
        self._ip(side, "link", "set", f"link{link}", state)

    def drop(self, link, on):
        """Drops all packets of a link, both ways, without a word to anybody: each side sends to an address that nobody has."""
        for side, other in (("near", "far"), ("far", "near")):
            neighbour = (self.address(other, link), "dev", f"link{link}")
            if on:
                self._ip(side, "neigh", "replace", *neighbour[:1], "lladdr", "02:00:00:00:00:99", *neighbour[1:], "nud", "permanent")
            else:
                self._ip(side, "neigh", "del", *neighbour)

    def sent(self, link):
        """Bytes that near has sent over a link, with all headers."""
        text = run(*self.inside("near"), "cat", f"/sys/class/net/link{link}/statistics/tx_bytes")
        return int(text)

    def _ip(self, side, *words):
        return run("ip", "-n", self.name(side), *words)

    def _remove_abandoned(self):
        """A run that was killed has left its namespaces."""
        for pid, side in re.findall(rf"^{self.PREFIX}(\d+)-(\w+)", run("ip", "netns", "list"), re.M):
            if not Path(f"/proc/{pid}").exists():
                run("ip", "netns", "del", f"{self.PREFIX}{pid}-{side}")
