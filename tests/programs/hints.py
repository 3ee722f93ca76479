# SPDX-License-Identifier: MIT
"""A program that waits says for what, since when, and why that may be: each kind of wait, with a peer at rest.

    python3 tests/programs/hints.py build/dev/examples
"""

import argparse
import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import survivors
from silence import fake
from survivors import Folder, LabError, Process, Program, wait_for

HINT = ("--hint-after", "200ms")
LIMIT = 30  # for what does come


def check(process, wanted):
    wanted = "hint: .*nothing has moved for .*" + wanted
    wait_for(f"{process.name} to say {wanted!r}", LIMIT,
             lambda: re.search(wanted, process.stderr()) or not process.alive())
    hints = [line for line in process.stderr().splitlines() if line.startswith("hint: ")]
    if not process.alive() or not any(re.search(wanted, line) for line in hints):
        raise LabError(f"{process.name} does not say {wanted!r} and wait on: {process.stderr()[-500:]}")
    return hints[-1]


def receiver(folder, programs, *options):
    copy = folder.memory / folder.new("received").name / "copy"
    copy.parent.mkdir()
    return survivors.receiver(folder, programs, "tcp:127.0.0.1:0", copy, *HINT, *options)


def receiver_alone(folder, programs, _image):
    with receiver(folder, programs) as alone:
        return check(alone, "Nobody has connected")


def receiver_and(until, wanted):
    def run(folder, programs, _image):
        with receiver(folder, programs) as waiting:
            other, _ = fake(folder, "--connect", waiting.address, "--until", until)
            with other:
                return check(waiting, wanted)
    return run


def sender_to(peer, wanted, *options):
    def run(folder, programs, image):
        other, address = fake(folder, "--listen", "tcp:127.0.0.1:0", *peer)
        with other, survivors.sender(folder, programs, address, image, *HINT, *options) as sender:
            return check(sender, wanted)
    return run


def guest_to(peer, wanted):
    def run(folder, programs, _image):
        other, address = fake(folder, "--listen", "tcp:127.0.0.1:0", *peer)
        command = [programs / "live_migration", "--backend", "thread", "--memory", "64M", "--working-set", "1M",
                   "--run-before", "0", "--connect", address, *HINT]
        with other, Process(folder, "live_migration", command) as migration:
            return check(migration, wanted)
    return run


def qemu_program(name, begins, wanted):
    def run(folder, programs, _image):
        command = [programs / name, "--listen", "tcp:127.0.0.1:0", *HINT]
        if name == "qemu_dump":
            command += ["--output", folder.memory / folder.new("dump").name, "--channels", "3"]
        else:
            command += ["--connect", "tcp:127.0.0.1:1", "--in-channels", "3"]
        with Program(folder, command) as program, socket.socket() as source:
            if begins:
                host, port = program.address.split(":")[1:]
                source.connect((host, int(port)))
                source.sendall(begins)
            return check(program, wanted)
    return run


