# SPDX-License-Identifier: MIT
"""Limits of the system: a soft one is raised, a hard one is named at both ends, with its value, and no other cause is blamed.

    python3 tests/programs/limits.py build/dev/examples [CASE...]
"""

import argparse
import contextlib
import os
import subprocess
import time
from pathlib import Path

import survivors
from files import Lab, check, sparse
from survivors import Folder, LabError, Process, Program, wait_for

LISTEN = ("--listen", "tcp:127.0.0.1:0")


def under(limit, *command):
    """A command under a limit of sh's ulimit."""
    return ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *command]


def receiver(lab, limit, *options, listen="tcp:127.0.0.1:0"):
    command = under(limit, lab.programs / "ram_receive", "--listen", listen, *options)
    return lab.stack.enter_context(Program(lab.folder, command))


def sender(lab, limit, to, image, *options):
    command = under(limit, lab.programs / "ram_send", "--connect", to.address, "--file", image, *options)
    return lab.stack.enter_context(Process(lab.folder, "ram_send", command))


def both_say(text, *processes):
    for process in processes:
        status, lines = process.wait_exit(30), survivors.told(process)
        if status != 1 or len(lines) != 1 or text not in lines[0]:
            raise LabError(f"{process.name} ended with status {status}, not with 1 and {text!r}: {lines}")
        check("neither a main connection" not in process.stderr(), f"called a stranger: {process.stderr()}")


def a_soft_limit(lab):
    """Is no limit."""
    image = lab.image(1)
    to = receiver(lab, "-Sn 64", "--discard")
    check(sender(lab, "-Sn 64", to, image, "--channels", 255).wait_exit(60) == 0, "the source")
    to.finish(30)
    for command in (("qemu_dump", "--output", lab.home / "out", "--channels", 255),
                    ("qemu_relay", "--connect", "tcp:127.0.0.1:1", "--in-channels", 255, "--out-channels", 255)):
        lab.stack.enter_context(Program(lab.folder, under("-Sn 64", lab.programs / command[0], *LISTEN, *command[1:])))


def few_descriptors_at_the_destination(lab):
    image = lab.image(1)
    for limit, channels, options in ((128, 255, ()), (128, 120, ("--channels", 120)), (24, 16, ())):
        # A UNIX socket's file goes away with its owner, while the source still connects.
        listen = f"unix:{lab.folder.new('socket')}" if limit == 128 else "tcp:127.0.0.1:0"
        to = receiver(lab, f"-n {limit}", "--discard", *options, listen=listen)
        both_say(f"may have {limit}", sender(lab, "-n 1024", to, image, "--channels", channels), to)
    for _ in range(10):  # how many are left when it gives up is a race with the source
        to = lab.stack.enter_context(Process(lab.folder, "ram_receive", under(
            "-n 10", lab.programs / "ram_receive", *LISTEN, "--discard")))
        if listens(to):
            source = sender(lab, "-n 1024", to, image)
            # A destination that has ended already, or ends before it takes the connection, cannot tell it why.
            status, lines = source.wait_exit(30), survivors.told(source)
            said = ("may have 10", "Connection refused", "Connection reset by peer")
            check(status == 1 and len(lines) == 1 and any(text in lines[0] for text in said),
                  f"ram_send ended with status {status}: {lines}")
        both_say("may have 10", to)


def listens(process):
    """Within its first moments; with next to no descriptors it may end instead."""
    deadline = time.monotonic() + 10
    while process.alive() and time.monotonic() < deadline:
        for line in process.stderr().splitlines():
            if line.startswith("listening on "):
                process.address = line.split()[-1]
                return True
        time.sleep(0.01)
    check("may have 10" in process.stderr(), process.stderr())
    return False


def few_descriptors_elsewhere(lab):
    """Known before anything is connected."""
    image = lab.image(1)
    to = receiver(lab, "-n 1024", "--discard")
    both_say("and this process may have 128", sender(lab, "-n 128", to, image, "--channels", 255))
    for command in (("qemu_dump", *LISTEN, "--output", lab.home / "out", "--channels", 255),
                    ("qemu_relay", *LISTEN, "--connect", "tcp:127.0.0.1:1", "--in-channels", 60, "--out-channels", 60),
                    ("live_migration", "--connect", to.address, "--channels", 255, "--backend", "thread")):
        done = subprocess.run([str(each) for each in under("-n 128", lab.programs / command[0], *command[1:])],
                              capture_output=True, text=True, timeout=30)
        check(done.returncode == 1 and "may have 128 (RLIMIT_NOFILE)" in done.stderr, f"{command}: {done.stderr}")
        check("listening" not in done.stderr, f"{command}: listened all the same")


