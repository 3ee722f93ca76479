# SPDX-License-Identifier: MIT
"""fake_vmm, a VMM for multifd_pager, as a child process: a command at a time."""

import json
import select
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "interop"))
from processes import LabError  # noqa: E402

LIMIT = 60
PROTOCOLS = ("firecracker", "cloud-hypervisor", "multifd")


class Vmm:
    """fake_vmm, a command at a time."""

    def __init__(self, program, protocol, socket, memory, regions=1, idstr="", minor=False):
        command = [program, protocol, socket, memory, str(regions), idstr, *(["minor"] if minor else [])]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = self.popen.stdout.readline()
        if hello.startswith("skipped"):
            print(hello.strip())
            raise SystemExit(77)
        if hello != "ok\n":
            raise LabError(f"fake_vmm: {hello}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def ask(self, command):
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()

    def answer(self):
        """Of a command that is under way."""
        if not select.select([self.popen.stdout], [], [], LIMIT)[0]:
            raise LabError(f"fake_vmm: no answer within {LIMIT} s: a thread of the guest still waits for memory")
        text = self.popen.stdout.readline().strip()
        if not text.startswith("ok"):
            raise LabError(f"fake_vmm: {text or 'ended'}")
        return text[3:]

    def do(self, command):
        self.ask(command)
        return self.answer()

    def kill(self):
        self.popen.kill()
        self.popen.wait()


def start(vmm, protocol):
    vmm.do("connect")
    if protocol == "cloud-hypervisor":
        if vmm.do("answer") != "0 0":
            raise LabError("no acknowledgement")
    if protocol == "multifd":
        answer = json.loads(vmm.do("line"))
        if answer["ok"] is not True:
            raise LabError(f"refused: {answer}")
