# SPDX-License-Identifier: MIT
"""What ram_image makes of QEMU's mapped-ram files for tools that analyse a guest: ELF cores, raw memory, LiME.

    python3 tests/interop/analysis.py --programs build/dev/examples

A real QEMU saves a stopped guest. Each byte of the core must be what its monitor reads at that guest-physical address
(`pmemsave`), each register what `info registers -a` says, QEMU's own notes the same bytes as in a core of
`dump-guest-memory`; raw and LiME must hold the same as the core; gdb must open it. Of guests over 4 GiB, the 16 MiB at both
ends of each range, and 64 pages in between.
"""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

from cases import arguments, exit_with, run, timed
from lab import MIB, PAGE, Guest, Qemu
from processes import LabError

GIB = 1024 * MIB
LIMIT = 120  # seconds for one conversion; no measure
NOTE_AT = 24 * MIB  # where the lab's guest never writes
TEXT = ("OSRELEASE=6.1.0-multifd\nBUILD-ID=0123\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a0c6c0\n"
        "NUMBER(phys_base)=16777216\n").encode()


# Devices of every kind of field list: the vCPUs' sections stand between theirs.
DEVICES = ("-device pcie-root-port,id=rp -device virtio-net-pci -device e1000 -device e1000e -device qemu-xhci "
           "-device usb-tablet -device usb-kbd -device virtio-balloon-pci -device virtio-rng-pci "
           "-drive if=none,id=d,driver=null-co,size=1M -device virtio-blk-pci,drive=d -device virtio-scsi-pci "
           "-device lsi53c895a -device megasas -device vmcoreinfo -device i6300esb "
           "-device virtio-serial-pci -chardev null,id=c -device virtconsole,chardev=c").split()


def vmcoreinfo_note(text):
    return struct.pack("<3I", 11, len(text), 0) + b"VMCOREINFO\0\0" + text


def fill(file):
    """Numbers all over memory, so that a wrong address is a wrong number; and notes, of which one is Linux's."""
    size = os.fstat(file.fileno()).st_size
    for at in range(16 * MIB, size, 4 * MIB):
        file.seek(at)
        file.write(struct.pack("<Q", 0xE1F0000000000000 | at))
    for at, note in ((NOTE_AT - 3 * PAGE, vmcoreinfo_note(b"OSRELEASE=without a page size\n")),
                     (NOTE_AT - 2 * PAGE, vmcoreinfo_note(TEXT.replace(b"6.1", b"\x01.1"))),
                     (NOTE_AT, vmcoreinfo_note(TEXT))):
        file.seek(at)
        file.write(note)


# ---- ELF, LiME -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    address: int
    offset: int
    size: int


class Core:
    def __init__(self, path):
        self.path, self._file = path, open(path, "rb")
        head = self._file.read(64)
        if head[:7] != b"\x7fELF\2\1\1" or struct.unpack_from("<HH", head, 16)[0] != 4:
            raise LabError(f"{path}: not an ELF core")
        start, (entry, count) = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<HH", head, 54)
        self.loads, self.notes = [], []
        for i in range(count):
            kind, _, offset, _, physical, size, memory, _ = struct.unpack("<IIQQQQQQ", self.read(start + i * entry, 56))
            if kind == 4:
                self.notes += self._notes(self.read(offset, size))
            elif kind == 1:
                self.loads.append(Load(physical, offset, size))
                if memory != size:
                    raise LabError(f"{path}: {size} bytes of {memory} at {physical:#x}")

    def close(self):
        self._file.close()

    def read(self, at, size):
        self._file.seek(at)
        data = self._file.read(size)
        if len(data) != size:
            raise LabError(f"{self.path}: ends at {at + len(data):#x}, not behind {at + size:#x}")
        return data

    def memory(self, address, size):
        for load in self.loads:
            if load.address <= address and address + size <= load.address + load.size:
                return self.read(load.offset + address - load.address, size)
        raise LabError(f"{self.path}: nothing at {address:#x}")

    def of(self, owner):
        return [text for name, _, text in self.notes if name == owner]

    @staticmethod
    def _notes(data):
        at, found = 0, []
        while at < len(data):
            name, text, kind = struct.unpack_from("<3I", data, at)
            begin = at + 12 + (name + 3) // 4 * 4
            found.append((data[at + 12:at + 11 + name].decode(), kind, data[begin:begin + text]))
            at = begin + (text + 3) // 4 * 4
        return found