def no_address_space(lab):
    image = sparse(lab.home / "sparse", 1024, 4096)
    to = receiver(lab, "-v 900000", "--discard")
    both_say("RLIMIT_AS", sender(lab, "-n 1024", to, image), to)
    done = subprocess.run([str(each) for each in under(
        "-v 900000", lab.programs / "ram_send", "--connect", "tcp:127.0.0.1:1", "--file", image)],
        capture_output=True, text=True, timeout=30)
    check(done.returncode == 1 and "921600000 bytes of address space (RLIMIT_AS" in done.stderr, done.stderr)


def small_files(lab):
    image, copy = lab.image(8), lab.home / "copy"
    to = receiver(lab, "-f 2048", "--file", copy)  # blocks of 512 bytes
    both_say("1048576 bytes (RLIMIT_FSIZE", sender(lab, "-n 1024", to, image), to)
    check(sorted(os.listdir(lab.home)) == ["image"], "left behind")


def no_threads(lab):
    """Of a user that has no others: root has no such limit."""
    home = lab.folder.path
    home.chmod(0o755)
    image = survivors.make_image(home / "image", 1)
    image.chmod(0o644)
    user = ["setpriv", "--reuid", "61999", "--regid", "61999", "--clear-groups"]
    if os.geteuid() != 0 or subprocess.run([*user, lab.programs / "ram_send", "--help"], capture_output=True,
                                           timeout=20).returncode != 0:
        return "skipped: no right to be another user, or that one may not run the programs"
    text = "(RLIMIT_NPROC, ulimit -u)"
    for limit in (1, 2, 4):
        to = receiver(lab, "-n 1024", "--discard")
        few = lab.stack.enter_context(Process(lab.folder, "ram_send", [
            *user, "prlimit", f"--nproc={limit}", lab.programs / "ram_send", "--connect", to.address, "--file", image,
            "--channels", 16]))
        both_say(text, few)
        check(to.alive(), f"ram_receive takes a source that has said nothing for one: {to.stderr()}")
        to.kill()
    return None


def socket_buffers(lab):
    """Of which the kernel silently gives less."""
    image = lab.image(1)
    most = max(int(Path(f"/proc/sys/net/core/{each}").read_text()) for each in ("wmem_max", "rmem_max"))
    for size, said in (("64K", False), ("1G", True)):
        if said and most >= 1 << 30:
            return "skipped: this system's buffers may be that large"
        to = lab.receiver("--discard", "--socket-buffer", size)
        source = lab.sender(to, image, "--socket-buffer", size)
        check(source.wait_exit(30) == 0, "the source")
        to.finish(30)
        for process, limit in ((source, "net.core.wmem_max"), (to, "net.core.rmem_max")):
            check((limit in process.stderr()) == said, f"--socket-buffer {size}: {process.name} says {process.stderr()}")
    return None


def waiting_connections(lab):
    """Of which the kernel lets fewer wait than a source makes at once; each network namespace has a limit of its own."""
    inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up; echo 16 > /proc/sys/net/core/somaxconn && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*inside, "true"], capture_output=True, timeout=20).returncode != 0:
        return "skipped: no network namespaces here"
    limit = "lets 16 connections wait to be accepted (net.core.somaxconn)"
    image = lab.image(1)
    for name, *options in (("qemu_dump", "--output", lab.home / "out"), ("qemu_relay", "--connect", "tcp:127.0.0.1:1")):
        for channels, said in ((15, False), (16, True), (255, True)):
            listening = lab.stack.enter_context(Program(lab.folder, [
                *inside, lab.programs / name, *LISTEN, *options,
                "--in-channels" if name == "qemu_relay" else "--channels", channels]))
            wait_for("its last line before it waits", 20, lambda: "listening" in listening.stderr())
            check((f"{limit}, and the source makes {channels + 1} at once" in listening.stderr()) == said,
                  f"{name}, {channels} channels: {listening.stderr()}")
            listening.kill()
    for channels, said in ((8, False), (64, True)):  # both ends, where all get through all the same
        to = lab.stack.enter_context(survivors.receiver(lab.folder, lab.programs, f"unix:{lab.folder.new('socket')}",
                                                        lab.home / f"copy{channels}", inside=inside))
        source = lab.sender(to, image, "--channels", channels)
        check(source.wait_exit(30) == 0, f"the source: {source.stderr()}")
        to.finish(30)
        check((limit in to.stderr()) == said, f"ram_receive, {channels} channels: {to.stderr()}")
    return None


CASES = (waiting_connections, socket_buffers, a_soft_limit, few_descriptors_at_the_destination, few_descriptors_elsewhere, no_address_space, small_files,
         no_threads)


def main():
    parser = argparse.ArgumentParser(description="the programs under limits")
    parser.add_argument("programs", type=Path, help="folder of the programs")
    parser.add_argument("cases", nargs="*", help="only these")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.cases or case.__name__ in options.cases]
    with Folder() as folder:
        def run(case):
            with contextlib.ExitStack() as stack:
                return case(Lab(folder, options.programs.resolve(), stack))

        return survivors.run_cases([(case.__name__, lambda case=case: run(case)) for case in chosen])


if __name__ == "__main__":
    raise SystemExit(main())
