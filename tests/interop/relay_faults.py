# SPDX-License-Identifier: MIT
"""What qemu_relay may take for granted about the QEMUs beside it: nothing. Each case is a kind of thing that it once did.

    python3 tests/interop/relay_faults.py --programs build/dev/examples [--full] [--only kind=memory]

memory   the destination's memory holds something else before: every page arrives, however zero pages travel
names    a machine type that names no version of QEMU: the relay says so, and takes the peer for an old one
styles   source and destination end epochs in different ways: refused by name in seconds, where both do alike it goes on
guest    whoever goes at the end, the relay says who has the guest
loss     a destination is lost: the same words wherever that is noticed first

All guests are paused, so no case needs KVM.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import termios
import threading
import time

import cases
import lab
from lab import MIB, PAGE, Qemu, compare, mixed_pages
from processes import LabError, Process, Program, wait_for
from proxy import Connection, Proxy, parse_address
from qmp import Qmp

RAM_MIB = 16
EACH_SECTION = "migration.multifd-flush-after-each-section"
TCG = dict(accel="tcg")


def all_cases():
    found = []

    def add(full=False, **case):
        found.append(case | {"full": full})

    # memory: main RAM, and a device's, that are full of 0xaa before. Last column: rewritten when all has been sent once.
    pairs = [("7.2", "7.2", "7.2"), ("7.2", "10.0", "7.2"), ("10.0", "7.2", "7.2"), ("10.0", "10.0", "10.0"),
             ("11.1", "10.0", "10.0"), ("10.0", "11.1", "10.0"), ("11.1", "11.1", "11.1"), ("7.2", "11.1", "7.2")]
    for qemu, to, machine in pairs:
        for zero_pages in ("legacy",) if qemu == "7.2" else ("legacy", "multifd", "none"):
            for out_zero_pages in ("auto", "legacy", "none") if to == "7.2" else ("auto", "legacy", "multifd", "none"):
                quick = (out_zero_pages == "auto" and (qemu, to) in (("7.2", "7.2"), ("7.2", "10.0"), ("10.0", "7.2"),
                                                                     ("10.0", "10.0"), ("11.1", "11.1"))) or \
                        (qemu, to, zero_pages, out_zero_pages) in (("7.2", "10.0", "legacy", "multifd"),
                                                                   ("10.0", "10.0", "multifd", "multifd"),
                                                                   ("10.0", "10.0", "none", "multifd"))
                add(not quick, kind="memory", qemu=qemu, to=to, machine=f"pc-i440fx-{machine}", zero_pages=zero_pages,
                    out_zero_pages=out_zero_pages, memory="dirty")
    for zero_pages, memory in (("multifd", "device"), ("legacy", "device"), ("multifd", "rewritten"),
                               ("legacy", "rewritten"), ("multifd", "fresh"), ("legacy", "fresh")):
        for version in ("10.0", "11.1"):
            add(version == "11.1" and memory != "fresh", kind="memory", qemu=version, to=version,
                machine=f"pc-i440fx-{version}", zero_pages=zero_pages, out_zero_pages="multifd", memory=memory)
    add(kind="names", qemu="7.2", to="7.2", machine="isapc", target="x86_64")
    for machine in ("SS-20", "SS-10"):
        add(machine == "SS-10", kind="names", qemu="7.2", to="7.2", machine=machine, target="sparc")
    for version, machine in (("10.0", "10.0"), ("10.0", "7.2"), ("11.1", "11.1")):
        for styles in ("on-off", "off-on", "on-on", "off-off"):
            for return_path in ("on", "off"):
                # Nothing tells of a property that is set at the destination alone, but its answers.
                if return_path == "off" and styles in (("off-on", "on-on") if machine != "7.2" else ("on-off", "off-off")):
                    continue
                add(version == "11.1" or machine == "7.2" and (return_path, styles) != ("on", "off-off"), kind="styles", qemu=version,
                    to=version, machine=f"pc-i440fx-{machine}", styles=styles, return_path=return_path)
    for how in ("source-unanswered", "source-confirmed", "signal-unanswered", "signal-confirmed", "destination-loads-not",
                "destination-gone", "nobody", "source-reset", "late-stranger"):
        for return_path in ("on", "off"):
            if return_path == "off" and how.endswith("confirmed"):
                continue
            if return_path == "on" and how in ("source-reset", "late-stranger"):  # the confirmation has passed by then
                continue
            add(kind="guest", qemu="10.0", to="10.0", machine="pc-i440fx-10.0", how=how, return_path=return_path)
    for version, machine in (("7.2", "7.2"), ("10.0", "10.0"), ("11.1", "11.1")):
        for how in ("uuid", "compression", "size", "killed", "main-cut", "channel-cut"):
            add(version == "11.1", kind="loss", qemu=version, to=version, machine=f"pc-i440fx-{machine}", how=how)
    return [case for case in found if {case["qemu"], case["to"]} <= set(lab.VERSIONS)]


# ---- the stage -------------------------------------------------------------------------------------------------------


class Stage:
    """A source, the relay, a destination, and what stands between them."""

    def __init__(self, folder, stack, case, programs):
        self.folder, self.stack, self.case, self.programs = folder, stack, case, programs
        self.result = folder.new("relay.json")

    def qemu(self, role, **settings):
        version = self.case["qemu" if role == "source" else "to"]
        settings = dict(ram_mib=RAM_MIB, incoming=role == "destination", name=role) | TCG | settings
        return self.stack.enter_context(Qemu(self.folder, version, self.case["machine"], **settings))

    def relay(self, connect, *options, **keywords):
        command = [self.programs / "qemu_relay", "--listen", "tcp:127.0.0.1:0", "--connect", connect, "--json", self.result,
                   *options]
        return self.stack.enter_context(Program(self.folder, command, **keywords))

    def told(self):
        return json.loads(self.result.read_text())


def full_of_aa(file):
    file.write(b"\xaa" * os.fstat(file.fileno()).st_size)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Gdb:
    """Writes the memory of a paused guest so that QEMU notices."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))

    def write(self, address, data):
        for at in range(0, len(data), 1024):
            part = data[at : at + 1024]
            packet = f"M{address + at:x},{len(part):x}:{part.hex()}"
            self._socket.sendall(f"${packet}#{sum(packet.encode()) % 256:02x}".encode())
            answer = b""
            while b"$OK#9a" not in answer:
                got = self._socket.recv(100)
                if not got or b"$E" in answer:
                    raise LabError(f"gdb stub: {answer}")
                answer += got
            self._socket.sendall(b"+")


