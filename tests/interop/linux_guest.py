# SPDX-License-Identifier: MIT
"""A running Linux, without the vmcoreinfo device, migrates into `qemu_dump --format elf`; crash and drgn list its processes.

    python3 tests/interop/linux_guest.py --programs build/dev/examples [--show]

No part of CI: it takes Debian 12's kernel (71 MB), its symbols (859 MB, of which 634 MB are kept), and Debian 13's crash and
drgn from the mirror that apt on this machine uses, and unpacks them below build/linux-guest without installing anything.
linux_init.c is all that runs in the guest. Equal must be: the core's VMCOREINFO and what the guest reads in /proc/kcore; the
note in memory, at the address that /sys/kernel/vmcoreinfo tells; memory and `pmemsave`; registers and `info registers`; QEMU's
notes and those of `dump-guest-memory`; processes and what the guest has started. KASLR is on,
and in front of the kernel lies a note that another one has left.
"""

import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import analysis
from cases import arguments, exit_with, run, timed, told_by
from lab import MIB, ROOT, SKIPPED, Qemu
from processes import Folder, LabError, Program, wait_for

KERNEL = "linux-image-amd64"  # not the cloud's: without AMD_MEM_ENCRYPT crash ends in a stack of 0 bytes
BOOTS = 240  # seconds, at most, under TCG
# What a kernel before may have left, where Linux takes memory last: a whole note, in front of the one of the kernel that runs.
LEFT_AT = 12 * MIB
LEFT = analysis.vmcoreinfo_note(b"OSRELEASE=5.10.0\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a13580\n"
                                b"NUMBER(phys_base)=0\nKERNELOFFSET=0\n")
HERE = Path(__file__).resolve().parent


# ---- what is taken from Debian ---------------------------------------------------------------------------------------


def call(what, limit, *command, **options):
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=limit, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{what}: {error}") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise LabError(f"{what} ended with {done.returncode} {re.sub(r'https?://[^ /]+', '', ' '.join(last))[:300]}")
    return done.stdout


class Packages:
    """Debian packages, unpacked each in a folder of its own, that stay for the next run."""

    def __init__(self, folder):
        self.folder = folder.resolve()

    def names(self, virtual):
        """What a package that is only a name stands for: here already, or by apt's lists."""
        there = [each.name for each in self.folder.glob("linux-image-*-amd64") if each.is_dir()]
        if there:
            return there[0]
        found = re.search(r"Depends: (linux-image-\S+)", call("apt-cache", 60, "apt-cache", "depends", virtual))
        if not found:
            raise LabError(f"apt knows no {virtual} (apt-get update?)")
        return found[1]

    def get(self, name, limit, *members):
        """The folder of a package. `members`: only these files, with wildcards."""
        folder, part = self.folder / name, self.folder / f"{name}.part"
        if folder.is_dir():
            return folder
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            call(f"apt-get download {name}", limit, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name, cwd=part)
            package = next(part.glob("*.deb"))
            only = ["--wildcards", *members] if members else []
            call(f"unpack {name}", limit, "sh", "-c", 'file=$1; shift; dpkg-deb --fsys-tarfile "$file" | tar -x "$@"', "sh",
                 package, *only, cwd=part)
            package.unlink()
            return part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


# $1: the tree, $2: a folder to show as /mnt; the command follows. unshare and chroot replace themselves: its pid is the caller's.
IN_TREE = """tree=$1; shown=$2; shift 2
for each in /dev /proc /sys /tmp; do mount --rbind "$each" "$tree$each" || exit 1; done
mount --bind "$shown" "$tree/mnt" && exec chroot "$tree" "$@"
"""


class Tools:
    """crash, drgn and the kernel's symbols, where they can be had; those of Debian 13: 12's drgn finds no page table."""

    def __init__(self, packages, kernel):
        self.missing, self.tree, self.vmlinux = "", packages.folder / "tools", None
        try:
            self.vmlinux = next(packages.get(f"{kernel}-dbg", 600, "./usr/lib/debug/boot/vmlinux-*").glob(
                "usr/lib/debug/boot/vmlinux-*"))
            if not self.tree.is_dir():
                self._install()
        except (LabError, StopIteration) as error:
            self.missing = str(error)

    def _install(self):
        rows = call("apt-get indextargets", 60, "apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)",
                    "Created-By: Packages")
        mirror = re.search(rf"^(\S+) {platform.freedesktop_os_release().get('VERSION_CODENAME')} main$", rows, re.M)
        if not mirror:
            raise LabError("no Debian mirror among apt's sources")
        part = self.tree.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            call("mmdebstrap", 300, "mmdebstrap", "--quiet", "--variant=extract", "--aptopt=APT::Install-Recommends \"false\"",
                 "--include=base-files,libc6,libc-bin,dash,coreutils,crash,python3-drgn", "trixie", part,
                 f"deb {mirror[1]} trixie main")
            call("ldconfig", 60, "chroot", part, "ldconfig")
            for each in ("dev", "proc", "sys", "tmp", "mnt"):
                (part / each).mkdir(exist_ok=True)
            part.rename(self.tree)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def fit(self, text):
        """Whether these are the symbols of the kernel with this VMCOREINFO."""
        build_id = re.search(r"Build ID: ([0-9a-f]+)", call("readelf", 60, "readelf", "-n", self.vmlinux))
        return bool(build_id) and f"BUILD-ID={build_id[1]}\n".encode() in text

    def run(self, *command, **options):
        return call(command[0], 180, "unshare", "-m", "--propagation", "private", "sh", "-c", IN_TREE, "sh", self.tree,
                    self.vmlinux.parent, *command, env={**os.environ, "HOME": "/tmp"}, **options)


