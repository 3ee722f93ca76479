# SPDX-License-Identifier: MIT
"""Every number and path that a program takes, with what people type by accident: status 2 or 1 and one line with the
option's name, at once.

    python3 tests/programs/options.py build/dev/examples [PROGRAM...]

The options are those that --help lists: a new one is tried without a word here.
"""

import argparse
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import survivors
from survivors import Folder, LabError

# Options that each program needs before it checks others; no process listens at this address.
NEEDED = {
    "ram_send": ("--connect", "tcp:127.0.0.1:1", "--file", "IMAGE"),
    "ram_receive": ("--listen", "tcp:127.0.0.1:0", "--discard"),
    "qemu_dump": ("--listen", "tcp:127.0.0.1:0", "--output", "OUT"),
    "qemu_load": ("--connect", "tcp:127.0.0.1:1", "--input", "IMAGE"),
    "qemu_relay": ("--listen", "tcp:127.0.0.1:0", "--connect", "tcp:127.0.0.1:1"),
    "live_migration": ("--connect", "tcp:127.0.0.1:1"),
    "custom_policy": (),
}
# Never a number, whatever it counts.
NO_NUMBER = ("", "-", "--1", "1e3", "0x", "0x10", "+4", " 4", "4 ", "4x", "nan", "inf", "1,5", "99999999999999999999", "\u0664")
BAD = {
    "UINT": (*NO_NUMBER, "-1", "010", "4.0", "4k", "18446744073709551617"),
    "INT": (*NO_NUMBER, "010", "-010", "4.0", "-99999999999999999999"),
    "FLOAT": (*(each for each in NO_NUMBER if each[:2] != "99"), "-1", "1.", ".5", "1.5.5"),
    "SIZE": (*NO_NUMBER, "-1", "-1G", "1.5G", "99999999999G", "16E", "18446744073709551616", "4iB", "4KK", "4 K", "K"),
    "SECONDS": (*NO_NUMBER, "-1", "-1s", "-0.1ms", "1.5.5", "2d", "25h", "s", "3 s"),
}
# What stays right beside all of that.
GOOD = {"SIZE": ("4096", "4k", "4KiB", "4kb", "1M"), "SECONDS": ("3", "1.5s", "500ms", "2min", "2m", "1h", "0.5", "0", "0s")}


def options_of(program):
    """[(name, type)] of those that take a value."""
    text = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20).stdout
    found = re.findall(r"^ +(?:-\w,)?(--[\w-]+) ([A-Z]+)", text, re.M)
    if long := [line for line in text.splitlines() if len(line) > 80]:
        raise LabError(f"{program}: --help has lines of more than 80 columns: {long}")
    if not found:
        raise LabError(f"{program}: --help lists no options")
    return found


def time_limits(programs, name):
    """Each limit is an option of the one kind, and says what 0 is."""
    text = subprocess.run([programs / name, "--help"], capture_output=True, text=True, timeout=20).stdout
    limits = re.findall(r"^ +(--(?:[\w-]+-)?(?:timeout|after)) (\w+)(.*?)(?=^ +-)", text, re.M | re.S)
    for option, kind, said in limits:
        if option == "--run-after":  # a span that the guest runs, and no limit
            continue
        if kind != "SECONDS" or "0: no limit" not in " ".join(said.split()):
            raise LabError(f"{name} {option}: {kind}{said}")
    if not limits and name not in ("custom_policy",):
        raise LabError(f"{name}: --help lists no time limits")


def run(command, needed_in=b""):
    began = time.monotonic()
    # One that does not end is told to, and again: that it does not hear the first is half of the fault.
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=5)
            raise LabError(f"{command}: ran for {time.monotonic() - began:.0f} s") from None
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise LabError(f"{command}: hangs, and does not hear SIGINT") from None
    return process.returncode, said.strip()


def refused(command, statuses, text):
    status, said = run(command)
    if status not in statuses or text not in said:
        raise LabError(f"{command}: status {status}, not one of {statuses} with {text!r}: {said[-300:]!r}")


def numbers(programs, name, needed):
    """[(function, arguments)]"""
    for option, kind in options_of(programs / name):
        for value in BAD.get(kind, ()):
            # With "=": a value of its own may look like another option.
            yield refused, ([programs / name, *needed, f"{option}={value}"], (2,), option)
        for value in GOOD.get(kind, ()):
            yield taken, ([programs / name, *needed, f"{option}={value}"],)


def taken(command):
    """The value as such is accepted. --help goes first, so nothing is done."""
    _, said = run([*command, "--help"])
    if "is no size" in said or "is no time" in said:
        raise LabError(f"{command}: {said[-300:]!r}")