def device_memory(folder, stack, fill):
    """(path, arguments) of a device whose 64 MiB are guest memory."""
    path = folder.memory / folder.new("device").name
    stack.callback(path.unlink, missing_ok=True)
    with open(path, "w+b") as file:
        file.truncate(64 * MIB)
        fill(file)
    return path, ("-object", f"memory-backend-file,id=device0,size=64M,mem-path={path},share=on",
                  "-device", "ivshmem-plain,memdev=device0,master=on")


def run_memory(stage):
    folder, stack, case = stage.folder, stage.stack, stage.case
    before = (lambda file: None) if case["memory"] == "fresh" else full_of_aa
    paths, extra = [], {"source": (), "destination": ()}
    if case["memory"] == "device":
        for role, fill in (("source", mixed_pages(2)), ("destination", before)):
            path, extra[role] = device_memory(folder, stack, fill)
            paths.append(path)
    gdb_path = folder.new("gdb")
    rewritten = case["memory"] == "rewritten"
    if rewritten:
        extra["source"] = ("-gdb", f"unix:{gdb_path},server=on,wait=off")
    source = stage.qemu("source", fill=mixed_pages(), extra=extra["source"])
    destination = stage.qemu("destination", fill=before, extra=extra["destination"])
    destination.configure(channels=2, return_path=True)
    path = folder.new("destination")
    destination.listen(f"unix:{path}")
    source.configure(channels=2, zero_pages=case["zero_pages"], return_path=True,
                     capabilities={"pause-before-switchover": rewritten})
    options = ["--out-peer", f"qemu-{case['to'] if case['to'] != '11.1' else '11.0'}"]
    if case["out_zero_pages"] != "auto":
        options += ["--out-zero-pages", case["out_zero_pages"]]
    if case["memory"] == "fresh":
        options += ["--out-memory", "fresh"]
    relay = stage.relay(f"unix:{path}", *options)
    with cases.told_by(relay, destination):
        if rewritten:
            gdb = Gdb(gdb_path)
            source.migrate(relay.address)
            source.wait_migration("pre-switchover", 30)
            memory = source.read_block("ram0")
            places = range(2 * MIB, RAM_MIB * MIB, PAGE)
            zeros = [at for at in places if not any(memory[at : at + PAGE])]
            data = [at for at in places if any(memory[at : at + PAGE])]
            for at in data[:8]:
                gdb.write(at, bytes(PAGE))
            for at in zeros[:4]:
                gdb.write(at, b"\x55" * PAGE)
            source.qmp.call("migrate-continue", state="pre-switchover")
        else:
            source.migrate(relay.address)
        source.wait_migration("completed", 60)
        destination.wait_migration("completed", 20)
        relay.finish(30)
    if paths and paths[0].read_bytes() != paths[1].read_bytes():
        raise LabError("the device's memory differs")
    found = compare(source.read_blocks(), destination.read_blocks())
    if found:
        raise LabError(found)
    told = stage.told()
    lists = told["zero_pages"] - told["out_zero_records"]
    if case["memory"] == "fresh" and lists < told["zero_pages"] / 2:
        raise LabError(f"only {lists} of {told['zero_pages']} zero pages were listed")
    if case["memory"] == "rewritten" and case["zero_pages"] == "multifd" and lists == 0:
        raise LabError("no page was listed that the destination had had before")
    return f"{lists} zero pages listed, {told['out_zero_records']} by record, {told['out_zero_pages']}"