# ---- the guest -------------------------------------------------------------------------------------------------------


def archive(init):
    """An initramfs: a cpio archive ("newc") of one file."""
    def entry(number, name, mode, data):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % each for each in fields) + name + b"\0"
        return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)

    return entry(1, b"init", stat.S_IFREG | 0o755, init) + entry(0, b"TRAILER!!!", 0, b"")


def initramfs(folder):
    init, image = folder.path / "linux_init", folder.path / "initramfs"
    call("the guest's program", 60, "gcc", "-static", "-Os", "-Wall", "-Wextra", "-Werror", "-o", init, HERE / "linux_init.c")
    image.write_bytes(archive(init.read_bytes()))
    return image


def leave_note(file):
    file.seek(LEFT_AT)
    file.write(LEFT)


class Linux(Qemu):
    """A Linux in QEMU. QEMU's wrapper shows it only /tmp, so that the kernel is copied there."""

    def __init__(self, folder, case, kernel):
        self.began = 0
        image = folder.path / "vmlinuz"
        shutil.copyfile(kernel, image)
        extra = ["-bios", "bios-256k.bin", "-cpu", case["cpu"], "-smp", str(case["vcpus"]), "-kernel", image,
                 "-initrd", initramfs(folder), "-append", "console=ttyS0 quiet"]
        super().__init__(folder, case["qemu"], case["machine"], ram_mib=case["mib"], paused=False, accel="tcg",
                         fill=leave_note, extra=extra)

    def said(self):
        """What the guest's program has said since the last boot."""
        said = self.serial.read_text(errors="replace").replace("\r", "") if self.serial.exists() else ""
        return said[self.began:]

    def reboot(self):
        """Its memory stays: what the kernel before has left is there, too."""
        self.began += len(self.said())
        self.qmp.call("system_reset")
        self.boot()

    def boot(self):
        def up():
            said = self.said()
            if failed := re.search(r"^FAIL .*|Kernel panic.*", said, re.M):
                raise LabError(f"the guest: {failed[0]}")
            if not self.alive():
                raise LabError(f"QEMU ended: {self.stderr()[-300:]} {said[-300:]}")
            return re.search(r"^HB 2 0$", said, re.M)

        wait_for("that Linux comes up", BOOTS, up, 0.2)

    def bytes_of(self, what):
        found = re.search(rf"^BEGIN {what}\n([0-9a-f\n]*)\nEND {what}$", self.said(), re.M)
        if not found:
            raise LabError(f"the guest did not tell its {what}")
        return bytes.fromhex(found[1])

    def vmcoreinfo(self):
        """(address, size) of the note, by the guest's /sys."""
        found = re.search(r"^VMCOREINFO ([0-9a-f]+) ([0-9a-f]+)$", self.said(), re.M)
        return int(found[1], 16), int(found[2], 16)

    def processes(self):
        return {(1, "init"), *((int(pid), name) for pid, name in re.findall(r"^PROCESS (\d+) (\S+)$", self.said(), re.M))}


# ---- checks ----------------------------------------------------------------------------------------------------------


def compare_vmcoreinfo(guest, core):
    address, size = guest.vmcoreinfo()
    text = guest.bytes_of("kcore")
    if core.of("VMCOREINFO") != [text]:
        raise LabError(f"VMCOREINFO is {core.of('VMCOREINFO')}, the guest has {text}")
    note = guest.bytes_of("memory")
    if note[:24 + len(text)] != analysis.vmcoreinfo_note(text):
        raise LabError(f"the guest has another note in memory than in /proc/kcore: {note[:64].hex()}")
    if core.memory(address, size) != note:
        raise LabError(f"the core has another note at {address:#x}")
    if core.memory(LEFT_AT, len(LEFT)) != LEFT:
        raise LabError("Linux has overwritten the note of a kernel before: nothing is tested by it")
    offset = int(re.search(rb"^KERNELOFFSET=([0-9a-f]+)$", text, re.M)[1], 16)
    if offset == 0:
        raise LabError("KASLR moved nothing")
    return text, offset


