#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The same guest memory, migrated three ways in one run, in turn: QEMU to QEMU, ram_send to ram_receive, and over plain
sockets without any protocol. Prints medians and ratios, and which goals they reach (rows of benchmarks/README.md).

  qemu  QEMU's own multifd: a paused guest on TCG whose memory is the image (memory-backend-file, share=on, prealloc=on, on
        tmpfs), into a QEMU with anonymous memory (memory-backend-ram, for which QEMU asks huge pages, too) and, where it is
        fresh, also with shared memory (memory-backend-memfd: what a guest with vhost-user or virtiofs devices has, in
        pages of 4 KiB); zero pages found by its channels, no bandwidth limit. Wall time is the source's total-time (ms; set-up of the connections included, loading of devices at the
        destination not, which is kept as wall_events). CPU time is each process's CPU clock from the migrate command until
        both sides are done.
  ours  ram_send --populate with the same file, into ram_receive's anonymous memory, for which it asks huge pages. Wall time
        is from before the source connects its channels until the destination has the last byte; CPU time of the
        same stretch. Neither includes starting the programs and their digest of all bytes.
  pump  socket_pump: the same bytes in writes of the same size, on the same socket settings, into the same memory.

Both sources have every page mapped and no holes. Destination memory is warm (touched before: prealloc=on, --populate) or
fresh (never touched). Where this machine is itself a guest, its host may have to find fresh memory first, which can cost
several times what the kernel here does, in huge pages as in small ones; so right before each fresh transfer twice its
memory is touched and freed (--cold-host: it is not), and the cost of touching 1 GiB is measured and printed with it. A case is a pattern, a compression, a number of channels and warm or fresh; rows of the table name
cases, and --pattern, --compression, --channels, --memory ask for others.

    side_by_side.py --build build --rows 8,9,10,11,12,14,15 --json results.json
    side_by_side.py --build build --pattern half,random --compression none,zstd --channels 1,2,4
    side_by_side.py --build build --quick
"""

import argparse
import contextlib
import datetime
import json
import mmap
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/interop"))

from lab import Binary, Qemu, find_qemu  # noqa: E402
from processes import Folder, LabError, Process, Program, wait_for  # noqa: E402
from qmp import Qmp  # noqa: E402

GIB = 1 << 30
PATTERNS = ("zero", "half", "random", "text", "guest", "library", "mixed")
ZSTD_LEVELS = (1, -1, -2, -3, -5, -6, -7, -8, -10, -20)


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    pattern: str
    compression: str = "none"
    channels: int = 2
    memory: str = "warm"

    def __str__(self):
        return f"{self.pattern} {self.compression} {self.channels}ch {self.memory}"


@dataclass(frozen=True)
class Way:
    """One of the ways to move a case's memory."""

    kind: str  # "qemu", "ours", "pump"
    compression: str = "none"
    level: int = 1
    backend: str = "ram"  # of QEMU's destination

    def __str__(self):
        name = self.kind if self.backend == "ram" else f"{self.kind} {self.backend}"
        return name if self.compression == "none" else f"{name} {self.compression} {self.level}"


@dataclass
class Sample:
    """One migration; CPU seconds and faults of the stretch that `wall` says."""

    wall: float
    cpu_source: float
    cpu_destination: float
    user_source: float
    user_destination: float
    wire_bytes: int
    faults_source: int
    faults_destination: int
    huge_before: int  # bytes of the destination in huge pages; None where it cannot be asked
    huge_after: int
    more: dict = field(default_factory=dict)


# Row of the table -> its cases.
ROWS = {
    8: [Case("random")],
    9: [Case("mixed")],
    10: [Case("zero")],
    11: [Case("random", memory="fresh"), Case("mixed", memory="fresh")],
    12: [Case("random", channels=channels) for channels in (1, 2, 4, 8)],
    14: [Case("mixed", "zstd")],
    15: [Case("mixed", "zlib"), Case("library", "zlib")],
}


