# SPDX-License-Identifier: MIT
"""ram_receive --base: only what differs from an older copy is sent, into a copy of that or in place; sparse files stay sparse, and
what cannot be is refused.

    python3 tests/programs/base.py build/dev/examples [CASE...]

benchmarks/base.py measures the same with larger files.
"""

import argparse
import contextlib
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import survivors
from survivors import Folder, LabError, Program, wait_for

MIB = 1 << 20
PAGE = 4096


def check(true, what):
    if not true:
        raise LabError(what)


def write_pages(path, pages, make):
    """Writes `make(page)`, a page's bytes, to each of these."""
    with open(path, "r+b") as file:
        for page in pages:
            file.seek(page * PAGE)
            file.write(make(page))


def image_and_older(home, size, changed=0.3, seed=1):
    """Two files of noise that differ in `changed` of their pages."""
    image, older = home / "image", home / "older"
    with open(image, "wb") as file:
        for _ in range(0, size, 16 * MIB):
            file.write(os.urandom(min(size, 16 * MIB)))
    shutil.copyfile(image, older)
    pages = range(size // PAGE)
    write_pages(older, random.Random(seed).sample(pages, round(len(pages) * changed)), lambda _: os.urandom(PAGE))
    return image, older


def wire_bytes(report):
    """Both ways: pages, and the digests."""
    return sum(channel["wire_bytes"] for channel in report["channels"]) + (report["base"] or {"digest_bytes": 0})["digest_bytes"]


class Lab:
    """A folder that a case has for itself, and the two programs."""

    def __init__(self, folder, programs, where, stack):
        self.folder, self.programs, self.stack = folder, programs, stack
        self.home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where)))
        self.copy = self.home / "copies" / "copy"
        self.copy.parent.mkdir()

    def receiver(self, *options):
        return self.stack.enter_context(Program(self.folder, [self.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", *options]))

    def sender(self, receiver, image, *options):
        return self.stack.enter_context(survivors.sender(self.folder, self.programs, receiver.address, image, *options))

    def move(self, image, older, *options, receiver=()):
        """The whole transfer to a right copy; in place where `older` is the copy. Returns both reports."""
        sent, got = self.folder.new("sent.json"), self.folder.new("got.json")
        there = self.receiver("--base", older, "--file", self.copy, "--json", got, *receiver)
        here = self.sender(there, image, "--json", sent, *options)
        check(here.wait_exit(120) == 0, f"ram_send: {here.stderr()[-300:]}")
        there.finish(60)
        check(filecmp.cmp(image, self.copy, shallow=False), "the copy is not the image")
        check(survivors.leftovers(self.copy) == ["copy"], f"left: {survivors.leftovers(self.copy)}")
        return json.loads(sent.read_text()), json.loads(got.read_text())


def du(path):
    return path.stat().st_blocks * 512


def some_changed(lab, *options, in_place=False):
    """Less than 35 % of the file's bytes go over the wire where 30 % of its pages have changed."""
    image, older = image_and_older(lab.home, 64 * MIB)
    if in_place:
        shutil.copyfile(older, lab.copy)
    before = older.read_bytes()
    sent, got = lab.move(image, lab.copy if in_place else older, *options)
    pages = 64 * MIB // PAGE
    check(abs(sent["base"]["equal_pages"] - 0.7 * pages) < 2, f"equal pages: {sent['base']}")
    check(sent["base"]["pages"] == got["base"]["pages"] == pages, "not all pages were compared")
    check(sent["base"]["digest_bytes"] == got["base"]["digest_bytes"], "digests were lost")
    share = wire_bytes(sent) / (64 * MIB)
    check(share < 0.35, f"{100 * share:.1f} % of the file's bytes went over the wire")
    check(older.read_bytes() == before, "the older copy was changed")
    return f"{100 * share:.1f} % of the bytes"


def equal(lab):
    image, older = image_and_older(lab.home, 32 * MIB, 0)
    sent, _ = lab.move(image, older)
    check(sent["normal_pages"] == 0, f"{sent['normal_pages']} pages were sent")
    check(wire_bytes(sent) < 32 * MIB // 100, f"{wire_bytes(sent)} bytes for nothing")


def zeros_and_holes(lab, mode, in_place):
    """Data over holes, holes and written zeros over data, holes at both ends: the copy is as sparse as the image."""
    size, pages = 256 * MIB, 256 * MIB // PAGE
    image, older = lab.home / "image", lab.home / "older"
    for path in image, older:
        with open(path, "wb") as file:
            file.truncate(size)
    noise = os.urandom(PAGE)
    both, new, gone, zeroed = (range(first, pages, 512) for first in (0, 16, 32, 48))
    write_pages(image, [*both, *new], lambda page: page.to_bytes(8, "big") + noise[8:])
    write_pages(image, zeroed, lambda _: bytes(PAGE))
    write_pages(older, [*both, *gone, *zeroed], lambda page: page.to_bytes(8, "big") + noise[8:])
    os.sync()
    if in_place:
        lab.copy.parent.rmdir()
        older.parent.joinpath("copies").mkdir()
        older.rename(lab.copy)
        older = lab.copy
    before = du(image), du(older)
    sent, _ = lab.move(image, older, "--zero-pages", mode)
    counts = [len(each) for each in (both, new, gone, zeroed)]
    if mode == "none":
        check(sent["normal_pages"] == sum(counts[1:]), f"{sent['normal_pages']} pages were sent, not {sum(counts[1:])}")
    else:
        check((sent["normal_pages"], sent["zero_pages"]) == (counts[1], counts[2] + counts[3]),
              f"sent: {sent['normal_pages']}, {sent['zero_pages']}; not {counts[1]}, {counts[2] + counts[3]}")
        check(du(image) <= before[0], f"the source's file has grown to {du(image)}")
    check(sent["base"]["equal_pages"] == pages - sum(counts[1:]), f"equal pages: {sent['base']}")
    check(wire_bytes(sent) < 4 * MIB, f"{wire_bytes(sent)} bytes were sent")
    os.sync()
    check(du(lab.copy) <= max(before), f"the copy takes {du(lab.copy)}, the others {before}")


def page_sizes(lab):
    image, older = image_and_older(lab.home, 16 * MIB, 0.002)
    for size in "1K", "64K":
        lab.move(image, older, "--page-size", size, "--compression", survivors.compressions(lab.programs)[-1])
        lab.copy.unlink()


def ping_pong(lab):
    """A file that changes goes five times to and fro, each time in place."""
    image, _ = image_and_older(lab.home, 16 * MIB, 0)
    shutil.copyfile(image, lab.copy)
    for turn in range(5):
        write_pages(image, random.Random(turn).sample(range(4096), 100), lambda _: os.urandom(PAGE))
        sent, _ = lab.move(image, lab.copy)
        check(sent["normal_pages"] == 100, f"{sent['normal_pages']} pages were sent")
        # The next one goes the other way.
        swap = lab.home / "swap"
        image.rename(swap), lab.copy.rename(image), swap.rename(lab.copy)


def other_sizes(lab):
    image, older = image_and_older(lab.home, 8 * MIB)
    os.truncate(older, 4 * MIB)
    there = lab.receiver("--base", older, "--file", lab.copy)
    here = lab.sender(there, image)
    for process in here, there:
        process.wait_exit(30)
        survivors.check_failure(process, "older copy, has 4194304: leave out --base")
    check(survivors.leftovers(lab.copy) == [], "a copy was left")
    check(older.stat().st_size == 4 * MIB, "the older copy was changed")


def refused(lab):
    image, older = image_and_older(lab.home, MIB)
    empty, folder = lab.home / "empty", lab.home
    empty.touch()
    taken = lab.home / "taken"
    taken.touch()
    listen = "--listen", "tcp:127.0.0.1:0"
    for status, text, options in (
            (2, "excludes", ("--base", older, "--discard")),
            (2, "excludes", ("--base", older, "--file", lab.copy, "--populate", "--size", "1M")),
            (1, "No such file", ("--base", lab.home / "none", "--file", lab.copy)),
            (1, "empty", ("--base", empty, "--file", lab.copy)),
            (1, "empty", ("--base", empty, "--file", empty)),
            (1, "not a regular file", ("--base", folder, "--file", lab.copy)),
            (1, "exists already", ("--base", older, "--file", taken))):
        done = subprocess.run([lab.programs / "ram_receive", *listen, *map(str, options)], capture_output=True, text=True, timeout=20)
        check(done.returncode == status and text in done.stderr, f"{options}: {done.returncode}, {done.stderr}")
    check(survivors.leftovers(lab.copy) == [], "a copy was left")
    # Two programs, one file in place.
    lab.receiver("--base", older, "--file", older)
    done = subprocess.run([lab.programs / "ram_receive", *listen, "--base", older, "--file", older], capture_output=True, text=True, timeout=20)
    check(done.returncode == 1 and "another program is writing" in done.stderr, done.stderr)
    check(image.exists(), "the image is gone")


def source_dies(lab, in_place):
    """A copy is gone with its source; a file in place stays, and the receiver says what is in it."""
    image, older = image_and_older(lab.home, 32 * MIB)
    if in_place:
        older.rename(lab.copy)
        older = lab.copy
    there = lab.receiver("--base", older, "--file", lab.copy)
    here = lab.sender(there, image, "--bandwidth", "2M")
    wait_for("the source sends", 30, lambda: here.alive() and filecmp_some(image, lab.copy if in_place else
                                                                          lab.copy.with_name("copy.part")))
    here.kill()
    check(there.wait_exit(60) == 1, "the receiver did not fail")
    if not in_place:
        check(survivors.leftovers(lab.copy) == [], "a copy was left")
        return
    check("pages of the older copy and of the new one" in there.stderr(), there.stderr())
    sent, _ = lab.move(image, lab.copy)  # the mix is an older copy like any other
    check(sent["base"]["equal_pages"] >= 0.7 * 8192 - 2, f"equal pages: {sent['base']}")


def filecmp_some(image, other):
    """Whether a page that was different has arrived."""
    with open(image, "rb") as one, open(other, "rb") as two:
        pages = random.Random(1).sample(range(8192), round(8192 * 0.3))
        return any(os.pread(one.fileno(), PAGE, page * PAGE) == os.pread(two.fileno(), PAGE, page * PAGE) for page in pages)


def resumed(lab):
    """Over two paths, with connections that may return."""
    image, older = image_and_older(lab.home, 32 * MIB)
    sent, _ = lab.move(image, older, "--resume", "--channels", "3", "--digest")
    check(sent["base"]["equal_pages"] > 5000, f"equal pages: {sent['base']}")


def cases(folder, programs, disk):
    def case(name, run, where=folder.memory):
        def inside():
            with contextlib.ExitStack() as stack:
                return run(Lab(folder, programs, where, stack))
        return name, inside

    yield case("a third changed, into a copy", some_changed)
    yield case("a third changed, on a disk", some_changed, disk)
    yield case("a third changed, in place", lambda lab: some_changed(lab, in_place=True))
    yield case("a third changed, with --resume", resumed)
    yield case("nothing changed", equal)
    for mode in "none", "legacy", "multifd":
        yield case(f"zeros and holes, {mode}", lambda lab, mode=mode: zeros_and_holes(lab, mode, False))
    yield case("zeros and holes, on a disk", lambda lab: zeros_and_holes(lab, "multifd", False), disk)
    yield case("zeros and holes, in place", lambda lab: zeros_and_holes(lab, "multifd", True))
    yield case("small and large pages", page_sizes)
    yield case("ping-pong", ping_pong)
    yield case("another size", other_sizes)
    yield case("refused", refused)
    yield case("the source dies", lambda lab: source_dies(lab, False))
    yield case("the source dies, in place", lambda lab: source_dies(lab, True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=lambda path: Path(path).resolve(), help="folder of the built programs")
    parser.add_argument("case", nargs="*", help="only cases whose name has one of these words")
    options = parser.parse_args()
    without = subprocess.run([options.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", "--base", "x", "--file", "y"],
                             capture_output=True, text=True, timeout=20)
    if "built without OpenSSL" in without.stderr:
        print("skipped: the programs were built without OpenSSL")
        return 77
    with Folder() as folder, tempfile.TemporaryDirectory(dir=options.programs) as disk:
        return survivors.run_chosen(cases(folder, options.programs, disk), options.case)


if __name__ == "__main__":
    sys.exit(main())
