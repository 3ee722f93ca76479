# SPDX-License-Identifier: MIT
"""QEMU's monitor: one connection, each call with a limit."""

import contextlib
import json
import socket
import time

from processes import LabError, wait_for


class Qmp:
    """One monitor connection. Calls raise LabError for an error reply or no reply in time."""

    def __init__(self, path, process, limit=20):
        self._socket = socket.socket(socket.AF_UNIX)
        self._process = process
        self._buffer = b""
        self.events = []

        def connected():
            if not process.alive():
                raise LabError(f"{process.name} ended at once: {process.stderr()[-400:]}")
            with contextlib.suppress(OSError):
                self._socket.connect(str(path))
                return True

        wait_for(f"{process.name}: its monitor", limit, connected)
        self._read(limit)
        self.call("qmp_capabilities")

    def close(self):
        self._socket.close()

    def _read(self, limit):
        """The next message, or None after `limit` seconds."""
        end = time.monotonic() + limit
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0:
                return None
            self._socket.settimeout(left)
            try:
                got = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as error:
                raise LabError(f"{self._process.name}: monitor: {error}") from None
            if not got:
                raise LabError(f"{self._process.name}: monitor closed: {self._process.stderr()[-400:]}")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def call(self, command, limit=10, **arguments):
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": names})
        try:
            self._socket.settimeout(limit)
            self._socket.sendall(message.encode() + b"\n")
        except OSError as error:
            raise LabError(f"{self._process.name}: {command}: {error}") from None
        end = time.monotonic() + limit
        while True:
            reply = self._read(max(0.001, end - time.monotonic()))
            if reply is None:
                raise LabError(f"{self._process.name}: no answer to {command} within {limit} s")
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise LabError(f"{self._process.name}: {command}: {reply['error']['desc']}")
            elif "return" in reply:
                return reply["return"]

    def wait_event(self, limit):
        """Returns when something happened, or after `limit` seconds."""
        message = self._read(limit)
        if message:
            self.events.append(message)
