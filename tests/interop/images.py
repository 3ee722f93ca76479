# SPDX-License-Identifier: MIT
"""Images and real QEMUs: what a QEMU saves is read here, what is written here a QEMU loads, and the guest goes on.

    python3 tests/interop/images.py --programs build/dev/examples --full

kind=saved     QEMU writes mapped-ram; ram_image checks it; qemu_load gives it to another QEMU
kind=loaded    qemu_dump writes mapped-ram of a guest, which QEMU itself loads
kind=killed    qemu_load, or the QEMU that it restores into, is killed at a random moment
kind=restored  qemu_dump writes any format, qemu_load gives it to a QEMU, with other channels and another codec
kind=plain     the same without multifd, over a socket or by exec: in and out
"""

import contextlib
import itertools
import json
import random
import shutil
import time

import cases
from lab import PEERS, Guest, Qemu, cannot_migrate_running, compare, mixed_pages
from processes import LabError, Process, Program

RAM_MIB = 32
LIMIT = 60
CODECS = ("none", "zlib", "zstd")
# Source, destination, a machine type that both have.
PAIRS = [("7.2", "7.2", "pc-i440fx-7.2"), ("7.2", "10.0", "pc-i440fx-7.2"), ("10.0", "10.0", "pc-i440fx-10.0"),
         ("10.0", "7.2", "pc-i440fx-7.2"), ("11.1", "11.1", "pc-i440fx-11.1"), ("11.1", "10.0", "pc-i440fx-10.0")]
FORMATS = ("blocks", "mapped-ram", "mapped-ram-zst")


def zero_pages_of(version):
    return ("legacy",) if version == "7.2" else ("legacy", "multifd", "none")


def all_cases():
    found = []
    for qemu, to, machine in PAIRS:
        if qemu != "7.2":
            for multifd, direct, offset, guest in itertools.product((0, 1, 2, 8), (False, True), (0, 12345), ("paused", "running")):
                found.append(dict(kind="saved", qemu=qemu, to=to, machine=machine, multifd=multifd,
                                  direct="on" if direct else "off", offset=offset, guest=guest))
        if to != "7.2":
            for channels, multifd, codec, guest in itertools.product((1, 2, 8), (0, 1, 8), CODECS, ("paused", "running")):
                found.append(dict(kind="loaded", qemu=qemu, to=to, machine=machine, channels=channels, multifd=multifd,
                                  compression=codec, guest=guest))
        for victim, number in itertools.product(("program", "destination"), range(25)):
            found.append(dict(kind="killed", qemu=qemu, to=to, machine=machine, victim=victim, number=number, channels=2,
                              compression="none", guest="paused"))
        for form, by, xbzrle, out_by, guest in itertools.product(
                ("blocks", "mapped-ram"), ("socket", "exec"), ("off", "on"), ("socket", "exec"), ("paused", "running")):
            found.append(dict(kind="plain", qemu=qemu, to=to, machine=machine, format=form, by=by, xbzrle=xbzrle,
                              out_by=out_by, guest=guest))
        for form, codec, zero, channels, out_codec, out_zero, out_channels, memory, guest in itertools.product(
                FORMATS, CODECS, zero_pages_of(qemu), (1, 3), CODECS, zero_pages_of(to), (1, 2, 5),
                ("unknown", "fresh"), ("paused", "running")):
            found.append(dict(kind="restored", qemu=qemu, to=to, machine=machine, format=form, compression=codec,
                              zero_pages=zero, channels=channels, out_compression=out_codec, out_zero_pages=out_zero,
                              out_channels=out_channels, memory=memory, guest=guest))
    return found


