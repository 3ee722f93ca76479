# SPDX-License-Identifier: MIT
"""README's tested-with table, from the results of dump.py and relay.py.

    python3 tests/interop/table.py dump.json relay.json                      prints it
    python3 tests/interop/table.py --write README.md dump.json relay.json    puts it between README's two markers
    python3 tests/interop/table.py --check README.md dump.json relay.json    fails when README has another (dates aside)
"""

import argparse
import json
import re
import sys
from pathlib import Path

from lab import SKIPPED

BEGIN, END = "<!-- tested-with: made by tests/interop/table.py -->", "<!-- tested-with: end -->"
CODECS = ("none", "zlib", "zstd")
MODES = ("legacy", "multifd", "none")
ROLES = ("source to qemu_dump", "source to qemu_relay", "destination of qemu_relay")


def cells(results):
    """{(version, role): {(codec, mode): [outcome...]}} and {(version, role): machines}."""
    found, machines = {}, {}

    def add(version, role, codec, mode, run):
        found.setdefault((version, role), {}).setdefault((codec, mode), []).append(run["outcome"])
        machines.setdefault((version, role), set()).add(run["machine"])

    for result in results:
        for run in result["runs"]:
            if run["outcome"] == "skip" or "machine" not in run:
                continue
            if result["tool"] == "dump":
                add(run["qemu"], ROLES[0], run["compression"], run["zero_pages"], run)
            elif result["tool"] == "relay":
                add(run["qemu"], ROLES[1], run["compression"], run["zero_pages"], run)
                add(run["to"], ROLES[2], run["out_compression"], run["out_zero_pages"], run)
    return found, machines


def by_version(version):
    return [int(part) for part in re.findall(r"\d+", version)]


def table(results):
    found, machines = cells(results)
    versions = {key: value for result in results for key, value in result["qemu"].items()}
    failed = sum(outcomes.count("FAIL") for row in found.values() for outcomes in row.values())
    runs = sum(run["outcome"] != "skip" for result in results for run in result["runs"])
    lines = [f"| QEMU | role | machine types | {' | '.join(CODECS)} |", "| --- | --- | --- | --- | --- | --- |"]
    for version, role in sorted(found, key=lambda row: (by_version(row[0]), ROLES.index(row[1]))):
        row = found[version, role]
        columns = []
        for codec in CODECS:
            good = [mode for mode in MODES if row.get((codec, mode)) and "FAIL" not in row[codec, mode]]
            bad = [mode for mode in MODES if "FAIL" in row.get((codec, mode), [])]
            columns.append(", ".join(good + [f"**{mode} fails**" for mode in bad]) or "not run")
        types = ", ".join(sorted((name.removeprefix("pc-i440fx-") for name in machines[version, role]), key=by_version))
        lines.append(f"| {version} | {role} | {types} | {' | '.join(columns)} |")
    names = "; ".join(f"{key} is {versions[key]}" for key in sorted(versions, key=by_version))
    date = max(result["date"] for result in results)
    lines += ["", f"The cells name the zero-page modes that were run with that codec: what the source sends, or what "
                  f"`qemu_relay` sends to the destination. Machine types `pc-i440fx-…`. {runs} migrations, {failed} "
                  f"failed. {names}. {date}."]
    return "\n".join(lines) + "\n"


def without_what_varies(text):
    """A quick run tells the same as a full one, on any day; Debian's next patch level of a QEMU is no other claim."""
    text = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
    text = re.sub(r"\b([\d.]+) is \1[^;]*?(;|\. DATE)", r"\1\2", text)
    return re.sub(r"\d+ migrations", "N migrations", text)


def main():
    parser = argparse.ArgumentParser(description="README's tested-with table")
    parser.add_argument("results", nargs="+", type=Path, help="what dump.py --json and relay.py --json wrote")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", type=Path, metavar="README")
    what.add_argument("--write", type=Path, metavar="README")
    options = parser.parse_args()
    missing = [str(path) for path in options.results if not path.exists()]
    results = [] if missing else [json.loads(path.read_text()) for path in options.results]
    skipped = {run["detail"] for result in results for run in result["runs"] if run["outcome"] == "skip"}
    if options.check and (missing or skipped):
        print(f"skipped: not everything was run: {'; '.join([*missing, *skipped])}")
        return SKIPPED
    made = table(results)
    readme = options.check or options.write
    if not readme:
        print(made, end="")
        return 0
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{readme}: needs one line {BEGIN} and one {END}", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    if options.write:
        readme.write_text(f"{before}{BEGIN}\n{made}{END}{after}")
    elif without_what_varies(old.strip()) != without_what_varies(made.strip()):
        print(f"{readme}: its tested-with table is not what these results make:\n{made}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
