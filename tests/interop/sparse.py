# SPDX-License-Identifier: MIT
"""A guest of 64 GiB of which 200 MiB are used: a dump of it, and its way back into a QEMU, cost what is used.

    python3 tests/interop/sparse.py --programs build/dev/examples

Limits for each of the two programs: 10 s, 300 MiB on the disk, 200 MiB of memory. The time is the program's, from the source's first
byte (dump) or from connecting (load) to its end. In the dump's time the source's QEMU looks through 64 GiB for zero pages: the CPU
seconds of both say whose time it is.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import time
from pathlib import Path

from lab import MIB, SKIPPED, Qemu, find_qemu, guest_image
from memory import Peak
from processes import Folder, LabError, Process, Program
from qmp import Qmp

MACHINE = "pc-i440fx-10.0"
LIMIT_SECONDS, LIMIT_DISK_MIB, LIMIT_MEMORY_MIB = 10, 300, 200
CHANNELS = 2
USED_MIB = 200


class LargeQemu(Qemu):
    """A paused QEMU with anonymous memory, most of which nobody has touched. (Reading a hole of a file on tmpfs allocates it.)"""

    def __init__(self, folder, binary, ram_mib, incoming):
        self.binary, self.accel = binary, "tcg"
        monitor, self.serial = folder.new("qmp"), folder.new("serial")
        Process.__init__(self, folder, f"qemu-{'destination' if incoming else 'source'}", [
            binary.command, "-accel", "tcg", "-machine", f"{MACHINE},memory-backend=ram0", "-m", f"{ram_mib}M",
            "-object", f"memory-backend-ram,id=ram0,size={ram_mib}M,reserve=off", "-S", "-nodefaults", "-no-user-config",
            "-display", "none", "-vga", "none", "-nic", "none", "-bios", guest_image(folder),
            "-serial", f"file:{self.serial}", "-qmp", f"unix:{monitor},server=on,wait=off",
            *(["-incoming", "defer"] if incoming else [])])
        try:
            self.qmp = Qmp(monitor, self, limit=60)
        except BaseException:
            self.kill()
            raise
        self._blocks = None


def places(ram_mib):
    """Where the used stretches of a MiB lie: all over the memory, not where the guest itself writes."""
    dice = random.Random(3)
    return sorted(dice.sample(range(32, ram_mib), USED_MIB))


def stretch(number):
    return random.Random(number).randbytes(MIB)


def use(source, ram_mib):
    host = source.blocks()["ram0"].host
    for at in places(ram_mib):
        source.write_memory(host + at * MIB, stretch(at))


def check(destination, ram_mib):
    """The used stretches are there, and nothing else has become resident."""
    host = destination.blocks()["ram0"].host
    for at in places(ram_mib):
        if destination.read_memory(host + at * MIB, MIB) != stretch(at):
            raise LabError(f"destination: wrong bytes at {at} MiB")


def resident_mib(qemu):
    return int(Path(f"/proc/{qemu.pid}/statm").read_text().split()[1]) * 4096 / MIB


def disk_mib(path):
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_blocks for file in files) * 512 / MIB


def cpu_seconds_of(pid):
    return time.clock_gettime((~pid << 3) | 2)  # its CPU clock: what clock_getcpuclockid() computes


def own_cpu_seconds():
    """Of all programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def hold(what, seconds, disk_mib, memory_mib):
    says = f"{what} {seconds:.1f} s, {disk_mib:.0f} MiB on the disk, {memory_mib:.0f} MiB of memory"
    if seconds >= LIMIT_SECONDS or disk_mib >= LIMIT_DISK_MIB or not 0 < memory_mib < LIMIT_MEMORY_MIB:
        raise LabError(f"{says}: not under {LIMIT_SECONDS} s, {LIMIT_DISK_MIB} MiB, {LIMIT_MEMORY_MIB} MiB")
    return says


def run(folder, binary, options, form):
    programs, image = options.programs.resolve(), folder.new("image")
    with LargeQemu(folder, binary, options.memory, False) as source:
        use(source, options.memory)
        source.cont()  # a guest whose own check goes on at the destination
        source.wait_heartbeats(2)
        source.configure(channels=CHANNELS, zero_pages="multifd", return_path=True)
        source.stop()
        result = folder.new("dump.json")
        with Program(folder, [programs / "qemu_dump", "--listen", f"unix:{folder.new('dump')}", "--channels", CHANNELS,
                              "--format", form, "--output", image, "--json", result]) as dump:
            peak = Peak(dump.pid)
            cpu, source_cpu = own_cpu_seconds(), cpu_seconds_of(source.pid)
            source.migrate(dump.address)
            info = source.wait_migration("completed", 120)
            source_cpu = cpu_seconds_of(source.pid) - source_cpu
            dump.finish(60)
            peak.join()
        told = json.loads(result.read_text())
        says = [hold(f"{form}: dump", told["seconds"], disk_mib(image), peak.mib)
                + f" (CPU {own_cpu_seconds() - cpu:.1f} s; the source's QEMU {info['total-time'] / 1000:.1f} s, CPU {source_cpu:.1f} s)"]
        at_switch = source.heartbeat()
    with LargeQemu(folder, binary, options.memory, True) as destination:
        path, result = folder.new("destination"), folder.new("load.json")
        destination.configure(channels=CHANNELS)
        destination.listen(f"unix:{path}")
        with Process(folder, "qemu_load", [programs / "qemu_load", "--input", image, "--connect", f"unix:{path}",
                                           "--channels", CHANNELS, "--out-memory", "fresh", "--json", result]) as load:
            peak = Peak(load.pid)
            if load.wait_exit(120) != 0:
                raise LabError(f"qemu_load: {load.stderr()[-400:]}")
            peak.join()
        destination.wait_migration("completed", 60)
        told = json.loads(result.read_text())
        says.append(hold("load", told["seconds"], 0, peak.mib)
                    + f" (QEMU then {resident_mib(destination):.0f} MiB)")
        check(destination, options.memory)
        destination.cont()
        destination.wait_heartbeats(2, after=at_switch)
    shutil.rmtree(image) if image.is_dir() else image.unlink()
    return ", ".join(says)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", required=True, type=Path)
    parser.add_argument("--memory", type=int, default=64 * 1024, metavar="MIB", help="the guest's size")
    parser.add_argument("--formats", nargs="+", default=["mapped-ram", "mapped-ram-zst"])
    options = parser.parse_args()
    binary, why = find_qemu("10.0")
    if not binary:
        print(f"skipped: {why}")
        return SKIPPED
    failed = 0
    with Folder() as folder:
        for form in options.formats:
            began = time.monotonic()
            try:
                print(f"ok    {run(folder, binary, options, form)} [{time.monotonic() - began:.0f} s]", flush=True)
            except LabError as error:
                failed += 1
                print(f"FAIL  {form}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
