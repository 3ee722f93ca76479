# SPDX-License-Identifier: MIT
"""A peer that stops at a chosen point and then says nothing more: as a destination (--listen) or a source (--connect).

    python3 tests/programs/fake_peer.py --listen tcp:127.0.0.1:0 --read
    python3 tests/programs/fake_peer.py --connect unix:/tmp/socket --channels 2 --until hellos

Prints one line on stdout when it has come that far, and ends when it is killed.
"""

import argparse
import json
import select
import signal
import socket
import struct
import sys
import time

MAIN_MAGIC = 0x4d46446d
CHANNEL_MAGIC, CHANNEL_VERSION = 0x11223344, 1
SYNC = struct.pack(">IIII", CHANNEL_MAGIC, CHANNEL_VERSION, 1, 128).ljust(320 + 128 * 8, b"\0")  # format/packets.md section 3
ROUND_END, DONE = 3, 6
MIB = 1 << 20


def address_of(text):
    kind, rest = text.split(":", 1)
    if kind == "unix":
        return socket.AF_UNIX, rest
    host, port = rest.rsplit(":", 1)
    return socket.AF_INET, (host, int(port))


def hello(channel):
    return struct.pack(">II16sB7x4Q", CHANNEL_MAGIC, CHANNEL_VERSION, bytes(16), channel, *(0,) * 4)


def be_destination(options):
    """Takes every connection; reads all that comes, or nothing."""
    family, where = address_of(options.listen)
    server = socket.socket(family)
    server.bind(where)
    # A full queue makes a connecting peer wait: Linux takes one connection more than the backlog.
    server.listen(0 if options.full else 300)
    links = []
    name = server.getsockname()
    address = f"unix:{name}" if family == socket.AF_UNIX else f"tcp:{name[0]}:{name[1]}"
    if options.full:
        filler = socket.socket(family)
        filler.connect(name)
        links.append(filler)
    print(address, flush=True)
    while not options.full:
        ready, _, _ = select.select([server, *(links if options.read else [])], [], [])
        for each in ready:
            if each is server:
                links.append(server.accept()[0])
            elif not each.recv(MIB):
                links.remove(each)
    time.sleep(600)


def be_source(options):
    """Goes through the start of a migration of 16 MiB up to the chosen point."""
    family, where = address_of(options.connect)

    def connect():
        link = socket.socket(family)
        link.connect(where)
        return link

    links = [connect()]
    if options.until != "nothing":
        text = json.dumps({"size": 16 * MIB, "page_size": 4096, "channels": options.channels, "compression": "none"})
        links[0].sendall(struct.pack(">IBI", MAIN_MAGIC, 1, len(text)) + text.encode())
    if options.until in ("channels", "hellos", "ended"):
        for channel in range(options.channels):
            links.append(connect())
            # The magic alone lets it be taken for a channel.
            links[-1].sendall(hello(channel)[:4 if options.until == "channels" else 64])
    if options.until == "ended":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        for channel in links[1:]:
            channel.sendall(SYNC)
            channel.close()
        links[0].sendall(struct.pack(">BI", ROUND_END, 0))
    print("there", flush=True)
    if options.until == "ended":
        signal.sigwait({signal.SIGUSR1})
        text = json.dumps({"digest": "none"})
        links[0].sendall(struct.pack(">BI", DONE, len(text)) + text.encode())
    time.sleep(600)


def main():
    parser = argparse.ArgumentParser(description="a peer that falls silent")
    parser.add_argument("--listen")
    parser.add_argument("--read", action="store_true", help="take everything, answer nothing")
    parser.add_argument("--full", action="store_true", help="let nobody in")
    parser.add_argument("--connect")
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--until", choices=("nothing", "main", "channels", "hellos", "ended"),
                        default="nothing", help="ended: the channels have, and SIGUSR1 lets the main connection say done")
    options = parser.parse_args()
    (be_destination if options.listen else be_source)(options)


if __name__ == "__main__":
    sys.exit(main())