def relay_without_destination(folder, programs, _image, *options):
    """A destination's address that takes no connection: the accept queue of its listener is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        destination = "tcp:%s:%d" % full.getsockname()
        relay = stack.enter_context(Program(folder, [
            programs / "qemu_relay", "--listen", "tcp:127.0.0.1:0", "--connect", destination, "--in-channels", "1",
            "--out-channels", "1", *HINT, *options]))
        host, port = relay.address.split(":")[1:]
        for begins in (bytes.fromhex("5145564d 00000003"), bytes.fromhex("11223344 00000001") + bytes(56)):
            source = stack.enter_context(socket.create_connection((host, int(port))))
            source.sendall(begins)
        said = check(relay, "does the address lead elsewhere")
        if f"waiting for the destination {destination}" not in said:
            raise LabError(f"other words: {said}")
        return said


def terminal(folder, programs, _image):
    """On a terminal the progress line itself says since when."""
    try:
        here, there = pty.openpty()
    except OSError as error:
        print(f"skipped: a terminal: no pseudo-terminals here: {error}")
        return "skipped"
    command = [programs / "ram_receive", "--listen", "tcp:127.0.0.1:0", "--discard"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=there) as program:
        os.close(there)
        try:
            text = b""
            while b"waiting for a source on tcp:127.0.0.1:" not in text or b"nothing has moved for " not in text:
                read = os.read(here, 4096)  # until it ends, if it says nothing of that; the test has a time limit
                if not read:
                    raise LabError(f"the progress line ends without a word: {text[-300:]}")
                text += read
            return text.decode(errors="replace").split("\r")[-1]
        finally:
            program.kill()
            os.close(here)


STEPS = {
    "ram_receive": ("touching the memory", "looking through the file for zeros and for its digest", "(fsync)"),
    "ram_receive --discard": ("reading it again for its digest",),
    "ram_send": ("mapping every page", "reading the file again for its digest", "waiting for the receiver's verdict"),
    "live_migration": ("waiting for the destination to load the guest", "reading all memory for the pages' digests",
                       "waiting for the destination's verdict"),
    "live_migration --listen": ("loading the guest's devices", "comparing all pages",
                                "the guest runs, for --run-after"),
}


def steps(one, other):
    """On a terminal the line names each step of two programs that may take long, with nothing on the wire meanwhile."""
    def run(folder, programs, image):
        try:
            terminals = [pty.openpty() for _ in (one, other)]
        except OSError as error:
            print(f"skipped: steps: no pseudo-terminals here: {error}")
            return "skipped"
        copy = folder.memory / folder.new("steps").name
        options = {
            "ram_receive": ("--listen", "tcp:127.0.0.1:0", "--file", copy, "--populate", "--size", image.stat().st_size),
            "ram_receive --discard": ("--listen", "tcp:127.0.0.1:0"),
            "ram_send": ("--file", image, "--populate", "--connect"),
            "live_migration --listen": ("tcp:127.0.0.1:0", "--backend", "thread"),
            "live_migration": ("--backend", "thread", "--memory", "64M", "--working-set", "1M", "--run-before", "0",
                               "--run-after", "0", "--connect"),
        }
        said, running = [b"", b""], []

        def read(index):
            try:
                said[index] += os.read(terminals[index][0], 65536)
            except OSError:  # EIO: its program has ended
                return False
            return True

        try:
            for index, name in enumerate((one, other)):
                command = [*map(str, (programs / name.split()[0], *name.split()[1:], *options[name]))]
                if index == 1:
                    line = re.compile(rb"tcp:127.0.0.1:[1-9]\d*")
                    while not line.search(said[0]) and read(0):
                        pass
                    command.append(line.search(said[0])[0].decode())
                # Only live_migration's destination says on stdout where it listens.
                out = terminals[index][1] if name == "live_migration --listen" else subprocess.DEVNULL
                running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out,
                                                stderr=terminals[index][1]))
                os.close(terminals[index][1])
            for index in (1, 0):
                while read(index):  # to its end; the test has a time limit
                    pass
                if running[index].wait(LIMIT) != 0:
                    raise LabError(f"status {running[index].returncode}: {said[index][-300:]}")
        finally:
            for process in running:
                process.kill()
                process.wait()
            for here, _ in terminals:
                os.close(here)
            copy.unlink(missing_ok=True)
        for name, text in zip((one, other), said):
            for step in STEPS[name]:
                if step not in text.decode(errors="replace"):
                    raise LabError(f"{name} does not say that it is {step!r}: {text[-800:]}")
        return f"{sum(len(STEPS[name]) for name in (one, other))} steps"
    return run


CASES = {
    "ram_receive, nobody comes": receiver_alone,
    "ram_receive, no channels come": receiver_and("main", "hold its connections back"),
    "ram_receive, the source stands still": receiver_and("hellos", "Is the source stopped"),
    "ram_send, the receiver stands still": sender_to((), "Is the receiver stopped"),
    "ram_send, no verdict": sender_to(("--read",), "compares digests"),
    "live_migration, the destination stands still": guest_to((), "Is the destination stopped"),
    "live_migration, no word that it has loaded": guest_to(("--read",), "load the guest|destination stopped"),
    "qemu_dump, nobody comes": qemu_program("qemu_dump", b"", "multifd-channels 3"),
    "qemu_dump, no channels come": qemu_program("qemu_dump", b"QEVM", "multifd-channels 3"),
    "qemu_relay, no channels come": qemu_program("qemu_relay", b"QEVM", "multifd-channels 3"),
    "qemu_relay, the destination takes no connection": relay_without_destination,
    "the same without a limit": lambda *where: relay_without_destination(*where, "--timeout", "0"),
    "a terminal": terminal,
    "steps into a file": steps("ram_receive", "ram_send"),
    "steps into memory": steps("ram_receive --discard", "ram_send"),
    "steps of a guest": steps("live_migration --listen", "live_migration"),
}


def main():
    parser = argparse.ArgumentParser(description="what a program says while it waits")
    parser.add_argument("programs", type=Path, help="folder of the programs")
    programs = parser.parse_args().programs.resolve()
    with Folder() as folder:
        image = survivors.make_image(folder.memory / "image", 32)
        cases = [(name, lambda run=run: run(folder, programs, image)) for name, run in CASES.items()]
        return survivors.run_cases(cases, "waits", jobs=len(cases))


if __name__ == "__main__":
    sys.exit(main())
