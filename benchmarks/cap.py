#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How well --bandwidth holds: samples what a network interface carries, every 100 ms for 10 s.

    sudo python3 benchmarks/cap.py build/bench/examples [--bandwidth 200M] [--channels 1 4 16]

ram_send runs in a network namespace of its own and sends over a veth pair to a router, and its transmit counter is what is sampled: TCP
headers are in it (0.1 % to 4 %, printed apart), acknowledgements are not. Prints, for each number of channels, the mean over the whole
time and the samples' spread against the cap.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/programs"))

from network import Network  # noqa: E402

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text):
    return int(float(text[:-1]) * UNITS[text[-1].upper()]) if text[-1].upper() in UNITS else int(text)


SAMPLER = """
import sys, time
seconds, interval = float(sys.argv[1]), float(sys.argv[2])
def read():
    with open("/proc/net/dev") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name.strip() == "up0":
                fields = rest.split()
                return time.monotonic(), int(fields[8]), int(fields[9])
start = read()
due = start[0]
while due < start[0] + seconds:
    print(*read(), flush=True)
    due += interval
    time.sleep(max(0.0, due - time.monotonic()))
print(*read(), flush=True)
"""


def sample(programs, image, bandwidth, channels, seconds, interval):
    with Network() as network:
        here, there = network.inside("source"), network.inside("destination")
        rounds = max(1, int(bandwidth * (seconds + 3) / image.stat().st_size) + 1)
        receiver = subprocess.Popen([*there, programs / "ram_receive", "--listen", f"tcp:{Network.ADDRESS['destination']}:0", "--discard"],
                                    stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        sender = None
        try:
            address = ""
            while not address.startswith("listening on "):  # behind the warning that nothing is encrypted
                address = receiver.stderr.readline() or sys.exit("ram_receive does not listen")
            address = address.removeprefix("listening on ").strip()
            sender = subprocess.Popen([*here, programs / "ram_send", "--connect", address, "--file", image,
                                       "--bandwidth", str(bandwidth), "--channels", str(channels), "--rounds", str(rounds),
                                       "--zero-pages", "none"],
                                      stdout=subprocess.DEVNULL)
            time.sleep(1.5)  # behind the connections and the bucket's first 20 ms
            rows = subprocess.run([*here, sys.executable, "-c", SAMPLER, str(seconds), str(interval)],
                                  capture_output=True, text=True, check=True).stdout.splitlines()
            if sender.poll() is not None:
                raise RuntimeError("the sender has ended before the last sample")
        finally:
            for process in (sender, receiver):
                if process:
                    process.kill()
                    process.wait()
    return [tuple(map(float, row.split())) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=pathlib.Path, help="the folder of the built programs")
    parser.add_argument("--bandwidth", type=size, default=size("200M"))
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--interval", type=float, default=0.1)
    options = parser.parse_args()
    print(f"cap {options.bandwidth / 1e6:.1f} MB/s, {options.seconds:g} s, a sample every {options.interval * 1000:g} ms")
    print(f"{'channels':>8} {'mean':>9} {'of cap':>8} {'least':>8} {'most':>8} {'within 2 %':>11}")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(os.urandom(64 << 20) * 4)
        file.flush()
        for channels in options.channels:
            rows = sample(options.programs.resolve(), pathlib.Path(file.name), options.bandwidth, channels, options.seconds,
                          options.interval)
            # Ethernet, IP and TCP headers, with time stamps: 66 bytes a packet as the interface counts them.
            pure = [(now, sent - 66 * packets) for now, sent, packets in rows]
            rates = [(b - a) / (t - s) / options.bandwidth for (s, a), (t, b) in zip(pure, pure[1:])]
            mean = (pure[-1][1] - pure[0][1]) / (pure[-1][0] - pure[0][0])
            good = sum(abs(rate - 1) <= 0.02 for rate in rates)
            print(f"{channels:>8} {mean / 1e6:>7.1f}MB {mean / options.bandwidth:>7.2%} {min(rates):>8.2%} {max(rates):>8.2%} "
                  f"{good:>5} of {len(rates)}", flush=True)


if __name__ == "__main__":
    main()
