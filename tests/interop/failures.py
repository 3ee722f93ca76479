# SPDX-License-Identifier: MIT
"""Whichever process dies in a migration through our programs, the others end with an error soon, and no dump looks whole.

    python3 tests/interop/failures.py --programs build/dev/examples --full --seed 7

Each scenario happens at random moments of a migration that lacks the bandwidth to end by then; at each fourth moment it
may end, so that what happens last is hit as well.
"""

import contextlib
import random
import shutil
import subprocess
import time

import cases
from lab import MIB, PEERS, Qemu
from processes import LabError, Program, wait_for
from proxy import Proxy

LIMIT = 20  # for what does not hang, also on a busy machine
TIMEOUT = 10  # of the programs: a connection that is lost before it has said what it is may be anybody's, so they wait
VICTIMS = {
    "qemu_dump": ("source", "program", "channel"),
    "qemu_relay": ("source", "program", "destination", "channel", "out-channel"),
}
PAIRS = [("7.2", "7.2", "pc-i440fx-7.2"), ("10.0", "10.0", "pc-i440fx-10.0"), ("7.2", "10.0", "pc-i440fx-7.2"),
         ("10.0", "7.2", "pc-i440fx-7.2"), ("11.1", "11.1", "pc-i440fx-11.1"), ("11.1", "10.0", "pc-i440fx-10.0")]