def chosen_cases(full):
    everything = all_cases()
    chosen = []
    for kind, together in (("saved", (("qemu", "multifd"),)), ("loaded", (("qemu", "channels"),)),
                           ("killed", ()), ("plain", ()),
                           ("restored", (("format", "compression", "zero_pages"),))):
        some = [case for case in everything if case["kind"] == kind]
        if kind == "killed":
            chosen += some if full else [case for case in some if case["qemu"] == case["to"] == "10.0" and case["number"] < 2]
        elif full:
            whole = (("qemu", "format", "compression", "zero_pages"), ("to", "format", "out_compression", "out_zero_pages"))
            chosen += cases.covering(some, *itertools.combinations(some[0], 3), *(whole if kind == "restored" else ()))
        else:
            wanted = {"restored": lambda case: True,
                      "plain": lambda case: (case["qemu"] == case["to"] and case["qemu"] in ("7.2", "10.0")
                                             and (case["guest"] == "running" or case["xbzrle"] == "off")
                                             and (case["by"] == case["out_by"] == "exec") == (case["format"] == "blocks")),
                      }.get(kind, lambda case: case["qemu"] == "10.0")
            chosen += cases.covering([case for case in some if wanted(case)], *together)
    return chosen


def run_program(folder, limit, *command):
    """Runs a program to its end; LabError unless its exit status is 0."""
    with Process(folder, command[0].name, command) as program:
        status = program.wait_exit(limit)
        if status != 0:
            raise LabError(f"{command[0].name} ended with {status}: {program.stderr()[-400:]}")


