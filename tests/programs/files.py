# SPDX-License-Identifier: MIT
"""The programs and their users' files: two programs with one output, names that are taken, what a killed program left.

    python3 tests/programs/files.py build/dev/examples [CASE...]
"""

import argparse
import contextlib
import filecmp
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import survivors
from survivors import Folder, LabError, Process, Program, wait_for

MIB = 1 << 20


class Lab:
    """Programs in a folder that a case has for itself."""

    def __init__(self, folder, programs, stack):
        self.folder, self.programs, self.stack = folder, programs, stack
        self.home = folder.memory / folder.new("case").name
        self.home.mkdir()

    def receiver(self, *options):
        command = [self.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", *options]
        return self.stack.enter_context(Program(self.folder, command))

    def dump(self, output, *options):
        command = [self.programs / "qemu_dump", "--listen", "tcp:127.0.0.1:0", "--output", output, *options]
        return self.stack.enter_context(Program(self.folder, command))

    def sender(self, receiver, image, *options):
        command = [self.programs / "ram_send", "--connect", receiver.address, "--file", image, *options]
        return self.stack.enter_context(Process(self.folder, "ram_send", command))

    def refused(self, text, name, *options):
        """A program that ends at once, without having listened, with one line that has `text` in it."""
        done = subprocess.run([self.programs / name, *map(str, options)], capture_output=True, text=True, timeout=20)
        lines = done.stderr.strip().splitlines()
        if done.returncode != 1 or len(lines) != 1 or text not in lines[0]:
            raise LabError(f"{name} {options}: status {done.returncode}, not 1 and one line with {text!r}: {lines}")

    def image(self, mib=8):
        return survivors.make_image(self.home / "image", mib)

    def receive(self, receiver, image, copy, *options):
        """The rest of a migration, to a right copy."""
        self.sender(receiver, image, *options).wait_exit(60)
        receiver.finish(20)
        check(filecmp.cmp(image, copy, shallow=False), "the copy is not the image")


def check(true, what):
    if not true:
        raise LabError(what)


# ---- two programs, one output


def two_dumps(lab):
    """By whatever path the second one names the folder."""
    out = lab.home / "out"
    first = lab.dump(out)
    (lab.home / "link").symlink_to(out)
    for name in (out, lab.home / "." / "out" / ".." / "out", lab.home / "link", os.path.relpath(out)):
        lab.refused("another program is writing to it", "qemu_dump", "--listen", "tcp:127.0.0.1:0", "--output", name)
    os.kill(first.pid, signal.SIGINT)
    first.wait_exit(5)
    check(not any(out.iterdir()), "the folder is not empty")
    lab.dump(out)  # free again


def two_receivers(lab):
    image, copy = lab.image(), lab.home / "copy"
    first = lab.receiver("--file", copy)
    (lab.home / "link").symlink_to(lab.home)
    sender = lab.sender(first, image, "--bandwidth", "16M")
    for name in (copy, lab.home / "link" / "copy"):
        lab.refused("another program is writing to it", "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", name)
    sender.wait_exit(30)
    first.finish(20)
    check(filecmp.cmp(image, copy, shallow=False), "the first one's copy is not its image")


def one_report_of_two(lab):
    image, report = lab.image(), lab.home / "report"
    receiver = lab.receiver("--discard", "--json", report)
    listen = ("--listen", "tcp:127.0.0.1:0")
    for name, options in (("ram_receive", (*listen, "--discard")), ("qemu_dump", (*listen, "--output", lab.home / "out")),
                          ("qemu_relay", (*listen, "--connect", "tcp:127.0.0.1:1")), ("live_migration", ()),
                          ("ram_send", ("--connect", receiver.address, "--file", image)), ("custom_policy", ())):
        lab.refused("another program writes its report there", name, *options, "--json", report)
    lab.sender(receiver, image).wait_exit(30)
    receiver.finish(20)
    check(json.loads(report.read_text())["ok"], "the first one's report")


# ---- names that are taken


def an_earlier_report(lab):
    """Is overwritten; nothing else is."""
    image, report = lab.image(), lab.home / "report"
    for _ in range(2):
        lab.refused("refused", "ram_send", "--connect", "tcp:127.0.0.1:1", "--file", image, "--json", report)
        check(json.loads(report.read_text())["ok"] is False, "the report of the failure")
    for what in (b"notes", b'{"machine": "pc", "blocks": []}', b"\0" * 4096, b'["ok"]'):
        report.write_bytes(what)
        lab.refused("holds something that is no report", "ram_send", "--connect", "tcp:127.0.0.1:1", "--file", image,
                    "--json", report)
        check(report.read_bytes() == what, "a file that is no report was overwritten")
    lab.refused("holds something that is no report", "ram_send", "--connect", "tcp:127.0.0.1:1", "--file", image,
                "--json", image)


def a_file_of_that_name(lab):
    copy = lab.home / "copy"
    copy.write_text("mine")
    (lab.home / "nowhere").symlink_to("no such file")
    (lab.home / "folder").mkdir()
    for name in (copy, lab.home / "nowhere", lab.home / "folder"):
        lab.refused("exists already", "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", name)
    check(copy.read_text() == "mine", "overwritten")


def a_file_that_appears(lab):
    """While the data arrives: neither of the two is lost."""
    image, copy = lab.image(), lab.home / "copy"
    receiver = lab.receiver("--file", copy)
    sender = lab.sender(receiver, image, "--bandwidth", "16M")
    wait_for("the transfer", 10, lambda: survivors.receiving(copy))
    copy.write_text("mine")
    check(sender.wait_exit(30) == 1, "the source is not told")
    check("stays as" in receiver.fail(20), "where the data is")
    check(copy.read_text() == "mine", "overwritten")
    part = lab.home / "copy.part"
    check(filecmp.cmp(image, part, shallow=False), "the part is not whole")
    lab.refused("is not what a killed program has left", "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file",
                rename(copy))
    check(filecmp.cmp(image, part, shallow=False), "what was kept was overwritten")


def rename(path):
    """Frees a name."""
    path.rename(path.with_name("away"))
    return path


def a_dump_folder_in_use(lab):
    out = lab.home / "out"
    for name in ("manifest.json", "pc.ram.ram"):
        out.mkdir()
        (out / name).write_text("mine")
        lab.refused("choose another --output", "qemu_dump", "--listen", "tcp:127.0.0.1:0", "--output", out)
        check([each.name for each in out.iterdir()] == [name] and (out / name).read_text() == "mine", "changed")
        (out / name).unlink()
        out.rmdir()
    out.mkdir()
    (out / "notes").write_text("mine")
    lab.dump(out)


# ---- what a killed program leaves


def a_killed_receiver(lab):
    """Is no obstacle: its part is taken over."""
    image, copy = lab.image(), lab.home / "copy"
    first = lab.receiver("--file", copy)
    lab.sender(first, image, "--bandwidth", "4M")
    wait_for("the transfer", 10, lambda: survivors.receiving(copy))
    first.kill()
    check((lab.home / "copy.part").exists(), "no part: nothing to show")
    lab.receive(lab.receiver("--file", copy), image, copy)
    check(sorted(os.listdir(lab.home)) == ["copy", "image"], "left behind")


def a_killed_dump(lab):
    out = lab.home / "out"
    lab.dump(out).kill()
    check(os.listdir(out) == ["manifest.json.part"], "no part: nothing to show")
    lab.dump(out)


def a_part_of_somebody_else(lab):
    copy, part = lab.home / "copy", lab.home / "copy.part"
    part.write_text("a download of mine")
    lab.refused("is not what a killed program has left", "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", copy)
    check(part.read_text() == "a download of mine", "overwritten")
    part.unlink()
    part.symlink_to("victim")
    lab.refused("copy.part", "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", copy)
    check(not (lab.home / "victim").exists(), "written through a link")


def a_part_that_goes_away(lab):
    """And another one in its place, which is not renamed or removed."""
    image, copy, part = lab.image(), lab.home / "copy", lab.home / "copy.part"
    receiver = lab.receiver("--file", copy)
    sender = lab.sender(receiver, image, "--bandwidth", "16M")
    wait_for("the transfer", 10, lambda: survivors.receiving(copy))
    part.unlink()
    part.write_text("mine")
    check(sender.wait_exit(30) == 1, "the source is not told")
    check("was removed or replaced" in receiver.fail(20), "why")
    check(part.read_text() == "mine" and not copy.exists(), "another's file was taken")


# ---- holes


def sparse(path, mib, page):
    """Noise here and there: at both ends, a page, a few neighbours, across a boundary of huge pages."""
    dice = random.Random(page)
    with open(path, "wb") as file:
        file.truncate(mib * MIB)
        for offset, pages in ((0, 1), (5 * page, 3), (2 * MIB - 2 * page, 4), (mib // 2 * MIB, 64),
                              (mib * MIB - page, 1)):
            file.seek(offset)
            file.write(dice.randbytes(pages * page))
    return path


def used(path):
    """What a file takes of its disk."""
    with open(path) as file:
        os.fsync(file)  # some file systems find its place only then
    return path.stat().st_blocks * 512


def holes_stay_holes(lab):
    """At both ends, in memory and on a disk; with --zero-pages none the source reads them."""
    room = 4 * MIB
    for home in (lab.home, lab.folder.new("disk")):
        home.mkdir(exist_ok=True)
        for page, options in ((4096, ()), (4096, ("--zero-pages", "legacy")), (65536, ("--populate", "--digest")),
                              (4096, ("--compression", "zstd", "--rounds", 2)), (4096, ("--zero-pages", "none"))):
            image, copy = sparse(home / "sparse", 64, page), home / "copy"
            before = used(image)
            check(before < 8 * MIB, f"no holes on the file system of {home}: {before} bytes")
            lab.receive(lab.receiver("--file", copy), image, copy, "--page-size", page, *options)
            if "none" not in options:
                check(used(image) <= before, f"{options}: the source has grown from {before} to {used(image)}")
            check(used(copy) <= before + room, f"{options}: {before} bytes have become {used(copy)}")
            copy.unlink()


def discarded_holes(lab):
    """Are no memory of the receiver's, either; nor are those of a file, however often they are said to be zero."""
    image, copy = sparse(lab.home / "sparse", 512, 4096), lab.home / "copy"
    for mode, rounds, options in (("multifd", 1, ("--discard",)), ("legacy", 1, ("--discard",)),
                                  ("multifd", 2, ("--file", copy)), ("legacy", 3, ("--file", copy))):
        copy.unlink(missing_ok=True)
        receiver = lab.receiver(*options)
        sender = lab.sender(receiver, image, "--zero-pages", mode, "--rounds", rounds)
        _, status, usage = os.wait4(receiver.pid, 0)
        receiver.popen.returncode = os.waitstatus_to_exitcode(status)
        check(sender.wait_exit(10) == 0 and receiver.popen.returncode == 0, "the transfer")
        check(usage.ru_maxrss < 256 * 1024, f"{mode}, {rounds} rounds, {options}: {usage.ru_maxrss} KiB in memory")


SERVED = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>
int fstatfs(int fd, struct statfs* system) {
  const long done = syscall(SYS_fstatfs, fd, system);
  system->f_type = 0x65735546;
  return (int)done;
}
int fstatfs64(int fd, struct statfs64* system) { return fstatfs(fd, (struct statfs*)system); }
off_t lseek(int fd, off_t offset, int whence) {
  if (whence != SEEK_DATA && whence != SEEK_HOLE) return syscall(SYS_lseek, fd, offset, whence);
  errno = ENXIO;
  return -1;
}
off64_t lseek64(int fd, off64_t offset, int whence) { return lseek(fd, offset, whence); }
"""


def holes_that_are_none(lab):
    """On FUSE a server that has not been told yet of what a mapping has dirtied calls it a hole. This stands for one."""
    compiler, library = shutil.which("cc"), lab.home / "served.so"
    if compiler is None or os.uname().machine not in ("x86_64", "aarch64"):
        return "skipped: no C compiler"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=SERVED, text=True, timeout=60,
                   check=True)
    served = ["env", f"LD_PRELOAD={library}", "ASAN_OPTIONS=verify_asan_link_order=0"]
    image, copy = lab.image(), lab.home / "copy"
    for options in ((), ("--zero-pages", "legacy"), ("--compression", "zstd", "--rounds", 2)):
        receiver = lab.stack.enter_context(Program(lab.folder, [
            *served, lab.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", copy]))
        command = [*served, lab.programs / "ram_send", "--connect", receiver.address, "--file", image, *options]
        sender = lab.stack.enter_context(Process(lab.folder, "ram_send", command))
        check((sender.wait_exit(30), receiver.wait_exit(30)) == (0, 0), f"{options}: {receiver.stderr()}")
        check(filecmp.cmp(image, copy, shallow=False), f"{options}: the copy is not the image")
        copy.unlink()
    return None


# ---- huge pages


def hugetlbfs(lab):
    """A file system of ours with 8 huge pages to use, or why there is none."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    if os.geteuid() != 0 or not os.access(setting, os.W_OK):
        return None, "skipped: no right to reserve huge pages"
    before, home = setting.read_text(), lab.home / "huge"
    lab.stack.callback(setting.write_text, before)
    setting.write_text(str(int(before) + 8))
    home.mkdir()
    size = int(re.search(r"Hugepagesize:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    command = ["mount", "-t", "hugetlbfs", "-o", f"size={8 * size}", "none", home]
    if subprocess.run(command, capture_output=True, timeout=20).returncode != 0 or size > 4 * MIB:
        return None, "skipped: no hugetlbfs of small pages"
    lab.stack.callback(subprocess.run, ["umount", home], timeout=20, check=True)
    if os.statvfs(home).f_bavail < 8 or int(setting.read_text()) < int(before) + 8:
        return None, "skipped: no huge pages are free"
    return home, size


def free_huge_pages():
    return int(re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def huge_pages_at_the_source(lab):
    """The file uses all of them: the program must not need as many again."""
    home, size = hugetlbfs(lab)
    if home is None:
        return size
    image, copy = home / "guest", lab.home / "copy"
    with open(image, "w+b") as file:
        file.truncate(8 * size)
        with mmap.mmap(file.fileno(), 8 * size) as memory:
            for page in range(8):
                memory[page * size:page * size + 5] = b"guest"
    for options in ((), ("--zero-pages", "none"), ("--size", size // 2, "--populate")):
        receiver = lab.receiver("--file", copy)
        check(lab.sender(receiver, image, *options).wait_exit(30) == 0, f"{options}: the source")
        receiver.finish(20)
        bytes_ = copy.read_bytes()
        check(bytes_.count(b"guest") == (1 if "--size" in options else 8), "the copy is not the image")
        copy.unlink()
    return None


def huge_pages_at_the_destination(lab):
    """Work for one file; what cannot work is said before a source is taken, or has sent."""
    home, size = hugetlbfs(lab)
    if home is None:
        return size
    image, copy = lab.home / "image", home / "copy"
    survivors.make_image(image, 2 * size // MIB)
    with open(image, "r+b") as file:
        file.truncate(6 * size)
    try:
        lab.receive(lab.receiver("--file", copy), image, copy, "--zero-pages", "none")
    except LabError as error:
        if "more than are free" in str(error) and os.statvfs(home).f_bavail >= 6 and free_huge_pages() < 6:
            return "skipped: somebody else has taken the huge pages"
        raise
    check(copy.stat().st_blocks * 512 == 2 * size, "zero pages have kept their huge pages")
    copy.unlink()
    for mib, text in ((2 * size + 4096, "whole pages"), (9 * size, "9 huge pages of")):
        with open(image, "r+b") as file:
            file.truncate(mib)
        receiver = lab.receiver("--file", copy)
        check(lab.sender(receiver, image).wait_exit(30) == 1, "the source is not told")
        check(text in receiver.fail(20), receiver.message())
        check(not os.listdir(home), "left behind")
    lab.refused("choose another folder", "qemu_dump", "--listen", "tcp:127.0.0.1:0", "--output", home)
    check(not os.listdir(home), "left behind")
    return None


# ---- files that change under a program


def lost(lab, victim, size, receiver_options, sender_options, image):
    """Either end's file gets shorter in the middle: both ends name it, and nothing is left."""
    home = lab.home / "to"
    home.mkdir()
    copy = home / "copy"
    receiver = lab.receiver("--file", copy, *receiver_options)
    sender = lab.sender(receiver, image, "--bandwidth", "8M", *sender_options)
    part = home / "copy.part"
    wait_for("data", 10, lambda: part.exists() and part.stat().st_blocks > 0)
    file = image if victim == "source" else part
    os.truncate(file, size)
    text = f"{file}: has shrunk from "
    for process in (sender, receiver):
        status, lines = process.wait_exit(20), survivors.told(process)
        if status != 1 or len(lines) != 1 or text not in lines[0]:
            raise LabError(f"{victim}, {sender_options}: {process.name} ended with {status}: {lines}")
    check(not any(home.iterdir()), f"{victim}, {sender_options}: left behind")
    home.rmdir()


def files_that_shrink(lab):
    plain = ("--zero-pages", "none", "--compression", "none")
    for victim, size, receiver_options, sender_options in (
            ("source", 0, (), ("--compression", "zstd")),
            ("source", 4096, (), ("--digest",)),
            ("source", 0, (), ("--channels", 1, "--zero-pages", "legacy")),
            ("source", 0, (), plain),
            ("source", 12288, (), ("--compression", "zlib", "--rounds", 3)),
            ("destination", 0, (), ("--compression", "zstd")),
            ("destination", 8192, (), ("--compression", "zlib", "--level", 0)),
            ("destination", 0, (), plain),
            ("destination", 0, ("--populate-ahead",), ("--digest",))):
        lost(lab, victim, size, receiver_options, sender_options, lab.image(16))


def a_file_that_is_rewritten(lab):
    """The wire is not blamed."""
    for options, text in (((), "was changed while it was being sent"),
                          (("--compression", "zstd", "--channels", 1), "was changed while it was being sent")):
        image = lab.image(16)
        part = lab.home / "copy.part"
        receiver = lab.receiver("--file", lab.home / "copy")
        sender = lab.sender(receiver, image, "--bandwidth", "8M", *options)
        # Some of it has arrived; the rest takes a second and more.
        wait_for("data", 20, lambda: not sender.alive() or part.exists() and part.stat().st_blocks * 512 > MIB)
        with open(image, "r+b") as file:
            for offset in range(0, 16 * MIB, 4096):
                file.seek(offset)
                file.write(b"other")
        sender.wait_exit(20)
        for process in (sender, receiver):
            process.wait_exit(20)
            survivors.check_failure(process, text)


def a_full_disk(lab):
    """A file system of 8 MiB of its own for 32 MiB."""
    home = lab.home / "small"
    home.mkdir()
    inside = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"', home]
    if os.geteuid() != 0 or subprocess.run([*inside[:-1], home, "true"], capture_output=True, timeout=20).returncode != 0:
        return "skipped: no right to mount a file system"
    image = lab.image(32)
    for receiver_options, sender_options in (((), ()), ((), ("--compression", "zstd")), (("--populate-ahead",), ()),
                                             ((), ("--zero-pages", "none", "--channels", 1))):
        receiver = lab.stack.enter_context(Program(lab.folder, [
            *inside, lab.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", home / "copy",
            *receiver_options]))
        sender = lab.sender(receiver, image, *sender_options)
        for process in (sender, receiver):
            status = process.wait_exit(20)
            if status != 1 or "copy.part: No space left on device" not in process.stderr():
                raise LabError(f"{receiver_options} {sender_options}: {process.stderr()}, status {status}")
    done = subprocess.run([*inside, lab.programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", "--file", home / "copy",
                           "--populate", "--size", "32M"], capture_output=True, text=True, timeout=20)
    check(done.returncode == 1 and "No space left on device" in done.stderr, f"--populate: {done.stderr}")
    return None


def a_dump_that_shrinks(lab):
    """And the source keeps its guest."""
    import lab as qemus  # only here: what it needs is not everywhere
    version = next((each for each in qemus.VERSIONS if qemus.find_qemu(each)[0]), None)
    if version is None:
        return "skipped: no QEMU"
    out = lab.home / "out"
    machine = {"7.2": "pc-i440fx-7.2"}.get(version, f"pc-i440fx-{version}")

    def noise(file):
        file.write(random.Random(1).randbytes(48 * MIB))

    dump = lab.dump(out, "--channels", 2)
    with qemus.Qemu(lab.folder, version, machine, ram_mib=64, fill=noise) as source:
        source.configure(channels=2, return_path=True, max_bandwidth=8 * MIB)
        source.migrate(dump.address)
        part = wait_for("data", 20, lambda: next((each for each in out.glob("*.part") if each.stat().st_blocks > 2048),
                                                 None) if out.exists() else None)
        os.truncate(part, 0)
        check(f"{part}: has shrunk from " in dump.fail(20), dump.message())
        source.wait_migration("failed", 20)
    check(not any(out.iterdir()), "left behind")
    return None


# ---- nobody hears, nobody reads


def deaf(how, command):
    """Starts a program whose stdout and stderr take nothing."""
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    out = os.open("/dev/full", os.O_WRONLY)
    if how == "gone":
        os.close(out)
        there, out = os.pipe()
        os.close(there)
    try:
        return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    finally:
        os.close(out)


def nobody_listens(lab):
    """What cannot be said, and a report that cannot be written, are no failure of what has been done."""
    image, copy, address = lab.image(), lab.home / "copy", lab.home / "socket"
    for how in ("full", "closed", "gone"):
        for report in ((), ("--json", "/dev/full"), ("--json", "-")):
            receiver = deaf(how, [lab.programs / "ram_receive", "--listen", f"unix:{address}", "--file", copy,
                                  "--hint-after", "1ms", *report])
            wait_for("the socket", 20, lambda: address.exists() or receiver.poll() is not None)
            sender = deaf(how, [lab.programs / "ram_send", "--connect", f"unix:{address}", "--file", image,
                                "--hint-after", "1ms", "--bandwidth", "64M", *report])
            ended = sender.wait(30), receiver.wait(30)
            check(ended == (0, 0), f"{how}, {report}: sender and receiver ended with {ended}")
            check(filecmp.cmp(image, copy, shallow=False), f"{how}, {report}: the copy is not the image")
            copy.unlink()
        for name, options in (("live_migration", ("--backend", "thread", "--memory", "16M", "--working-set", "1M",
                                                  "--run-before", 0, "--run-after", 0)),
                              ("custom_policy", ("--memory", "4M"))):
            if (how, name) == ("gone", "custom_policy"):
                continue  # takes no signals into its hands: SIGPIPE ends it
            status = deaf(how, [lab.programs / name, *options, "--json", "/dev/full"]).wait(60)
            check(status == 0, f"{how}: {name} ended with {status}")
        status = deaf(how, [lab.programs / "ram_send", "--connect", "tcp:127.0.0.1:1", "--file", image]).wait(20)
        check(status == 1, f"{how}: a failure ended with {status}")
    done = subprocess.run([lab.programs / "custom_policy", "--memory", "4M", "--json", "/dev/full"],
                          capture_output=True, text=True, timeout=60)
    check(done.returncode == 0 and "warning: the report is lost: --json /dev/full: No space left" in done.stderr,
          f"no warning: {done.stderr}")


def a_report_of_every_failure(lab):
    """Whatever it is that fails first."""
    image, report = lab.image(), lab.home / "report"
    for text, name, *options in (
            ("refused", "live_migration", "--backend", "thread", "--memory", "16M", "--working-set", "1M", "--connect",
             "tcp:127.0.0.1:1"),
            ("No such file", "live_migration", "--memory", "16M", "--listen", f"unix:{lab.home}/no/socket"),
            ("No such file", "ram_receive", "--discard", "--listen", f"unix:{lab.home}/no/socket"),
            ("refused", "ram_send", "--connect", "tcp:127.0.0.1:1", "--file", image)):
        report.unlink(missing_ok=True)
        lab.refused(text, name, *options, "--json", report)
        told = json.loads(report.read_text())
        check(told["ok"] is False and text in told["error"], f"{name}: the report says {told}")
    # The source is there and gives up before it has said anything.
    command = [lab.programs / "live_migration", "--memory", "16M", "--listen", "tcp:127.0.0.1:0", "--peer-timeout", "2",
               "--json", report]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as destination:
        destination.stdout.readline()
        destination.send_signal(signal.SIGINT)
        check(destination.wait(20) == 1 and json.loads(report.read_text())["ok"] is False, "no report after SIGINT")


CASES = (nobody_listens, a_report_of_every_failure, huge_pages_at_the_source, huge_pages_at_the_destination, files_that_shrink, a_file_that_is_rewritten, a_full_disk, a_dump_that_shrinks, holes_stay_holes, discarded_holes, holes_that_are_none, two_dumps, two_receivers, one_report_of_two, an_earlier_report, a_file_of_that_name, a_file_that_appears,
         a_dump_folder_in_use, a_killed_receiver, a_killed_dump, a_part_of_somebody_else, a_part_that_goes_away)


def main():
    parser = argparse.ArgumentParser(description="the programs and their users' files")
    parser.add_argument("programs", type=Path, help="folder of the programs")
    parser.add_argument("cases", nargs="*", help="only these")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.cases or case.__name__ in options.cases]
    with Folder() as folder:
        def run(case):
            with contextlib.ExitStack() as stack:
                return case(Lab(folder, options.programs.resolve(), stack))

        return survivors.run_cases([(case.__name__, lambda case=case: run(case)) for case in chosen])


if __name__ == "__main__":
    raise SystemExit(main())