def ways_of(case, compressors, only_pump):
    """The first one is what the others are compared with."""
    if case.compression == "none":
        shared = [Way("qemu", backend="memfd")] if case.memory == "fresh" else []
        return [Way("pump"), Way("ours")] if only_pump else [Way("qemu"), *shared, Way("ours"), Way("pump")]
    ours = [Way("ours", case.compression)]
    if case.compression == "zstd":
        ours = [Way("ours", "zstd", level) for level in ZSTD_LEVELS]
    if case.compression == "zlib" and "igzip" in compressors:
        ours += [Way("ours", "igzip", level) for level in (1, 2, 3)]
    return [Way("qemu", case.compression), *ours]


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Counters:
    cpu: float
    user: float
    faults: int

    @staticmethod
    def of(pid):
        """What a process has used so far, threads that have ended included."""
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        # The CPU clock of another process, in nanoseconds: what clock_getcpuclockid() computes.
        return Counters(time.clock_gettime((~pid << 3) | 2), int(fields[11]) / os.sysconf("SC_CLK_TCK"), int(fields[7]))


def first_touch():
    """Seconds and CPU seconds per GiB that touching fresh anonymous memory costs one thread, by kind of page."""
    costs = {}
    size = GIB // 4
    for name, advice in (("huge", mmap.MADV_HUGEPAGE), ("small", mmap.MADV_NOHUGEPAGE)):
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(advice)
            began, cpu = time.monotonic(), time.process_time()
            with contextlib.suppress(OSError):  # before Linux 5.14
                memory.madvise(23)  # MADV_POPULATE_WRITE
            costs[name] = [(end - begin) * GIB / size
                           for end, begin in ((time.monotonic(), began), (time.process_time(), cpu))]
    return costs


