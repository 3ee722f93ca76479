# SPDX-License-Identifier: MIT
"""Real QEMUs to migrate with: how one is found, started, driven by QMP, read and ended.

    with Folder() as folder, Qemu(folder, "7.2", "pc-i440fx-7.2") as source:
        source.configure(channels=2, compression="zstd")
        source.migrate("unix:" + path)
        source.wait_migration("completed", 30)
        pages = source.read_block("ram0")

Every wait has a limit, since a QEMU whose migration went wrong can stop answering; every process started here ends with
the `with` that started it, and with this Python at the latest. `python3 lab.py --self-test` migrates QEMU into QEMU.
"""

import argparse
import contextlib
import fcntl
import functools
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from processes import Folder, GuestStoodStill, LabError, Process, wait_for
from qmp import Qmp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MIB = 1 << 20
PAGE = 4096
VERSIONS = ("7.2", "10.0", "11.1")
PEERS = {"7.2": "qemu-7.2", "10.0": "qemu-10.0", "11.1": "qemu-11.0"}  # what the programs call them: --out-peer
SKIPPED = 77  # exit status that ctest counts as "skipped"


# ---- which QEMUs there are -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binary:
    version: str  # "7.2": which generation
    command: str
    full_version: str  # as it prints itself


def _probe(version, command):
    try:
        out = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, cwd="/tmp")
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{command}: {error}"
    found = re.search(r"version ((\d+\.\d+)\S*.*)", out.stdout)
    if not found:
        return None, f"{command} --version: {(out.stderr or out.stdout).strip()[:200]}"
    if found[2] != version:
        return None, f"{command} is QEMU {found[1]}, not {version}"
    return Binary(version, command, found[1].strip()), ""


@functools.cache
def find_qemu(version):
    """(Binary, "") or (None, why there is none). 7.2 is taken from PATH, others from folders that install_qemu.sh made."""
    if version == "7.2":
        command = shutil.which("qemu-system-x86_64")
        return _probe(version, command) if command else (None, "no qemu-system-x86_64 in PATH")
    if version not in VERSIONS:
        raise ValueError(version)
    variable, place = f"MULTIFD_QEMU{version.split('.')[0]}", f"qemu-{version}"
    for folder in filter(None, (os.environ.get(variable), ROOT / "build" / place, f"/work/{place}")):
        if os.access(Path(folder) / "qemu", os.X_OK):
            return _probe(version, str(Path(folder) / "qemu"))
    return None, f"no QEMU {version}: sh tests/interop/install_qemu.sh {version} build/{place} (or a folder in {variable})"


@dataclass(frozen=True)
class Guest:
    """guest.S's parameters: how much memory it rewrites, its pauses, in units of about 0.4 us, and bytes from page to page."""

    working_set_kib: int = 8192
    pause_per_page: int = 0
    pause_per_sweep: int = 0
    stride: int = PAGE