PRSTATUS = ("r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es "
            "fs gs").split()


def registers_of(note):
    return dict(zip(PRSTATUS, struct.unpack_from("<27Q", note, 112)))


def registers_told(text):
    """What `info registers` says of one vCPU, by PRSTATUS's names, and its control registers."""
    found = {}
    for name, value in re.findall(r"\b([ER]?[A-Z][A-Z0-9]{1,2}) *=([0-9a-f]+)\b(?! [0-9a-f]{8,16} )", text):
        found.setdefault(name, int(value, 16))
    told = {f"r{name[1:].lower()}": value for name, value in found.items()
            if name[1:] in ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP", "IP")}
    told.update({name.lower(): value for name, value in found.items() if re.fullmatch(r"R\d+|CR\d", name)})
    told["eflags"] = int(re.search(r"[ER]FL=([0-9a-f]+)", text)[1], 16)
    for name, selector, base in re.findall(r"^([CDEFGS]S) =([0-9a-f]+) ([0-9a-f]+) ", text, re.M):
        told[name.lower()] = int(selector, 16)
        if name in ("FS", "GS"):
            told[f"{name.lower()}_base"] = int(base, 16)
    return told


# ---- a case ----------------------------------------------------------------------------------------------------------


def convert(program, image, to, out, *more):
    command = [program, "convert", "--to", to, image, out, *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT)
    if done.returncode != 0:
        raise LabError(f"ram_image --to {to} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
    return out


def samples(load, whole):
    """(address, size) of what is compared."""
    if whole:
        return [(load.address, load.size)]
    part = min(load.size, 16 * MIB)
    dice = random.Random(load.address)
    return [(load.address, part), (load.address + load.size - part, part),
            *((load.address + dice.randrange(load.size // PAGE) * PAGE, PAGE) for _ in range(64))]


def compare_memory(folder, qemu, core, whole):
    compared = 0
    path = folder.new("pmemsave")
    for load in core.loads:
        for address, size in samples(load, whole):
            qemu.qmp.call("pmemsave", limit=60, val=address, size=size, filename=str(path))
            there, here = path.read_bytes(), core.memory(address, size)
            if here != there:
                first = next(i for i in range(0, size, 8) if here[i:i + 8] != there[i:i + 8])
                raise LabError(f"the core differs at {address + first:#x}: {here[first:first + 8].hex()}, not "
                               f"{there[first:first + 8].hex()}")
            compared += size
    return compared


def compare_registers(qemu, core, vcpus, told):
    told = [part for part in re.split(r"^CPU#\d+\r?$", told, flags=re.M) if part.strip()]
    notes, own = core.of("CORE"), core.of("QEMU")
    if not len(told) == len(notes) == len(own) == vcpus:
        raise LabError(f"{len(notes)} and {len(own)} notes for {vcpus} vCPUs")
    for number, (text, note) in enumerate(zip(told, notes)):
        here, there = registers_of(note), registers_told(text)
        here.update(zip(("cr0", "cr1", "cr2", "cr3", "cr4"), struct.unpack_from("<5Q", own[number], 392)))
        missing = [name for name in ("rax", "rsp", "rip", "eflags", "cs", "ss", "fs_base", "cr3") if name not in there]
        wrong = [f"{name} {here[name]:#x}, not {value:#x}" for name, value in there.items() if here[name] != value]
        if missing or wrong:
            raise LabError(f"vCPU {number}: {', '.join(wrong)} {missing or ''}")
    return sum(len(registers_told(text)) for text in told)


def compare_formats(program, image, core, folder, whole, more):
    raw = open(convert(program, image, "raw", folder.new("raw"), *more), "rb")
    lime = open(convert(program, image, "lime", folder.new("lime"), *more), "rb")
    with raw, lime:
        ranges, at = {}, 0
        while head := os.pread(lime.fileno(), 32, at):
            magic, version, first, last, reserved = struct.unpack("<IIQQQ", head)
            if (magic, version, reserved) != (0x4C694D45, 1, 0):
                raise LabError(f"LiME: header {head.hex()} at {at:#x}")
            ranges[first] = (last + 1 - first, at + 32)
            at += 32 + last + 1 - first
        if {first: size for first, (size, _) in ranges.items()} != {load.address: load.size for load in core.loads}:
            raise LabError(f"LiME has other ranges than the core: {ranges}")
        for load in core.loads:
            for address, size in samples(load, whole):
                wanted = core.memory(address, size)
                if os.pread(raw.fileno(), size, address) != wanted:
                    raise LabError(f"raw differs from the core within {size:#x} of {address:#x}")
                if os.pread(lime.fileno(), size, ranges[load.address][1] + address - load.address) != wanted:
                    raise LabError(f"LiME differs from the core within {size:#x} of {address:#x}")
        end = max(load.address + load.size for load in core.loads)
        if os.fstat(raw.fileno()).st_size != end:
            raise LabError(f"raw is {os.fstat(raw.fileno()).st_size:#x} bytes long, not {end:#x}")


def open_in_gdb(core, address, value):
    gdb = shutil.which("gdb")
    if not gdb:
        return "gdb not tried: it is not installed"
    done = subprocess.run([gdb, "-batch", "-nx", "-ex", "info registers", "-ex", f"x/1gx {address:#x}", "-c", core.path],
                          capture_output=True, text=True, timeout=LIMIT)
    rip = re.search(r"^rip +0x([0-9a-f]+)", done.stdout, re.M)
    word = re.search(rf"^{address:#x}:\s+0x([0-9a-f]+)", done.stdout, re.M)
    if not rip or int(rip[1], 16) != registers_of(core.of("CORE")[0])["rip"] or not word or int(word[1], 16) != value:
        raise LabError(f"gdb reads something else: {done.stdout[-300:]} {done.stderr[-300:]}")
    return "gdb reads it"


def save(folder, qemu, case):
    image = folder.new("image")
    # The guest is stopped: its registers stay as they are.
    told = qemu.hmp("info registers -a")
    qemu.configure(multifd=case["channels"] > 0, channels=case["channels"] or None, capabilities={"mapped-ram": True})
    qemu.migrate(f"file:{image}")
    qemu.wait_migration("completed", 120)
    return image, told


def one(folder, options, case):
    program = options.programs.resolve() / "ram_image"
    small = case["mib"] <= 256
    seabios = case["machine_has"] == "seabios"
    extra = ["-smp", str(case["vcpus"]), *(["-bios", "bios-256k.bin"] if seabios else []),
             *(DEVICES if case["machine_has"] == "devices" else [])]
    # Numbers in front of the firmware's own memory would be overwritten by it, or disturb it: 16 MiB and up are free.
    with Qemu(folder, case["qemu"], case["machine"], ram_mib=case["mib"], paused=False, accel="tcg", fill=fill,
              vga="std" if seabios else "none", guest=Guest(working_set_kib=4096), extra=extra) as qemu:
        if seabios:
            time.sleep(5)  # it says nothing when it has found no disk to boot from
        else:
            qemu.wait_heartbeats()
        qemu.stop()
        own = None
        if small:
            own = folder.new("dump-guest-memory")
            qemu.qmp.call("dump-guest-memory", limit=60, paging=False, protocol=f"file:{own}")
        image, told = save(folder, qemu, case)
        began = time.monotonic()
        core = Core(convert(program, image, "elf", folder.new("core")))
        seconds = time.monotonic() - began
        compared = compare_memory(folder, qemu, core, small)
        registers = compare_registers(qemu, core, case["vcpus"], told)
    if own and core.of("QEMU") != Core(own).of("QEMU"):
        raise LabError("QEMU's own notes have other bytes in dump-guest-memory's core")
    if core.of("VMCOREINFO") != [TEXT]:
        raise LabError(f"VMCOREINFO is {core.of('VMCOREINFO')}")
    compare_formats(program, image, core, folder, small, [])
    at, value = 20 * MIB, 0xE1F0000000000000 | 20 * MIB
    if core.loads[-1].address == 4 * GIB:
        below = case["mib"] * MIB - core.loads[-1].size
        at, value = 4 * GIB, 0xE1F0000000000000 | below
        # Overruled with the same, it is the same; with another, another number is at 4 GiB.
        for overruled in (below, below // 2):
            other = Core(convert(program, image, "elf", folder.new("core"), "--below-4g", f"{overruled // MIB}M"))
            if struct.unpack("<Q", other.memory(4 * GIB, 8))[0] != 0xE1F0000000000000 | overruled:
                raise LabError(f"--below-4g {overruled // MIB}M has something else at 4 GiB")
    if struct.unpack("<Q", core.memory(at, 8))[0] != value:
        raise LabError(f"{core.memory(at, 8).hex()} at {at:#x}, not {value:#x}")
    gdb = open_in_gdb(core, at, value)
    used, held = os.stat(core.path).st_blocks * 512, os.stat(image).st_blocks * 512
    if used > held + MIB:
        raise LabError(f"the core takes {used // MIB} MiB on the disk, the image {held // MIB}")
    ranges = " ".join(f"{load.address:x}+{load.size:x}" for load in core.loads)
    return (f"{ranges}: {compared / MIB:.1f} MiB and {registers} registers equal; {gdb}; {used >> 10} KiB on disk, "
            f"{seconds:.2f} s")


def cases_of(full):
    rows = [("10.0", "pc-q35-10.0", 1, 64, "guest", 0), ("10.0", "pc-i440fx-7.2", 4, 64, "devices", 2),
            ("10.0", "pc-q35-10.0", 2, 5120, "guest", 0), ("11.1", "pc-q35-10.0", 4, 64, "devices", 2)]
    if full:
        machines = [("pc-q35-10.0", 4, 64, "guest", 2), ("pc-i440fx-7.2", 4, 64, "guest", 0),
                    ("pc-i440fx-7.2", 1, 5120, "guest", 2), ("pc-q35-10.0,max-ram-below-4g=1G", 1, 2048, "guest", 0),
                    ("pc-q35-10.0", 2, 128, "seabios", 0), ("pc-q35-10.0", 2, 64, "devices", 0),
                    ("pc-i440fx-7.2", 2, 64, "devices", 2), ("pc-i440fx-7.2", 1, 128, "seabios", 0)]
        machines += [(f"pc-{chipset}-{version}", 1, mib, "guest", 0) for chipset in ("q35", "i440fx")
                     for version in ("2.4", "7.2", "9.0") for mib in (2815, 2816, 3072, 3583, 3584, 4096)]
        rows += [(version, *row) for version in ("10.0", "11.1") for row in machines]
    axes = ("qemu", "machine", "vcpus", "mib", "machine_has", "channels")
    return [dict(zip(axes, row)) for row in dict.fromkeys(rows)]


def main():
    options = arguments("ram_image's formats for analysis").parse_args()
    if not (options.list or (options.programs / "ram_image").exists()):
        raise SystemExit(f"no ram_image in {options.programs}")

    def run_group(folder, _, cases, report):
        for case in cases:
            timed(report, case, lambda case=case: one(folder, options, case))

    exit_with(run("analysis", options, cases_of(options.full), lambda case: json.dumps(case), run_group))


if __name__ == "__main__":
    main()