# ---- names -----------------------------------------------------------------------------------------------------------


class Sparc(Process):
    """A paused qemu-system-sparc."""

    def __init__(self, folder, command, machine, ram, *extra):
        self.ram = ram
        monitor = folder.new("qmp")
        super().__init__(folder, f"sparc-{machine}", [
            command, "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-m", f"{RAM_MIB}M", "-machine",
            f"{machine},memory-backend=ram0", "-object",
            f"memory-backend-file,id=ram0,size={RAM_MIB}M,share=on,mem-path={ram}", "-qmp",
            f"unix:{monitor},server=on,wait=off", *extra])
        self.qmp = Qmp(monitor, self)
        self.qmp.call("migrate-set-capabilities", capabilities=[
            {"capability": name, "state": True} for name in ("multifd", "return-path")])

    def status(self):
        return self.qmp.call("query-migrate").get("status")


def run_names(stage):
    folder, stack, case = stage.folder, stage.stack, stage.case
    path = folder.new("destination")
    if case["target"] == "sparc":
        ram = {}
        for role, fill in (("source", mixed_pages()), ("destination", full_of_aa)):
            ram[role] = folder.memory / folder.new("ram").name
            stack.callback(ram[role].unlink, missing_ok=True)
            with open(ram[role], "w+b") as file:
                file.truncate(RAM_MIB * MIB)
                fill(file)
        command = shutil.which("qemu-system-sparc")
        destination = stack.enter_context(Sparc(folder, command, case["machine"], ram["destination"], "-incoming", "defer"))
        source = stack.enter_context(Sparc(folder, command, case["machine"], ram["source"]))
        destination.qmp.call("migrate-incoming", uri=f"unix:{path}")
        migrate = lambda uri: source.qmp.call("migrate", uri=uri)
        completed = lambda: wait_for("source: completed", 30, lambda: source.status() == "completed")
        contents = lambda: [ram[role].read_bytes() for role in ("source", "destination")]
    else:
        source = stage.qemu("source", fill=mixed_pages())
        destination = stage.qemu("destination", fill=full_of_aa)
        destination.configure(channels=2, return_path=True)
        destination.listen(f"unix:{path}")
        source.configure(channels=2, return_path=True)
        migrate, completed = source.migrate, lambda: source.wait_migration("completed", 30)
        contents = lambda: [qemu.read_block("ram0") for qemu in (source, destination)]
    # "fresh" is not true here: a list would show.
    relay = stage.relay(f"unix:{path}", "--out-memory", "fresh")
    with cases.told_by(relay, destination):
        migrate(relay.address)
        completed()
        relay.finish(30)
    if len(set(contents())) != 1:
        raise LabError("memory differs")
    if case["machine"] not in relay.message() or "--out-peer" not in relay.message():
        raise LabError(f"stderr does not say that {case['machine']} names no version: {relay.message()}")
    if stage.told()["out_peer"] != "qemu-7.2":
        raise LabError(f"out_peer is {stage.told()['out_peer']}")
    return relay.message()