def warm_host(size):
    """Touches and frees memory, so that the pages that are found next are known to this machine's host: else the order of
    the cases decides who pays for that. It has to be now or never: a guest that reports its free pages to the host
    (virtio-balloon) gives them away two seconds later."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):  # before Linux 5.14
            memory.madvise(23)  # MADV_POPULATE_WRITE


def huge_bytes(pid):
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^(?:AnonHugePages|ShmemPmdMapped):\s+(\d+)", text, re.M))


class BenchQemu(Qemu):
    """A paused QEMU without devices whose main memory is `memory`, the middle of an -object option."""

    def __init__(self, folder, binary, machine, size, memory, *, incoming=False, extra=()):
        self.binary, self.machine = binary, machine
        monitor = folder.new("qmp")
        Process.__init__(self, folder, f"qemu-{binary.version}-{'destination' if incoming else 'source'}", [
            binary.command, "-accel", "tcg", "-machine", f"{machine},memory-backend=ram0", "-m", f"{size >> 20}M",
            "-object", f"{memory},id=ram0,size={size}", "-S", "-nodefaults", "-no-user-config", "-display", "none",
            "-vga", "none", "-nic", "none", "-qmp", f"unix:{monitor},server=on,wait=off",
            *(["-incoming", "defer"] if incoming else []), *extra])
        try:
            self.qmp = Qmp(monitor, self, limit=120)
        except BaseException:
            self.kill()
            raise

    def event_time(self, status):
        """When it first said so, or None."""
        for event in self.qmp.events:
            if event["event"] == "MIGRATION" and event["data"]["status"] == status:
                return event["timestamp"]["seconds"] + 1e-6 * event["timestamp"]["microseconds"]
        return None


def finished(info):
    return info if info.get("total-time") else None


class Bench:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.size = arguments.size
        self.images = {}
        self.programs = {name: self._program(name) for name in ("ram_send", "ram_receive", "socket_pump", "make_image")}
        self.binary = self._qemu() if arguments.with_qemu else None

    def _program(self, name):
        for folder in (self.arguments.build, *(self.arguments.build / sub for sub in ("examples", "benchmarks"))):
            if os.access(folder / name, os.X_OK) and (folder / name).is_file():
                return folder / name
        raise LabError(f"{name}: not in {self.arguments.build}: build examples and benchmarks, or say --build")

    def _qemu(self):
        path = self.arguments.qemu
        if path in ("7.2", "10.0"):
            binary, why = find_qemu(path)
            if not binary:
                raise LabError(why)
            return binary
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
        found = re.search(r"version ((\d+\.\d+)\S*)", out)
        if not found:
            raise LabError(f"{path} --version: {out[:200]}")
        return Binary(found[2], path, found[1])

    def compressors(self):
        """What ram_send can do."""
        help_text = subprocess.run([self.programs["ram_send"], "--help"], capture_output=True, text=True, timeout=60).stdout
        found = re.search(r"--compression\s[^{]*\{([^}]*)\}", help_text)
        return found[1].split(",") if found else ["none"]

    def image(self, pattern, size):
        key = (pattern, size)
        if key not in self.images:
            # Only one at a time: they lie in memory.
            for path in self.images.values():
                path.unlink()
            self.images.clear()
            path = self.folder.memory / f"{pattern}-{size}"
            command = [self.programs["make_image"], path, "--pattern", pattern, "--size", str(size),
                       "--seed", str(self.arguments.seed)]
            subprocess.run(command, check=True, timeout=300)
            with open(path, "r+b") as file:  # no holes: reading one costs a source what no guest's memory does
                os.posix_fallocate(file.fileno(), 0, size)
            self.images[key] = path
        return self.images[key]

    # What a way of another script adds: words for a QEMU and its migration's parameters; words for ram_send, ram_receive.

    def qemu_words(self, way, endpoint):
        return []

    def qemu_parameters(self, way, endpoint):
        return {}

    def program_words(self, way, endpoint):
        return []

    def run(self, case, way, size):
        image = self.image(case.pattern, size)
        return {"qemu": self._run_qemu, "ours": self._run_ours, "pump": self._run_pump}[way.kind](case, way, size, image)

    def _run_qemu(self, case, way, size, image):
        limit = self.arguments.limit
        prealloc = "on" if case.memory == "warm" else "off"
        with (BenchQemu(self.folder, self.binary, self.arguments.machine, size,
                        f"memory-backend-{way.backend},prealloc={prealloc}", incoming=True,
                        extra=self.qemu_words(way, "server")) as destination,
              BenchQemu(self.folder, self.binary, self.arguments.machine, size,
                        f"memory-backend-file,mem-path={image},share=on,prealloc=on",
                        extra=self.qemu_words(way, "client")) as source):
            for qemu, endpoint in ((source, "client"), (destination, "server")):
                qemu.configure(channels=case.channels, compression=way.compression, zero_pages="multifd",
                               level=way.level if way.compression != "none" else None,
                               downtime_ms=self.arguments.downtime_ms, **self.qemu_parameters(way, endpoint))
            destination.listen("tcp:127.0.0.1:0")
            address = destination.listening_on()
            huge_before = huge_bytes(destination.pid)
            self._warm_host(case, size)
            before = [Counters.of(each.pid) for each in (source, destination)]
            source.migrate(address)
            source.wait_migration("completed", limit)
            # "completed" can be there before the time is.
            info = wait_for(f"{source.name}: its total-time", 5, lambda: finished(source.migration()))
            destination.wait_migration("completed", 30)
            after = [Counters.of(each.pid) for each in (source, destination)]
            cpu, user, faults = (
                [getattr(now, name) - getattr(then, name) for now, then in zip(after, before)]
                for name in ("cpu", "user", "faults"))
            begins, ends = source.event_time("setup"), destination.event_time("completed")
            return Sample(info["total-time"] / 1000, *cpu, *user, info["ram"]["transferred"], *faults, huge_before,
                          huge_bytes(destination.pid),
                          {"wall_events": ends - begins if begins and ends else None,
                           "setup_ms": info.get("setup-time"), "downtime_ms": info.get("downtime"),
                           "normal_pages": info["ram"]["normal"], "zero_pages": info["ram"]["duplicate"],
                           "multifd_bytes": info["ram"].get("multifd-bytes")})

    def _run_pair(self, receive, send, case, size):
        """A listening program and one that connects to it: their reports."""
        limit = self.arguments.limit
        reports = [self.folder.new("receive.json"), self.folder.new("send.json")]
        with Program(self.folder, [*receive, "--listen", "tcp:127.0.0.1:0", "--json", reports[0]], limit=120) as receiver:
            huge = huge_bytes(receiver.pid)
            self._warm_host(case, size)
            with Process(self.folder, Path(send[0]).name,
                         [*send, "--connect", receiver.address, "--channels", str(case.channels),
                          "--json", reports[1]]) as sender:
                status = sender.wait_exit(limit)
                if status != 0:
                    raise LabError(f"{sender.name} ended with status {status}: {sender.stderr()[-300:]}")
            receiver.finish(30)
        received, sent = (json.loads(path.read_text()) for path in reports)
        for path in reports:
            path.unlink()
        return received, sent, huge

    def _warm_host(self, case, size):
        """When everything is up and the transfer is next."""
        if case.memory == "fresh" and not self.arguments.cold_host:
            warm_host(2 * size)

    def _buffers(self):
        return [f"--socket-buffer={self.arguments.socket_buffer}"] if self.arguments.socket_buffer else []

    def _sample(self, received, sent, huge, more):
        return Sample(received["began"] + received["seconds"] - sent["began"], sent["cpu_seconds"],
                      received["cpu_seconds"], sent["user_seconds"], received["user_seconds"],
                      sent.get("wire_bytes", 0), sent["minor_faults"], received["minor_faults"], huge, None, more)

    def _run_ours(self, case, way, size, image):
        receive = [self.programs["ram_receive"], "--discard", "--size", str(size)]
        if case.memory == "warm":
            receive.append("--populate")
        send = [self.programs["ram_send"], "--file", image, "--populate", "--compression", way.compression,
                f"--level={way.level}", *self._buffers(), *self.arguments.send_option,
                *self.program_words(way, "client")]
        receive += [*self.arguments.receive_option, *self.program_words(way, "server")]
        received, sent, huge = self._run_pair(receive, send, case, size)
        return self._sample(received, sent, huge,
                            {"seconds_source": sent["seconds"], "normal_pages": sent["normal_pages"],
                             "zero_pages": sent["zero_pages"], "bounded_by": sent.get("bounded_by")})

    def _run_pump(self, case, way, size, image):
        receive = [self.programs["socket_pump"], "--size", str(size), "--channels", str(case.channels), "--huge"]
        if case.memory == "warm":
            receive.append("--populate")
        send = [self.programs["socket_pump"], "--file", image, "--populate"]
        send += self._buffers()
        received, sent, huge = self._run_pair(receive, send, case, size)
        sent["wire_bytes"] = size
        return self._sample(received, sent, huge, {"seconds_source": sent["seconds"]})


# ---- what is said about it -------------------------------------------------------------------------------------------


class Results:
    """All samples, by case and way; numbers are medians."""

    def __init__(self):
        self.samples = {}
        self.sizes = {}

    def add(self, case, way, size, sample):
        self.samples.setdefault((case, way), []).append(sample)
        self.sizes[case] = size

    def median(self, case, way, value):
        samples = self.samples.get((case, way))
        return statistics.median(value(sample) for sample in samples) if samples else None

    def rate(self, case, way):
        return self.median(case, way, lambda sample: self.sizes[case] / GIB / sample.wall)

    def cpu(self, case, way):
        return self.median(case, way, lambda s: (s.cpu_source + s.cpu_destination) * GIB / self.sizes[case])

    def wire(self, case, way):
        return self.median(case, way, lambda sample: sample.wire_bytes)

    def faults(self, case, way):
        return self.median(case, way, lambda sample: sample.faults_destination * GIB / self.sizes[case])

    def ratio(self, figure, case, way, base):
        mine, theirs = figure(case, way), figure(case, base)
        return mine / theirs if mine and theirs else None

    def ways(self, case):
        return [way for each, way in self.samples if each == case]

    def table(self, case):
        """The lines of one case."""
        ways = self.ways(case)
        base, pump = ways[0], Way("pump")
        lines = [f"\n{case}, {self.sizes[case] / GIB:g} GiB, median of {len(self.samples[case, base])}",
                 f"{'':16} {'GiB/s':>7} {'min-max':>11} | {'CPU-s/GiB':>9} {'source':>7} {'dest.':>7} | {'wire':>6} "
                 f"{'faults/GiB':>10} {'huge':>9} | {'GiB/s':>7} {'CPU':>6} {'wire':>6} {'of pump':>8}"]
        per_gib = GIB / self.sizes[case]
        for way in ways:
            samples = self.samples[case, way]
            rates = [self.sizes[case] / GIB / sample.wall for sample in samples]
            source = self.median(case, way, lambda s: s.cpu_source) * per_gib
            destination = self.median(case, way, lambda s: s.cpu_destination) * per_gib
            huge = "/".join("?" if each is None else f"{each / self.sizes[case]:.0%}"
                            for each in (samples[-1].huge_before, samples[-1].huge_after))
            ratios = [self.ratio(figure, case, way, base) for figure in (self.rate, self.cpu, self.wire)]
            of_pump = self.ratio(self.rate, case, way, pump)
            lines.append(
                f"{str(way):16} {statistics.median(rates):7.3f} {min(rates):5.2f}-{max(rates):5.2f} | "
                f"{self.cpu(case, way):9.3f} {source:7.3f} {destination:7.3f} | "
                f"{self.wire(case, way) / self.sizes[case]:6.1%} {self.faults(case, way):10.0f} {huge:>9} | "
                + " ".join(f"{'':>{width}}" if ratio is None else f"{ratio:{width - 1}.2f}x"
                           for ratio, width in zip((*ratios, of_pump), (7, 6, 6, 8))))
        return lines

    # One line per figure of the table: (row, figure, value, whether more is better, to reach, stretch).

    def figures(self, row, case):
        ours, qemu = Way("ours"), Way("qemu", case.compression)
        if row == 12:
            yield f"{case}: GiB/s / pump", self.ratio(self.rate, case, ours, Way("pump")), True, 0.95, 0.98
            return
        if row in (8, 9, 10, 11):
            goals = {8: (1.5, 1.8), 9: (1.5, 1.8), 10: (3, 5), 11: (1.6, 2)}[row]
            yield f"{case}: GiB/s / QEMU", self.ratio(self.rate, case, ours, qemu), True, *goals
        if row == 8:
            yield f"{case}: CPU / QEMU", self.ratio(self.cpu, case, ours, qemu), False, 0.65, 0.55
        if row == 11:
            memfd = Way("qemu", backend="memfd")
            yield f"{case}: GiB/s / QEMU with memfd", self.ratio(self.rate, case, ours, memfd), True, *goals
            yield f"{case}: faults per GiB", self.faults(case, ours), False, 1000, 1000
        if row == 14:
            for most, goal, stretch in ((1.0, 1.2, 1.4), (1.12, 1.5, 2.0), (1.25, 2.5, 3.5)):
                yield self._fastest(case, qemu, ("zstd",), most, goal, stretch)
        if row == 15:
            yield f"{case}: zlib, GiB/s / QEMU", self.ratio(self.rate, case, Way("ours", "zlib"), qemu), True, 1.1, 1.1
            yield self._fastest(case, qemu, ("igzip",), 1.04, 3.5, 5)

    def _fastest(self, case, qemu, compressions, most, goal, stretch):
        """The best of ours whose wire size is at most `most` times QEMU's."""
        name = f"{case}: GiB/s / QEMU at {most - 1:.0%} larger"
        best = None
        for way in self.ways(case):
            # 0.1 %: packets that are cut elsewhere differ by as much.
            if way.kind != "ours" or way.compression not in compressions:
                continue
            if self.ratio(self.wire, case, way, qemu) > most + 0.001:
                continue
            ratio = self.ratio(self.rate, case, way, qemu)
            if best is None or ratio > best[0]:
                best = (ratio, way)
        if not best:
            return f"{name}: no {'/'.join(compressions)}", None, True, goal, stretch
        return f"{name} ({best[1].compression} {best[1].level})", best[0], True, goal, stretch

    def row_lines(self, rows):
        for row in rows:
            for case in ROWS[row]:
                if case not in self.sizes:
                    continue
                for name, value, more, goal, stretch in self.figures(row, case):
                    yield {"row": row, "figure": name, "value": value, "goal": goal, "stretch": stretch,
                           "reached": value is not None and (value >= goal if more else value <= goal),
                           "stretched": value is not None and (value >= stretch if more else value <= stretch)}


