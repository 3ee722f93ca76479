# SPDX-License-Identifier: MIT
"""Memory that was never touched stays so in the programs: holes of files stay holes in source and copy, and a guest that has
used little of its memory makes little of it resident at either end. By `du` and the peak of each process's memory (VmHWM).

    python3 tests/programs/untouched.py build/dev/examples [CASE...]

benchmarks/untouched.py measures the same with larger memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import survivors
from lab import kvm_opens  # survivors knows where that is
from survivors import Folder, LabError, Process, wait_for

MIB = 1 << 20
PIECE = 64 * 1024  # of data in a sparse file


class Measured(Process):
    """A program whose peak of resident memory is known when it has ended."""

    def __init__(self, folder, command, listens=""):
        self.out = folder.new("stdout")
        with open(self.out, "wb") as out:
            super().__init__(folder, Path(command[0]).name, command, out)
        self.listens = listens
        self.began = self.ended = time.monotonic()

    def address(self):
        def look():
            text = self.out.read_text(errors="replace") + self.stderr()
            if not self.alive():
                raise LabError(f"{self.name} ended with status {self.popen.returncode}: {text[-300:]}")
            return next((word for word in text.split() if word.startswith(self.listens) and not word.endswith(":0")), None)
        return wait_for(f"{self.name}: that it listens", 30, look)

    def peak_mib(self, limit):
        """Waits for its success. VmHWM: what wait4() says of a process and of no other."""
        wait_for(f"{self.name}: its end", limit, lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), 0.002)
        self.ended = time.monotonic()
        _, status, usage = os.wait4(self.pid, 0)
        self.popen.returncode = os.waitstatus_to_exitcode(status)
        if self.popen.returncode != 0:
            raise LabError(f"{self.name} ended with status {self.popen.returncode}: {self.stderr()[-400:]}")
        return usage.ru_maxrss / 1024


def du_mib(path):
    return path.stat().st_blocks * 512 / MIB


def sparse_file(path, size, data):
    """`data` bytes in pieces all over the file; of each piece some pages are zeros that were written."""
    with open(path, "wb") as file:
        file.truncate(size)
        count = data // PIECE
        for i in range(count):
            file.seek(i * (size // count) // 4096 * 4096)
            file.write(os.urandom(PIECE))
    return path


def send_file(folder, programs, image, copy, *options, discard=False):
    """ram_send and ram_receive. Returns both reports, and the peaks; ram_send's has how long it has run in "lifetime"."""
    sent, got = folder.new("sent.json"), folder.new("got.json")
    kept = ["--discard"] if discard else ["--file", copy]
    with Measured(folder, [programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", *kept, "--size", image.stat().st_size, "--json",
                           got], "tcp:") as receiver:
        with Measured(folder, [programs / "ram_send", "--connect", receiver.address(), "--file", image, "--json", sent, *options]) as sender:
            peaks = sender.peak_mib(120), receiver.peak_mib(60)
    return json.loads(sent.read_text()) | {"lifetime": sender.ended - sender.began}, json.loads(got.read_text()), peaks


def move_guest(folder, programs, backend, memory, used, *options):
    """live_migration between two processes. Returns the source's report, and the peaks."""
    report = folder.new("report.json")
    with Measured(folder, [programs / "live_migration", "--listen", "tcp:127.0.0.1:0", "--backend", backend, "--memory", memory],
                  "tcp:") as there:
        with Measured(folder, [programs / "live_migration", "--connect", there.address(), "--backend", backend, "--memory", memory,
                               "--used", used, "--working-set", "1M", "--run-before", "0.1", "--run-after", "0", "--json", report,
                               *options]) as here:
            peaks = here.peak_mib(120), there.peak_mib(60)
    return json.loads(report.read_text()), peaks


def check(true, what):
    if not true:
        raise LabError(what)


def holes(folder, programs, where, mode):
    home = Path(where)
    image = sparse_file(home / "image", 1 << 30, 8 * MIB)
    copy = home / "copy"
    try:
        before = du_mib(image)
        sent, got, peaks = send_file(folder, programs, image, copy, "--zero-pages", mode)
        check(subprocess.run(["cmp", image, copy]).returncode == 0, "the copy is not the image")
        check(before < 10, "this file system has no holes")
        # cmp has read both; on tmpfs that leaves holes as they are.
        check(du_mib(image) <= before, f"the source's file has grown to {du_mib(image):.0f} MiB")
        check(du_mib(copy) < 10, f"the copy takes {du_mib(copy):.0f} MiB")
        check(max(peaks) < 100, f"peaks of {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
        check(sum(each["wire_bytes"] for each in sent["channels"]) < 10 * MIB, "holes were sent")
        for report in sent, got:
            check(report["normal_pages"] + report["zero_pages"] == (1 << 30) // 4096, f"not all pages are counted: {report}")
        return f"copy {du_mib(copy):.1f} MiB, peaks {peaks[0]:.0f} and {peaks[1]:.0f} MiB"
    finally:
        for path in image, copy:
            path.unlink(missing_ok=True)


def guest(folder, programs, backend, *options):
    report, peaks = move_guest(folder, programs, backend, "4G", "20M", *options)
    pages = (4 << 30) // 4096
    check(max(peaks) < 150, f"peaks of {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    check(report["pages_verified"] in (0, pages), "not all pages were compared")
    first = report["rounds"][0]
    check(first["normal_pages"] + first["zero_pages"] == pages, f"not all pages are counted: {first}")
    check(first["wire_bytes"] < 40 * MIB, f"{first['wire_bytes']} bytes in the first round")
    return f"peaks {peaks[0]:.0f} and {peaks[1]:.0f} MiB"


def cases(folder, programs, disk):
    for mode in ("legacy", "multifd"):
        yield f"file on tmpfs, {mode}", lambda mode=mode: holes(folder, programs, folder.memory, mode)
    yield "file on a disk", lambda: holes(folder, programs, disk, "multifd")
    for backend in ("thread", "kvm"):
        if backend == "kvm" and not kvm_opens():
            print("skipped: kvm: no /dev/kvm")
            continue
        yield f"guest, {backend}", lambda backend=backend: guest(folder, programs, backend)
        yield f"guest, {backend}, legacy", lambda backend=backend: guest(folder, programs, backend, "--zero-pages", "legacy")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=lambda path: Path(path).resolve(), help="folder of the built programs")
    parser.add_argument("case", nargs="*", help="only cases whose name has one of these words")
    options = parser.parse_args()
    with Folder() as folder, tempfile.TemporaryDirectory(dir=options.programs) as disk:
        return survivors.run_chosen(cases(folder, options.programs, disk), options.case)


if __name__ == "__main__":
    sys.exit(main())
