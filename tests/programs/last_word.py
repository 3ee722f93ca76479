# SPDX-License-Identifier: MIT
"""The destination's verdict is the last word of a migration. It says that the source may not have heard it only where
that is so, and keeps what was verified in any case.

    python3 tests/programs/last_word.py build/dev/examples
"""

import argparse
import contextlib
import filecmp
import re
import socket
import struct
import threading
from pathlib import Path

import fake_peer
import survivors
from proxy import Connection, Proxy
from survivors import Folder, LabError, Process

ROUND_TRIPS = 40
LIMIT = 60
RUNNING = fake_peer.answer(11)
# Which call meets the reset first is chance.
CUT = "may not have heard it: .*(reset by peer|Broken pipe|closed the connection)"
WITHHELD = "may not have heard it: .*time limit passed"


def listening(folder, tcp):
    return "tcp:127.0.0.1:0" if tcp else f"unix:{folder.new('socket')}"


def new_copy(folder):
    copy = folder.memory / folder.new("received").name / "copy"
    copy.parent.mkdir()
    return copy


def check_kept(image, copy, receiver):
    receiver.wait_exit(LIMIT)
    if receiver.popen.returncode != 0 or not filecmp.cmp(image, copy, shallow=False):
        raise LabError(f"the receiver ended with {receiver.popen.returncode}, or its copy differs: {receiver.stderr()}")


def check_heard(folder, programs, image, tcp):
    copy = new_copy(folder)
    with survivors.receiver(folder, programs, listening(folder, tcp), copy) as receiver:
        with survivors.sender(folder, programs, receiver.address, image) as sender:
            if sender.wait_exit(LIMIT) != 0:
                raise LabError(f"ram_send failed: {sender.stderr()}")
            check_kept(image, copy, receiver)
            return survivors.told(sender) + survivors.told(receiver)


class Withholding(Connection):
    """Lets nothing of the destination through from RUNNING on: that it has kept what it got."""

    def _pump(self, source, sink):
        if source is self.near:
            return super()._pump(source, sink)
        said = b""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                said += data
                while len(said) >= 4 and len(said) >= (end := 4 + int.from_bytes(said[2:4], "big")):
                    message, said = said[:end], said[end:]
                    if message == RUNNING:
                        return self.answered()
                    sink.sendall(message)
            sink.shutdown(socket.SHUT_WR)
            return None
        self.cut()
        return None

    def answered(self):
        threading.Event().wait(20)


class Cutting(Withholding):
    def answered(self):
        # No thread waits at this end, so closing it resets the connection; cut() alone would send an end first.
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far.close()
        self.cut()


def check_unheard(folder, programs, image, connection, tcp, cause):
    copy = new_copy(folder)
    with survivors.receiver(folder, programs, listening(folder, tcp), copy) as receiver:
        with Proxy(listening(folder, tcp), receiver.address, connection) as proxy:
            with survivors.sender(folder, programs, proxy.address, image, "--result-timeout", "10s") as sender:
                check_kept(image, copy, receiver)
                lines = survivors.told(receiver)
                if len(lines) != 1 or not re.search(cause, lines[0]):
                    raise LabError(f"the receiver says {lines}, not that the source may not have heard: {cause}")
                if sender.wait_exit(LIMIT) != 1:
                    raise LabError("ram_send cannot know that all went well, and says so")


def check_guests(folder, programs):
    """A guest's destination, which is a child here, has the same last word."""
    for _ in range(5):
        command = [programs / "live_migration", "--backend", "thread", "--memory", "4M", "--working-set", "1M",
                   "--run-before", "0", "--run-after", "0"]
        with Process(folder, "live_migration", command) as migration:
            if migration.wait_exit(LIMIT) != 0 or survivors.told(migration):
                raise LabError(f"live_migration ended with {migration.popen.returncode}: {migration.stderr()}")


def main():
    parser = argparse.ArgumentParser(description="who has heard the verdict")
    parser.add_argument("programs", type=Path, help="folder of the programs")
    programs = parser.parse_args().programs.resolve()
    with Folder() as folder:
        image = survivors.make_image(folder.memory / "image", 2)

        def heard(number):
            said = check_heard(folder, programs, image, number % 4 != 0)
            if said:
                raise LabError(f"a round trip that went well says {said}")

        checks = [(f"round trip {number}", lambda number=number: heard(number)) for number in range(ROUND_TRIPS)]
        for tcp in (True, False):
            name = "tcp" if tcp else "unix"
            # A connection that ends without the source's finish() cannot be told from its end on a UNIX socket.
            if tcp:
                checks.append((f"{name}: cut",
                               lambda: check_unheard(folder, programs, image, Cutting, True, CUT)))
            checks.append((f"{name}: withheld",
                           lambda tcp=tcp: check_unheard(folder, programs, image, Withholding, tcp, WITHHELD)))
        checks.append(("guests", lambda: check_guests(folder, programs)))
        return survivors.run_cases(checks, "last words", jobs=4, quiet=True)


if __name__ == "__main__":
    raise SystemExit(main())
