# SPDX-License-Identifier: MIT
"""Real QEMUs migrate over TLS into qemu_dump, and through qemu_relay into each other: with certificates and with
pre-shared keys, trusted and not; and take new keys on the way, in both directions.

    python3 tests/interop/tls.py --programs build/dev/examples --tls-files build/dev/tests/programs/make_tls_files
"""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import cases
import proxy
from lab import PEERS, Qemu, compare, mixed_pages
from processes import LabError, Program, wait_for

MACHINES = [("7.2", "pc-i440fx-7.2"), ("10.0", "pc-i440fx-7.2"), ("10.0", "pc-i440fx-10.0"), ("11.1", "pc-i440fx-11.1")]


def all_cases():
    return [dict(qemu=qemu, machine=machine, program=program, credentials=credentials, peer=peer, channels=channels,
                 cipher=cipher, library=library, return_path=path, keys="one")
            for qemu, machine in MACHINES
            for program in ("qemu_dump", "qemu_relay")
            for credentials in ("x509", "psk")
            for peer in ("trusted", "stranger")
            for channels in (1, 4)
            for cipher in ("aes", "chacha20")
            for library in ("openssl", "gnutls")[:1 if channels == 1 else 2]
            for path in ("off", "on")] + [
                dict(qemu=qemu, machine=machine, program="qemu_relay", credentials=credentials, peer="trusted",
                     channels=channels, cipher=cipher, library=library, return_path="on", keys="new")
                for qemu, machine in MACHINES
                for credentials, cipher in (("x509", "aes"), ("psk", "chacha20"))
                for channels in (1, 4)
                for library in ("openssl", "gnutls")]


def quick_cases():
    return cases.covering(all_cases(), ("machine", "program", "credentials", "peer", "cipher"))


def tls_files(folder, options):
    files = folder.path / "tls"
    if not files.exists():
        subprocess.run([options.tls_files, files], check=True, timeout=30)
    return files


def credentials_of_qemu(files, case, endpoint):
    if case["credentials"] == "x509":
        return f"tls-creds-x509,id=tls0,dir={files / 'good'},endpoint={endpoint},verify-peer=on"
    user = ",username=qemu" if endpoint == "client" else ""
    return f"tls-creds-psk,id=tls0,dir={files},endpoint={endpoint}{user}"  # its keys.psk


def ours(files, case, prefix, trusted):
    cipher = [f"--{prefix}tls-cipher", case["cipher"], f"--{prefix}tls-library", case["library"]]
    if case["credentials"] == "x509":
        return [f"--{prefix}tls-dir", files / ("good" if trusted else "other"), *cipher]
    return [f"--{prefix}tls-psk", files / ("keys.psk" if trusted else "other.psk"), *cipher]


class Records(proxy.Connection):
    """Counts the records that have the size of a KeyUpdate: of 5 bytes, with type and tag."""

    def __init__(self, near, far):
        self.key_updates, self._left = {True: 0, False: 0}, {True: b"", False: b""}
        super().__init__(near, far)

    def see(self, data, from_source):
        left = self._left[from_source] + data
        while len(left) >= 5 and len(left) >= (size := 5 + int.from_bytes(left[3:5], "big")):
            self.key_updates[from_source] += left[0] == 23 and size == 5 + 5 + 17
            left = left[size:]
        self._left[from_source] = left


def check_keys(case, to_relay, to_destination):
    """The destination's channels got new keys; of the library that may renew beside a reader, the source's return path,
    too."""
    channels = [each.key_updates[True] for each in to_destination.connections[1:]]
    back = to_relay.connections[0].key_updates[False]
    if sum(channels) < 4 or (case["library"] == "openssl" and back == 0):
        raise LabError(f"new keys: {channels} on the channels, {back} on the return path")
    return f"new keys: {channels} on the channels, {back} on the return path"


def check_cipher(case, found):
    """In either role the programs' preference decides: a QEMU has GnuTLS' own order, which lets the client's decide."""
    wanted = "TLS1.3 CHACHA20-POLY1305" if case["cipher"] == "chacha20" else "TLS1.3 AES-128-GCM"
    if found != wanted:
        raise LabError(f"the cipher is {found}, not {wanted}")