# ---- styles ----------------------------------------------------------------------------------------------------------


def run_styles(stage):
    folder, case = stage.folder, stage.case
    here, there = case["styles"].split("-")
    by_itself = "on" if case["machine"].endswith("-7.2") else "off"
    return_path = case["return_path"] == "on"
    source = stage.qemu("source", fill=mixed_pages(), extra=("-global", f"{EACH_SECTION}={here}"))
    destination = stage.qemu("destination", extra=("-global", f"{EACH_SECTION}={there}"))
    destination.configure(channels=2, return_path=return_path)
    path = folder.new("destination")
    destination.listen(f"unix:{path}")
    source.configure(channels=2, zero_pages="legacy", return_path=return_path)
    relay = stage.relay(f"unix:{path}", "--out-peer", "qemu-10.0", "--timeout", 6)
    began = time.monotonic()
    source.migrate(relay.address)
    # Names alone refuse where there are no answers; answers let pass what fits, however unusual it is.
    refused = here != there if return_path else here != by_itself
    # What only the destination's silence would show: seen for machine type 7.2, whose sources are often 7.2 themselves.
    if return_path and case["styles"] == "on-off" and by_itself == "on":
        return "not told apart: as a QEMU 7.2 would send; ends by --timeout" if relay.alive() else "ended"
    if not refused:
        with cases.told_by(relay, destination):
            source.wait_migration("completed", 30)
            destination.wait_migration("completed", 20)
            relay.finish(20)
        found = compare(source.read_blocks(), destination.read_blocks())
        if found:
            raise LabError(found)
        return f"{time.monotonic() - began:.1f} s"
    message = relay.fail(20)
    if EACH_SECTION not in message or case["machine"] not in message:
        raise LabError(f"the message does not name the property and the machine type: {message}")
    return f"{time.monotonic() - began:.1f} s"


# ---- who has the guest -----------------------------------------------------------------------------------------------

def unsent(end):
    return struct.unpack("i", fcntl.ioctl(end.fileno(), termios.TIOCOUTQ, bytes(4)))[0]


SHUT_0 = struct.pack(">HHI", 1, 4, 0)


