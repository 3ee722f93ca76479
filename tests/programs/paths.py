# SPDX-License-Identifier: MIT
"""ram_send over two networks: both carry, one that is down is left out, and what cannot be is refused by name.

    python3 tests/programs/paths.py build/dev/examples

Needs root and iproute2 for two network namespaces with two veth pairs (two_links.py), and is skipped without. That both
carry is seen by the interfaces' own counters.
"""

import argparse
import contextlib
import json
import re
import subprocess
from pathlib import Path

import survivors
from survivors import MIB, LabError, run_cases
from two_links import LINKS, with_two_links

IMAGE_MIB = 24


class Lab:
    def __init__(self, folder, links, programs):
        self.folder, self.links, self.programs = folder, links, programs
        self.image = survivors.make_image(folder.memory / "image", IMAGE_MIB)

    @contextlib.contextmanager
    def receiver(self, host="0.0.0.0", *options):
        copy = self.folder.memory / self.folder.new("received").name / "copy"
        copy.parent.mkdir()
        with survivors.receiver(self.folder, self.programs, f"tcp:{host}:0", copy, *options,
                                inside=self.links.inside("far")) as receiver:
            yield receiver, receiver.address.rsplit(":", 1)[1], copy

    def send(self, *options):
        """Status, report, and what it said."""
        report = self.folder.new("report.json")
        command = [*self.links.inside("near"), self.programs / "ram_send", "--file", self.image, "--json", report, *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
        return done.returncode, json.loads(report.read_text() or "{}") if report.exists() else {}, done.stderr + done.stdout

    def paths(self, port, *options):
        """--path for each link, with these options in turn."""
        texts = [self.links.path(link, port, more) for link, more in zip(LINKS, options or ("", ""))]
        return [word for text in texts for word in ("--path", text)]

    def check_copy(self, receiver, copy):
        if receiver.wait_exit(60) != 0:
            raise LabError(f"ram_receive: {receiver.stderr()[-300:]}")
        if copy.read_bytes() != self.image.read_bytes():
            raise LabError("the copy differs")


def check(condition, what):
    if not condition:
        raise LabError(what)


def both_carry(lab, paths_of, host="0.0.0.0"):
    """A migration over two paths, of which each carries a quarter at least; the report says so as the interfaces do."""
    with lab.receiver(host) as (receiver, port, copy):
        before = [lab.links.sent(link) for link in LINKS]
        status, report, said = lab.send(*paths_of(port))
        check(status == 0, f"status {status}: {said[-300:]}")
        lab.check_copy(receiver, copy)
    sent = [lab.links.sent(link) - was for link, was in zip(LINKS, before)]
    told = [path["written_bytes"] for path in report["paths"]]
    check(all(path["up"] and path["error"] is None for path in report["paths"]), report["paths"])
    check(min(sent) > 0.25 * IMAGE_MIB * MIB / 2, f"the interfaces carried {sent}")
    for interface, path in zip(sent, told):
        check(path < interface < 1.2 * path, f"the interfaces carried {sent}, and the report has {told}")
    check("by path:" in said or "--json" in said, said)
    return f"interfaces {', '.join(f'{each / MIB:.1f} MiB' for each in sent)}"


def cases(lab):
    links = lab.links
    # Alike in speed: else a busy machine may let one path take nearly all.
    caps = ",channels=2,cap=32M"

    def two_paths():
        return both_carry(lab, lambda port: lab.paths(port, caps, caps))

    def devices():
        return both_carry(lab, lambda port: [
            word for link in LINKS
            for word in ("--path", f"dev:link{link}=tcp:{links.address('far', link)}:{port}{caps}")])

    def ipv6():
        return both_carry(lab, lambda port: [
            word for link in LINKS
            for word in ("--path", f"[{links.address6('near', link)}]=tcp:[{links.address6('far', link)}]:{port}{caps}")],
            "[::]")

    def one_capped():
        """The cap of one path leaves the other alone."""
        with lab.receiver() as (receiver, port, copy):
            status, report, said = lab.send(*lab.paths(port, ",channels=2,cap=1M", ""))
            check(status == 0, said[-300:])
            lab.check_copy(receiver, copy)
        slow, fast = (path["written_bytes"] for path in report["paths"])
        check(slow < fast, f"the capped path carried {slow} bytes, the other {fast}")
        check([path["cap"] for path in report["paths"]] == [MIB, 0], report["paths"])
        check([path["channels"] for path in report["paths"]] == [2, 1], report["paths"])
        return f"{slow / MIB:.1f} MiB and {fast / MIB:.1f} MiB"

    def down(link, side="near", says="Network is unreachable"):
        def case():
            links.set(link, "down", side)
            try:
                with lab.receiver() as (receiver, port, copy):
                    status, report, said = lab.send(*lab.paths(port, ",channels=2", ",channels=2"), "--connect-timeout", "4s")
                    check(status == 0, said[-300:])
                    lab.check_copy(receiver, copy)
            finally:
                links.set(link, "up", side)
            check(re.search(says, said), said)
            warnings = [line for line in said.splitlines() if line.startswith("warning:")]
            check(len(warnings) == 1 and links.path(link, port) in warnings[0] and "--insist" in warnings[0], said)
            down_path = report["paths"][link - 1]
            check(not down_path["up"] and down_path["error"] and down_path["channels"] == 0, report["paths"])
            check(report["paths"][2 - link]["channels"] == 2 and len(report["channels"]) == 2, report["paths"])
            return warnings[0]
        return case

    def insist():
        links.set(2, "down")
        try:
            with lab.receiver() as (receiver, port, _):
                status, report, said = lab.send(*lab.paths(port), "--insist")
                receiver.kill()
        finally:
            links.set(2, "up")
        check(status == 1 and not report["ok"], said)
        check(links.path(2, port) in said, f"the path is not named: {said}")
        return said.strip().splitlines()[-1]

    def refused():
        """Nobody listens, and with one of the paths there is nobody else."""
        status, _, said = lab.send(*lab.paths(9))
        check(status == 1 and "Connection refused" in said and links.path(1, 9) in said, said)
        return said.strip().splitlines()[-1]

    def not_ours():
        status, _, said = lab.send("--path", f"10.78.9.9=tcp:{links.address('far', 1)}:9")
        check(status == 1 and "bind to the local address" in said, said)
        return said.strip().splitlines()[-1]

    def usage():
        path = links.path(1, 9)
        for options, says in (
                (("--path", path, "--connect", "tcp:a:1"), r"--connect with --path"),
                (("--path", path, "--channels", "2"), r"--channels with --path: say channels="),
                (("--insist", "--connect", "tcp:a:1"), r"--insist requires --path"),
                (("--path", "eth0=tcp:a:1"), r"--path eth0=tcp:a:1: .*the local address is neither"),
                (("--path", "=tcp:a"), r"port is missing"),
                (("--path", "=tcp:a:1,cap=fast"), r"cap= needs"),
                (("--path", "=tcp:a:1,channels=200", "--path", "=tcp:b:1,channels=56"), r"256 channels together")):
            status, _, said = lab.send(*options)
            check(status == 2 and re.search(says, said), f"{options}: status {status}: {said}")

    def mptcp(*options):
        def case():
            with lab.receiver("0.0.0.0", *options) as (receiver, port, copy):
                status, report, said = lab.send("--path", links.path(1, port, ",mptcp,channels=2"))
                check(status == 0, said[-300:])
                lab.check_copy(receiver, copy)
            return report["paths"][0]["path"]
        return case

    found = [("two paths by their addresses", two_paths), ("two paths by their devices", devices), ("two paths over IPv6", ipv6),
             ("a cap on one of them", one_capped), ("the first path is down", down(1)), ("the second path is down", down(2)),
             ("the first path is silent", down(1, "far", "time limit|No route to host")), ("the second path is silent", down(2, "far", "time limit|No route to host")),
             ("one is down, and --insist", insist), ("nobody listens", refused), ("an address of another host", not_ours),
             ("options that do not go together", usage)]
    enabled = Path("/proc/sys/net/mptcp/enabled")
    if enabled.exists() and enabled.read_text().strip() == "1":
        found += [("MPTCP to a receiver without", mptcp()), ("MPTCP at both ends", mptcp("--mptcp"))]
    else:
        print("no MPTCP here: not checked")
    return found


def main():
    parser = argparse.ArgumentParser(description="ram_send over two networks")
    parser.add_argument("programs", type=Path, help="folder of ram_send and ram_receive")
    programs = parser.parse_args().programs.resolve()
    return with_two_links(lambda folder, links: run_cases(cases(Lab(folder, links, programs))))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except LabError as error:
        raise SystemExit(f"FAILED: {error}") from None
