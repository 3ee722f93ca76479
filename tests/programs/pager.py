# SPDX-License-Identifier: MIT
"""multifd_pager against VMMs written from the protocols' documents (fake_vmm.cpp): every page as the image has it, many guests
at once, what a balloon gives back, guests that die or lie, and a pager that is killed and started anew.

    python3 tests/programs/pager.py build/dev/examples build/dev/tests/programs/fake_vmm build/dev/tests/programs/page_source [CASE...]
"""

import argparse
import array
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from images import PAGE, guest_pages, ram_image, write_image  # ahead of what adds tests/interop, which has its own images.py

import survivors
from files import check
from survivors import MIB, Folder, LabError, Program, wait_for
from vmm import LIMIT, PROTOCOLS, Vmm, start


class Lab:
    """An image of one guest in three formats, its memory as a flat file, and pagers of it."""

    def __init__(self, folder, options, stack):
        self.folder, self.stack = folder, stack
        self.programs, self.fake_vmm, self.page_source = options.programs, options.fake_vmm, options.page_source
        self.home = folder.memory / folder.new("case").name
        self.home.mkdir()
        self.socket = Path(tempfile.mkdtemp(dir=self.home)) / "s"

    def guest(self, mib=16, seed=1):
        """Returns the flat file."""
        pages = guest_pages(mib * MIB // PAGE, seed)
        # A page that is zero, and in the image all the same.
        pages[7] = bytes(PAGE)
        self.image = write_image(self.home / "image", {"pc.ram": (mib * MIB, pages), "vga.vram": (256 * 1024, {3: b"x" * PAGE})})
        flat = self.home / "memory"
        with open(flat, "wb") as file:
            file.truncate(mib * MIB)
            for number, content in pages.items():
                file.seek(number * PAGE)
                file.write(content)
        return flat

    def pager(self, protocol, *options, image=None, server=None):
        source = ("--connect", server) if server else ("--image", image or self.image)
        command = [self.programs / "multifd_pager", *source, "--listen", f"unix:{self.socket}", "--protocol",
                   protocol, *options]
        return self.stack.enter_context(Program(self.folder, list(map(str, command))))

    def vmm(self, protocol, memory, regions=1, idstr="", minor=False):
        return self.stack.enter_context(Vmm(self.fake_vmm, protocol, self.socket, memory, regions, idstr, minor))

    def report(self, pager, path, number=signal.SIGTERM):
        """Ends it, and returns what it says."""
        if number:
            os.kill(pager.pid, number)
        status = pager.wait_exit(LIMIT)
        report = json.loads(path.read_text())
        check(status == (0 if report["ok"] else 1), f"status {status} with {report}")
        return report


def said(pager, text, count=1):
    """Waits until it has said that so often on stderr."""
    wait_for(f"{text!r} from {pager.name}", LIMIT, lambda: pager.stderr().count(text) >= count)


# ---- what is served


def every_format(lab):
    """And every protocol, over memory in one piece and in many; the last page, too, and nothing but the guest's faults."""
    memory = lab.guest()
    packed = lab.home / "packed"
    ram_image(lab, "convert", "--to", "mapped-ram-zst", "--frame-size", "64K", lab.image, packed)
    for image, options in ((lab.image, ()), (packed, ()), (memory, ("--raw",))):
        for protocol, regions in zip(PROTOCOLS, (3, 1, 7)):
            report = lab.home / f"report-{image.name}-{protocol}"
            pager = lab.pager(protocol, *options, "--workers", 0, "--json", report, image=image)
            vmm = lab.vmm(protocol, memory, regions)
            start(vmm, protocol)
            vmm.do("touch 1 500 3")
            vmm.do("check")
            found = lab.report(pager, report)
            check(found["faults"] >= 4096, f"{image.name}, {protocol}: {found['faults']} faults")
            vmm.kill()


def the_rest_comes(lab):
    """All of it comes by itself, the pager ends when it has been served, and the guest does not need it any more."""
    memory = lab.guest()
    for protocol in PROTOCOLS:
        report = lab.home / f"report-{protocol}"
        pager = lab.pager(protocol, "--guests", 1, "--json", report)
        vmm = lab.vmm(protocol, memory, 2)
        start(vmm, protocol)
        vmm.do("touch 5 300 2")
        if protocol == "multifd":
            check(json.loads(vmm.do("line")) == {"complete": True}, "no word of the end")
        found = lab.report(pager, report, None)
        check(found["ok"] and found["guests"] == 1 and found["sessions"][0]["complete"], f"{protocol}: {found}")
        vmm.do("remove 1048576 1048576")
        vmm.do("check")
        vmm.kill()


def blocks_by_name(lab):
    """A device's memory, as our own protocol has it."""
    lab.guest()
    memory = lab.home / "vram"
    memory.write_bytes(bytes(3 * PAGE) + b"x" * PAGE + bytes(60 * PAGE))
    lab.pager("multifd")
    vmm = lab.vmm("multifd", memory, 2, "vga.vram")
    start(vmm, "multifd")
    vmm.do("check")


def minor_faults(lab):
    """Shared memory of the VMM's, which the pager has mapped as well."""
    memory = lab.guest()
    for workers in (0, 1):
        pager = lab.pager("multifd", "--workers", workers)
        vmm = lab.vmm("multifd", memory, 3, minor=True)
        start(vmm, "multifd")
        vmm.do("touch 1 1000 2")
        vmm.do("check")
        vmm.kill()
        os.kill(pager.pid, signal.SIGTERM)
        pager.finish(LIMIT)


def balloon(lab):
    """What the guest gives back is zero from then on, had it been there or not."""
    memory = lab.guest()
    for protocol in PROTOCOLS:
        for workers in (0, 1):
            pager = lab.pager(protocol, "--workers", workers)
            vmm = lab.vmm(protocol, memory)
            start(vmm, protocol)
            vmm.do("touch 1 100 2")
            for offset in (0, 3 * MIB, 5 * MIB, 15 * MIB):
                vmm.do(f"remove {offset} {MIB}")
            vmm.do("check")
            vmm.do(f"remove {3 * MIB} {2 * MIB}")
            vmm.do("touch 2 4096 3")
            vmm.kill()
            os.kill(pager.pid, signal.SIGTERM)
            pager.finish(LIMIT)


def sixteen_guests(lab):
    """At once, of one image: every page of each."""
    memory = lab.guest()
    packed = lab.home / "packed"
    ram_image(lab, "convert", "--to", "mapped-ram-zst", "--frame-size", "64K", lab.image, packed)
    for protocol, image in (("firecracker", packed), ("cloud-hypervisor", lab.image)):
        report = lab.home / f"report-{protocol}"
        pager = lab.pager(protocol, "--guests", 16, "--json", report, image=image)
        vmms = [lab.vmm(protocol, memory, 1 + number % 4) for number in range(16)]
        for vmm in vmms:
            start(vmm, protocol)
        for number, vmm in enumerate(vmms):
            vmm.ask(f"touch {number} 4096 2")
        for vmm in vmms:
            vmm.answer()
        found = lab.report(pager, report, None)
        check(found["ok"] and found["guests"] == 16 and found["failed"] == 0, f"{found}")
        for vmm in vmms:
            vmm.do("check")
            vmm.kill()


def page_server(lab):
    """Pages of a server that is killed, and started anew: the guest goes on with what it has, and then with the rest."""
    memory = lab.guest()
    address = f"unix:{lab.socket}.pages"
    serve = [lab.page_source, lab.image, address]
    server = lab.stack.enter_context(Program(lab.folder, list(map(str, serve))))
    pager = lab.pager("firecracker", "--workers", 0, server=address)
    vmms = [lab.vmm("firecracker", memory, number) for number in (1, 3)]
    for vmm in vmms:
        start(vmm, "firecracker")
        vmm.do("touch 1 200 2")
    for number in range(3):
        server.kill()
        for vmm in vmms:
            vmm.do(f"&touch {number + 2} 500 2")
            vmm.do("touch 1 200 1")
        server = lab.stack.enter_context(Program(lab.folder, list(map(str, serve))))
        for vmm in vmms:
            vmm.do("join")
    for vmm in vmms:
        vmm.do("check")
    check(pager.alive(), "the pager has ended")
    os.kill(pager.pid, signal.SIGTERM)
    pager.finish(LIMIT)


# ---- guests that die, and guests that lie


def killed_guests(lab):
    """In the middle of their memory: the pager notices each, and serves the others."""
    memory = lab.guest()
    report = lab.home / "report"
    pager = lab.pager("firecracker", "--workers", 0, "--json", report)
    stays = lab.vmm("firecracker", memory)
    start(stays, "firecracker")
    for number in range(5):
        vmm = lab.vmm("firecracker", memory)
        start(vmm, "firecracker")
        vmm.do(f"touch {number} 50 1")
        vmm.ask("touch 77 4096 2")
        vmm.kill()
        stays.do(f"touch {number} 100 2")
    # As many as are still there: one.
    wait_for("that all others have gone", LIMIT, lambda: len(os.listdir(f"/proc/{pager.pid}/task")) < 10)
    stays.do("check")
    found = lab.report(pager, report)
    gone = [each for each in found["sessions"] if each["gone"]]
    check(len(gone) == 5, f"{len(gone)} of five are told to have gone")
    check(len(found["sessions"]) == 6, f"{len(found['sessions'])} sessions of six are told")


def floods(lab):
    """A guest that gives back and touches the same memory all the time does not keep others waiting for ever; nor do a
    hundred connections that say nothing, which are no more than the pager allows, or talk without an end."""
    memory = lab.guest()
    pager = lab.pager("firecracker", "--workers", 0, "--max-guests", 8, "--handshake-timeout", "1s")
    flooding, other = lab.vmm("firecracker", memory), lab.vmm("firecracker", memory)
    start(flooding, "firecracker")
    start(other, "firecracker")
    flooding.ask("flood 2 64")
    silent = []
    for number in range(100):
        link = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            link.settimeout(0.2)
            link.connect(str(lab.socket))
            link.sendall(b"[" * (number % 3) + b" " * 1000)
        silent.append(link)
    other.do("check")
    check(int(flooding.answer()) > 0, "the flood did not run")
    said(pager, "connections were refused")
    said(pager, "--handshake-timeout")
    for link in silent:
        link.close()
    with open(f"/proc/{pager.pid}/status") as status:
        size = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    check(size < 200 * 1024, f"{size} KiB")

    def served():
        vmm = lab.vmm("firecracker", memory)
        start(vmm, "firecracker")
        vmm.ask("touch 3 50 1")
        return vmm

    wait_for("room for another guest", LIMIT, lambda: sum("guest" in Path(task, "comm").read_text() for task in
                                                           Path(f"/proc/{pager.pid}/task").iterdir()) <= 3)
    served().answer()


def wrong_descriptors(lab):
    """And texts: one line each, and nobody else is disturbed."""
    memory = lab.guest()
    pager = lab.pager("firecracker", "--workers", 0)
    good = lab.vmm("firecracker", memory)
    start(good, "firecracker")
    file = os.open(memory, os.O_RDONLY)
    reader, writer = os.pipe()
    event = os.eventfd(0)
    region = {"base_host_virt_addr": 1 << 40, "size": PAGE, "offset": 0, "page_size": PAGE}
    own, *_ = socket.socketpair()

    def handshake(fds, *regions):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(lab.socket))
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            link.sendmsg([json.dumps(regions).encode()], control)
            link.settimeout(LIMIT)
            link.recv(1)

    for fds, text in (([], "0 descriptors"), ([file], "no userfaultfd"), ([reader], "no userfaultfd"), ([event], "no userfaultfd"),
                      ([own.fileno()], "no userfaultfd"), ([event, file], "2 descriptors")):
        before = pager.stderr().count(text)
        handshake(fds, region)
        said(pager, text, before + 1)
        good.do("touch 1 10 1")
    os.close(writer)
    for change, text in (({"size": 17 * MIB}, "where the memory file has"), ({"offset": (1 << 64) - PAGE}, "where the memory file has"),
                         ({"size": (1 << 64) - PAGE, "offset": PAGE}, "where the memory file has"), ({"size": 0}, "where the memory file")):
        before = pager.stderr().count(text)
        handshake_of(lab, {**region, **change})
        said(pager, text, before + 1)
    for regions in ([{**region, "size": PAGE + 1}], [{**region, "base_host_virt_addr": 1}], [{**region, "offset": 1}],
                    [{**region, "base_host_virt_addr": (1 << 64) - PAGE, "size": 2 * PAGE}], [region, region],
                    [{**region, "page_size": 3 * PAGE, "size": 3 * PAGE}], [{**region, "page_size": 1 << 40}]):
        before = pager.stderr().count("\n")
        handshake_of(lab, *regions)
        wait_for(f"a line about {regions}", LIMIT, lambda before=before: pager.stderr().count("\n") > before)
        check("region of guest memory" in pager.stderr().splitlines()[-1], pager.stderr()[-300:])
    # Memory that is not registered, or not there: of this process, which has no such addresses.
    before = pager.stderr().count("\n")
    handshake_of(lab, region)
    good.do("check")
    check(pager.alive(), "the pager has ended")


