# SPDX-License-Identifier: MIT
"""multifd_pager serves the image that a real QEMU wrote of its guest: every page, to VMMs written from the protocols' documents.

    python3 tests/interop/lazy.py --programs build/dev/examples --fake-vmm build/dev/tests/programs/fake_vmm
"""

import json
import os
import signal
import sys
from pathlib import Path

import cases
from images import run_program
from lab import Guest, Qemu, mixed_pages
from processes import LabError, Program

sys.path.append(str(Path(__file__).resolve().parent.parent / "programs"))
from vmm import LIMIT, PROTOCOLS, Vmm, start  # noqa: E402

RAM_MIB = 32
MACHINES = {"10.0": "pc-i440fx-10.0", "11.1": "pc-i440fx-11.1"}


def all_cases():
    return [dict(qemu=qemu, multifd=multifd, format=form, protocol=protocol, regions=regions, workers=workers)
            for qemu in MACHINES for multifd in (0, 2) for form in ("mapped-ram", "mapped-ram-zst") for protocol in PROTOCOLS
            for regions in (1, 3) for workers in (0, 2)]


def chosen_cases(full):
    return all_cases() if full else cases.covering(all_cases(), ("qemu", "format"), ("format", "protocol"), ("protocol", "workers"))


def run_case(folder, case, images, programs, fake_vmm):
    """All pages of all blocks where the protocol names blocks; of main memory with the others."""
    image, blocks = images[case["multifd"]]
    if case["format"] == "mapped-ram-zst":
        packed = folder.new("packed")
        run_program(folder, LIMIT, programs / "ram_image", "convert", "--to", "mapped-ram-zst", image, packed)
        image = packed
    socket, report, protocol = folder.new("s"), folder.new("report"), case["protocol"]
    command = [programs / "multifd_pager", "--image", image, "--listen", f"unix:{socket}", "--protocol", protocol, "--workers",
               case["workers"], "--json", report]
    with Program(folder, list(map(str, command))) as pager:
        for name in blocks if protocol == "multifd" else ["ram0"]:
            memory = folder.memory / folder.new("wanted").name
            memory.write_bytes(blocks[name])
            with Vmm(fake_vmm, protocol, socket, memory, case["regions"], name if protocol == "multifd" else "") as vmm:
                start(vmm, protocol)
                vmm.do("touch 1 3000 3")
                vmm.do("check")
            memory.unlink()
        os.kill(pager.pid, signal.SIGTERM)
        pager.finish(LIMIT)
    told = json.loads(report.read_text())
    if told["faults"] == 0:
        raise LabError("not a fault")
    return f"{told['faults']} faults"


def run_group(folder, group, group_cases, report, programs, fake_vmm):
    qemu = group[0]
    with Qemu(folder, qemu, MACHINES[qemu], ram_mib=RAM_MIB, fill=mixed_pages(), guest=Guest(4096)) as source:
        images = {}
        for multifd in sorted({case["multifd"] for case in group_cases}):
            image = folder.new("image")
            source.configure(multifd=multifd > 0, capabilities={"mapped-ram": True}, channels=multifd or None)
            source.cont()  # else it says that it was paused by the migration before
            source.stop()
            source.migrate(f"file:{image}")
            source.wait_migration("completed", LIMIT)
            images[multifd] = image, source.read_blocks()
        for case in group_cases:
            cases.timed(report, case, lambda case=case: run_case(folder, case, images, programs, fake_vmm))


def main():
    parser = cases.arguments("images on demand")
    parser.add_argument("--fake-vmm", required=True, type=Path)
    options = parser.parse_args()
    return cases.run("lazy", options, chosen_cases(options.full), lambda case: (case["qemu"],),
                     lambda *group: run_group(*group, options.programs.resolve(), options.fake_vmm.resolve()),
                     lambda case: (case["qemu"],))


if __name__ == "__main__":
    cases.exit_with(main())