def guest_image(folder, guest=Guest()):
    """The 64 KiB firmware that rewrites and checks its own memory, built when first asked for."""
    words = (guest.working_set_kib, guest.pause_per_page, guest.pause_per_sweep, guest.stride)
    image = folder.path / f"guest-{'-'.join(map(str, words))}.bin"
    if not image.exists():
        command = ["sh", str(HERE / "build_guest.sh"), str(image), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise LabError(f"build_guest.sh: {done.stderr.strip()[-400:]}")
    return image


@functools.cache
def kvm_opens():
    try:
        with open("/dev/kvm", "r+b", buffering=0) as kvm:
            return fcntl.ioctl(kvm, 0xAE00) == 12  # KVM_GET_API_VERSION
    except OSError:
        return False


_accelerators = {}
_accelerators_lock = threading.Lock()


def accelerator(folder, version):
    """"kvm" where a guest of this QEMU really runs under it, else "tcg". MULTIFD_ACCEL overrides."""
    forced = os.environ.get("MULTIFD_ACCEL")
    if forced:
        return forced
    with _accelerators_lock:
        if version not in _accelerators:
            _accelerators[version] = "tcg"
            if kvm_opens():
                with contextlib.suppress(LabError):
                    with Qemu(folder, version, "pc-i440fx-7.2", paused=False, accel="kvm") as guest:
                        guest.wait_heartbeats(2, 30)
                        _accelerators[version] = "kvm"
        return _accelerators[version]


def cannot_migrate_running(folder, version):
    """Why a running guest of this QEMU cannot be a test of others; "" where it can."""
    if version == "7.2" and accelerator(folder, version) == "tcg":
        return "no KVM: QEMU 7.2's TCG loses pages of a guest that writes fast, whoever receives them"
    return ""


# ---- QEMU ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    name: str
    size: int  # the used length, what migrates
    host: int  # its address in QEMU's own address space


# How blocks of equal size are told apart, where QEMU (before 8.0) does not print their addresses: the first bytes.
_FIRST_BYTES = {
    "pc.bios": b"MFDGUEST",
    "/rom@etc/acpi/tables": b"FACS", "/rom@etc/acpi/rsdp": b"RSD PTR ", "/rom@etc/table-loader": b"\1\0\0\0"}
_BLOCK_ROW = re.compile(r"^ *(\S+) +\d+ \S+ +0x\w+ +0x(\w+) +0x(\w+)(?: +0x(\w+))?", re.M)


class Qemu(Process):
    """One QEMU with `ram_mib` of main memory (block "ram0", a shared file) and the self-checking guest as firmware.

    version   one of VERSIONS
    machine   always a versioned type
    paused    starts with -S; an incoming one then stays paused when its migration is over
    incoming  waits for listen()
    fill      function that gets the open RAM file before QEMU starts
    """

    def __init__(self, folder, version, machine, *, ram_mib=64, paused=True, incoming=False, accel=None, uuid=None,
                 vga="none", fill=None, guest=Guest(), name=None, extra=()):
        binary, why = find_qemu(version)
        if not binary:
            raise LabError(why)
        self.binary, self.machine, self.ram_mib, self.paused = binary, machine, ram_mib, paused
        self.accel = accel or accelerator(folder, version)
        name = name or f"qemu-{version}-{'destination' if incoming else 'source'}"
        self._ram = ram = folder.memory / folder.new("ram").name
        with open(ram, "w+b") as file:
            file.truncate(ram_mib * MIB)
            if fill:
                fill(file)
        monitor, self.serial = folder.new("qmp"), folder.new("serial")
        command = [
            binary.command, "-accel", self.accel, "-machine", f"{machine},memory-backend=ram0",
            "-object", f"memory-backend-file,id=ram0,size={ram_mib}M,mem-path={ram},share=on", "-m", f"{ram_mib}M",
            "-nodefaults", "-no-user-config", "-display", "none", "-vga", vga, "-nic", "none",
            "-serial", f"file:{self.serial}", "-qmp", f"unix:{monitor},server=on,wait=off",
            "-bios", guest_image(folder, guest), *(["-uuid", uuid] if uuid else []), *(["-S"] if paused else []),
            *(["-incoming", "defer"] if incoming else []), *extra]
        super().__init__(folder, name, command)
        try:
            self.qmp = Qmp(monitor, self)
        except BaseException:
            self.kill()
            raise
        finally:
            ram.unlink()  # QEMU has it mapped; so nothing stays behind whatever happens to us
        self._blocks = None

    def kill(self):
        super().kill()
        if hasattr(self, "qmp"):
            self.qmp.close()

    # ---- migration

    def configure(self, *, multifd=True, channels=None, compression=None, zero_pages=None, return_path=False,
                  switchover_ack=False, level=None, downtime_ms=2000, max_bandwidth=0, capabilities=None, **parameters):
        """Sets capabilities and parameters; what is None keeps QEMU's default. max_bandwidth 0: no limit."""
        wanted = {"events": True, "multifd": multifd, "return-path": return_path, **(capabilities or {})}
        if self.binary.version != "7.2":
            wanted["switchover-ack"] = switchover_ack
        self.qmp.call("migrate-set-capabilities",
                      capabilities=[{"capability": name, "state": state} for name, state in wanted.items()])
        settings = {"max-bandwidth": max_bandwidth or 1 << 40, "downtime-limit": downtime_ms, **parameters}
        if channels:
            settings["multifd-channels"] = channels
        if compression:
            settings["multifd-compression"] = compression
        if level is not None:
            settings[f"multifd-{compression}-level"] = level
        if zero_pages and self.binary.version != "7.2":
            settings["zero-page-detection"] = zero_pages
        self.qmp.call("migrate-set-parameters", **settings)

    def listen(self, uri):
        self.qmp.call("migrate-incoming", uri=uri)

    def listening_on(self):
        """Where an incoming QEMU listens, once it does: the port that 0 became."""
        address = wait_for(f"{self.name}: that it listens", 30, lambda: self.migration().get("socket-address"))[0]
        return f"unix:{address['path']}" if address["type"] == "unix" else f"tcp:{address['host']}:{address['port']}"

    def migrate(self, uri):
        self.qmp.call("migrate", uri=uri)

    def migration(self):
        return self.qmp.call("query-migrate")

    def wait_migration(self, status="completed", limit=60, other=("failed", "cancelled", "completed")):
        """query-migrate's answer once it says `status`; LabError when it says one of `other` or too late."""
        end = time.monotonic() + limit
        while True:
            info = self.migration()
            now = info.get("status", "none")
            if now == status:
                return info
            if now in other:
                raise LabError(f"{self.name}: migration is {now}, not {status}: "
                               f"{info.get('error-desc', '')} {self.stderr()[-300:]}")
            if time.monotonic() > end:
                raise LabError(f"{self.name}: migration is {now} after {limit} s, not {status}: {self.stderr()[-300:]}")
            self.qmp.wait_event(0.05)

    def migrate_writing(self, uri, limit=60, xbzrle=False):
        """Migrates a running guest so that pages are sent again: the switch-over is allowed only after some rounds,
        and with `xbzrle` after some pages of that kind.
        Returns query-migrate's answer."""
        self.qmp.call("migrate-set-parameters", downtime_limit=1)
        self.migrate(uri)
        end = time.monotonic() + limit
        while True:
            info = self.migration()
            again = info.get("ram", {}).get("dirty-sync-count", 0) >= 4
            changed = not xbzrle or info.get("xbzrle-cache", {}).get("pages", 0) > 10
            if info["status"] not in ("setup", "active") or again and changed:
                break
            if time.monotonic() > end:
                raise LabError(f"{self.name}: migration is {info['status']} after {limit} s: {self.stderr()[-300:]}")
            self.qmp.wait_event(0.02)
        self.qmp.call("migrate-set-parameters", downtime_limit=10000)
        info = self.wait_migration("completed", limit)
        if pages_sent_again(info) <= 0:
            raise GuestStoodStill(f"{self.name}: the guest wrote nothing while it migrated")
        if xbzrle and info.get("xbzrle-cache", {}).get("pages", 0) == 0:  # it had converged by then, on a busy machine
            raise GuestStoodStill(f"{self.name}: no page went out as what had changed in it")
        return info

    def stop(self):
        self.qmp.call("stop")

    def cont(self):
        self.qmp.call("cont")

    def status(self):
        """"running", "postmigrate", "inmigrate", "paused", "prelaunch"..."""
        return self.qmp.call("query-status")["status"]

    # ---- memory

    def hmp(self, line):
        return self.qmp.call("human-monitor-command", command_line=line)

    def blocks(self):
        """Every RAM block that QEMU knows, by name; their places do not move."""
        if self._blocks is None:
            rows = _BLOCK_ROW.findall(self.hmp("info ramblock"))
            hosts = {name: int(host, 16) for name, _, _, host in rows if host}
            if not hosts:  # QEMU before 8.0
                hosts = self.find_hosts({name: int(total, 16) for name, _, total, _ in rows})
            self._blocks = {name: Block(name, int(used, 16), hosts[name]) for name, used, _, _ in rows}
        return self._blocks

    def find_hosts(self, sizes):
        """Where blocks lie, from the process's mappings: the main one is a file; QEMU maps others at multiples of
        2 MiB, in full size, with an inaccessible page behind."""
        lines = [line.split(maxsplit=5) for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines()]
        maps = [(*(int(word, 16) for word in line[0].split("-")), line[1], line[-1]) for line in lines]
        hosts = {"ram0": start for start, _, _, path in maps if f"{self._ram} " in path + " "}
        places = [(start, end - start) for (start, end, rights, _), (behind, _, behind_rights, _) in zip(maps, maps[1:])
                  if rights == "rw-p" and start % (2 * MIB) == 0 and behind == end and behind_rights == "---p"]
        # Those with known first bytes come first, so that what is left is another's.
        for name, total in sorted(sizes.items(), key=lambda row: row[0] not in _FIRST_BYTES):
            if name in hosts:
                continue
            first = _FIRST_BYTES.get(name, b"")
            fitting = [start for start, size in places if size == total and start not in hosts.values()
                       and self.read_memory(start, len(first)) == first]
            if len(fitting) != 1:
                raise LabError(f"{self.name}: {len(fitting)} mappings look like block {name}")
            hosts[name] = fitting[0]
        return hosts

    def read_memory(self, host, size):
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            parts = []
            while size:
                memory.seek(host)
                part = memory.read(min(size, 16 * MIB))
                parts.append(part)
                host, size = host + len(part), size - len(part)
            return b"".join(parts)

    def write_memory(self, host, data):
        """Only for a guest that does not migrate at the moment: QEMU does not notice."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(host)
            memory.write(data)

    def read_block(self, name):
        block = self.blocks()[name]
        return self.read_memory(block.host, block.size)

    def read_blocks(self):
        return {name: self.read_block(name) for name in self.blocks()}

    # ---- the guest's own check

    def heartbeat(self):
        """(sweep, errors) of the last complete "HB sweep errors" line (hexadecimal), or None."""
        text = self.serial.read_bytes() if self.serial.exists() else b""
        lines = re.findall(rb"HB ([0-9a-fA-F]+) ([0-9a-fA-F]+)\r?\n", text)
        return (int(lines[-1][0], 16), int(lines[-1][1], 16)) if lines else None

    def wait_heartbeats(self, count=2, limit=60, after=None):
        """Waits for `count` sweeps more than `after` (than now); the last heartbeat. LabError when the guest counts an
        error."""
        before = after or self.heartbeat() or (0, 0)

        def later():
            if not self.alive():
                raise LabError(f"{self.name} ended with {self.popen.returncode}: {self.stderr()[-300:]}")
            now = self.heartbeat()
            if now and now[1]:
                raise LabError(f"{self.name}: the guest found {now[1]} wrong pages by sweep {now[0]}")
            return now if now and now[0] >= before[0] + count else None

        return wait_for(f"{self.name}: {count} sweeps of the guest after {before[0]}", limit, later, 0.02)


def pages_sent_again(info):
    """How many more pages than there are query-migrate counts."""
    ram = info["ram"]
    return ram["normal"] + ram["duplicate"] - ram["total"] // PAGE


# ---- memory contents -------------------------------------------------------------------------------------------------


def mixed_pages(seed=1):
    """A fill for Qemu: stretches of zeros, of text and of random bytes, of 1 to 64 pages each."""

    def fill(file):
        size = os.fstat(file.fileno()).st_size
        dice = random.Random(seed)
        words = [b"page", b"dirty", b"migrate", b"channel", b"epoch", b"guest", b"zero", b"0123456789", b"\n", b" "]
        text = b"".join(dice.choice(words) for _ in range(1 << 18))
        noise = dice.randbytes(4 * MIB)
        file.seek(MIB)  # what firmware looks at stays empty
        while (at := file.tell()) < size:
            length = min(size - at, dice.randint(1, 64) * PAGE)
            kind = dice.randrange(3)
            if kind == 0:
                file.seek(at + length)
            else:
                content = (text, noise)[kind - 1]
                start = dice.randrange(len(content) - length)
                file.write(content[start : start + length])

    return fill


def compare(wanted, got):
    """Nothing when both {block: bytes} are equal, else a line that says where they differ."""
    if set(wanted) != set(got):
        return f"blocks differ: only one side has {sorted(set(wanted) ^ set(got))}"
    for name in sorted(wanted):
        left, right = wanted[name], got[name]
        if len(left) != len(right):
            return f"{name}: {len(left)} bytes there, {len(right)} here"
        if left != right:
            pages = [at for at in range(0, len(left), PAGE) if left[at : at + PAGE] != right[at : at + PAGE]]
            return f"{name}: {len(pages)} of {len(left) // PAGE} pages differ, the first at {pages[0]:#x}"
    return ""


# ---- self-test -------------------------------------------------------------------------------------------------------


def self_test(quick):
    """QEMU to QEMU, so that what the other tests find is not this file's doing."""
    failed = skipped = 0
    with Folder() as folder:
        for version in VERSIONS:
            print(f"QEMU {version}: {accelerator(folder, version) if find_qemu(version)[0] else find_qemu(version)[1]}")
        some = (("zstd",), (True,)) if quick else (("none", "zstd"), (False, True))
        cases = list(itertools.product(VERSIONS, VERSIONS, *some))
        for source_version, destination_version, compression, running in cases:
            name = f"{source_version} -> {destination_version} {compression} {'running' if running else 'paused'}"
            missing = [find_qemu(v)[1] for v in (source_version, destination_version) if not find_qemu(v)[0]]
            if not missing and running:
                missing = list(filter(None, [cannot_migrate_running(folder, source_version)]))
            if missing:
                print(f"skipped {name}: {missing[0]}")
                skipped += 1
                continue
            began = time.monotonic()
            try:
                says = _self_test_pair(folder, source_version, destination_version, compression, running)
                print(f"ok    {name} {time.monotonic() - began:.1f} s {says}")
            except LabError as error:
                failed += 1
                print(f"FAIL  {name}: {error}")
        newest = next((version for version in reversed(VERSIONS[1:]) if find_qemu(version)[0]), None)
        if newest:
            with Qemu(folder, newest, "pc-i440fx-7.2", vga="std") as printing:
                printed = {block.name: block.host for block in printing.blocks().values()}
                sizes = {row[0]: int(row[2], 16) for row in _BLOCK_ROW.findall(printing.hmp("info ramblock"))}
                found = printing.find_hosts(sizes)
                print(f"{'ok  ' if found == printed else 'FAIL'}  blocks found where QEMU {newest} says they are")
                failed += found != printed
    print(f"{len(cases) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else SKIPPED if skipped == len(cases) else 0


def _self_test_pair(folder, source_version, destination_version, compression, running):
    machine = "pc-i440fx-7.2"
    setup = dict(channels=3, compression=compression, zero_pages="legacy", return_path=True)
    with (Qemu(folder, source_version, machine, paused=not running, fill=mixed_pages()) as source,
          Qemu(folder, destination_version, machine, incoming=True) as destination):
        if running:
            source.wait_heartbeats()
        path = folder.new("migration")
        for qemu in (source, destination):
            qemu.configure(**setup)
        destination.listen(f"unix:{path}")
        if running:
            info = source.migrate_writing(f"unix:{path}")
        else:
            source.migrate(f"unix:{path}")
            info = source.wait_migration("completed", 60)
        destination.wait_migration("completed", 60)
        found = compare(source.read_blocks(), destination.read_blocks())
        if found:
            raise LabError(found)
        destination.cont()
        destination.wait_heartbeats()
        return (f"{len(source.blocks())} blocks, {info['ram']['dirty-sync-count']} rounds, "
                f"{pages_sent_again(info)} pages sent again, heartbeat {destination.heartbeat()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="QEMUs to migrate with")
    parser.add_argument("--self-test", action="store_true", required=True)
    parser.add_argument("--quick", action="store_true")
    sys.exit(self_test(parser.parse_args().quick))