def machine(build):
    """What kind of machine this is, with what its kernel charges where `build` has machine_costs."""
    costs = next((path for path in (build / "machine_costs", build / "benchmarks" / "machine_costs") if path.exists()), None)
    told = json.loads(subprocess.run([costs], capture_output=True, text=True, timeout=60, check=True).stdout) if costs else {}
    info = Path("/proc/cpuinfo").read_text()
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {"cpu": re.search(r"model name\s*:\s*(.*)", info)[1], "cores": os.cpu_count(),
            "memory_gib": round(int(memory[1]) / (1 << 20), 1), "kernel": platform.release(),
            "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
            "load": os.getloadavg(), "costs": told}


def commit():
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, timeout=60).stdout.strip()

    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=no").splitlines()]
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


# ---- the program -----------------------------------------------------------------------------------------------------


def size_of(text):
    found = re.fullmatch(r"(\d+)([KMGkmg]?)(?:i?[Bb])?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: a size as 512M or 2G")
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2].lower()]


def list_of(kind, allowed=None):
    def parse(text):
        values = [kind(part) for part in text.split(",") if part]
        if allowed and not set(values) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: of {','.join(map(str, allowed))}")
        return values

    return parse


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=lambda text: Path(text).resolve(), default=ROOT / "build",
                        help="where ram_send, ram_receive, socket_pump and make_image were built, or its parent "
                        "(default: build)")
    parser.add_argument("--qemu", default="10.0", help="10.0 or 7.2 (as tests/interop finds them), or a command")
    parser.add_argument("--machine", default="pc-i440fx-7.2", help="a versioned machine type (default: %(default)s)")
    parser.add_argument("--cold-host", action="store_true", help="do not touch and free memory before a fresh transfer")
    parser.add_argument("--no-qemu", dest="with_qemu", action="store_false", help="only ours and the pump")
    parser.add_argument("--rows", type=list_of(int, ROWS), help=f"rows of the table: {','.join(map(str, ROWS))} "
                        "(default, unless cases are asked for: all)")
    parser.add_argument("--pattern", type=list_of(str, PATTERNS), help=f"cases of one's own: {','.join(PATTERNS)}")
    parser.add_argument("--compression", type=list_of(str, ("none", "zlib", "zstd")), default=["none"],
                        help="for --pattern: none,zlib,zstd (default: none)")
    parser.add_argument("--channels", type=list_of(int), default=[2], help="for --pattern (default: 2)")
    parser.add_argument("--memory", type=list_of(str, ("warm", "fresh")), default=["warm"],
                        help="for --pattern: warm,fresh destination (default: warm)")
    parser.add_argument("--repeat", type=int, default=5, help="times that each is done (default: %(default)s)")
    parser.add_argument("--size", type=size_of, default=2 * GIB, help="memory of a guest (default: 2G)")
    parser.add_argument("--compressed-size", type=size_of, default=GIB // 2,
                        help="the same in cases with compression, which are slower (default: 512M)")
    parser.add_argument("--seed", type=int, default=1, help="of the memory's contents (default: 1)")
    parser.add_argument("--quick", action="store_true", help="256M, once: to see that all of it works")
    parser.add_argument("--json", type=Path, help="every repetition, the medians, machine, versions and commit")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one migration (default: 120)")
    parser.add_argument("--downtime-ms", type=int, default=2000, help="QEMU's downtime-limit (default: %(default)s)")
    parser.add_argument("--socket-buffer", type=size_of, default=0, help="SO_SNDBUF of the sources of ours and the pump "
                        "(default: the kernel's; a small one keeps the bytes in cache on one machine)")
    parser.add_argument("--send-option", action="append", default=[], help="one more word for ram_send, as "
                        "--send-option=--zero-pages=none")
    parser.add_argument("--receive-option", action="append", default=[], help="one more word for ram_receive")
    arguments = parser.parse_args()
    if arguments.rows is None and not arguments.pattern:
        arguments.rows = list(ROWS)
    arguments.rows = arguments.rows or []
    if arguments.quick:
        arguments.size = arguments.compressed_size = 256 << 20
        arguments.repeat = 1
    if arguments.size % (1 << 20) or arguments.compressed_size % (1 << 20) or arguments.repeat < 1:
        parser.error("sizes are multiples of 1M, and --repeat at least 1")
    return arguments


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def measure(bench, arguments, results, raw, touched):
    cases = {}  # case -> whether only the pump is asked for
    for row in arguments.rows:
        for case in ROWS[row]:
            cases[case] = cases.get(case, True) and row == 12
    for pattern in arguments.pattern or []:
        for compression in arguments.compression:
            for channels in arguments.channels:
                for memory in arguments.memory:
                    cases[Case(pattern, compression, channels, memory)] = False
    compressors = bench.compressors()
    # By image, each of which is made once.
    for case in sorted(cases, key=lambda each: (each.compression != "none", PATTERNS.index(each.pattern))):
        ways = ways_of(case, compressors, cases[case])
        if not arguments.with_qemu:
            ways = [way for way in ways if way.kind != "qemu"]
        size = arguments.size if case.compression == "none" else arguments.compressed_size
        if case.memory == "fresh":
            warm_host(3 * size)
            costs = first_touch()
            touched.append({"case": vars(case), **costs})
            print(f"\ntouching fresh memory, 1 thread: {costs['huge'][0]:.2f} s per GiB (CPU {costs['huge'][1]:.2f}) in huge "
                  f"pages, {costs['small'][0]:.2f} ({costs['small'][1]:.2f}) in small ones")
        for repeat in range(arguments.repeat):
            for way in ways:
                progress(f"{case}: {way} ({repeat + 1} of {arguments.repeat})")
                sample = bench.run(case, way, size)
                results.add(case, way, size, sample)
                raw.append({"case": vars(case), "way": str(way), "kind": way.kind, "compression": way.compression,
                            "level": way.level, "repeat": repeat, "size": size,
                            "gib_per_s": size / GIB / sample.wall, **vars(sample)})
        progress("")
        print("\n".join(results.table(case)), flush=True)