class Case:
    """A source that stays as it was at the end of its migration, and what became of it elsewhere."""

    def __init__(self, folder, case, source, programs):
        self.folder, self.case, self.source, self.programs = folder, case, source, programs
        self.dice = random.Random()
        self.folder_of_case = folder.memory / folder.new("images").name

    def migrate(self, uri, **settings):
        capabilities = {"xbzrle": self.case.get("xbzrle") == "on"}
        if self.case["qemu"] != "7.2":
            capabilities["mapped-ram"] = False
            settings["direct-io"] = False
        if capabilities["xbzrle"]:
            settings["max_bandwidth"] = 64 << 20  # else the guest has no time to write a page twice
        self.source.configure(capabilities=capabilities, **settings)
        self.source.cont()
        if self.case["guest"] == "running":
            self.source.migrate_writing(uri, LIMIT, xbzrle=self.case.get("xbzrle") == "on")
        else:
            self.source.stop()
            self.source.migrate(uri)
            self.source.wait_migration("completed", LIMIT)

    def save(self):
        """QEMU itself writes the file. One on a disk, because tmpfs has no direct I/O."""
        case = self.case
        self.image = self.folder.new("image")
        offset = f",offset={case['offset']}" if case["offset"] else ""
        # Not right behind the migration before: a QEMU 10.0 that still cleans up crashes when multifd is switched meanwhile.
        self.source.configure(multifd=case["multifd"] > 0, capabilities={"mapped-ram": True},
                              channels=case["multifd"] or None, **{"direct-io": case["direct"] == "on"})
        self.source.cont()
        if case["guest"] == "paused":
            self.source.stop()
        self.source.migrate(f"file:{self.image}{offset}")
        self.source.wait_migration("completed", LIMIT)
        info = self.folder.new("info.json")
        at = ("--offset", case["offset"])
        run_program(self.folder, LIMIT, self.programs / "ram_image", "info", *at, "--json", info, self.image)
        run_program(self.folder, LIMIT, self.programs / "ram_image", "verify", *at, self.image)
        told = json.loads(info.read_text())
        sizes = {block["name"]: block["size"] for block in told["blocks"]}
        if sizes != {name: block.size for name, block in self.source.blocks().items()}:
            raise LabError(f"ram_image info: {sizes}")
        if told["machine"] != case["machine"]:
            raise LabError(f"ram_image info: machine {told['machine']}")

    def dump(self, form):
        case = self.case
        result = self.folder.new("dump.json")
        command = [self.programs / "qemu_dump", "--listen", f"unix:{self.folder.new('listen')}", "--channels",
                   case["channels"], "--compression", case["compression"], "--format", form, "--output", self.image,
                   "--json", result]
        with Program(self.folder, command) as dump, cases.told_by(dump):
            self.migrate(dump.address, channels=case["channels"], compression=case["compression"],
                         zero_pages=case.get("zero_pages"), return_path=True)
            dump.finish(LIMIT)
        told = json.loads(result.read_text())
        if told["ok"] is not True or told["warnings"] or not told["stood_still"] >= 0:
            raise LabError(f"qemu_dump --json: {told}")
        left = {file.name for file in self.folder_of_case.iterdir()} - {"image"}
        if left:
            raise LabError(f"left behind: {sorted(left)}")

    def dump_plain(self):
        """Without multifd: over a socket, or by a file that QEMU's exec: has written."""
        case, result, saved = self.case, self.folder.new("dump.json"), self.folder_of_case / "stream"
        is_file = case["by"] == "exec"
        listen = f"exec:cat {saved}" if is_file else f"unix:{self.folder.new('listen')}"
        command = [self.programs / "qemu_dump", "--listen", listen, "--channels", 0, "--format", case["format"], "--output",
                   self.image, "--json", result]
        if is_file:
            self.migrate(f"exec:cat > {saved}", multifd=False)
            run_program(self.folder, LIMIT, *command)
            saved.unlink()
        else:
            with Program(self.folder, command) as dump, cases.told_by(dump):
                self.migrate(dump.address, multifd=False, return_path=True)
                dump.finish(LIMIT)
        told = json.loads(result.read_text())
        if told["ok"] is not True or told["warnings"] or told["return_path"] == is_file:
            raise LabError(f"qemu_dump --json: {told}")
        # A guest that stands still sends no page twice.
        if (told["xbzrle_pages"] > 0) != (case["xbzrle"] == "on" and case["guest"] == "running"):
            raise LabError(f"qemu_dump --json: {told['xbzrle_pages']} XBZRLE pages of {told['normal_pages']}")
        return told["xbzrle_pages"]

    def load_plain(self, destination):
        if self.case["out_by"] == "socket":
            return self.load(destination, 0, "none")
        stream = self.folder_of_case / "stream"
        run_program(self.folder, LIMIT, self.programs / "qemu_load", "--input", self.image, "--connect",
                    f"exec:cat > {stream}", "--channels", 0)
        destination.configure(multifd=False)
        destination.listen(f"exec:cat {stream}")
        destination.wait_migration("completed", LIMIT)

    def load_by_qemu(self, destination):
        multifd = self.case["multifd"]
        destination.configure(multifd=multifd > 0, capabilities={"mapped-ram": True}, channels=multifd or None)
        destination.listen(f"file:{self.image}")
        destination.wait_migration("completed", LIMIT)

    def load(self, destination, channels, compression, *options):
        path, result = self.folder.new("destination"), self.folder.new("load.json")
        destination.configure(multifd=channels > 0, channels=channels, compression=compression)
        destination.listen(f"unix:{path}")
        command = [self.programs / "qemu_load", "--input", self.image, "--connect", f"unix:{path}", "--channels", channels,
                   "--compression", compression, "--peer", PEERS[self.case["to"]], "--json", result, *options]
        with Process(self.folder, "qemu_load", command) as load, cases.told_by(load, destination):
            status = load.wait_exit(LIMIT)
            if status != 0:
                raise LabError(f"qemu_load ended with {status}")
            destination.wait_migration("completed", LIMIT)
        told = json.loads(result.read_text())
        total = sum(block.size for block in self.source.blocks().values())
        if told["ok"] is not True or told["ram_bytes"] != total:
            raise LabError(f"qemu_load --json: {total} bytes of RAM, {told}")

    def kill(self, destination):
        """Nothing says that all went well, nobody waits for ever, and the image is what it was."""
        path, seconds = self.folder.new("destination"), self.dice.uniform(0, 1.5)
        destination.configure(channels=2)
        destination.listen(f"unix:{path}")
        command = [self.programs / "qemu_load", "--input", self.image, "--connect", f"unix:{path}", "--channels", 2,
                   "--bandwidth", "12M", "--timeout", 10]
        with Process(self.folder, "qemu_load", command) as load, cases.told_by(load, destination):
            time.sleep(seconds)  # a moment, not a wait
            (load if self.case["victim"] == "program" else destination).kill()
            if self.case["victim"] == "destination":
                status, lines = load.wait_exit(LIMIT), load.stderr().splitlines()
                if status != 1 or len(lines) != 1 or "destination" not in lines[0]:
                    raise LabError(f"qemu_load ended with {status}: {lines}")
            else:
                with contextlib.suppress(LabError):  # its end, or a silent monitor (format/packets.md section 6.5)
                    if destination.migration().get("status") == "completed":
                        raise AssertionError("the destination says completed")
        run_program(self.folder, LIMIT, self.programs / "ram_image", "verify", self.image)
        return f"{seconds:.2f} s after the start"

    def goes_on(self, destination):
        found = compare(self.source.read_blocks(), destination.read_blocks())
        if found:
            raise LabError(f"source and destination: {found}")
        at_switch = self.source.heartbeat()
        destination.cont()
        now = destination.wait_heartbeats(2, after=at_switch)
        return f"guest at sweep {at_switch[0]}, then {now[0]}"

    def run(self):
        case = self.case
        shutil.rmtree(self.folder_of_case, ignore_errors=True)  # of a try whose guest stood still
        self.folder_of_case.mkdir()
        self.image = self.folder_of_case / "image"
        fill = mixed_pages(2) if case.get("memory") == "unknown" else None  # memory that held something else before
        if case["kind"] == "saved":
            self.save()
        elif case["kind"] == "plain":
            xbzrle_pages = self.dump_plain()
        else:
            self.dump(case.get("format", "mapped-ram-zst" if case["kind"] == "killed" else "mapped-ram"))
        with Qemu(self.folder, case["to"], case["machine"], ram_mib=RAM_MIB, incoming=True, fill=fill) as destination:
            if case["kind"] == "saved":
                self.load(destination, 2, "none", "--offset", case["offset"])
            elif case["kind"] == "killed":
                return self.kill(destination)
            elif case["kind"] == "loaded":
                self.load_by_qemu(destination)
            elif case["kind"] == "plain":
                self.load_plain(destination)
                return f"{self.goes_on(destination)}, {xbzrle_pages} XBZRLE pages"
            else:
                self.load(destination, case["out_channels"], case["out_compression"], "--zero-pages",
                          case["out_zero_pages"], "--out-memory", case["memory"])
            return self.goes_on(destination)


def run_group(folder, group, group_cases, report, programs):
    qemu, machine = group[0], group[2]
    source = None
    for case in group_cases:
        why_not = cannot_migrate_running(folder, qemu) if case["guest"] == "running" else ""
        if why_not:
            report.add(case, "skip", why_not)
            continue
        if source is None:
            source = Qemu(folder, qemu, machine, ram_mib=RAM_MIB, paused=False, fill=mixed_pages(), guest=Guest(4096))
            source.wait_heartbeats()
        one = Case(folder, case, source, programs)
        try:
            if not cases.timed(report, case, one.run):
                source.kill()
                source = None
        finally:
            shutil.rmtree(one.folder_of_case, ignore_errors=True)
    if source:
        source.kill()


def main():
    options = cases.arguments("images and QEMUs").parse_args()
    return cases.run("images", options, chosen_cases(options.full), lambda case: (case["qemu"], case["to"], case["machine"]),
                     lambda *group: run_group(*group, options.programs.resolve()),
                     lambda case: (case["qemu"], case["to"]))


if __name__ == "__main__":
    cases.exit_with(main())
