# SPDX-License-Identifier: MIT
"""A proxy between a source and its destination, so that one of the connections can be cut.

    python3 tests/interop/proxy.py tcp:127.0.0.1:0 unix:/tmp/x     runs until killed
"""

import contextlib
import ctypes
import socket
import struct
import sys
import threading


def parse_address(address):
    kind, rest = address.split(":", 1)
    if kind == "unix":
        return socket.AF_UNIX, rest
    host, port = rest.rsplit(":", 1)
    return socket.AF_INET, (host, int(port))


def disconnect(end):
    """Sends a reset and nothing before it. shutdown() would send a FIN first, and close() waits for the thread that
    reads: a peer that reads between FIN and reset sees an end in peace."""
    unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
    ctypes.CDLL(None, use_errno=True).connect(end.fileno(), unspecified, len(unspecified))


class Connection:
    most = float("inf")  # bytes from the source, after which no more pass

    def __init__(self, near, far):
        self.near, self.far = near, far
        self.passed = 0  # bytes from the source
        self._ended = threading.Event()
        self.threads = [threading.Thread(target=self._pump, args=ends, daemon=True)
                        for ends in ((near, far), (far, near))]
        for thread in self.threads:
            thread.start()

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                self.see(data, source is self.near)
                sink.sendall(data)
                if source is self.near:
                    self.passed += len(data)
                    if self.passed > self.most:
                        self._ended.wait(60)
            sink.shutdown(socket.SHUT_WR)
            return
        self.cut()  # an error on one side is one on the other

    def see(self, data, from_source):
        """Called with what passes, in the direction's thread."""

    def cut(self, reset=True):
        """Ends both directions: by a reset (TCP; unix sockets know none), or as a program that closes its socket."""
        self._ended.set()
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                if reset and end.family == socket.AF_INET:
                    disconnect(end)
                else:
                    end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens at `listen`, connects each comer to `connect`. `connections` are in order of arrival: QEMU's main one is
    the first."""

    def __init__(self, listen, connect, connection=Connection):
        self._connection = connection
        family, place = parse_address(listen)
        self._listener = socket.socket(family)
        self._listener.bind(place)
        self._listener.listen(64)
        self.address = f"unix:{place}" if family == socket.AF_UNIX else "tcp:%s:%d" % self._listener.getsockname()
        self._connect = connect
        self.connections = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                family, place = parse_address(self._connect)
                far = socket.socket(family)
                try:
                    far.connect(place)
                except OSError:
                    near.close()
                    continue
                self.connections.append(self._connection(near, far))

    def any_open(self):
        return any(thread.is_alive() for connection in self.connections for thread in connection.threads)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.cut(reset=False)


if __name__ == "__main__":
    with Proxy(*sys.argv[1:3]) as proxy:
        print(f"listening on {proxy.address}", file=sys.stderr, flush=True)
        threading.Event().wait()
