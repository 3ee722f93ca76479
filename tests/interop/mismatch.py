# SPDX-License-Identifier: MIT
"""What does not fit together ends soon, and the program says what it was.

    python3 tests/interop/mismatch.py --programs build/dev/examples

Nothing is negotiated between a source and a destination (format/README.md section 1.3): whoever mistypes a setting
depends on these messages. Each case is one wrong setting of the source, or of the destination behind qemu_relay, or a stranger.
"""

import contextlib
import re
import socket
import time

import cases
from lab import PEERS, VERSIONS, Qemu, mixed_pages
from processes import LabError, Program, wait_for
from proxy import parse_address

MACHINE = "pc-i440fx-7.2"
UUID = "3f9d2c1e-8f0b-4c53-9b1a-5c7e6d2a1b40"
OTHER_UUID = "11111111-2222-3333-4444-555555555555"
TIMEOUT = 3  # the programs' --timeout
MARGIN = 20  # for what does not hang, also on a busy machine

# What the program expects is SETTINGS and the VM UUID. mistake -> the other's settings, what the message must hold.
SETTINGS = dict(channels=2, compression="zlib", return_path=True)
SOURCE_MISTAKES = {
    "compression": (dict(compression="zstd"), r"zstd.*zlib|zlib.*zstd"),
    "fewer-channels": (dict(channels=1), r"1 of 2|2 channels"),
    "more-channels": (dict(channels=3), r"2 channels"),
    "uuid": (dict(), OTHER_UUID),
    "no-multifd": (dict(multifd=False, channels=None), r"multifd"),
}
# Ends nothing, so the program only gives a hint, and goes on.
# mistake -> the source's version and machine type, the program's options, what the hint must hold.
HINTS = {
    "no-switchover-ack": ("10.0", MACHINE, [], r"hint: .*all memory had come once .*it waits for --switchover-ack"),
    "switchover-ack": ("11.1", "pc-i440fx-11.1", ["--switchover-ack"],
                       r"hint: .*all memory had come once .*--switchover-ack must not be given"),
}
# Postcopy of a QEMU's, which multifd may begin with from 10.1 on. That the capability is on harms nothing; the first command
# of the second phase is refused by its name.
POSTCOPY = {"postcopy-on": None, "postcopy-begins": r"(POSTCOPY_RAM_DISCARD|PACKAGED).*postcopy, which cannot pass here"}
POSTCOPY_VERSION, POSTCOPY_MACHINE = "11.1", "pc-i440fx-11.1"
DESTINATION_MISTAKES = {
    "compression": (dict(compression="zstd"), r"destination"),
    "fewer-channels": (dict(channels=1), r"destination"),
    "more-channels": (dict(channels=3), r"destination"),
    "uuid": (dict(), r"destination"),
    "no-multifd": (dict(multifd=False, channels=None), r"destination"),
    "nobody-listens": (dict(), r"connect"),
}
# Strangers harm no migration. One that says it is a source, and no more, is taken for one with a mistake.
STRANGERS = {"http-before": r"GET ", "http-during": r"GET ", "silent": r"", "header-only": r"no channel.*multifd"}


def all_cases():
    found = [dict(qemu=qemu, program=program, wrong_side="source", mistake=mistake)
             for qemu in VERSIONS for program in ("qemu_dump", "qemu_relay") for mistake in SOURCE_MISTAKES]
    found += [dict(qemu=qemu, program="qemu_relay", wrong_side="destination", mistake=mistake)
              for qemu in VERSIONS for mistake in DESTINATION_MISTAKES]
    found += [dict(qemu=HINTS[mistake][0], program="qemu_dump", wrong_side="hint", mistake=mistake)
              for mistake in HINTS]
    found += [dict(qemu=POSTCOPY_VERSION, program=program, wrong_side="postcopy", mistake=mistake)
              for program in ("qemu_dump", "qemu_relay") for mistake in POSTCOPY]
    found += [dict(qemu=qemu, program=program, wrong_side="stranger", mistake=mistake)
              for qemu in VERSIONS for program in ("qemu_dump", "qemu_relay") for mistake in STRANGERS]
    return found


class Bench:
    """The program under test between a source and, for the relay, a destination."""

    def __init__(self, folder, case, programs, stack, uuid=UUID, destination=None, machine=MACHINE):
        relay = case["program"] == "qemu_relay"
        self.output = folder.memory / folder.new("dump").name
        path = folder.new("destination")
        self.destination = None
        if relay and case["mistake"] != "nobody-listens":
            wrong_uuid = OTHER_UUID if case["wrong_side"] == "destination" and case["mistake"] == "uuid" else UUID
            self.destination = stack.enter_context(
                Qemu(folder, case["qemu"], machine, ram_mib=16, uuid=wrong_uuid, incoming=True))
            self.destination.configure(**(SETTINGS | (destination or {})))
            self.destination.listen(f"unix:{path}")
        command = [programs / case["program"], "--listen", "tcp:127.0.0.1:0", "--timeout", TIMEOUT, "--uuid", uuid]
        if relay:
            command += ["--connect", f"unix:{path}", "--in-channels", 2, "--in-compression", "zlib",
                        "--out-channels", 2, "--out-compression", "zlib", "--out-zero-pages", "legacy",
                        "--out-peer", PEERS[case["qemu"]]]
        else:
            command += ["--channels", 2, "--compression", "zlib", "--output", self.output]
        if case["wrong_side"] == "hint":
            command += ["--hint-after", "1s", *HINTS[case["mistake"]][2]]
        self.program = stack.enter_context(Program(folder, command))
        self.source = None

    def start_source(self, folder, stack, case, settings, running=False, machine=MACHINE):
        self.source = stack.enter_context(
            Qemu(folder, case["qemu"], machine, ram_mib=16, uuid=UUID, paused=not running, fill=mixed_pages()))
        self.source.configure(**(SETTINGS | settings))
        self.source.migrate(self.program.address)

    def refuses(self, wanted):
        """The program ends with a message that has `wanted` in it, and the migration fails on both sides."""
        message = self.program.fail(TIMEOUT + MARGIN)
        if not re.search(wanted, message):
            raise LabError(f"the message does not say /{wanted}/: {message}")
        if self.source:
            self.source.wait_migration("failed", MARGIN)
        return message