def all_cases(count):
    found = []
    for program, victims in VICTIMS.items():
        for victim in victims:
            for number in range(count):
                qemu, to, machine = PAIRS[(number + len(found) // count) % len(PAIRS)]
                found.append(dict(qemu=qemu, to=to, machine=machine, program=program, victim=victim, number=number))
    return found


def fill_with_noise(file):
    """No codec makes less of it, so that the bandwidth says how long it takes."""
    file.seek(MIB)
    file.write(random.Random(1).randbytes(16 * MIB))


class Moment:
    """What chance decides about one case."""

    def __init__(self, seed, case):
        dice = random.Random(f"{seed} {case['program']} {case['victim']} {case['number']}")
        self.channels, self.out_channels = dice.choice((1, 2, 5)), dice.choice((1, 2, 4))
        self.compression, self.out_compression = (dice.choice(("none", "zlib", "zstd")) for _ in range(2))
        self.return_path = dice.random() < 0.5
        # A destination does not always notice that a channel has ended in peace (format/packets.md section 6.5),
        # whoever sends to it. So only a reset is a fair cut on its side.
        self.tcp = dice.random() < 0.5 or case["victim"] == "out-channel"
        self.reset = dice.random() < 0.5 or case["victim"] == "out-channel"
        self.ending = case["number"] % 4 == 3
        self.after = dice.uniform(0, 0.3) if self.ending else dice.uniform(0, 1.2)
        self.connection = dice.randrange(256)  # which one is cut, of those that are there
        self.main = dice.random() < 0.25
        self.format = dice.choice(("blocks", "mapped-ram", "mapped-ram-zst"))  # of a dump

    def __str__(self):
        return (f"{self.after:.3f} s after {'the last round began' if self.ending else 'migrate'}, "
                f"{self.channels}/{self.out_channels} channels, {self.compression}/{self.out_compression}, "
                f"return path {'on' if self.return_path else 'off'}, {'tcp' if self.tcp else 'unix'}, "
                f"{'reset' if self.reset else 'FIN'} of {'the main connection' if self.main else 'a channel'}, {self.format}")

    def listen(self, folder):
        return "tcp:127.0.0.1:0" if self.tcp else f"unix:{folder.new('listen')}"


class Scene:
    """All processes of one case."""

    def __init__(self, folder, case, moment, programs, stack):
        self.case, self.moment, self.programs = case, moment, programs
        relay = case["program"] == "qemu_relay"
        self.output = folder.memory / folder.new("dump").name
        stack.callback(shutil.rmtree, self.output, ignore_errors=True)
        self.destination = self.proxy = None
        command = [programs / case["program"], "--listen", moment.listen(folder), "--timeout", TIMEOUT, "--hint-after", 2]
        if relay:
            to = self._start_destination(folder, stack)
            if case["victim"] == "out-channel":
                self.proxy = stack.enter_context(Proxy(moment.listen(folder), to))
                to = self.proxy.address
            command += ["--connect", to, "--in-channels", moment.channels, "--in-compression", moment.compression,
                        "--out-channels", moment.out_channels, "--out-compression", moment.out_compression,
                        "--out-zero-pages", "legacy", "--out-peer", PEERS[case["to"]]]
        else:
            self.output.mkdir()
            self.image = self.output / "image"
            command += ["--channels", moment.channels, "--compression", moment.compression, "--format", moment.format,
                        "--output", self.output if moment.format == "blocks" else self.image]
        self.program = stack.enter_context(Program(folder, command))
        self.address = self.program.address
        if case["victim"] == "channel":
            self.proxy = stack.enter_context(Proxy(moment.listen(folder), self.address))
            self.address = self.proxy.address
        self.source = stack.enter_context(
            Qemu(folder, case["qemu"], case["machine"], ram_mib=24, paused=False, fill=fill_with_noise))
        self.source.wait_heartbeats()

    def _start_destination(self, folder, stack):
        moment = self.moment
        self.destination = stack.enter_context(
            Qemu(folder, self.case["to"], self.case["machine"], ram_mib=24, incoming=True))
        self.destination.configure(channels=moment.out_channels, compression=moment.out_compression,
                                   return_path=moment.return_path)
        self.destination.listen(moment.listen(folder))
        return self.destination.listening_on()

    def migrate_until_it_happens(self):
        moment, source = self.moment, self.source
        source.configure(channels=moment.channels, compression=moment.compression, zero_pages="legacy",
                         return_path=moment.return_path, downtime_ms=1, max_bandwidth=8 * MIB)
        source.migrate(self.address)
        if moment.ending:
            wait_for("two rounds", 20, lambda: source.migration().get("ram", {}).get("dirty-sync-count", 0) > 2)
            source.qmp.call("migrate-set-parameters", downtime_limit=10000)
        time.sleep(moment.after)
        self._happen(self.case["victim"])

    def _happen(self, victim):
        self.said_before = len(self.program.stderr())
        if victim in ("source", "program", "destination"):
            getattr(self, victim).kill()
            return
        connections = wait_for("a connection", LIMIT, lambda: list(self.proxy.connections))
        if len(connections) > 1 and not self.moment.main:
            connections = connections[1:]
        connections[self.moment.connection % len(connections)].cut(self.moment.reset)

    def check(self):
        """What became of the survivors; LabError unless each has ended as it should in time."""
        end = time.monotonic() + LIMIT
        told = [check(end) for check in (self._program, self._source, self._destination, self._dump) if check]
        return "; ".join(filter(None, told))

    def _program(self, end):
        if self.case["victim"] == "program":
            return ""
        left = max(0.01, end - time.monotonic())
        # A connection that is cut before its first byte is no source, and the program waits for the next one.
        # Neither is a source that is killed ahead of its first connection: then it goes on waiting for that.
        def waits():
            said = self.program.stderr()
            return "said nothing" in said or (self.case["victim"] == "source" and
                                              "waiting for a source's main connection" in said[self.said_before:])

        wait_for(f"{self.program.name}: its end", left, lambda: not self.program.alive() or waits())
        with contextlib.suppress(LabError):
            self.program.wait_exit(5)
        if self.program.alive() and waits():
            return "no migration had begun: it waits for a source"
        if self.moment.ending:  # it may have been too late to harm
            status = self.program.wait_exit(max(0.01, end - time.monotonic()))
            if status == 0:
                return "too late to harm"
        return self.program.fail(max(0.01, end - time.monotonic()))

    def _source(self, end):
        if self.case["victim"] == "source":
            return ""
        ends = ("failed", "completed")
        status = wait_for("source's migration: its end", max(0.01, end - time.monotonic()),
                          lambda: (now := self.source.migration()["status"]) in ends and now)
        if status == "completed" and not self.moment.ending:
            raise LabError("the source says completed")
        return f"source {status}"

    def _destination(self, end):
        if not self.destination or self.case["victim"] == "destination":
            return ""
        with contextlib.suppress(LabError):
            status = self.destination.wait_exit(1)
            return f"destination ended with {status}"

        def outcome():
            if not self.destination.alive():
                return f"destination ended with {self.destination.popen.returncode}"
            try:
                status = self.destination.migration().get("status", "none")
            except LabError:  # it is just ending, or its monitor is dead
                return self._silent_end()
            if status == "completed" and self.moment.ending:
                return "destination completed"
            if status in ("none", "setup"):  # nobody has connected to it
                return "destination still waits for its source"
            return ""

        return wait_for("destination: its end", max(5, end - time.monotonic()), outcome)

    def _silent_end(self):
        """How a destination whose monitor is silent ended, in words. Nothing while a connection to it is open, which somebody may still
        end. 10.0 hangs once in some fifty cuts of a channel."""
        with contextlib.suppress(LabError):
            return f"destination ended with {self.destination.wait_exit(2)}"
        if self.program.alive() or self.proxy and self.proxy.any_open():
            return ""
        return "destination hangs with a dead monitor, as QEMUs do without a relay (format/packets.md section 3.4)"

    def _dump(self, _end):
        if self.case["program"] != "qemu_dump" or not self.output.exists():
            return ""
        names = sorted(file.name for file in self.output.iterdir())
        done = self.program.popen.returncode == 0
        whole = [name for name in names if not name.endswith(".part")]
        if self.moment.format != "blocks":
            return self._image(names, whole, done)
        if done and "manifest.json" in names:
            return ""
        if whole or done:
            raise LabError(f"qemu_dump ended with {self.program.popen.returncode} and left {names}")
        return f"left {len(names)} parts" if names else ""

    def _image(self, names, whole, done):
        """A file without .part is whole, also when its program was killed behind its last step, or in what comes behind that."""
        for name in whole:
            checked = subprocess.run([self.programs / "ram_image", "verify", self.output / name], capture_output=True, text=True, timeout=LIMIT)
            if checked.returncode != 0:
                raise LabError(f"qemu_dump left {name}: {checked.stderr.strip()}")
        if done != ("image" in names) and self.case["victim"] != "program":
            raise LabError(f"qemu_dump ended with {self.program.popen.returncode} and left {names}")
        return f"left {names}" if names and not done else ""


def run_one(folder, case, report, programs, seed):
    moment = Moment(seed, case)

    def act():
        with contextlib.ExitStack() as stack:
            try:
                scene = Scene(folder, case, moment, programs, stack)
                scene.migrate_until_it_happens()
                with cases.told_by(*filter(None, (scene.program, scene.source, scene.destination))):
                    return f"{moment}: {scene.check()}"
            except LabError as error:
                raise LabError(f"--seed {seed}: {moment}: {error}") from None

    cases.timed(report, case, act)


def main():
    parser = cases.arguments("somebody dies in a migration")
    parser.set_defaults(seed=int(time.time()))
    options = parser.parse_args()
    print(f"--seed {options.seed}")
    return cases.run("failures", options, all_cases(20 if options.full else 3), lambda case: tuple(case.values()),
                     lambda folder, _, some, report: run_one(folder, some[0], report, options.programs.resolve(),
                                                             options.seed),
                     lambda case: (case["qemu"], case["to"]) if case["program"] == "qemu_relay" else (case["qemu"],))


if __name__ == "__main__":
    cases.exit_with(main())