class Gate:
    """A proxy for one side's connections that can hold back the destination's SHUT(0), or a connection's end."""

    def __init__(self, connect, hold_answer=False, hold_end=False):
        self.answer_is_here, self.answer_may_pass = threading.Event(), threading.Event()
        self.end_is_here, self.ends_held = threading.Event(), 0
        self._hold_answer, self._hold_end = hold_answer, hold_end
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp:%s:%d" % self._listener.getsockname()
        self.pairs, self.passed_ends = [], []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                family, place = parse_address(self._connect)
                far = socket.socket(family)
                far.connect(place)
                self.pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink, source is near), daemon=True).start()

    def _pump(self, source, sink, forth):
        try:
            while data := source.recv(1 << 18):
                if not forth and data.endswith(SHUT_0):
                    self.answer_is_here.set()
                    if self._hold_answer:
                        self.answer_may_pass.wait(60)
                sink.sendall(data)
            if forth and self._hold_end:
                self.ends_held += 1
                self.end_is_here.set()
                return
            sink.shutdown(socket.SHUT_WR)
            if forth:
                self.passed_ends.append(sink)
        except OSError:
            self.end(source, sink)

    def reset_channels(self):
        """The source's end on the main connection, resets on its channels, in place of the ends that are held back."""
        wait_for("everything at the relay", 20, lambda: not any(unsent(far) for _, far in self.pairs))
        for _, far in self.pairs[1:]:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):  # the relay has broken this one, because of the one before
                far.shutdown(socket.SHUT_RD)  # ends the read that would keep the socket
            far.close()
        with contextlib.suppress(OSError):
            self.pairs[0][1].shutdown(socket.SHUT_WR)

    def end_channels(self):
        for _, far in self.pairs:
            far.shutdown(socket.SHUT_WR)

    @staticmethod
    def end(*ends):
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Ends everything as a process that dies does."""
        for pair in self.pairs:
            self.end(*pair)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answer_may_pass.set()
        self._listener.close()
        self.cut()


def run_guest(stage):
    case, how = stage.case, stage.case["how"]
    return_path = case["return_path"] == "on"
    # A device that the destination does not have: its state cannot be loaded.
    extra = ("-device", "virtio-rng-pci") if how == "destination-loads-not" else ()
    source = stage.qemu("source", fill=mixed_pages(), extra=extra)
    destination = stage.qemu("destination")
    destination.configure(channels=2, return_path=return_path)
    destination.listen("tcp:127.0.0.1:0")
    source.configure(channels=2, return_path=return_path)
    back = stage.stack.enter_context(Gate(destination.listening_on(), hold_answer=how != "signal-confirmed"))
    # A proxy makes a peaceful end of a reset.
    relay = stage.relay(destination.listening_on() if how == "destination-loads-not" else back.address, "--timeout", 5)
    front = stage.stack.enter_context(Gate(relay.address,
                                           hold_end=how in ("signal-confirmed", "source-reset", "late-stranger")))
    late = how in ("source-reset", "late-stranger")
    stopped = not return_path and how != "destination-loads-not" and not late
    if stopped:  # without an answer the destination's end is all that there is: so it does not come to that yet
        os.kill(destination.pid, signal.SIGSTOP)
    source.migrate(front.address)
    if how != "destination-loads-not" and (stopped or late or how == "signal-confirmed"):
        source.wait_migration("completed", 30)
    elif how != "destination-loads-not" and not back.answer_is_here.wait(30):
        raise LabError("the destination does not answer")
    if late:
        wait_for("the source's ends", 20, lambda: front.ends_held == len(front.pairs) == 3)
        if how == "late-stranger":
            stranger = stage.stack.enter_context(socket.create_connection(parse_address(relay.address)[1]))
            # Another channel of the source's, by what it says.
            stranger.sendall(struct.pack(">II16sB7x40x", 0x11223344, 1, bytes(16), 2))
            front.end_channels()
        else:
            front.reset_channels()
    elif how.startswith("source"):
        if not return_path:  # it has closed its connections, and nothing is on its way any more
            wait_for("the source's ends", 20, lambda: len(front.passed_ends) == len(front.pairs) == 3)
        front.cut()
    elif how.startswith("signal"):
        if return_path and how == "signal-confirmed" and not front.end_is_here.wait(20):
            raise LabError("the source does not close its connections")
        os.kill(relay.pid, signal.SIGTERM)
    elif how == "destination-gone":
        back.cut() if return_path else destination.kill()
    if how in ("source-confirmed", "nobody"):
        back.answer_may_pass.set()
    if stopped and how in ("source-unanswered", "nobody"):
        os.kill(destination.pid, signal.SIGCONT)
    # Where the relay was told to end by a signal it may not have sent everything yet.
    status, guests, words = {
        "source-unanswered": (1, ["unknown"], "info status") if return_path else (0, ["unknown"], "ask the destination"),
        "source-confirmed": (1, ["both"], "quit"),
        "signal-unanswered": (1, ["unknown"] if return_path else ["unknown", "source"], ""),
        "signal-confirmed": (0, ["destination"], "the destination confirmed"),
        "destination-loads-not": (1, ["source"] if return_path else ["unknown", "source"], "cont"),
        "destination-gone": (1, ["unknown"] if return_path else ["unknown", "source"], ""),
        "nobody": (0, ["destination"] if return_path else ["unknown"], "confirmed"),
        "source-reset": (0, ["unknown"], "ask the destination"),
        "late-stranger": (0, ["unknown"], "ask the destination"),
    }[how]
    ended = relay.wait_exit(45)
    if how == "destination-gone" and not return_path and ended == 0:
        # It had read all before it was killed: on the wire that is how a destination ends that has loaded everything.
        status, guests, words = 0, ["unknown"], "ask the destination"
    told = stage.told()
    text = told.get("outcome") or told.get("error", "")
    if ended != status or told.get("guest") not in guests or words not in text:
        raise LabError(f"ended with {ended}, guest {told.get('guest')}, not {status}, {guests}, {words!r}: {text}")
    if late:
        destination.wait_migration("completed", 20)
        if "warning: everything is forwarded, but" not in relay.stderr():
            raise LabError(f"no warning: {relay.stderr()}")
    return f"{ended}, {told['guest']}: {text[-120:]}"


# ---- a destination is lost -------------------------------------------------------------------------------------------

LOST = re.compile(r"destination: (has gone in the middle of the migration|says that it failed \(SHUT \d+\)); its own message "
                  r"says why\. Channels, compression, uuid and machine type must be those it expects; the guest is at the "
                  r"source")


def noise(file):
    file.seek(MIB)
    file.write(os.urandom((RAM_MIB - 1) * MIB))


class BeginningOnly(Connection):
    """A channel that passes no more than its beginning. So a migration is in its middle until it is lost, however busy the
    machine is; a cap at the source does not hold it there, because QEMU lifts the cap for the last round."""
    most = 256 * 1024


def run_loss(stage):
    case, how = stage.case, stage.case["how"]
    uuids = {role: "3f9d2c1e-8f0b-4c53-9b1a-5c7e6d2a1b4%d" % (how == "uuid" and role == "source")
             for role in ("source", "destination")}
    source = stage.qemu("source", fill=noise, uuid=uuids["source"])
    destination = stage.qemu("destination", uuid=uuids["destination"],
                             ram_mib=2 * RAM_MIB if how == "size" else RAM_MIB)
    destination.configure(channels=2, compression="zlib" if how == "compression" else "none", return_path=True)
    destination.listen("tcp:127.0.0.1:0")
    source.configure(channels=2, return_path=True, max_bandwidth=MIB)  # the source is at work when a destination refuses
    lost = how in ("killed", "main-cut", "channel-cut")
    proxy = stage.stack.enter_context(Proxy("tcp:127.0.0.1:0", destination.listening_on(),
                                            BeginningOnly if lost else Connection))
    relay = stage.relay(proxy.address, "--timeout", 5)
    source.migrate(relay.address)
    if lost:
        wait_for("pages on a channel", 20, lambda: any(one.passed > one.most for one in proxy.connections[1:]))
        if how == "killed":
            destination.kill()
        else:
            proxy.connections[0 if how == "main-cut" else 1].cut()
    message = relay.fail(20)
    if not LOST.search(message):
        raise LabError(f"other words: {message}")
    if stage.told()["guest"] != "source":
        raise LabError(f"guest: {stage.told()['guest']}")
    source.wait_migration("failed", 10)
    return message[:100]


# ----------------------------------------------------------------------------------------------------------------------

KINDS = {"memory": run_memory, "names": run_names, "styles": run_styles, "guest": run_guest, "loss": run_loss}


def run_one(folder, case, report, programs):
    if case.get("target") == "sparc" and not shutil.which("qemu-system-sparc"):
        report.add(case, "skip", "no qemu-system-sparc in PATH")
        return

    def act():
        with contextlib.ExitStack() as stack:
            return KINDS[case["kind"]](Stage(folder, stack, case, programs))

    cases.timed(report, case, act)


def main():
    options = cases.arguments("what qemu_relay takes for granted").parse_args()
    wanted = [{axis: value for axis, value in case.items() if axis != "full"}
              for case in all_cases() if options.full or not case["full"]]
    return cases.run("relay_faults", options, wanted, lambda case: tuple(case.values()),
                     lambda folder, _, some, report: run_one(folder, some[0], report, options.programs.resolve()),
                     lambda case: (case["qemu"], case["to"]))


if __name__ == "__main__":
    cases.exit_with(main())
