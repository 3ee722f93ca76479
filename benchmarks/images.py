#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Guests in files, beside QEMU's own way, in one run and in turn. Prints medians, spreads and ratios.

    python3 benchmarks/images.py --build build/bench                 # all parts
    python3 benchmarks/images.py --build build/bench save restore    # these alone

save      memory to a mapped-ram file on tmpfs, two channels. qemu: a paused QEMU whose memory is the data (memory-backend-file on
          tmpfs, share=on, prealloc=on), total-time of query-migrate, which has no start of a process in it, but the devices. ours:
          MappedRamWriter in a process of its own, with the same file mapped and touched, from opening the output to its end.
restore   that file, QEMU's own, into memory. qemu: -incoming defer, from migrate-incoming to the event that says completed, with the
          devices, which a paused guest of this kind has few of. ours: load_ram(), from opening the file to the last page; checked
          against the data behind the measured stretch. "fresh": anonymous memory that nobody has touched, huge pages asked for by
          both; "touched": written to before (QEMU: prealloc=on), and zero again. QEMU 10.0 leaves pages that are zero in the file as
          they are; "clearing" is load_ram() with DestinationMemory::unknown, which looks at these, too.
cold      the same from a disk, with nothing of the file in the page cache, into fresh memory, of guest-like data: a third zero
          pages, a third text, a third programs and libraries of this machine. Raw: QEMU and ours; compressed (mapped-ram-zst): ours;
          and the files' sizes. Drops the machine's caches: needs root.
stop      how long a running guest stands still, by the longest gap in what its serial port says: qemu_dump --format elf beside
          dump-guest-memory.