def main():
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` ends what it started
    results, raw, touched, error = Results(), [], [], None
    report = {"what": "side_by_side", "command": " ".join(sys.argv), "commit": commit(), "machine": machine(arguments.build),
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "seed": arguments.seed}
    try:
        with Folder() as folder:
            bench = Bench(arguments, folder)
            report["qemu"] = bench.binary.full_version if bench.binary else None
            print(f"QEMU {report['qemu']}, {report['machine']['cpu']}, {report['machine']['cores']} cores, "
                  f"Linux {report['machine']['kernel']}, commit {report['commit'][:12]}")
            measure(bench, arguments, results, raw, touched)
    except (LabError, subprocess.SubprocessError, OSError) as problem:
        error = str(problem)
    lines = list(results.row_lines(arguments.rows))
    if lines:
        print("\nrow  figure")
    for line in lines:
        value = "-" if line["value"] is None else f"{line['value']:.2f}"
        verdict = "not reached" if not line["reached"] else "reached" if not line["stretched"] else "reached, stretch too"
        print(f"{line['row']:3}  {line['figure']}: {value}, to reach {line['goal']:g} ({line['stretch']:g}): {verdict}")
    if arguments.json:
        report.update(rows=lines, samples=raw, first_touch=touched, error=error)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if error:
        print(f"side_by_side.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
