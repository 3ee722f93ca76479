# SPDX-License-Identifier: MIT
"""Holds the documents (*.md) and the raw results against the tree.

    python3 tests/documents.py

* README.md has at most 250 lines.
* Every folder and file that a document names exists, and so does every heading that it links to.
* Every file in benchmarks/results/ is cited by a document, and every cited one exists.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
LONGEST = 250
FOLDERS = ("", "include", "include/multifd", "examples", "tests", "benchmarks")  # where a name may begin
MADE = ("build/", "guest-ram/")  # what the commands of a document make
NAMES = re.compile(r"(?<![\w./<>…$:*-])[\w.-][\w./-]*(?![\w…])")
LINKS = re.compile(r"\]\(([\w./-]*)#([\w-]+)\)")
SOURCES = (".hpp", ".cpp", ".py", ".sh", ".md", ".cmake", ".S")


def names_in(text):
    """What looks like a folder ("tests/unit/") or a source ("zero/policy.hpp"). Links to web pages are neither."""
    for name in NAMES.findall(re.sub(r"\w+://\S+", "", text)):
        name = name.rstrip(".")
        if (name.endswith("/") or name.endswith(SOURCES)) and not name.startswith(MADE) and name.strip("./"):
            yield name


def headings_of(path):
    """As they are linked to: "In a VMM" is in-a-vmm."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in found}


def main():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, timeout=30)
    if tracked.returncode != 0:
        print("skipped: not a clone, so what is tracked is not known")
        sys.exit(77)
    files = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    endings = {Path(name).name for name in files}
    folders = {str(parent) + "/" for name in files for parent in Path(name).parents}
    problems = []

    lines = len((ROOT / "README.md").read_text().splitlines())
    if lines > LONGEST:
        problems.append(f"README.md has {lines} lines, and may have {LONGEST}: figures go to benchmarks/README.md, tests "
                        f"to tests/README.md, options to --help")

    named = 0
    documents = sorted(name for name in files if name.endswith(".md"))
    for document in documents:
        places = (*FOLDERS, str(Path(document).parent))
        for name in names_in((ROOT / document).read_text()):
            named += 1
            paths = [str(Path(place, name)) + "/" * name.endswith("/") for place in places]
            if not any(path in files or path in folders for path in paths) and name not in endings:
                problems.append(f"{document}: there is no {name}")
        for target, heading in LINKS.findall((ROOT / document).read_text()):
            path = (ROOT / document).parent / target if target else ROOT / document
            if not path.is_file() or heading not in headings_of(path):
                problems.append(f"{document}: {target} has no heading {heading}")

    cited = set()
    for document in documents:
        for name in re.findall(r"\bresults/([\w.+-]+\.(?:txt|json|svg))", (ROOT / document).read_text()):
            cited.add(name)
            if f"{RESULTS}/{name}" not in files:
                problems.append(f"{document}: {RESULTS} has no {name}")
    for name in sorted(files):
        if name.startswith(RESULTS + "/") and Path(name).name not in cited:
            problems.append(f"{name}: no document cites it, so nobody needs it (git keeps it)")

    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(problem)
    print(f"README.md: {lines} lines; {named} names of files and folders, {len(cited)} results, {len(problems)} wrong")
    sys.exit(bool(problems) or not named or not cited)


if __name__ == "__main__":
    main()