def run_one(folder, _group, group_cases, report, programs):
    for case in group_cases:
        with contextlib.ExitStack() as stack:
            test = {"source": wrong_source, "destination": wrong_destination, "stranger": stranger,
                    "hint": hint, "postcopy": postcopy}[case["wrong_side"]]
            cases.timed(report, case, lambda: test(folder, stack, case, programs))


def wrong_source(folder, stack, case, programs):
    settings, wanted = SOURCE_MISTAKES[case["mistake"]]
    bench = Bench(folder, case, programs, stack, uuid=OTHER_UUID if case["mistake"] == "uuid" else UUID)
    bench.start_source(folder, stack, case, settings)
    return bench.refuses(wanted)


def hint(folder, stack, case, programs):
    _, machine, _, wanted = HINTS[case["mistake"]]
    bench = Bench(folder, case, programs, stack)
    bench.start_source(folder, stack, case, dict(switchover_ack=True), running=True, machine=machine)
    wait_for(f"the hint /{wanted}/", 30, lambda: re.search(wanted, bench.program.stderr()))
    if not bench.program.alive() or bench.source.migration()["status"] != "active":
        raise LabError("the migration does not go on")
    bench.source.qmp.call("migrate_cancel")
    return bench.program.fail(TIMEOUT + 20) and bench.program.stderr().splitlines()[-2]


def postcopy(folder, stack, case, programs):
    on = dict(capabilities={"postcopy-ram": True})
    bench = Bench(folder, case, programs, stack, destination=on, machine=POSTCOPY_MACHINE)
    begins = POSTCOPY[case["mistake"]]
    slow = dict(max_bandwidth=4 << 20, downtime_ms=1) if begins else {}
    bench.start_source(folder, stack, case, on | slow, running=True, machine=POSTCOPY_MACHINE)
    if not begins:
        bench.source.wait_migration("completed", 60)
        return bench.program.finish(MARGIN) and ""
    wait_for("the migration's first pages", MARGIN, lambda: bench.source.migration().get("ram", {}).get("transferred"))
    bench.source.qmp.call("migrate-start-postcopy")
    message = bench.program.fail(TIMEOUT + MARGIN)
    if not re.search(begins, message):
        raise LabError(f"the message does not say /{begins}/: {message}")
    status = bench.source.migration()["status"]
    return f"{message} (the source is {status}, its guest {bench.source.status()})"


def wrong_destination(folder, stack, case, programs):
    settings, wanted = DESTINATION_MISTAKES[case["mistake"]]
    bench = Bench(folder, case, programs, stack, destination=settings)
    bench.start_source(folder, stack, case, {})
    return bench.refuses(wanted)


def stranger(folder, stack, case, programs):
    bench = Bench(folder, case, programs, stack)
    if case["mistake"] == "http-during":
        # Slow enough that the browser comes in the middle: 16 MiB of which a third goes out at 8 MiB/s.
        bench.start_source(folder, stack, case, dict(max_bandwidth=8 << 20), running=True)
        wait_active(bench.source)
    family, place = parse_address(bench.program.address)
    with socket.socket(family) as client:
        client.settimeout(TIMEOUT + MARGIN)
        client.connect(place)
        if case["mistake"] == "header-only":
            client.sendall(b"QEVM\0\0\0\3")
            return bench.refuses(STRANGERS["header-only"])
        if case["mistake"] != "silent":
            client.sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
        if case["mistake"] == "http-before":
            closed(client)
        if not bench.source:
            bench.start_source(folder, stack, case, {})
        bench.source.wait_migration("completed", 60)
        bench.program.finish(MARGIN)
        closed(client)
    if not re.search(STRANGERS[case["mistake"]], bench.program.message()):
        raise LabError(f"stderr does not say /{STRANGERS[case['mistake']]}/: {bench.program.message()}")
    return bench.program.message()


def wait_active(source):
    end = time.monotonic() + MARGIN
    while source.migration().get("ram", {}).get("multifd-bytes", 0) < 1 << 20:
        if time.monotonic() > end:
            raise LabError("the migration does not start")
        source.qmp.wait_event(0.02)


def closed(client):
    """Waits for the other side to close."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        raise LabError("the browser's connection is still open") from None


def main():
    parser = cases.arguments("what does not fit together")
    parser.set_defaults(jobs=4)  # they mostly wait
    options = parser.parse_args()
    return cases.run("mismatch", options, all_cases(), lambda case: tuple(case.values()),
                     lambda *group: run_one(*group, options.programs.resolve()))


if __name__ == "__main__":
    cases.exit_with(main())
