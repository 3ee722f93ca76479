#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What two networks carry that no bond joins: two paths against one, caps on them, a QEMU as destination, and MPTCP beside it. In
turn, in one run; prints medians, spreads, and which goals they reach.

    sudo MULTIFD_QEMU10=/opt/qemu-10.0 python3 benchmarks/paths.py build/bench [--repeat 5] [--json FILE]

Two network namespaces with two veth pairs (tests/programs/two_links.py), each a token bucket (tbf) of 1 Gbit/s, or 300 Mbit/s for
the second where it says so. Of a bucket's rate 4.4 % are Ethernet, IP and TCP headers, which the interfaces' counters have less of,
because they count before packets are cut to size (TSO).

one 1 Gbit, one 300 Mbit   ram_send over the first or the second path alone, two channels
1 + 1 Gbit, 1 Gbit + 300   ram_send over both, two channels each
MPTCP, 1 + 1 Gbit          ram_send over one path of two channels with mptcp; the kernel's subflows go over both networks
qemu: the same             QEMU 10.0 -> qemu_relay -> QEMU 10.0, of which the relay's output goes over the paths
caps                       path_caps: 40 and 20 MB/s, the second 60 MB/s from half time on; buckets of 10 Gbit/s

Memory is noise. A rate is bytes of memory a second, from before the source connects until the destination has the last one
(CLOCK_MONOTONIC of both programs); for QEMU: until its source calls itself completed, within the total time that it says.
What the interfaces carried meanwhile is their own counter. Caps: the interfaces' counters, without headers, over each half.
"""
import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/programs"), str(ROOT / "tests/interop")]

from lab import Qemu, find_qemu  # noqa: E402
from processes import Folder, LabError, Process, Program  # noqa: E402
from two_links import LINKS, TwoLinks, run  # noqa: E402

FULL, SLOW = "1gbit", "300mbit"
HEADERS = 66  # Ethernet, IP and TCP with time stamps, as an interface counts a packet
CAPS, CHANGED = (40_000_000, 20_000_000), 60_000_000
# What is measured: the rate of the second network, and the paths.
WAYS = {"one 1 Gbit": (FULL, (1,)), "one 300 Mbit": (SLOW, (2,)), "1 + 1 Gbit": (FULL, (1, 2)), "1 Gbit + 300 Mbit": (SLOW, (1, 2))}
GOALS = {"1 + 1 Gbit": ("1.9x one", lambda rate: rate["1 + 1 Gbit"] / rate["one 1 Gbit"], 1.9),
         "1 Gbit + 300 Mbit": ("95 % of the sum", lambda rate: rate["1 Gbit + 300 Mbit"] / (rate["one 1 Gbit"] + rate["one 300 Mbit"]), 0.95)}


def carried(links, before):
    return [links.sent(link) - was for link, was in zip(LINKS, before)]


def shape(links, second):
    links.cap(1, FULL)
    links.cap(2, second)


def ours(lab, second, used, mptcp=False):
    """A migration by ram_send; `used`: the links."""
    links = lab.links
    shape(links, second)
    sent, got = lab.folder.new("sent.json"), lab.folder.new("got.json")
    with Program(lab.folder, [*links.inside("far"), lab.programs / "ram_receive", "--listen", "tcp:0.0.0.0:0", "--discard", "--populate",
                              "--size", lab.image.stat().st_size, "--json", got, *(["--mptcp"] if mptcp else [])]) as receiver:
        port = receiver.address.rsplit(":", 1)[1]
        before = [links.sent(link) for link in LINKS]
        options = ",channels=2,mptcp" if mptcp else ",channels=2"
        paths = [word for link in used for word in ("--path", links.path(link, port, options))]
        with Process(lab.folder, "ram_send", [*links.inside("near"), lab.programs / "ram_send", "--file", lab.image, "--populate",
                                              "--json", sent, *paths]) as sender:
            if sender.wait_exit(120) != 0:
                raise LabError(f"ram_send: {sender.stderr()[-300:]}")
        if receiver.wait_exit(60) != 0:
            raise LabError(f"ram_receive: {receiver.stderr()[-300:]}")
        interfaces = carried(links, before)
    began, end = json.loads(sent.read_text()), json.loads(got.read_text())
    seconds = end["began"] + end["seconds"] - began["began"]
    return {"mb_per_s": began["ram_bytes"] / seconds / 1e6, "interfaces": interfaces}


def qemu(lab, second, used):
    """The same by way of the relay; the destination runs in the namespace far, where this Python is."""
    links = lab.links
    shape(links, second)
    fill = lambda file: file.write(lab.image.read_bytes())  # noqa: E731
    mib = lab.image.stat().st_size >> 20
    machine = "pc-i440fx-10.0"
    with Qemu(lab.folder, "10.0", machine, ram_mib=mib, fill=fill) as source, \
            Qemu(lab.folder, "10.0", machine, ram_mib=mib, incoming=True) as destination:
        channels = 2 * len(used)
        for each in (source, destination):
            each.configure(channels=2 if each is source else channels, return_path=True)
        destination.listen("tcp:0.0.0.0:0")
        port = destination.listening_on().rsplit(":", 1)[1]
        paths = [word for link in used for word in ("--out-path", links.path(link, port, ",channels=2"))]
        with Program(lab.folder, [*links.inside("near"), lab.programs / "qemu_relay", "--listen", f"unix:{lab.folder.new('relay')}",
                                  "--in-channels", 2, "--out-memory", "fresh", *paths]) as relay:
            before = [links.sent(link) for link in LINKS]
            source.migrate(relay.address)
            source.wait_migration("completed", 120)
            destination.wait_migration("completed", 60)
            relay.finish(60)
            interfaces = carried(links, before)
        seconds = source.migration()["total-time"] / 1000
    return {"mb_per_s": (mib << 20) / seconds / 1e6, "interfaces": interfaces}


def caps(lab):
    """Each half's mean against the cap, from the interfaces' counters and from what the paths count."""
    links, program = lab.links, lab.build / "benchmarks/path_caps"
    for link in LINKS:
        links.cap(link, "10gbit")
    sink = subprocess.Popen([*links.inside("far"), program, "--sink", "tcp:0.0.0.0:0"], stdout=subprocess.PIPE, text=True)
    try:
        port = sink.stdout.readline().strip().rsplit(":", 1)[1]
        options = [word for link, cap in zip(LINKS, CAPS)
                   for word in ("--path", links.path(link, port, f",channels=3,cap={cap}"), "--interface", f"link{link}")]
        told = json.loads(run(*links.inside("near"), program, *options, "--seconds", 10, "--change", 1, "--to", CHANGED))
    finally:
        sink.kill()
        sink.wait()
    result = {}
    for before in (True, False):
        # Behind the first half second: the kernel's buffers fill, or empty, by more than the cap.
        half = [row for row in told["samples"] if row["before"] is before][5:]
        first, last = half[0], half[-1]
        seconds = last["seconds"] - first["seconds"]
        for i, cap in enumerate(CAPS if before else (CAPS[0], CHANGED)):
            pure = [row["sent"][i] - HEADERS * row["packets"][i] for row in (first, last)]
            result[f"path {i + 1}, {cap / 1e6:g} MB/s{'' if before else ', behind the change'}"] = {
                "interface": (pure[1] - pure[0]) / seconds / cap, "path": (last["written"][i] - first["written"][i]) / seconds / cap}
    return result


class Lab:
    def __init__(self, folder, links, build, mib):
        self.folder, self.links, self.build, self.programs = folder, links, build, build / "examples"
        self.image = folder.memory / "image"
        self.image.write_bytes(os.urandom(mib << 20))


def allow_subflows(links):
    """MPTCP: near makes a subflow by its second address, far says its own."""
    for side, flag in (("near", "subflow"), ("far", "signal")):
        here = links.inside(side)
        run(*here, "ip", "mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
        run(*here, "ip", "mptcp", "endpoint", "add", links.address(side, 2), "dev", "link2", flag)


def enter(links, side):
    """QEMU listens in that namespace: what this process starts from now on is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{links.name(side)}", "rb") as namespace:
        if libc.setns(namespace.fileno(), 0x40000000) != 0:  # CLONE_NEWNET
            raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")


