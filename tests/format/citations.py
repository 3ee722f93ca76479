# SPDX-License-Identifier: MIT
"""Holds the sources' references to documents against the tree.

    python3 tests/format/citations.py

Every Markdown file that a tracked file mentions must be in the tree, and every "format/packets.md section 3.1" (with
"step N" or "row N" behind it) must be a section of that file, or a step or row of that section.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TEXTS = ROOT / "include/multifd/format"
KINDS = (".hpp", ".cpp", ".h", ".S", ".py", ".sh", ".md", ".txt", ".cmake", ".in", ".json")
BREAK = r"(?:[ ]|\n[ \t]*(?://[/!]?<?|#)?[ ]*)"  # a space, or a line's end
ITEM = rf"\d+(?:\.\d+)?(?:,?{BREAK}(?:step|row)s?{BREAK}\d+)?"
BETWEEN = rf"(?:,{BREAK}and{BREAK}|,{BREAK}|{BREAK}and{BREAK})"
CITATION = re.compile(rf"format/(\w+\.md){BREAK}\(?sections?{BREAK}({ITEM}(?:{BETWEEN}{ITEM})*)")
DOCUMENT = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.md)\b")


def parts_of(path):
    """What can be cited of a text: {"3", "3.1", "16 row 9", "10 step 7", ...}"""
    parts, section = set(), None
    for line in path.read_text().splitlines():
        if heading := re.match(r"##+ (\d+(?:\.\d+)?)\.? ", line):
            section = heading[1]
            parts.add(section)
        elif section and (step := re.match(r"(\d+)\. ", line)):
            parts.add(f"{section} step {step[1]}")
        elif section and (row := re.match(r"\| (\d+) \|", line)):
            parts.add(f"{section} row {row[1]}")
    return parts


def main():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, timeout=30)
    if tracked.returncode != 0:
        print("not a clone, so what is tracked is not known")
        sys.exit(77)
    files = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    documents = ["/" + name for name in files if name.endswith(".md")]
    parts = {path.name: parts_of(path) for path in TEXTS.glob("*.md")}
    cited = mentioned = 0
    problems = []
    for name in files:
        if not name.endswith(KINDS):
            continue
        text = (ROOT / name).read_text(errors="replace")
        for found in CITATION.finditer(text):
            for item in re.findall(ITEM, found[2]):
                item = re.sub(r"\D*?((?:step|row))s?\D+", r" \1 ", item)
                cited += 1
                if item not in parts.get(found[1], ()):
                    problems.append(f"{name}: format/{found[1]} has no section {item}")
        for found in DOCUMENT.finditer(text):
            mentioned += 1
            if not any(each.endswith("/" + found[1]) for each in documents):
                problems.append(f"{name}: {found[1]} is not in the tree")
    for problem in problems:
        print(problem)
    print(f"{mentioned} mentions of documents, {cited} citations of sections, {len(problems)} wrong")
    sys.exit(bool(problems) or cited == 0)


if __name__ == "__main__":
    main()
