# SPDX-License-Identifier: MIT
"""A peer that stops at a chosen point and then says nothing more: as a destination (--listen) or a source (--connect) of
our own main stream (include/multifd/format/extension.md section 19).

    python3 tests/programs/fake_peer.py --listen tcp:127.0.0.1:0 --read
    python3 tests/programs/fake_peer.py --connect unix:/tmp/socket --channels 2 --until hellos

Prints one line on stdout when it has come that far, a destination another one when all memory has come, and ends when
it is killed.
"""

import argparse
import re
import select
import signal
import socket
import struct
import sys
import time

MAIN_MAGIC = b"QEVM"
CHANNEL_MAGIC, CHANNEL_VERSION = 0x11223344, 1
SYNC = struct.pack(">IIII", CHANNEL_MAGIC, CHANNEL_VERSION, 1, 128).ljust(320 + 128 * 8, b"\0")  # format/packets.md section 3
EXTENSION = 0x6d66
SETTINGS, ACCEPTED, FAILED, SECTION_SIZE, STATE_WHOLE = 1, 2, 3, 6, 8
PING = struct.pack(">BHHHBB", 8, 2, 4, EXTENSION, 0, 1)
PONG = struct.pack(">HHHBB", 2, 4, EXTENSION, 0x80, 1)
# Versions spoken, newest and oldest; what a destination can do that is asked to compare pages.
VERSIONS, FEATURES = bytes((1, 1, 1)), b"\1\0\x0cpage-digests"
RECORDS = struct.pack(">QQ", 0x200, 0x10)  # MULTIFD_FLUSH, EOS
END, FOOTER = struct.pack(">BI", 3, 1), struct.pack(">BI", 0x7e, 1)  # of RAM's section
MIB = 1 << 20


def address_of(text):
    kind, rest = text.split(":", 1)
    if kind == "unix":
        return socket.AF_UNIX, rest
    host, port = rest.rsplit(":", 1)
    return socket.AF_INET, (host, int(port))


def hello(channel):
    return struct.pack(">II16sB7x4Q", CHANNEL_MAGIC, CHANNEL_VERSION, bytes(16), channel, *(0,) * 4)


def message(kind, body=b""):
    """A source's message of the extension."""
    return struct.pack(">BHHH", 8, EXTENSION, 2 + len(body), kind) + body


def answer(kind, body=b""):
    """A destination's."""
    return struct.pack(">HHH", EXTENSION, 2 + len(body), kind) + body


def failed(text):
    return message(FAILED, struct.pack(">BBIIQQ", 3, 0, 0, 0, 0, 0) + text)


def main_question():
    """Up to the question whether the destination is ours."""
    machine = b"multifd"
    return MAIN_MAGIC + struct.pack(">IBI", 3, 7, len(machine)) + machine + struct.pack(">BHH", 8, 1, 0) + PING


def main_setup(channels, size=16 * MIB):
    """All that a source says on its main connection ahead of its pages."""
    settings = struct.pack(">HHI HHI HHI", 1, 4, channels, 2, 4, 4096, 3, 4, 0)
    start = struct.pack(">BIB3sIIQB3sQ", 1, 1, 3, b"ram", 0, 4, size | 4, 3, b"ram", size)
    return main_question() + message(SETTINGS, VERSIONS + b"\0" + settings) + start + RECORDS + FOOTER


def device(name, state):
    section = struct.pack(">BIB", 4, 2, len(name)) + name + struct.pack(">II", 0, 0) + state
    return message(SECTION_SIZE, struct.pack(">Q", len(state))) + section + struct.pack(">BI", 0x7e, 2)


class Main:
    """A source's main connection as the destination reads it: answers up to RAM's START, and prints when RAM is whole."""

    def __init__(self):
        self.said, self.answered, self.accepted, self.whole = b"", False, False, False

    def take(self, link, said):
        self.said += said
        if not self.answered and PING in self.said:
            link.sendall(PONG)
            self.answered = True
        start = self.said.find(b"\1\0\0\0\1\3ram")
        if not self.accepted and start > 0 and FOOTER in self.said[start:]:
            link.sendall(answer(ACCEPTED, VERSIONS + FEATURES))
            self.accepted = True
        if not self.whole and END + RECORDS + FOOTER in self.said:
            print("whole", flush=True)
            self.whole = True


def be_destination(options):
    """Takes every connection, and what a source says ahead of its pages; reads all that comes then, or nothing."""
    family, where = address_of(options.listen)
    server = socket.socket(family)
    server.bind(where)
    # A full queue makes a connecting peer wait: Linux takes one connection more than the backlog.
    server.listen(0 if options.full else 300)
    mains, links = {}, []
    name = server.getsockname()
    address = f"unix:{name}" if family == socket.AF_UNIX else f"tcp:{name[0]}:{name[1]}"
    if options.full:
        filler = socket.socket(family)
        filler.connect(name)
        links.append(filler)
    print(address, flush=True)
    while not options.full:
        reading = [each for each in links if options.read or each in mains and not mains[each].accepted]
        ready, _, _ = select.select([server, *reading], [], [])
        for each in ready:
            if each is server:
                links.append(server.accept()[0])
                if not options.deaf and len(links) == 1:  # a source connects it first
                    mains[links[0]] = Main()
            elif not (said := each.recv(MIB)):
                links.remove(each)
            elif each in mains:
                mains[each].take(each, said)
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
        links[0].sendall(main_setup(options.channels))
    if options.until in ("channels", "hellos", "ended"):
        for channel in range(options.channels):
            links.append(connect())
            # The magic alone lets it be taken for a channel.
            links[-1].sendall(hello(channel)[:4] if options.until == "channels" else hello(channel) + SYNC)  # START's
    if options.until == "ended":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        said = b""
        while not re.search(rb"mf\x00.\x00\x02", said, re.S):  # ACCEPTED
            said += links[0].recv(MIB)
        for channel in links[1:]:
            channel.sendall(SYNC)  # END's
        links[0].sendall(END + RECORDS + FOOTER)
    print("there", flush=True)
    if options.until == "ended":
        signal.sigwait({signal.SIGUSR1})
        links[0].sendall(device(b"ram_send", b'{"digest": "none"}') + message(STATE_WHOLE, struct.pack(">I", 1)))
    time.sleep(600)


def main():
    parser = argparse.ArgumentParser(description="a peer that falls silent")
    parser.add_argument("--listen")
    parser.add_argument("--read", action="store_true", help="take everything, say nothing behind RAM's START")
    parser.add_argument("--full", action="store_true", help="let nobody in")
    parser.add_argument("--deaf", action="store_true", help="read and say nothing at all")
    parser.add_argument("--connect")
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--until", choices=("nothing", "main", "channels", "hellos", "ended"),
                        default="nothing", help="ended: all memory has come, and SIGUSR1 lets the device's state follow")
    options = parser.parse_args()
    (be_destination if options.listen else be_source)(options)


if __name__ == "__main__":
    sys.exit(main())