def spread(values, digits=1):
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def print_rates(samples, prefix):
    rate = {way.removeprefix(prefix): statistics.median(run["mb_per_s"] for run in runs) for way, runs in samples.items()}
    for way, runs in samples.items():
        share = [statistics.median(run["interfaces"][i] for run in runs) / 1e6 for i in range(2)]
        goal = GOALS.get(way.removeprefix(prefix))
        reached = f"{goal[1](rate):.3f} of {goal[0]}: {'reached' if goal[1](rate) >= goal[2] else 'missed'}" if goal else ""
        print(f"{way:26} {spread([run['mb_per_s'] for run in runs]):>24} MB/s   interfaces {share[0]:6.0f} and {share[1]:6.0f} MB   {reached}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="release build with programs and benchmarks")
    parser.add_argument("--mib", type=int, default=1024, help="memory (default 1024)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--only", default="ours,qemu,caps,mptcp", help="what to measure (default ours,qemu,caps,mptcp)")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    wanted = options.only.split(",")
    binary, why = find_qemu("10.0")
    if "qemu" in wanted and not binary:
        print(f"without QEMU: {why}")
        wanted.remove("qemu")
    samples, cap_samples = {}, []
    with Folder() as folder, TwoLinks() as links:
        lab = Lab(folder, links, options.build.resolve(), options.mib)
        ways = {}
        if "ours" in wanted:
            ways |= {way: lambda way=way: ours(lab, *WAYS[way]) for way in WAYS}
        if "mptcp" in wanted:
            allow_subflows(links)
            ways["MPTCP, 1 + 1 Gbit"] = lambda: ours(lab, FULL, (1,), mptcp=True)
        if "qemu" in wanted:
            ways |= {f"qemu: {way}": lambda way=way: qemu(lab, *WAYS[way]) for way in WAYS}
        enter(links, "far")
        for _ in range(options.repeat):
            for way, measure in ways.items():
                samples.setdefault(way, []).append(measure())
                print(f"{time.strftime('%H:%M:%S')} {way}: {samples[way][-1]}", file=sys.stderr, flush=True)
            if "caps" in wanted:
                cap_samples.append(caps(lab))
                print(f"{time.strftime('%H:%M:%S')} caps: {cap_samples[-1]}", file=sys.stderr, flush=True)
    print(f"Linux {platform.release()}, {options.mib} MiB of noise, medians of {options.repeat} (least to most)\n")
    print_rates({way: runs for way, runs in samples.items() if not way.startswith("qemu")}, "")
    print_rates({way: runs for way, runs in samples.items() if way.startswith("qemu")}, "qemu: ")
    for name in cap_samples[0] if cap_samples else ():
        values = [100 * run[name]["interface"] for run in cap_samples]
        good = all(abs(value - 100) <= 2 for value in values)
        print(f"caps: {name:42} {spread(values, 2)} % at the interface, {spread([100 * run[name]['path'] for run in cap_samples], 2)} % as "
              f"the path counts, within 2 %: {'yes' if good else 'NO'}")
    if options.json:
        options.json.write_text(json.dumps({"command": " ".join(sys.argv), "kernel": platform.release(), "mib": options.mib,
                                            "samples": samples, "caps": cap_samples}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except LabError as error:
        raise SystemExit(f"paths.py: {error}") from None
