# SPDX-License-Identifier: MIT
"""Main streams of MainStreamWriter, and packets of Sender, into real QEMU destinations.

    python3 tests/interop/written.py build/dev/tests/play_source [--qemu 10.0]

Each QEMU waits with -S; play_source (tests/support/play_source.cpp) is its source, with the same machine type and
block list, pages of a pattern and no device's state. The QEMU must take every byte, say SHUT(0), and have the pattern
in every block. Asked whether it is ours, it must answer as a QEMU does, and the source must show it nothing that it
does not know.
"""

import argparse
import subprocess
import sys

from lab import PAGE, PEERS, SKIPPED, VERSIONS, Folder, LabError, Qemu, find_qemu

MACHINES = {"7.2": ("pc-i440fx-7.2",), "10.0": ("pc-q35-10.0", "pc-q35-9.0", "pc-i440fx-7.2"), "11.1": ("pc-q35-11.1",)}
LIMIT = 120  # seconds for everything; no measure


def content(block, pages):
    """What play_source has in a block."""
    return b"".join(bytes(PAGE) if page % 3 == 0 else (block + 1 << 24 | page).to_bytes(4, "little") * 1024
                    for page in range(pages))


def peer_of(version, machine):
    """The generation that decides what the stream may have: the older one of the program's and the machine type's."""
    return "qemu-7.2" if machine.endswith("-7.2") else PEERS[version] if not machine.endswith("-9.0") else "qemu-9.0"


def case(program, folder, version, machine, peer, channels):
    with Qemu(folder, version, machine, incoming=True, ram_mib=16) as destination:
        blocks = destination.blocks()
        path = folder.new("written")
        destination.configure(channels=channels, compression="none", zero_pages="legacy", return_path=True)
        destination.listen(f"unix:{path}")
        sizes = [f"{name}={block.size // PAGE}" for name, block in blocks.items()]
        done = subprocess.run([program, f"unix:{path}", machine, peer, str(channels), *sizes], capture_output=True,
                              text=True, timeout=LIMIT)
        if done.returncode != 0:
            raise LabError(f"play_source: {done.stdout.strip()} {done.stderr.strip()}; {destination.stderr()[-300:]}")
        wanted = ["PONG 0x1", *(["PONG 0x6d660001"] if peer == "multifd" else []), "SHUT 0"]
        if done.stdout.splitlines() != wanted:
            raise LabError(f"play_source heard {done.stdout.split()}; {destination.stderr()[-300:]}")
        destination.wait_migration("completed", 30)
        if destination.stderr():
            raise LabError(f"{destination.name} says: {destination.stderr()[-300:]}")
        for number, (name, block) in enumerate(blocks.items()):
            here = destination.read_block(name)
            sent = content(number, block.size // PAGE)
            if here != sent:
                first = next(i for i in range(0, len(sent), PAGE) if here[i:i + PAGE] != sent[i:i + PAGE])
                raise LabError(f"block {name} differs at {first:#x}")
        return f"{len(blocks)} blocks, {sum(block.size for block in blocks.values()) // PAGE} pages"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--qemu", choices=VERSIONS, action="append")
    options = parser.parse_args()
    failed = passed = 0
    with Folder() as folder:
        for version in options.qemu or VERSIONS:
            binary, why = find_qemu(version)
            if not binary:
                print(f"skipped QEMU {version}: {why}")
                continue
            for machine in MACHINES[version]:
                # The question may only go to a peer of unknown kind, so of a row that fits this machine's style.
                rows = [(peer_of(version, machine), 1), (peer_of(version, machine), 3)]
                if not machine.endswith("-7.2"):
                    rows.append(("multifd", 2))
                for peer, channels in rows:
                    name = f"{machine} of QEMU {version}, as {peer}, {channels} channels"
                    try:
                        print(f"ok    {name}: {case(options.program, folder, version, machine, peer, channels)}")
                        passed += 1
                    except (LabError, subprocess.TimeoutExpired) as error:
                        failed += 1
                        print(f"FAIL  {name}: {error}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0 if passed else SKIPPED)


if __name__ == "__main__":
    main()
