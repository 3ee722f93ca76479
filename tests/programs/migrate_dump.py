# SPDX-License-Identifier: MIT
"""live_migration's guest into a tool that knows QEMU's stream and nothing else.

    python3 tests/programs/migrate_dump.py build/dev/examples

qemu_dump takes the running guest with every codec and zero mode, asked for the extension and not, and must have the memory
that the source's guest had when it was stopped. A comparison that the destination cannot make is refused before a page travels.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

LIMIT = 60  # seconds for one migration; no measure
CODECS = ("none", "zlib", "zstd")
ZERO_MODES = ("none", "legacy", "multifd")


def migrate(programs, folder, name, taken, *options):
    """Starts qemu_dump, sends it a guest. Returns the source's exit status and output, its report and the manifest."""
    dump = folder / name
    taker = subprocess.Popen([programs / "qemu_dump", "--listen", f"unix:{dump}.sock", "--output", dump, "--channels", "2",
                              *taken], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "waiting on" not in said and "listening on" not in said:
            line = taker.stdout.readline()
            if not line:
                raise AssertionError(f"qemu_dump has ended: {said}")
            said += line
        source = subprocess.run([programs / "live_migration", "--connect", f"unix:{dump}.sock", "--backend", "thread",
                                 "--channels", "2", "--memory", "24M", "--working-set", "2M", "--run-before", "0.05",
                                 "--json", f"{dump}.json", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, timeout=LIMIT)
        if source.returncode != 0:
            taker.kill()
        said += taker.communicate(timeout=LIMIT)[0]
    finally:
        taker.kill()
        taker.wait()
    report = json.loads(pathlib.Path(f"{dump}.json").read_text())
    manifest = dump / "manifest.json"
    return source, report, json.loads(manifest.read_text()) if manifest.exists() else None, said


def main():
    programs = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for codec in CODECS:
            for zero in ZERO_MODES:
                source, report, manifest, said = migrate(programs, folder, f"{codec}-{zero}", ("--compression", codec),
                                                         "--compression", codec, "--zero-pages", zero)
                assert source.returncode == 0, f"{codec}, {zero}: {source.stdout}{said}"
                assert manifest, f"{codec}, {zero}: no manifest: {said}"
                [block] = manifest["blocks"]
                assert block["name"] == "pc.ram" and block["size"] == 24 << 20, block
                assert block["xxh3"] == report["guest"]["xxh3"], \
                    f"{codec}, {zero}: the dump is not what the guest's memory was: {block}, {report['guest']}"
                assert report["pages_verified"] == 0
                print(f"{codec}, zero pages {zero}: {block['pages']} pages, {manifest['epochs']} epochs, as the guest had them")
        source, report, manifest, said = migrate(programs, folder, "required", (), "--verify")
        assert source.returncode == 1 and manifest is None, f"{source.stdout}{said}"
        assert "verify" in source.stdout and "the guest is at the source, and runs there" in source.stdout, source.stdout
        print("a comparison that the destination cannot make is refused")


if __name__ == "__main__":
    main()