def handshake_of(lab, *regions):
    """With a userfaultfd of this process, which nothing is registered with."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK) if os.uname().machine == "x86_64" else -1
    if fd < 0:
        raise LabError("no userfaultfd")
    api = ctypes.create_string_buffer((0xAA).to_bytes(8, "little") + (1 << 3).to_bytes(8, "little") + bytes(8), 24)
    check(libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), api) == 0, "UFFDIO_API")
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(lab.socket))
        link.sendmsg([json.dumps(regions).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)


# ---- pagers that end, and lists


def killed_pager(lab):
    """kill -9 with threads of the guest that wait: the next pager gets the same userfaultfd, and no thread is left waiting.
    What was given back meanwhile is zero."""
    memory = lab.guest()
    dice = random.Random(1)
    vmm = lab.vmm("multifd", memory, 3)
    pager = lab.pager("multifd", "--workers", 0)
    start(vmm, "multifd")
    for number in range(5):
        vmm.do(f"touch {number} 200 2")
        vmm.do(f"remove {dice.randrange(20) * 64 * PAGE} {16 * PAGE}")
        vmm.do(f"&touch {number + 100} 4096 3")
        pager.kill()
        # The kernel has nobody to tell of this one but the next pager.
        vmm.do(f"&remove {(40 + number) * 16 * PAGE} {8 * PAGE}")
        pager = lab.pager("multifd", "--workers", 1 if number == 4 else 0)
        start(vmm, "multifd")
        vmm.do("join")
    vmm.do("check")


def swallowed_faults(lab):
    """A pager is killed when it has read faults and not served them: nobody is told of them again, so the next one wakes their
    threads."""
    memory = lab.guest()
    vmm = lab.vmm("multifd", memory, 2)
    vmm.do("&touch 1 100 3")
    vmm.do("swallow 3")
    lab.pager("multifd", "--workers", 0)
    start(vmm, "multifd")
    vmm.do("join")
    vmm.do("check")


def prefetch(lab):
    """What one start has needed, the next one finds there."""
    memory = lab.guest()
    pages = lab.home / "pages"
    faults = []
    for number in range(2):
        report = lab.home / f"report-{number}"
        pager = lab.pager("firecracker", "--workers", 1 if number else 0, "--prefetch", pages, "--record", pages, "--json", report)
        vmm = lab.vmm("firecracker", memory)
        start(vmm, "firecracker")
        if number:
            vmm.do(f"wait-resident {needed}")
        vmm.do("touch 9 700 2")
        needed = int(vmm.do("resident"))
        found = lab.report(pager, report)
        faults.append(found["faults"])
        vmm.kill()
    check(faults[0] >= 700 and faults[1] <= faults[0] * 0.05, f"faults: {faults}")
    check(pages.read_text().startswith("multifd-prefetch-list 1 4096 2 "), "no list")
    # Of another guest, and no list at all; neither is overwritten.
    for text in (b"multifd-prefetch-list 1 4096 1 4096\n", b"notes\n", os.urandom(3000)):
        other = lab.home / "other"
        other.write_bytes(text)
        for option in ("--prefetch", "--record"):
            done = subprocess.run([lab.programs / "multifd_pager", "--image", lab.image, "--listen", f"unix:{lab.socket}",
                                   option, other], capture_output=True, text=True, timeout=LIMIT)
            check(done.returncode == 1 and "list of pages" in done.stderr and "line 1" in done.stderr, done.stderr)
        check(other.read_bytes() == text, "overwritten")
    return f"{faults[0]} faults, then {faults[1]}"


def signals_end_it(lab):
    memory = lab.guest()
    for number in (signal.SIGINT, signal.SIGTERM):
        report = lab.home / f"report-{number}"
        pager = lab.pager("multifd", "--workers", 0, "--json", report)
        vmm = lab.vmm("multifd", memory)
        start(vmm, "multifd")
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(str(lab.socket))
        vmm.do("touch 1 10 1")
        found = lab.report(pager, report, number)
        check(found["ok"] and found["guests"] == 1, f"{found}")
        check(not lab.socket.exists(), "the socket is still there")
        check("cancelled by a signal" in vmm.do("line"), "the VMM was not told")
        vmm.kill()
        silent.close()


def wrong_use(lab):
    lab.guest()
    command = [lab.programs / "multifd_pager", "--image", lab.image]
    for options, status, text in ((("--listen", "tcp::1"), 2, "UNIX socket"), (("--listen", lab.socket), 2, "neither tcp"),
                                  (("--listen", f"unix:{lab.socket}", "--protocol", "qemu"), 2, "qemu"),
                                  (("--listen", f"unix:{lab.socket}", "--raw", "--offset", "4K"), 2, "--offset"),
                                  (("--listen", f"unix:{lab.home}/none/s"), 1, "No such file"),
                                  (("--listen", f"unix:{lab.socket}", "--prefetch", lab.home / "none"), 1, "No such file"),
                                  (("--listen", f"unix:{lab.socket}", "--raw", "--page-size", "3000"), 1, "page")):
        done = subprocess.run(list(map(str, (*command, *options))), capture_output=True, text=True, timeout=LIMIT)
        check(done.returncode == status and text in done.stderr, f"{options}: {done.returncode}: {done.stderr}")


CASES = [every_format, the_rest_comes, blocks_by_name, minor_faults, balloon, sixteen_guests, page_server, killed_guests, floods, wrong_descriptors,
         killed_pager, swallowed_faults, prefetch, signals_end_it, wrong_use]


def main():
    parser = argparse.ArgumentParser(description="multifd_pager and VMMs")
    parser.add_argument("programs", type=lambda text: Path(text).resolve())
    parser.add_argument("fake_vmm", type=lambda text: Path(text).resolve())
    parser.add_argument("page_source", type=lambda text: Path(text).resolve())
    parser.add_argument("only", nargs="*")
    options = parser.parse_args()

    def run(case):
        with Folder() as folder, contextlib.ExitStack() as stack:
            return case(Lab(folder, options, stack))

    return survivors.run_cases([(case.__name__.replace("_", " "), lambda case=case: run(case)) for case in CASES
                                if not options.only or case.__name__ in options.only])


if __name__ == "__main__":
    raise SystemExit(main())