Ahead of each save and restore memory is touched and freed, so that nobody pays for pages that a virtual machine's host has taken
back. Needs QEMU 10.0 (sh tests/interop/install_qemu.sh 10.0 build/qemu-10.0), and room for three times --size in /dev/shm.
"""
import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/interop"), str(ROOT / "benchmarks/qemu")]

from lab import MIB, PAGE, Guest, Qemu, find_qemu  # noqa: E402
from memory import fill_quickly  # noqa: E402
from processes import Folder, LabError, Process, Program  # noqa: E402
from side_by_side import BenchQemu, warm_host  # noqa: E402

MACHINE = "pc-i440fx-10.0"
CHANNELS = 2
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
GOALS = {"save": 1.3, "restore fresh": 1.2, "restore touched": 1.2, "cold": 1.0, "cold size": 3.0, "stop": 10.0}


def size(text):
    return int(float(text[:-1]) * UNITS[text[-1].upper()]) if text[-1].upper() in UNITS else int(text)


# ---- data ------------------------------------------------------------------------------------------------------------


def machine_bytes(folders, suffixes, wanted):
    """So many bytes of files below these folders, largest first."""
    files = []
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                file = os.path.join(path, name)
                if any(suffix in name for suffix in suffixes) and os.path.isfile(file) and not os.path.islink(file):
                    files.append((os.path.getsize(file), file))
    content = bytearray()
    for _, file in sorted(files, reverse=True):
        if len(content) >= wanted:
            break
        with contextlib.suppress(OSError):
            content += Path(file).read_bytes()[: wanted - len(content)]
    return bytes(content)


def thirds(path, total, second, third, seed=1):
    """A file of stretches of 1 to 64 pages: holes, `second`, `third`, a third each. Each stretch takes up where the last one of its
    kind has ended."""
    dice = random.Random(seed)
    at = {1: 0, 2: 0}
    with open(path, "w+b") as file:
        file.truncate(total)
        done = [0, 0, 0]
        place = 0
        while place < total:
            length = min(total - place, dice.randint(1, 64) * PAGE)
            kind = done.index(min(done))
            done[kind] += length
            if kind:
                content = (second, third)[kind - 1]
                start = at[kind] if at[kind] + length <= len(content) else 0
                at[kind] = start + length
                file.seek(place)
                file.write(content[start : start + length])
            place += length


def mixed(path, total):
    dice = random.Random(2)
    words = [b"page", b"dirty", b"migrate", b"channel", b"epoch", b"guest", b"zero", b"0123456789", b"\n", b" "]
    text = b"".join(dice.choice(words) for _ in range(1 << 20))
    thirds(path, total, text, dice.randbytes(64 * MIB))


def guest_like(path, total):
    wanted = total // 3
    text = machine_bytes(["/usr/include", "/usr/lib/python3", "/usr/share"], (".h", ".py", ".txt", ".pm", ".xml"), wanted)
    programs = machine_bytes(["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/bin"], ("",), wanted)
    thirds(path, total, text, programs)


# ---- QEMU ------------------------------------------------------------------------------------------------------------


class PausedQemu(BenchQemu):
    """One that saves and loads files."""

    def mapped_ram(self, direct_io=False):
        self.configure(channels=CHANNELS, capabilities={"mapped-ram": True}, **{"direct-io": direct_io})


class Bench:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.total, self.samples = options.size, {}
        binary, why = find_qemu("10.0")
        if not binary:
            raise LabError(why)
        self.binary = binary
        self.shm, self.disk = folder.memory, Path(tempfile.mkdtemp(prefix="multifd-images-", dir=options.disk))

    def close(self):
        shutil.rmtree(self.disk, ignore_errors=True)

    def program(self, name):
        for folder in ("benchmarks", "examples", "."):
            found = self.options.build / folder / name
            if found.is_file():
                return found.resolve()
        raise LabError(f"{name}: not in {self.options.build}: build it, or say --build")

    def add(self, part, way, seconds):
        self.samples.setdefault(part, {}).setdefault(way, []).append(seconds)

    def speed(self, *arguments):
        warm_host(self.total * 3 // 2)
        command = [self.program("image_speed"), *map(str, arguments), "--threads", str(CHANNELS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise LabError(done.stderr.strip())
        return json.loads(done.stdout)["seconds"]

    # ---- ways

    def qemu_save(self, data, image):
        Path(image).unlink(missing_ok=True)
        with PausedQemu(self.folder, self.binary, MACHINE, self.total,
                        f"memory-backend-file,mem-path={data},share=on,prealloc=on") as qemu:
            qemu.mapped_ram()
            warm_host(self.total * 3 // 2)
            qemu.migrate(f"file:{image}")
            return qemu.wait_migration("completed", 120)["total-time"] / 1000

    def qemu_load(self, image, touched=False, before=lambda: None, direct_io=False):
        with PausedQemu(self.folder, self.binary, MACHINE, self.total,
                        f"memory-backend-ram,prealloc={'on' if touched else 'off'}", incoming=True) as qemu:
            qemu.mapped_ram(direct_io)
            before()
            warm_host(self.total * 3 // 2)
            began = time.monotonic()
            qemu.listen(f"file:{image}")
            while not any(event["event"] == "MIGRATION" and event["data"]["status"] in ("completed", "failed")
                          for event in qemu.qmp.events):
                if time.monotonic() - began > 120:
                    raise LabError("QEMU does not load the file")
                qemu.qmp.wait_event(0.5)
            seconds = time.monotonic() - began
            qemu.wait_migration("completed", 1)
            return seconds

    # ---- parts

    def speed_parts(self, parts):
        data, image, own = self.shm / "data", self.shm / "image", self.shm / "own"
        mixed(data, self.total)
        for _ in range(self.options.repeat):
            if "save" in parts:
                own.unlink(missing_ok=True)
                self.add("save", "QEMU", self.qemu_save(data, image))
                self.add("save", "multifd", self.speed("save", data, own))
                self.speed("load", own, "--compare", data)
            elif not image.exists():
                self.qemu_save(data, image)
            if "restore" in parts:
                for memory in ("fresh", "touched"):
                    ways = {"multifd": []} if memory == "fresh" else {"multifd": ["--touched"],
                                                                      "multifd, clearing": ["--touched", "--clear"]}
                    self.add(f"restore {memory}", "QEMU", self.qemu_load(image, memory == "touched"))
                    for way, flags in ways.items():
                        self.add(f"restore {memory}", way, self.speed("load", image, "--compare", data, *flags))
        for file in (data, image, own):
            file.unlink(missing_ok=True)

    def cold_part(self):
        data = self.shm / "data"
        guest_like(data, self.total)
        raw, small = self.disk / "raw", self.disk / "small"
        self.qemu_save(data, raw)
        done = subprocess.run([self.program("ram_image"), "convert", "--to", "mapped-ram-zst", raw, small],
                              capture_output=True, text=True, timeout=200)
        if done.returncode:
            raise LabError(done.stderr.strip())
        self.sizes = {"raw": raw.stat().st_blocks * 512, "mapped-ram-zst": small.stat().st_blocks * 512}

        def drop():
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            time.sleep(0.2)

        for _ in range(self.options.repeat):
            self.add("cold", "QEMU", self.qemu_load(raw, before=drop))
            self.add("cold", "QEMU, direct I/O", self.qemu_load(raw, before=drop, direct_io=True))
            for way, image in (("multifd, raw", raw), ("multifd", small)):
                drop()
                self.add("cold", way, self.speed("load", image, "--compare", data))
        for file in (data, raw, small):
            file.unlink(missing_ok=True)

    def stop_part(self):
        total = self.options.stop_size >> 20
        output = self.shm / "guest"
        with Qemu(self.folder, "10.0", MACHINE, ram_mib=total, paused=False, fill=fill_quickly,
                  guest=Guest(working_set_kib=1024, pause_per_sweep=2500)) as qemu:
            self.accelerator = qemu.accel
            qemu.wait_heartbeats(3)
            for _ in range(self.options.repeat):
                with Beats(qemu.serial) as beats:
                    time.sleep(1)
                self.add("stop", "nothing", beats.longest)
                with Beats(qemu.serial) as beats:
                    qemu.qmp.call("dump-guest-memory", limit=300, paging=False, protocol=f"file:{output}")
                    qemu.wait_heartbeats(3)
                output.unlink()
                self.add("stop", "QEMU", beats.longest)
                with Beats(qemu.serial) as beats:
                    told = self.dump(qemu, output)
                    qemu.wait_heartbeats(3)
                output.unlink()
                self.add("stop", "multifd", beats.longest)
                for way, seconds in told.items():
                    self.add("stop", f"multifd, {way}", seconds)

    def dump(self, qemu, output):
        """The guest goes on as soon as QEMU says that the migration is over, as a manager would have it."""
        result = self.folder.new("dump.json")
        qemu.configure(channels=CHANNELS, return_path=True, downtime_ms=self.options.downtime_limit)
        with Program(self.folder, [self.program("qemu_dump"), "--listen", f"unix:{self.folder.new('dump')}", "--channels",
                                   CHANNELS, "--format", "elf", "--output", output, "--json", result]) as dump:
            qemu.qmp.events.clear()
            qemu.migrate(dump.address)
            began = time.monotonic()
            while not any(event["event"] == "MIGRATION" and event["data"]["status"] in ("completed", "failed")
                          for event in qemu.qmp.events):
                if time.monotonic() - began > 300:
                    raise LabError("the dump does not end")
                qemu.qmp.wait_event(0.5)
            qemu.cont()
            info = qemu.wait_migration("completed", 1)
            dump.finish(300)
        return {"as qemu_dump says": json.loads(result.read_text())["stood_still"],
                "as query-migrate says": info["downtime"] / 1000}


class Beats(threading.Thread):
    """The longest time for which a guest says nothing, seen from outside: by the length of its serial port's file."""

    def __init__(self, serial):
        super().__init__(daemon=True)
        self.longest, self._serial, self._ended = 0.0, serial, False

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ended = True
        self.join()

    def run(self):
        length, since = self._serial.stat().st_size, time.monotonic()
        while not self._ended:
            time.sleep(0.0005)
            now, size_now = time.monotonic(), self._serial.stat().st_size
            if size_now != length:
                self.longest = max(self.longest, now - since)
                length, since = size_now, now


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="save, restore, cold, stop (all)")
    parser.add_argument("--build", type=Path, default=ROOT / "build/bench", help="the folder of the built programs")
    parser.add_argument("--size", type=size, default=size("1G"), help="of the guest's memory (1G)")
    parser.add_argument("--stop-size", type=size, default=size("4G"), help="of the guest's memory in part stop (4G)")
    parser.add_argument("--downtime-limit", type=int, default=300, metavar="MS",
                        help="in part stop, of the source: with so much time's data left it stops the guest (300, QEMU's default)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path("/tmp"),
                        help="a folder on the disk of part cold (/tmp: others are not there for a QEMU of install_qemu.sh)")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    every = ["save", "restore", "cold", "stop"]
    if unknown := set(options.parts) - set(every):
        parser.error(f"no part {', '.join(sorted(unknown))}")
    parts = options.parts or every
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` ends what it started
    with Folder() as folder:
        bench = Bench(options, folder)
        try:
            if {"save", "restore"} & set(parts):
                bench.speed_parts(parts)
            if "cold" in parts:
                bench.cold_part()
            if "stop" in parts:
                bench.stop_part()
        finally:
            bench.close()
            print_tables(bench, options)


def print_tables(bench, options):
    rows = []
    print(f"QEMU {bench.binary.full_version}, {os.cpu_count()} cores, Linux {platform.release()}, {options.size >> 20} MiB, "
          f"{CHANNELS} channels, median of {options.repeat} (least to most)\n")
    print("| what | way | seconds | times QEMU | goal |\n| --- | --- | --- | --- | --- |")
    for part, ways in bench.samples.items():
        if "QEMU" not in ways:
            continue  # ended by a signal
        baseline = statistics.median(ways["QEMU"])
        for way, samples in ways.items():
            median = statistics.median(samples)
            ratio = baseline / median
            goal = GOALS[part] if way == "multifd" else None
            rows.append({"part": part, "way": way, "seconds": median, "samples": samples, "ratio": ratio, "goal": goal})
            verdict = "" if goal is None else f"{goal:g}x, {'reached' if ratio >= goal else 'missed'}"
            print(f"| {part} | {way} | {median:.3f} ({min(samples):.3f} to {max(samples):.3f}) | "
                  f"{'' if way == 'QEMU' else f'{ratio:.2f}x'} | {verdict} |")
    if sizes := getattr(bench, "sizes", None):
        ratio = sizes["raw"] / sizes["mapped-ram-zst"]
        rows.append({"part": "cold size", "bytes": sizes, "ratio": ratio, "goal": GOALS["cold size"]})
        print(f"\nOn the disk: mapped-ram {sizes['raw'] / MIB:.0f} MiB, mapped-ram-zst {sizes['mapped-ram-zst'] / MIB:.0f} MiB: "
              f"{ratio:.2f} times smaller (goal {GOALS['cold size']:g}: {'reached' if ratio >= 3 else 'missed'})")
    if options.json:
        options.json.write_text(json.dumps({"what": "images", "command": " ".join(sys.argv), "qemu": bench.binary.full_version,
                                            "size": options.size, "stop_size": options.stop_size, "repeat": options.repeat,
                                            "accelerator": getattr(bench, "accelerator", None), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"images.py: {error}")