def run_relay(folder, case, options):
    """The stranger is the relay, to the destination."""
    files, trusted = tls_files(folder, options), case["peer"] == "trusted"
    return_path = case["return_path"] == "on"
    result = folder.new("relay.json")
    with contextlib.ExitStack() as running:
        source, destination = (
            running.enter_context(Qemu(
                folder, case["qemu"], case["machine"], ram_mib=32, incoming=endpoint == "server",
                fill=mixed_pages() if endpoint == "client" else None,
                extra=["-object", credentials_of_qemu(files, case, endpoint)]))
            for endpoint in ("client", "server"))
        destination.configure(channels=case["channels"], return_path=return_path, **{"tls-creds": "tls0"})
        destination.listen("tcp:127.0.0.1:0")
        source.configure(channels=2, return_path=return_path, **{"tls-creds": "tls0", "tls-hostname": "localhost"})
        to_destination, renewed = None, []
        if case["keys"] == "new":
            # Six on one channel, a few on each of four: GnuTLS refuses more than eight in a second. All of a return path is
            # a few records.
            to_destination = proxy.Proxy("tcp:127.0.0.1:0", destination.listening_on(), Records)
            renewed = ["--in-tls-records-per-key", 0, "--out-tls-records-per-key", 200]
        command = [options.programs.resolve() / "qemu_relay", "--listen", "tcp:127.0.0.1:0", *renewed,
                   "--connect", to_destination.address if to_destination else destination.listening_on(),
                   "--in-channels", 2, "--out-channels", case["channels"],
                   "--out-peer", PEERS[case["qemu"]], "--json", result, *ours(files, case, "in-", True),
                   *ours(files, case, "out-", trusted)]
        relay = running.enter_context(Program(folder, command))
        with cases.told_by(relay, destination):
            to_relay = proxy.Proxy("tcp:127.0.0.1:0", relay.address, Records) if to_destination else relay
            source.migrate(to_relay.address)
            if not trusted:
                return relay.fail(30).strip()
            source.wait_migration("completed", 60)
            destination.wait_migration("completed", 60)
            relay.finish(30)
        report = json.loads(result.read_text())
        for side in ("in", "out"):
            check_cipher(case, report[f"{side}_tls_cipher"])
        found = compare(source.read_blocks(), destination.read_blocks())
        if found:
            raise LabError(f"source and destination: {found}")
        return check_keys(case, to_relay, to_destination) if to_destination else ""


def run_dump(folder, case, options):
    files, trusted = tls_files(folder, options), case["peer"] == "trusted"
    output, result = folder.memory / folder.new("dump").name, folder.new("dump.json")
    command = [options.programs.resolve() / "qemu_dump", "--listen", "tcp:127.0.0.1:0", "--channels", case["channels"],
               "--output", output, "--json", result, *ours(files, case, "", trusted)]
    try:
        with Qemu(folder, case["qemu"], case["machine"], ram_mib=32, fill=mixed_pages(),
                  extra=["-object", credentials_of_qemu(files, case, "client")]) as source:
            source.configure(channels=case["channels"], return_path=case["return_path"] == "on",
                             **{"tls-creds": "tls0", "tls-hostname": "localhost"})
            with Program(folder, command) as dump, cases.told_by(dump):
                source.migrate(dump.address)
                if not trusted:
                    source.wait_migration("failed", 30)
                    wanted = "not from this side's authority" if case["credentials"] == "x509" else "pre-shared keys differ"
                    wait_for(f"qemu_dump: that it says {wanted!r}", 20, lambda: wanted in dump.message())
                    if not dump.alive():
                        raise LabError("qemu_dump does not wait for another source")
                    return dump.message().strip()
                source.wait_migration("completed", 60)
                dump.finish(30)
            check_cipher(case, json.loads(result.read_text())["tls_cipher"])
            manifest = json.loads((output / "manifest.json").read_text())
            dumped = {row["name"]: (output / row["file"]).read_bytes() for row in manifest["blocks"]}
            found = compare(source.read_blocks(), dumped)
            if found:
                raise LabError(f"dump and guest: {found}")
            return f"{manifest['epochs']} epochs"
    finally:
        shutil.rmtree(output, ignore_errors=True)


def main():
    parser = cases.arguments("QEMU migrates over TLS")
    parser.add_argument("--tls-files", required=True, type=Path, help="the program make_tls_files")
    options = parser.parse_args()
    options.jobs = 1  # the certificates are made once

    def run_group(folder, group, group_cases, report):
        for case in group_cases:
            run = run_relay if case["program"] == "qemu_relay" else run_dump
            cases.timed(report, case, lambda: run(folder, case, options))

    # The libraries that the programs were built with.
    words = subprocess.run([options.programs.resolve() / "qemu_dump", "--help"], capture_output=True, text=True, timeout=30)
    chosen = [case for case in (all_cases() if options.full else quick_cases()) if case["library"] in words.stdout]
    return cases.run("tls", options, chosen, lambda case: (case["qemu"], case["machine"]), run_group)


if __name__ == "__main__":
    cases.exit_with(main())