def paths(folder, programs, name, needed):
    fifo, home = folder / "fifo", folder / "tls"
    known = [option for option, _ in options_of(programs / name)]
    for option in known:
        last = option.rsplit("-", 1)[1]
        if option == "--json":
            yield refused, ([programs / name, *needed, option, fifo], (1,), "nobody reads from it")
            yield refused, ([programs / name, *needed, option, folder], (1,), "Is a directory")
        elif last == "psk":
            yield refused, ([programs / name, *needed, option, fifo], (1,), "not a regular file")
            yield refused, ([programs / name, *needed, option, folder], (1,), "not a regular file")
        elif last == "dir":
            yield refused, ([programs / name, *needed, option, home], (1,), "not a regular file")
    if "--file" in known:
        without = [each for each in needed if each not in ("--discard", "--file") and "image" not in str(each)]
        for path, text in ((fifo, "fifo: "), ("/dev/zero", "/dev/zero: "), (folder, f"{folder}: ")):
            yield refused, ([programs / name, *without, "--file", path], (1,), text)
        yield refused, ([programs / name, *without, "--file", ""], (2,), "--file")
    if "--output" in known:
        for path, text in ((fifo, "fifo: "), (folder / "image", "image: "), ("/dev/null", "/dev/null: ")):
            yield refused, ([programs / name, *needed[:-1], path], (1,), text)
        yield refused, ([programs / name, *needed[:-1], ""], (1, 2), "")


def pipes(folder, programs):
    """exec: and fd: addresses, which have no channels: what is none, and commands that come to nothing."""
    dump = [programs / "qemu_dump", "--format", "mapped-ram", "--output", folder / "out" / "dump", "--listen"]
    load = [programs / "qemu_load", "--input", folder / "image", "--connect"]
    for command, option in ((dump, "--listen"), (load, "--connect")):
        for address, text in (("exec:", "without a command"), ("fd:", "no number"), ("fd:x", "no number"), ("fd:-1", "no number"),
                              ("fd:3x", "no number"), ("fd:99999999999", "no number"), ("fd:1", "stdin"), ("fd:2", "stdin"),
                              ("fd:99", "not open"), ("exec:cat", "--channels 0"), ("fd:0", "--channels 0")):
            yield refused, ([*command, address], (2,), f"{option} {address}")
            yield refused, ([*command, address], (2,), text)
    # stdin is /dev/null here.
    for number, (address, text) in enumerate((("exec:false", "exit status 1"), ("exec:exit 3", "exit status 3"), ("exec:kill -9 $$", "signal 9"),
                          ("exec:/nonexistent", "exit status 127"), ("fd:0", "cut off"), ("exec:true", "cut off"),
                          ("exec:echo no stream", "no QEVM"))):
        dump[dump.index("--output") + 1] = folder / f"dump{number}"
        yield refused, ([*dump, address, "--channels", "0"], (1,), text)


def read_fifo(folder, programs):
    """A reader gets the report, and /dev/stdout and /dev/null are no outputs that somebody could have."""
    fifo = folder / "read"
    os.mkfifo(fifo)
    command = [programs / "custom_policy", "--memory", "1M", "--json"]
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while True:  # until cat has opened it
            status, said = run([*command, fifo])
            if "nobody reads" not in said or time.monotonic() > deadline:
                break
        if status != 0 or '"ok": true' not in reader.communicate(timeout=20)[0]:
            raise LabError(f"a FIFO with a reader: status {status}: {said}")
    finally:
        reader.kill()
        reader.wait()
    for path in ("/dev/stdout", "/dev/fd/1", "/dev/null", "-"):
        done = subprocess.run([*command, path], capture_output=True, text=True, timeout=20)
        if done.returncode != 0 or ('"ok": true' in done.stdout) != (path != "/dev/null"):
            raise LabError(f"--json {path}: status {done.returncode}: {done.stderr}")


def main():
    parser = argparse.ArgumentParser(description="numbers and paths that are none")
    parser.add_argument("programs", type=Path, help="folder of the programs")
    parser.add_argument("only", nargs="*", help="only these programs")
    options = parser.parse_args()
    programs = options.programs.resolve()
    with Folder() as home:
        folder = home.path
        (folder / "image").write_bytes(b"guest" * 4096)
        os.mkfifo(folder / "fifo")
        (folder / "tls").mkdir()
        os.mkfifo(folder / "tls" / "ca-cert.pem")
        tries = [] if options.only else [(read_fifo, (folder, programs)), *pipes(folder, programs)]
        for name, words in NEEDED.items():
            if options.only and name not in options.only:
                continue
            needed = [{"IMAGE": folder / "image", "OUT": folder / "out"}.get(word, word) for word in words]
            tries += [(time_limits, (programs, name)), *numbers(programs, name, needed), *paths(folder, programs, name, needed)]
        status = survivors.run_cases([(function.__name__, lambda function=function, arguments=arguments:
                                       function(*arguments)) for function, arguments in tries],
                                     "command lines", jobs=4, quiet=True)
        left = [*folder.glob("out/*"), *folder.glob("dump*")]
        if left:
            print(f"FAILED: left behind: {left}")
            status = 1
        return status


if __name__ == "__main__":
    raise SystemExit(main())
