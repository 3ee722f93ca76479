# SPDX-License-Identifier: MIT
"""Child processes and folders that never outlive their test; LabError for what does not happen in time."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path


class LabError(Exception):
    """A QEMU or a program did not do what it was asked for."""


class GuestStoodStill(LabError):
    """A busy machine gave no time to a guest that was to write while it migrated. Says nothing of what is tested."""


def wait_for(what, limit, condition, every=0.01):
    """The first true value of condition(), or LabError naming `what` after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {limit} s")
        time.sleep(every)


class Folder:
    """A folder in /tmp (which a newer QEMU's wrapper can see as well) and one in memory, both gone afterwards."""

    def __init__(self, keep=False):
        self.keep = keep
        self.path = Path(tempfile.mkdtemp(prefix="multifd-interop-", dir="/tmp"))
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
        self.memory = Path(tempfile.mkdtemp(prefix="multifd-interop-", dir=shm))
        self._numbers = itertools.count(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.memory, ignore_errors=True)
        if not self.keep:
            shutil.rmtree(self.path, ignore_errors=True)

    def new(self, name):
        """A path not used before."""
        return self.path / f"{next(self._numbers)}-{name}"


class Process:
    """A child process: its stderr in a file, SIGKILL at the end of the `with` or when this Python dies."""

    def __init__(self, folder, name, command, stdout=subprocess.DEVNULL):
        self.name = name
        self.log = folder.new(f"{name}.stderr")
        with open(self.log, "wb") as log:
            # setpriv replaces itself: the pid is the program's. Its signal follows the *thread* that starts it, so
            # threads that start processes must outlive them.
            self.popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, cwd=folder.path)
        self.pid = self.popen.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def stderr(self):
        return self.log.read_text(errors="replace").strip()

    def alive(self):
        return self.popen.poll() is None

    def wait_exit(self, limit):
        """The exit status (negative: ended by that signal), or LabError after `limit` seconds."""
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name} (pid {self.pid}) still runs after {limit} s: {self.stderr()[-300:]}") from None

    def kill(self):
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
        self.popen.wait(10)


class Program(Process):
    """qemu_dump or qemu_relay, listening: `address` is what it printed, in QEMU's spelling."""

    def __init__(self, folder, command, limit=30):
        super().__init__(folder, Path(command[0]).name, command)
        try:
            found = wait_for(f"{self.name}: that it listens", limit, self._listening)
        except BaseException:
            self.kill()
            raise
        self.address = found[1]

    def _listening(self):
        found = re.search(r"listening on (\S+)", self.stderr())
        if not found and not self.alive():
            raise LabError(f"{self.name} ended with status {self.popen.returncode}: {self.stderr()[-400:]}")
        return found

    def message(self):
        """What it said on stderr besides where it listens, how far it is, and why it may wait."""
        lines = re.split(r"[\r\n]+", self.stderr())
        return "\n".join(line for line in lines if line.strip() and "listening on" not in line
                         and not line.startswith("hint: "))

    def finish(self, limit):
        """Waits for success."""
        status = self.wait_exit(limit)
        if status != 0:
            raise LabError(f"{self.name} ended with status {status}: {self.message()[-400:]}")

    def fail(self, limit):
        """Waits for the failure it is to report: status 1 and one line besides those on strangers. All it said."""
        status = self.wait_exit(limit)
        message = self.message()
        lines = [line for line in message.splitlines() if not line.startswith("closed a connection")]
        if status != 1 or len(lines) != 1:
            raise LabError(f"{self.name} ended with status {status}, not with 1 and one line: {message[-400:]}")
        return message
