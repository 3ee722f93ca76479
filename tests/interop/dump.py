# SPDX-License-Identifier: MIT
"""Real QEMUs migrate into qemu_dump: each file it leaves is the guest's memory.

    python3 tests/interop/dump.py --programs build/dev/examples --full
"""

import itertools
import json
import shutil
from pathlib import Path

import cases
from lab import PAGE, Qemu, cannot_migrate_running, compare, mixed_pages, pages_sent_again
from processes import LabError, Program

RAM_MIB = 32
UUID = "3f9d2c1e-8f0b-4c53-9b1a-5c7e6d2a1b40"
MACHINES = {
    "7.2": ["pc-i440fx-7.2"],
    "10.0": [f"pc-i440fx-{version}" for version in ("7.2", "8.0", "8.1", "9.2", "10.0")],
    "11.1": [f"pc-i440fx-{version}" for version in ("7.2", "10.0", "11.1")],
}
PER_SECTION = ("pc-i440fx-7.2", "pc-i440fx-8.0")  # format/packets.md section 6.1


def all_cases():
    return [
        dict(qemu=qemu, machine=machine, compression=compression, channels=channels, zero_pages=zero_pages,
             return_path=return_path, guest=guest)
        for qemu in MACHINES
        for machine, compression, channels, zero_pages, return_path, guest in itertools.product(
            MACHINES[qemu], ("none", "zlib", "zstd"), (1, 2, 5),
            ("legacy",) if qemu == "7.2" else ("legacy", "multifd", "none"), ("on", "off"), ("paused", "running"))
    ]


def quick_cases():
    triples = {"10.0": (("machine", "zero_pages", "guest"), ("machine", "compression", "guest"))}
    return [case for qemu in MACHINES
            for case in cases.covering([case for case in all_cases() if case["qemu"] == qemu], *triples.get(qemu, ()))]


def run_group(folder, group, group_cases, report, programs):
    """All cases of one QEMU and machine type, with one source that goes on after each migration."""
    qemu, machine = group
    source = None
    for case in sorted(group_cases, key=lambda case: case["guest"]):
        why_not = cannot_migrate_running(folder, qemu) if case["guest"] == "running" else ""
        if why_not:
            report.add(case, "skip", why_not)
            continue
        if source is None:
            source = Qemu(folder, qemu, machine, ram_mib=RAM_MIB, uuid=UUID, paused=False, fill=mixed_pages())
            source.wait_heartbeats()
        if not cases.timed(report, case, lambda: migrate(folder, source, case, programs)):
            source.kill()
            source = None
    if source:
        source.kill()


def migrate(folder, source, case, programs):
    output = folder.memory / folder.new("dump").name
    result = folder.new("dump.json")
    tcp = case["channels"] == 2  # both kinds of address
    command = [programs / "qemu_dump", "--listen", "tcp:127.0.0.1:0" if tcp else f"unix:{folder.new('socket')}",
               "--channels", case["channels"], "--compression", case["compression"], "--output", output,
               "--json", result, "--uuid", UUID]
    source.configure(channels=case["channels"], compression=case["compression"], zero_pages=case["zero_pages"],
                     return_path=case["return_path"] == "on")
    try:
        with Program(folder, command) as dump, cases.told_by(dump):
            source.cont()  # also one that is to be paused: QEMU does not migrate twice from the same pause
            if case["guest"] == "running":
                info = source.migrate_writing(dump.address)
            else:
                source.stop()
                source.migrate(dump.address)
                info = source.wait_migration("completed", 60)
            dump.finish(30)
        return check(source, output, json.loads(result.read_text()), case, info)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def check(source, output, result, case, info):
    manifest = json.loads((output / "manifest.json").read_text())
    dumped, rows = {}, {}
    for row in manifest["blocks"]:
        file = output / row["file"]
        if Path(row["file"]).name != row["file"]:
            raise LabError(f"manifest.json names {row['file']!r}, which is not a plain file name")
        dumped[row["name"]], rows[row["name"]] = file.read_bytes(), row
        if file.stat().st_size != row["size"]:
            raise LabError(f"{file.name} has {file.stat().st_size} bytes, manifest.json says {row['size']}")
        if len(bytes.fromhex(row["xxh3"])) != 8:
            raise LabError(f"manifest.json: xxh3 {row['xxh3']!r} of {row['name']}")
    found = compare(source.read_blocks(), dumped)
    if found:
        raise LabError(f"dump and guest: {found}")
    others = {file.name for file in output.iterdir()} - {row["file"] for row in rows.values()}
    if others != {"manifest.json", "device-state.bin", "vmdesc.json"}:
        raise LabError(f"beside the blocks: {sorted(others)}")
    json.loads((output / "vmdesc.json").read_text())
    total = sum(len(content) for content in dumped.values())
    expected = {
        "machine": case["machine"], "uuid": UUID, "page_size": PAGE,
        "sync_style": "per-section" if case["machine"] in PER_SECTION else "per-round",
    }
    for key, value in expected.items():
        if manifest[key] != value:
            raise LabError(f"manifest.json: {key} is {manifest[key]!r}, not {value!r}")
    if result["ok"] is not True or len(result["channels"]) != case["channels"] or result["ram_bytes"] < total:
        raise LabError(f"--json: {result}")
    # Zero pages that were never anything else are holes, if the source says which they are.
    if case["guest"] == "paused" and case["zero_pages"] != "none":
        held = (output / rows["ram0"]["file"]).stat().st_blocks * 512
        zeros = sum(not any(dumped["ram0"][at : at + PAGE]) for at in range(0, len(dumped["ram0"]), PAGE)) * PAGE
        if held > len(dumped["ram0"]) - zeros // 2:
            raise LabError(f"ram0 holds {held} bytes, though {zeros} of {len(dumped['ram0'])} are zero pages")
    if case["guest"] == "running" and manifest["epochs"] < 3:
        raise LabError(f"{manifest['epochs']} epochs of a guest that wrote")
    return f"{manifest['epochs']} epochs, {pages_sent_again(info)} pages again"


def main():
    options = cases.arguments("QEMU migrates into qemu_dump").parse_args()
    chosen = all_cases() if options.full else quick_cases()
    return cases.run("dump", options, chosen, lambda case: (case["qemu"], case["machine"]),
                     lambda *group: run_group(*group, options.programs.resolve()))


if __name__ == "__main__":
    cases.exit_with(main())
