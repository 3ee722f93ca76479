# SPDX-License-Identifier: MIT
"""A real QEMU as destination by several paths: qemu_relay's --out-path, from several addresses of loopback.

    python3 tests/interop/relay_paths.py --programs build/dev/examples

A QEMU waits for as many channels as it was told of, so those of a path that is down have to come by another.
"""

import json
import socket

import cases
from lab import PEERS, Qemu, compare, mixed_pages
from processes import LabError, Program

RAM_MIB = 32
MACHINE = "pc-i440fx-7.2"
UUID = "3f9d2c1e-8f0b-4c53-9b1a-5c7e6d2a1b40"
SOURCE = "10.0"


def all_cases():
    found = [dict(qemu=SOURCE, to=to, paths=paths) for to in ("7.2", "10.0", "11.1") for paths in ("up", "capped", "first-down", "last-down")]
    return [*found, dict(qemu=SOURCE, to="10.0", paths="insist"), dict(qemu=SOURCE, to="10.0", paths="all-down")]


class ClosedPort:
    """A port at which nobody listens, kept by a bound socket."""

    def __enter__(self):
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        return self._socket.getsockname()[1]

    def __exit__(self, *_):
        self._socket.close()


def run_case(folder, case, programs):
    with Qemu(folder, SOURCE, MACHINE, ram_mib=RAM_MIB, uuid=UUID, fill=mixed_pages()) as source, \
            Qemu(folder, case["to"], MACHINE, ram_mib=RAM_MIB, uuid=UUID, incoming=True) as destination, ClosedPort() as closed:
        for each in (source, destination):
            each.configure(channels=5 if each is destination else 2, return_path=True)
        destination.listen("tcp:127.0.0.1:0")
        port = destination.listening_on().rsplit(":", 1)[1]
        ports = {"first-down": (closed, port), "last-down": (port, closed), "insist": (port, closed), "all-down": (closed, closed)}.get(
            case["paths"], (port, port))
        caps = (",cap=200M", ",cap=50M") if case["paths"] == "capped" else ("", "")
        texts = [f"127.0.0.{2 + i}=tcp:127.0.0.1:{ports[i]},channels={3 - i}{caps[i]}" for i in range(2)]
        result = folder.new("relay.json")
        command = [programs / "qemu_relay", "--listen", f"unix:{folder.new('relay')}", "--in-channels", 2, "--out-peer",
                   PEERS[case["to"]], "--json", result,
                   *(word for text in texts for word in ("--out-path", text)), *(["--out-insist"] if case["paths"] == "insist" else [])]
        with Program(folder, command) as relay, cases.told_by(relay, destination):
            source.migrate(relay.address)
            if case["paths"] in ("insist", "all-down"):
                if relay.wait_exit(30) != 1 or "Connection refused" not in relay.message() or str(closed) not in relay.message():
                    raise LabError(f"the path is not named: {relay.message()}")
                source.wait_migration("failed", 30)
                return relay.message().splitlines()[-1][:100]
            source.wait_migration("completed", 60)
            destination.wait_migration("completed", 60)
            relay.finish(30)
        if found := compare(source.read_blocks(), destination.read_blocks()):
            raise LabError(f"source and destination: {found}")
        paths = json.loads(result.read_text())["paths"]
        down = [not path["up"] for path in paths]
        if sum(path["channels"] for path in paths) != 5:
            raise LabError(f"not as many channels as the destination expects: {paths}")
        if down != [case["paths"] == "first-down", case["paths"] == "last-down"] or "warning: " * any(down) not in relay.message():
            raise LabError(f"{paths}, and: {relay.message()}")
        if any(path["up"] and not path["written_bytes"] for path in paths):
            raise LabError(f"a path that carries nothing: {paths}")
        return ", ".join(f"{path['written_bytes'] >> 10} KiB" for path in paths)


def run_group(folder, group_cases, report, programs):
    for case in group_cases:
        cases.timed(report, case, lambda case=case: run_case(folder, case, programs))


def main():
    options = cases.arguments("QEMU migrates into QEMU over several paths of qemu_relay").parse_args()
    return cases.run("relay_paths", options, all_cases(), lambda case: (case["qemu"], case["to"]),
                     lambda folder, _, group_cases, report: run_group(folder, group_cases, report, options.programs.resolve()),
                     lambda case: (case["qemu"], case["to"]))


if __name__ == "__main__":
    cases.exit_with(main())