DRGN = """
import sys, drgn
from drgn.helpers.linux.pid import for_each_task
program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.load_debug_info([sys.argv[2]])
print("drgn", drgn.__version__, "RELEASE", program["init_uts_ns"].name.release.string_().decode())
for task in for_each_task(program):
    print(task.pid.value_(), task.comm.string_().decode())
"""


def ask(tools, core, symbols, wanted):
    """(what they list in short, all that they said)."""
    crash = tools.run("crash", "-s", symbols, core.path, input="sys\nps\nbt -a\nlog\nquit\n")
    drgn = tools.run("/usr/bin/python3", "-B", "-c", DRGN, core.path, symbols)
    rows = {"crash": re.findall(r"^[> ] *(\d+) +\d+ +\d+ +[0-9a-f]{16} +\w+ +[\d.]+ +\d+ +\d+ +(\S+)$", crash, re.M),
            "drgn": re.findall(r"^(\d+) (\S+)$", drgn, re.M)}
    for name, found in rows.items():
        missing = wanted - {(int(pid), process) for pid, process in found}
        if missing:
            raise LabError(f"{name} does not list {sorted(missing)}: {(crash if name == 'crash' else drgn)[-600:]}")
    return ", ".join(f"{name} lists {len(found)} processes" for name, found in rows.items()), f"{crash}\n{drgn}"


def dump(folder, guest, options, case):
    core = folder.new("core")
    command = [options.programs.resolve() / "qemu_dump", "--listen", f"unix:{folder.new('listen')}", "--channels", 2,
               "--format", "elf", "--output", core]
    guest.configure(channels=2, return_path=True)
    with Program(folder, command) as program, told_by(program):
        guest.migrate_writing(program.address, 120)
        program.finish(120)
    return analysis.Core(core)


def one(folder, options, case, kernel, tools):
    whole = case["mib"] <= 512
    with Linux(folder, case, kernel) as guest:
        guest.boot()
        for _ in range(case["reboots"]):
            guest.reboot()
        core = dump(folder, guest, options, case)
        # The source stays as it was when it was stopped.
        told = guest.hmp("info registers -a")
        text, offset = compare_vmcoreinfo(guest, core)
        registers = analysis.compare_registers(guest, core, case["vcpus"], told)
        if not any(int(base, 16) >> 47 for base in re.findall(r"^GS =\S+ (\S+)", told, re.M)):
            raise LabError(f"no vCPU is in Linux's kernel: {told[:800]}")
        compared = analysis.compare_memory(folder, guest, core, whole)
        if whole:
            own = folder.new("dump-guest-memory")
            guest.qmp.call("dump-guest-memory", limit=120, paging=False, protocol=f"file:{own}")
            if core.of("QEMU") != analysis.Core(own).of("QEMU"):
                raise LabError("QEMU's own notes have other bytes in dump-guest-memory's core")
        wanted = guest.processes()
        before = guest.heartbeat()
        guest.cont()
        guest.wait_heartbeats(2, after=before)
    address, _ = guest.vmcoreinfo()
    gdb = analysis.open_in_gdb(core, address, struct.unpack("<Q", core.memory(address, 8))[0])
    if tools.missing:
        says = f"crash and drgn not tried: {tools.missing}"
    elif not tools.fit(text):
        says = "crash and drgn not tried: these are the symbols of another kernel"
    else:
        says, all_of_it = ask(tools, core, f"/mnt/{tools.vmlinux.name}", wanted)
        if options.show:
            print(all_of_it, flush=True)
    return (f"VMCOREINFO of {len(text)} bytes at {address:#x} is the guest's, KERNELOFFSET {offset:#x}; "
            f"{compared >> 20} MiB and {registers} registers equal; {gdb}; {says}")


def cases_of():
    axes = ("qemu", "machine", "vcpus", "mib", "cpu", "reboots")
    rows = [("10.0", "pc-i440fx-10.0", 2, 512, "qemu64", 0), ("10.0", "pc-i440fx-10.0", 2, 512, "max", 3),
            ("10.0", "pc-q35-10.0", 4, 5120, "max", 0)]
    return [dict(zip(axes, row)) for row in rows]


def main():
    parser = arguments("a Linux guest as a core")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/linux-guest", help="where Debian's packages stay")
    parser.add_argument("--show", action="store_true", help="print all that crash and drgn say")
    options = parser.parse_args()
    options.jobs = 1
    try:
        packages = Packages(options.cache)
        name = packages.names(KERNEL)
        kernel = next(packages.get(name, 120, "./boot/vmlinuz-*").glob("boot/vmlinuz-*"))
        tools = Tools(packages, name)
    except (LabError, StopIteration) as error:
        print(f"skipped: no Linux to run: {error}")
        return SKIPPED

    def run_group(folder, _, group, report):
        for case in group:
            timed(report, case, lambda: one(folder, options, case, kernel, tools))

    return run("linux_guest", options, cases_of(), lambda case: case["machine"], run_group)


if __name__ == "__main__":
    exit_with(main())
