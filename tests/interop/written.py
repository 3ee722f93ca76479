# SPDX-License-Identifier: MIT
"""Main streams of MainStreamWriter, and packets of Sender, into real QEMU destinations.

    python3 tests/interop/written.py build/dev/tests/play_source [--qemu 10.0] [--dump build/dev/examples/qemu_dump]

Each QEMU waits with -S; play_source (tests/support/play_source.cpp) is its source, with the same machine type and
block list, pages of a pattern and no device's state. The QEMU must take every byte, say SHUT(0), and have the pattern
in every block. Asked whether it is ours, it must answer as a QEMU does, and the source must show it nothing that it
does not know. The same for qemu_dump, which knows QEMU's stream and nothing else.
"""

import argparse
import subprocess
import sys

from lab import PAGE, PEERS, SKIPPED, VERSIONS, Folder, LabError, Qemu, find_qemu
from processes import Program

MACHINES = {"7.2": ("pc-i440fx-7.2",), "10.0": ("pc-q35-10.0", "pc-q35-9.0", "pc-i440fx-7.2"), "11.1": ("pc-q35-11.1",)}
RAM_MIB = 16
LIMIT = 120  # seconds for everything; no measure


def content(block, pages):
    """What play_source has in a block."""
    return b"".join(bytes(PAGE) if page % 3 == 0 else (block + 1 << 24 | page).to_bytes(4, "little") * 1024
                    for page in range(pages))


def peer_of(version, machine):
    """The generation that decides what the stream may have: the older one of the program's and the machine type's."""
    return "qemu-7.2" if machine.endswith("-7.2") else PEERS[version] if not machine.endswith("-9.0") else "qemu-9.0"


def block_list(folder, version, machine):
    """{name: bytes} as a QEMU of that kind has it. An incoming one has no content by which 7.2's could be found."""
    with Qemu(folder, version, machine, ram_mib=RAM_MIB) as source:
        return {name: block.size for name, block in source.blocks().items()}


def memory_of(destination, sizes):
    """The blocks' contents. Of 7.2, which does not say where they lie, of the main one only."""
    if destination.binary.version != "7.2":
        return {name: destination.read_block(name) for name in sizes}
    host = destination.find_hosts({"ram0": sizes["ram0"]})["ram0"]
    return {"ram0": destination.read_memory(host, sizes["ram0"])}


def complaints(destination):
    return [line for line in destination.stderr().splitlines() if "warning: host doesn't support" not in line]


def case(program, folder, version, machine, peer, channels, sizes):
    with Qemu(folder, version, machine, incoming=True, ram_mib=RAM_MIB) as destination:
        path = folder.new("written")
        destination.configure(channels=channels, compression="none", zero_pages="legacy", return_path=True)
        destination.listen(f"unix:{path}")
        blocks = [f"{name}={size // PAGE}" for name, size in sizes.items()]
        done = subprocess.run([program, f"unix:{path}", machine, peer, str(channels), *blocks], capture_output=True,
                              text=True, timeout=LIMIT)
        if done.returncode != 0:
            raise LabError(f"play_source: {done.stdout.strip()} {done.stderr.strip()}; {complaints(destination)}")
        wanted = ["PONG 0x1", *(["PONG 0x6d660001"] if peer == "multifd" else []), "SHUT 0"]
        if done.stdout.splitlines() != wanted:
            raise LabError(f"play_source heard {done.stdout.split()}; {complaints(destination)}")
        destination.wait_migration("completed", 30)
        if complaints(destination):
            raise LabError(f"{destination.name} says: {complaints(destination)}")
        compared = memory_of(destination, sizes)
        for number, (name, size) in enumerate(sizes.items()):
            sent = content(number, size // PAGE)
            here = compared.get(name, sent)
            if here != sent:
                first = next(i for i in range(0, len(sent), PAGE) if here[i:i + PAGE] != sent[i:i + PAGE])
                raise LabError(f"block {name} differs at {first:#x}")
        return f"{sum(sizes.values()) // PAGE} pages taken, {len(compared)} of {len(sizes)} blocks compared"


def dump_case(program, dump, folder, peer):
    """A tool of ours that does not take the extension is shown none of it."""
    sizes = {"pc.ram": 300 * PAGE, "rom": 9 * PAGE}
    output = folder.new("dump")
    listen = f"unix:{folder.new('written')}"
    with Program(folder, [dump, "--listen", listen, "--output", output, "--channels", "2"]) as taker:
        blocks = [f"{name}={size // PAGE}" for name, size in sizes.items()]
        done = subprocess.run([program, taker.address, "microvm", peer, "2", *blocks], capture_output=True, text=True,
                              timeout=LIMIT)
        if done.returncode != 0 or done.stdout.splitlines()[-1:] != ["SHUT 0"]:
            raise LabError(f"play_source: {done.stdout.strip()} {done.stderr.strip()}; {taker.message()}")
        taker.finish(LIMIT)
    for number, (name, size) in enumerate(sizes.items()):
        if (output / f"{name}.ram").read_bytes() != content(number, size // PAGE):
            raise LabError(f"block {name} differs")
    return f"{sum(sizes.values()) // PAGE} pages"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--dump", metavar="PROGRAM")
    parser.add_argument("--qemu", choices=VERSIONS, action="append")
    options = parser.parse_args()
    failed = passed = 0

    def run(name, what, *arguments):
        nonlocal failed, passed
        try:
            print(f"ok    {name}: {what(options.program, *arguments)}")
            passed += 1
        except (LabError, OSError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAIL  {name}: {error}")

    with Folder() as folder:
        for peer in ("qemu-8.1", "multifd") if options.dump else ():
            run(f"qemu_dump, as {peer}", dump_case, options.dump, folder, peer)
        for version in options.qemu or VERSIONS:
            binary, why = find_qemu(version)
            if not binary:
                print(f"skipped QEMU {version}: {why}")
                continue
            for machine in MACHINES[version]:
                sizes = block_list(folder, version, machine)
                # The question may only go to a peer of unknown kind, so of a row that fits this machine's style.
                rows = [(peer_of(version, machine), 1), (peer_of(version, machine), 3)]
                if not machine.endswith("-7.2"):
                    rows.append(("multifd", 2))
                for peer, channels in rows:
                    run(f"{machine} of QEMU {version}, as {peer}, {channels} channels", case, folder, version, machine,
                        peer, channels, sizes)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0 if passed else SKIPPED)


if __name__ == "__main__":
    main()
