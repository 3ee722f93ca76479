# SPDX-License-Identifier: MIT
"""Real QEMUs migrate into each other through qemu_relay, with other policies on each side: the guest goes on.

    python3 tests/interop/relay.py --programs build/dev/examples --full
"""

import itertools
import json
import random

import cases
from lab import PEERS, Guest, Qemu, cannot_migrate_running, compare, mixed_pages, pages_sent_again
from processes import LabError, Program

RAM_MIB = 32
UUID = "3f9d2c1e-8f0b-4c53-9b1a-5c7e6d2a1b40"
PAIRS = [
    ("7.2", "7.2", "pc-i440fx-7.2"),
    ("10.0", "10.0", "pc-i440fx-7.2"),
    ("7.2", "10.0", "pc-i440fx-7.2"),
    ("10.0", "7.2", "pc-i440fx-7.2"),
    ("10.0", "10.0", "pc-i440fx-8.1"),
    ("10.0", "10.0", "pc-i440fx-9.2"),
    ("10.0", "10.0", "pc-i440fx-10.0"),
    ("11.1", "11.1", "pc-i440fx-11.1"),
    ("11.1", "11.1", "pc-i440fx-8.1"),
    ("11.1", "10.0", "pc-i440fx-10.0"),
    ("10.0", "11.1", "pc-i440fx-9.2"),
    ("11.1", "7.2", "pc-i440fx-7.2"),
    ("7.2", "11.1", "pc-i440fx-7.2"),
]
CODECS = ("none", "zlib", "zstd")


def all_cases():
    found = []
    for qemu, to, machine in PAIRS:
        zero_pages = ("legacy",) if qemu == "7.2" else ("legacy", "multifd", "none")
        out_zero_pages = ("legacy", "none") if to == "7.2" else ("legacy", "multifd", "none")
        # "ack": with switchover-ack, which both sides must know.
        return_path = ("on", "off", "ack") if "7.2" not in (qemu, to) else ("on", "off")
        for values in itertools.product((1, 2, 5), CODECS, zero_pages, (1, 3, 4), CODECS, out_zero_pages, return_path,
                                        ("paused", "running")):
            axes = ("channels", "compression", "zero_pages", "out_channels", "out_compression", "out_zero_pages",
                    "return_path", "guest")
            found.append(dict(qemu=qemu, to=to, machine=machine) | dict(zip(axes, values)))
    return found


def chosen_cases(full):
    """Every pair of values, and some of more; with full, every three, the codecs and the zero pages of each pair."""
    everything = all_cases()
    pair = ("qemu", "to", "machine")
    if not full:
        everything = random.Random(1).sample(everything, 3000)  # all pairs are among these, found sooner
        return cases.covering(everything, (*pair, "guest"), ("qemu", "to", "zero_pages", "out_zero_pages"),
                              ("qemu", "compression", "zero_pages"), ("to", "out_compression", "out_zero_pages"))
    return cases.covering(everything, *itertools.combinations(everything[0], 3),
                          (*pair, "compression", "out_compression"), (*pair, "zero_pages", "out_zero_pages", "guest"))


def run_group(folder, group, group_cases, report, programs):
    qemu, to, machine = group
    source = None
    for case in group_cases:
        why_not = cannot_migrate_running(folder, qemu) if case["guest"] == "running" else ""
        if why_not:
            report.add(case, "skip", why_not)
            continue
        if source is None:
            source = Qemu(folder, qemu, machine, ram_mib=RAM_MIB, uuid=UUID, paused=False, fill=mixed_pages(),
                          guest=Guest(4096))
            source.wait_heartbeats()
        if not cases.timed(report, case, lambda: migrate(folder, source, case, programs)):
            source.kill()
            source = None
    if source:
        source.kill()


def migrate(folder, source, case, programs):
    path, result = folder.new("destination"), folder.new("relay.json")
    ack = case["return_path"] == "ack"
    return_path = case["return_path"] != "off"
    listen = "tcp:127.0.0.1:0" if case["channels"] == 2 else f"unix:{folder.new('relay')}"
    command = [
        programs / "qemu_relay", "--listen", listen, "--connect", f"unix:{path}",
        "--in-channels", case["channels"], "--in-compression", case["compression"],
        "--out-channels", case["out_channels"], "--out-compression", case["out_compression"],
        "--out-zero-pages", case["out_zero_pages"], "--out-peer", PEERS[case["to"]], "--json", result]
    if case["out_compression"] != "none":
        command += ["--out-level", 2]
    with Qemu(folder, case["to"], case["machine"], ram_mib=RAM_MIB, uuid=UUID, incoming=True) as destination:
        destination.configure(channels=case["out_channels"], compression=case["out_compression"],
                              return_path=return_path, switchover_ack=ack)
        destination.listen(f"unix:{path}")
        source.configure(channels=case["channels"], compression=case["compression"], zero_pages=case["zero_pages"],
                         return_path=return_path, switchover_ack=ack)
        with Program(folder, command) as relay, cases.told_by(relay, destination):
            if case["guest"] == "running":
                source.cont()
                info = source.migrate_writing(relay.address)
            else:
                source.stop()
                source.migrate(relay.address)
                info = source.wait_migration("completed", 60)
            destination.wait_migration("completed", 60)
            relay.finish(30)
        found = compare(source.read_blocks(), destination.read_blocks())
        if found:
            raise LabError(f"source and destination: {found}")
        told = json.loads(result.read_text())
        if told["ok"] is not True or told["ram_bytes"] <= 0:
            raise LabError(f"--json: {told}")
        # One sweep that began on the other side, and a whole one here.
        at_switch = source.heartbeat()
        destination.cont()
        now = destination.wait_heartbeats(2, after=at_switch)
        source.cont()
        return f"{pages_sent_again(info)} pages again, guest at sweep {at_switch[0]}, then {now[0]}"


def main():
    options = cases.arguments("QEMU migrates into QEMU through qemu_relay").parse_args()
    return cases.run("relay", options, chosen_cases(options.full),
                     lambda case: (case["qemu"], case["to"], case["machine"]),
                     lambda *group: run_group(*group, options.programs.resolve()),
                     lambda case: (case["qemu"], case["to"]))


if __name__ == "__main__":
    cases.exit_with(main())
