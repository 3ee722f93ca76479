# SPDX-License-Identifier: MIT
"""Rules of the house that no compiler holds.

    python3 tests/house.py RULE      one of those below; without a name: all
    python3 tests/house.py --self-test

lines      each header of include/ begins with what is in it; no source of include/, examples/ and benchmarks/ has more than 400 lines, a header not even 400, and the format
           of tests/exemplar/file_outlet.hpp stays below 150
names      the names of public types are made of the terms of include/multifd/README.md and of words of programming
nodiscard  whatever returns a Result in include/ is [[nodiscard]]
orders     each acquire in include/ says which release it meets ("meets push()"), and each release which acquire; the
           function that is named has one
policies   each concept that users may write a model of says all of: semantics, errors, threads, cost, models, exemplar,
           contract; exemplar, contract and tests/compile/ are there and are about that concept
comments   in the public headers: what returns a Result says which errors, as names that there are; each class says its
           threads; a destructor says what it does; each option, limit and counter has a text; what opens or creates says its
           cost; what makes or parses bytes of the wire says by which section of the format
programs   what examples/ and benchmarks/ include, and what names of the library they use, by the table below
"""

import re
import sys
import tempfile
from pathlib import Path

import declarations

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 400
TOY = "tests/exemplar/file_outlet.hpp"
MOST_TOY_LINES = 149

# Who may include which names in quotes. The first row that fits a file counts. Of the library, everybody may include
# what is public; "(own)" is a name in the file's own folder, written with or without the folder.
PROGRAMS = [
    ("examples/common/", "common/"),  # no program: a program's parts are its own
    ("examples/*/", "(own) common/"),
    ("examples/", "common/"),
    ("benchmarks/advise/", "(own) common/ corpus.hpp null_transport.hpp"),  # a program, too
    ("benchmarks/simulate/", "(own) common/"),  # another one
    ("benchmarks/pipeline/", "(own) corpus.hpp null_transport.hpp socket_pump.hpp support/tls_files.hpp"),
    ("benchmarks/*/", "(own) corpus.hpp"),
    ("benchmarks/", "(own)"),
]
# What is not public of the library: how it is made. A program is what a user would write.
PRIVATE = re.compile(r"multifd/(?:engine|packets)/|multifd/(?:\w+/)*detail/")
PRIVATE_NAME = re.compile(r"\bmultifd::(?:\w+::)*(detail|engine|packets)\b|\b(detail|engine|packets)::")
# Who may include and name it all the same, and why.
PRIVATE_FOR = {
    "benchmarks/handoff/": "engine",  # measures the hand-off by itself, and other designs in its place
}


def headers(root, *folders):
    return [path for path in sources(root, *folders) if path.suffix == ".hpp"]


def sources(root, *folders):
    return sorted(path for folder in folders for path in (root / folder).rglob("*.[ch]pp"))


def without_comments(text):
    """The same text with comments and strings as blanks: every character keeps its place."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.S)
    return token.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def lines(root):
    problems = []
    for path in sources(root, "include", "examples", "benchmarks"):
        count = len(path.read_text().splitlines())
        most = MOST_LINES - (path.suffix == ".hpp")
        if count > most:
            problems.append(f"{path.relative_to(root)} has {count} lines, and may have {most}")
    for path in headers(root, "include"):
        if not re.match(r"// SPDX-License-Identifier: MIT\n//\n// \S", path.read_text()):
            problems.append(f"{path.relative_to(root)}: its first lines have to say what is in it")
    toy = re.search(r"// \[format\]\n(.*)// \[format end\]", (root / TOY).read_text(), re.S)
    if not toy or toy[1].count("\n") > MOST_TOY_LINES:
        problems.append(f"{TOY}: a format of its own is to take less than 150 lines between its [format] marks")
    return problems


TERMS = "include/multifd/README.md"
# Words of programming and of the system, which need no term.
PLAIN_WORDS = """
accept access addrinfo address ahead announcement answer any arrival arriving aware basic bool bound bytes buffer buffers category check
cipher codec comp condition config configuration const copies counted credentials decoder descriptor digest encoder end errc error
failed failure fd field fields file first form free from full get gnutls group guard handshake has header holes hook id igzip in info init interrupt into
is kernel kind lanes legacy level limit limits link list live lookup looked map mask memory message method mode multifd
mutable name names next no none not number of openssl options pagemap parser path payload pending plain policy populate profile progress qemu
queued read reader reading received ref region residency resolve result role row runs said scan set shared sigpipe snapshot
socket some stage stats style subject tail text thread time tls towards untouched uuid version watch write writer zlib zstd
""".split()
# Not those of one member of a policy: HasLink.
TYPE_NAME = re.compile(r"^(?:template <.*>\s*)?(?:class|struct|enum class|concept|using) (?!Has[A-Z])([A-Z]\w+)", re.M)


def names(root):
    table = (root / TERMS).read_text().partition("## Terms\n")[2].partition("\n## ")[0]
    words = {word for term in re.findall(r"^\| ([^|]+) \|", table, re.M) for word in re.findall(r"\w+", term.lower())}
    problems = [] if words else [f"{TERMS} has no table of terms"]
    words |= set(PLAIN_WORDS)
    for path in headers(root, "include"):
        if re.search(r"/(?:engine|packets|detail|testing)/", str(path)):
            continue  # how the library is made and tested
        for name in TYPE_NAME.findall(without_comments(path.read_text())):
            parts = [part.lower() for part in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", name)]
            unknown = [part for part in parts if part not in words and part.removesuffix("s") not in words]
            if unknown:
                problems.append(f"{path.relative_to(root)}: {name}: {', '.join(unknown)} is no term of {TERMS}; take the "
                                f"field's name, or add the term with its meaning")
    return problems


TYPE = r"(?:multifd::)?Result<(?:[^<>;{}()]|<(?:[^<>;{}]|<[^<>;{}]*>)*>)*>"
SPECIFIER = r"(?:inline|static|constexpr|consteval|friend|virtual|extern)"
DECLARATION = re.compile(
    rf"^[ \t]*((?:{SPECIFIER}\s+|\[\[[^\n]*?\]\]\s*)*)(?:{TYPE}\s+|auto\s+)((?:\w+::)*(?:operator\W{{1,3}}|\w+))\s*\(",
    re.M)
RETURNS_RESULT = re.compile(rf"[^;{{}}]*->\s*(?:{TYPE}|decltype\(make\(\)\))\s*[;{{]")


def nodiscard(root):
    problems = []
    found = 0
    for path in headers(root, "include"):
        text = without_comments(path.read_text())
        for match in DECLARATION.finditer(text):
            if re.search(r"\bauto\s", match[0]) and not RETURNS_RESULT.match(text, match.end()):
                continue
            if "friend" in match[1] and re.match(r"[^{};]*;", text[match.end():]):
                continue  # says it again of a function that is declared elsewhere, and must not have the attribute
            found += 1
            line = text.count("\n", 0, match.start(2)) + 1
            if re.search(r"\bvirtual\b", match[1]) and not match[2].startswith("do_"):
                problems.append(f"{path.relative_to(root)}:{line}: {match[2]}() is virtual, and GCC does not warn when the "
                                f"result of a virtual call is dropped: a function around do_{match[2]}()")
            if "[[nodiscard" not in match[1]:
                problems.append(f"{path.relative_to(root)}:{line}: {match[2]}() returns a Result and is not "
                                f"[[nodiscard]]: an error could be dropped without a warning")
    if not found:
        problems.append("include/: no function returns a Result")
    return problems


ACQUIRES = ("memory_order_acquire", "memory_order_acq_rel", "memory_order_seq_cst")
RELEASES = ("memory_order_release", "memory_order_acq_rel", "memory_order_seq_cst")
ORDERED = re.compile(r"memory_order_(acquire|release|acq_rel)\b")
MEETS = re.compile(r"\b[Mm]eets\b([^.;]*)")


def bodies(text):
    """The bodies of all functions by name: {"push": ["{ ... }"], ...}"""
    found = {}
    for match in re.finditer(r"(~?\w+)\s*\((?:[^(){};]|\([^(){};]*\))*\)[^(){};=]*(?::[^{};]*)?\{", text):
        depth, at = 1, match.end()
        while depth and at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found.setdefault(match[1], []).append(text[match.end():at])
    return found


def comment_of(source, number):
    """The comments of a statement's lines, and those that stand right above it."""
    first = last = number
    code = [re.sub(r"//.*", "", line).strip() for line in source]
    while first > 0 and code[first - 1] and code[first - 1][-1] not in ";{}:":
        first -= 1
    while code[last] and code[last][-1] not in ";{}" and last + 1 < len(source):
        last += 1
    while first > 0 and source[first - 1].lstrip().startswith("//"):
        first -= 1
    comments = (re.sub(r"^\s*/*", "", line[line.index("//"):]) for line in source[first:last + 1] if "//" in line)
    return " ".join(comments)


def orders(root):
    problems = []
    found = 0
    for path in headers(root, "include"):
        text = path.read_text()
        source = text.splitlines()
        code = without_comments(text)
        functions = None
        for number, line in enumerate(code.splitlines()):
            kinds = set(ORDERED.findall(line))
            if not kinds:
                continue
            found += 1
            functions = functions or bodies_of_library(root)
            place = f"{path.relative_to(root)}:{number + 1}"
            named = re.findall(r"(~?\w+)\(\)", " ".join(MEETS.findall(comment_of(source, number))))
            if not named:
                problems.append(f"{place}: a comment at the {' or '.join(sorted(kinds))} has to say what it meets: "
                                f"\"meets push()\"")
            for name in named:
                other = RELEASES * (kinds != {"release"}) + ACQUIRES * (kinds != {"acquire"})
                if not any(order in body for body in functions.get(name, []) for order in other):
                    problems.append(f"{place}: meets {name}(), where nothing is ordered against it")
    if not found:
        problems.append("include/: no acquire and no release")
    return problems


def bodies_of_library(root):
    all_of_them = {}
    for path in headers(root, "include"):
        for name, texts in bodies(without_comments(path.read_text())).items():
            all_of_them.setdefault(name, []).extend(texts)
    return all_of_them


# What a policy's text has. What stands behind the last two is a file.
SECTIONS = ("Semantics", "Errors", "Threads", "Cost", "Models", "Exemplar", "Contract")
CONCEPT = re.compile(r"((?:^[ \t]*///[^\n]*\n)*)template <[^\n]*>\nconcept (\w+)", re.M)
# Concepts that are no policy. Those that begin with Has are a policy's single members.
NO_POLICY = {"ZeroSink": "the shape of a callable"}


def policies(root):
    problems = []
    found = 0
    tests = "".join(path.read_text() for path in sorted((root / "tests").rglob("*_test.cpp")))
    compiled = "".join(path.read_text() for path in sorted((root / "tests/compile").glob("*.cpp")))
    for path in headers(root, "include"):
        text = path.read_text()
        for comment, name in CONCEPT.findall(text):
            if name.startswith("Has") or name in NO_POLICY:
                continue
            found += 1
            mine = []
            comment = " ".join(re.sub(r"^[ \t]*/// ?", "", comment, flags=re.M).split())
            mine += [f"its text has no \"{section}:\"" for section in SECTIONS
                     if not re.search(rf"\b{section}\b[^:.]{{0,20}}:", comment)]
            check = "check" + re.sub(r"([A-Z])", lambda m: "_" + m[1].lower(), name)
            if f"consteval bool {check}()" not in text:
                mine.append(f"there is no {check}(), which says what member is missing")
            if not re.search(rf"\b{check}<|\b{name}<", compiled):
                mine.append("tests/compile/ has no case of it")
            if exemplar := re.search(r"Exemplar: ([\w./]+\w)", comment):
                file = root / exemplar[1]
                if not file.is_file() or f"{check}<" not in file.read_text():
                    mine.append(f"{exemplar[1]} has no model with {check}<...>()")
                elif file.suffix == ".hpp" and f'"{exemplar[1].removeprefix("tests/")}"' not in tests:
                    mine.append(f"no test includes its exemplar {exemplar[1]}")
            if contract := re.search(r"Contract: ([\w./]+\w)", comment):
                file = root / "include" / contract[1]
                if not contract[1].startswith("multifd/testing/") or not file.is_file() or name not in file.read_text():
                    mine.append(f"{contract[1]} has no contract of it")
                elif f'"{contract[1]}"' not in tests:
                    mine.append(f"no test includes its contract {contract[1]}")
            problems += [f"{path.relative_to(root)}: {name}: {each}" for each in mine]
    if not found:
        problems.append("include/: no policy")
    return problems


# Not public; what is in these rooms is for the library's own developers, and for tests.
INNER = re.compile(r"multifd/(?:\w+/)*(?:detail|engine|packets|format)/")
RESULT_OF = re.compile(rf"{TYPE}\s+(\w+)\s*\(")
# Structs that are nothing but settings or numbers.
PLAIN = re.compile(r"(?:Options|Limits|Stats)$")
# What follows "Errors:" up to the next section, which may be "Errors (stage accept):" or "Errors, Threads:".
ERRORS = re.compile(r"\bErrors?\b[^:.]*: (.*?)(?= (?:Threads|Cost|Wire|Lifetime|Returns|Params|Semantics)\b[^:.]{0,40}:|$)")
# Something that is told: an Errc, an errno, another function's or somebody else's errors, none.
TOLD = re.compile(r"\bErrc::|\w\(\)|\b(?:none|errno|E[A-Z]{3,}|those|same|GnuTLS|transport)\b|"
                  r"\b(?:the first error|out of memory|as \w+)\b")
EXPLAINS = re.compile(r"(\w+) explains")
# Calls of which a caller has to know what they take: memory, threads, descriptors.
COSTLY = re.compile(r"^(?:open|create|stats|snapshot|open_any_\w+|accept_source|tls_handshakes)$")
COST = re.compile(r"\bCost\b[^:.]*: |[Aa]llocat")
WIRE = re.compile(r"^(?:parse|encode|store|load)_\w+$")
CALLED = re.compile(r"(\w+)\s*\(")


def comments(root):
    problems = []
    found = 0
    table = root / "include/multifd/error.hpp"
    codes = set(re.findall(r"\bROW\((\w+),", table.read_text())) if table.is_file() else set()
    read = {path: declarations.read(path.read_text()) for path in headers(root, "include")
            if not INNER.search(str(path.relative_to(root)))}
    policies_there = {name for path in headers(root, "include") for comment, name in CONCEPT.findall(path.read_text())
                      if "Models:" in comment}
    fields = {}
    for each in (each for found_there in read.values() for each in found_there):
        if name := field_of(each):
            fields.setdefault(each.scopes[-1].name, set()).add(name)

    for path, all_of_them in read.items():
        types = {each.opens.name: each.comment for each in all_of_them if each.opens}

        def has_policy(scopes, types=types):
            """Whether a policy's text, which house.policies holds, says it for this type."""
            texts = [scope.comment for scope in scopes] + [types.get(scope.name.split("::")[0], "") for scope in scopes]
            return any(name in policies_there for text in texts for name in re.findall(r"\bmodel of (?:\w+::)*(\w+)", text))

        for each in all_of_them:
            if not each.public:
                continue
            place = f"{path.relative_to(root)}:{each.line}"
            owner = each.scopes[-1]
            if each.opens:
                if each.opens.key == "class":
                    found += 1
                    if not re.search(r"\bThreads\b[^:.]*:", each.comment) and not has_policy([*each.scopes, each.opens]):
                        problems.append(f"{place}: class {each.opens.name} does not say its threads (\"Threads:\")")
                continue
            if re.match(rf"(?:virtual\s+)?~{owner.name}\b", each.head):
                if not each.comment and not re.search(r"\bLifetime:|destructor", owner.comment):
                    problems.append(f"{place}: nothing says what {owner.name}'s destructor does (\"Lifetime:\")")
                continue
            returns = RESULT_OF.search(each.head)
            if returns and "deprecated" not in each.head:
                found += 1
                texts = ERRORS.findall(each.shared) + ERRORS.findall(owner.comment)
                if not texts and not has_policy(each.scopes):
                    problems.append(f"{place}: {returns[1]}() does not say its errors (\"Errors:\")")
                elif texts and not any(TOLD.search(text) or codes & set(re.findall(r"\w+", text)) for text in texts):
                    problems.append(f"{place}: {returns[1]}(): \"Errors:\" names no error")
            call = CALLED.search(each.head)
            if call and COSTLY.match(call[1]) and not COST.search(f"{each.shared} {owner.comment}") \
                    and not has_policy(each.scopes):
                problems.append(f"{place}: {call[1]}() does not say what it costs (\"Cost:\")")
            name = field_of(each)
            if name and PLAIN.search(owner.name) and not each.comment:
                found += 1
                explained = EXPLAINS.search(owner.comment)
                if not explained or name not in fields.get(explained[1], set()):
                    problems.append(f"{place}: {owner.name}::{name} has no text")
            for gone in sorted(set(re.findall(r"\bErrc::(\w+)", each.comment)) - codes):
                problems.append(f"{place}: there is no Errc::{gone}")
    # Where bytes of the wire are made and taken apart, the file or the call says by which section.
    for path in headers(root, "include/multifd/format"):
        text = path.read_text()
        whole = "section" in text.partition("#pragma once")[0]
        for each in declarations.read(text):
            call = CALLED.search(each.head)
            if call and WIRE.match(call[1]) and not whole and "section" not in each.shared:
                problems.append(f"{path.relative_to(root)}:{each.line}: {call[1]}() does not say which section of the "
                                f"format it follows")
    if not found:
        problems.append("include/: nothing to say")
    return problems


def field_of(declaration):
    """The name of a data member, if it is one."""
    head = re.sub(r"<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*>", "", declaration.head)
    if declaration.opens or declaration.scopes[-1].key == "namespace" or "(" in head.split("=")[0]:
        return None
    if re.match(r"(?:using|static|friend|template|enum|public|private)\b", head):
        return None
    named = re.match(r"[\w:&*\s]*?[\s&*](\w+)\s*(?:=.*|\{.*)?$", head, re.S)
    return named[1] if named else None


def row_of(name):
    for room, may in PROGRAMS:
        if re.match(re.escape(room).replace(r"\*", r"\w+"), name):
            return may.split()
    return None


def programs(root):
    problems = []
    found = 0
    for path in sources(root, "examples", "benchmarks"):
        name = str(path.relative_to(root))
        may = row_of(name)
        folder = name.split("/")[1] + "/"
        text = path.read_text()
        allowed = [what for room, what in PRIVATE_FOR.items() if name.startswith(room)]
        code = without_comments(text)
        for match in PRIVATE_NAME.finditer(code):
            inner = match[1] or match[2]
            if inner not in allowed and not re.search(rf"\bnamespace {inner} {{", code):
                line = code.count("\n", 0, match.start()) + 1
                problems.append(f"{name}:{line} must not use names of {inner}::, that is how the library is made")
        for include in re.findall(r'^\s*#\s*include\s*("[^"]+|<multifd/[^>]+)', text, re.M):
            include = include[1:]
            found += 1
            if include.startswith("multifd/"):
                if PRIVATE.match(include) and not include.startswith(tuple(f"multifd/{what}/" for what in allowed)):
                    problems.append(f"{name} must not include {include}: that is how the library is made")
                continue
            own = "(own)" in may and (path.parent / include.removeprefix(folder)).is_file()
            if not own and not include.startswith(tuple(each for each in may if each != "(own)")):
                problems.append(f"{name} must not include {include}; it may: {' '.join(may) or 'the library'}")
    if not found:
        problems.append("examples/ and benchmarks/ include nothing")
    return problems


RULES = {rule.__name__: rule for rule in (lines, names, nodiscard, orders, policies, comments, programs)}

def policy(name):
    """A policy that lacks nothing, for BROKEN."""
    small = name.lower()
    return f"""/// Works.
///
/// Semantics: all. Errors: none. Threads: any. Cost: none. Models: one.
///   Exemplar: tests/exemplar/{small}.hpp. Contract: multifd/testing/{small}.hpp.
template <class N>
concept {name} = true;
template <class N>
consteval bool check_{small}() {{
"""


SMALL = ("antenna", "beacon", "cable", "dial", "echo", "fuse", "gate", "house")

# What must be found, and a good neighbour of each that must not: file, text, what the rule says of it.
HEAD = "// SPDX-License-Identifier: MIT\n//\n// What is in it.\n"
BROKEN = {
    "lines": [
        ("include/multifd/long.hpp", HEAD + "\n" * 397, "include/multifd/long.hpp has 400 lines, and may have 399"),
        ("include/multifd/bare.hpp", "// SPDX-License-Identifier: MIT\n#pragma once\n", "bare.hpp: its first lines"),
        ("examples/common/long.hpp", "\n" * 401, "examples/common/long.hpp has 401 lines"),
        ("benchmarks/kernels/long.cpp", "\n" * 401, "benchmarks/kernels/long.cpp has 401 lines, and may have 400"),
        ("examples/relay/short.cpp", "\n" * 400, None),
        ("benchmarks/short.hpp", "\n" * 399, None),
        (TOY, "// [format]\n" + "\n" * 150 + "// [format end]\n", "less than 150 lines"),
    ],
    "names": [
        (TERMS, "## Terms\n\n| term | what |\n| --- | --- |\n| RAM block | x |\n| page | desk |\n\n## More\n| desk | x |\n", None),
        ("include/multifd/a.hpp", "class PageDesk {\n};\n", "a.hpp: PageDesk: desk is no term"),
        ("include/multifd/b.hpp", "template <class T>\nconcept RoomDoor = true;\n", "b.hpp: RoomDoor: room, door"),
        ("include/multifd/engine/c.hpp", "struct Gate {\n};\n", None),
        ("include/multifd/ok.hpp", "// class Door\nenum class RamBlocks { a };\nusing PageOptions = int;\n", None),
    ],
    "nodiscard": [
        ("include/multifd/a.hpp", "Result<void> f();\n", "a.hpp:1: f()"),
        ("include/multifd/b.hpp", "struct B {\n  static Result<std::pair<int, std::vector<int>>> g(int);\n};\n",
         "b.hpp:2: g()"),
        ("include/multifd/c.hpp", 'struct C {\n  [[deprecated("f()")]] Result<void>\n  h();\n};\n', "c.hpp:3: h()"),
        ("include/multifd/d.hpp", "template <class T>\ninline auto i(T t) -> Result<T> {\n}\n", "d.hpp:2: i()"),
        ("include/multifd/e.hpp",
         "struct E {\n  friend Result<E> operator+(E, E) { return E{}; }\n  friend Result<E> a(E);\n};\n",
         "e.hpp:2: operator+()"),
        ("include/multifd/v.hpp", "struct V {\n  [[nodiscard]] virtual Result<int> v() = 0;\n"
         "  [[nodiscard]] virtual Result<int> do_w() = 0;\n};\n", "v.hpp:2: v() is virtual"),
        ("include/multifd/ok.hpp", "[[nodiscard]] inline Result<void> f();\n// Result<void> g();\nauto j() -> int {}\n"
         "void k() {\n  Result<int> done = f();\n  auto l = [&]() -> Result<void> { return {}; };\n}\n", None),
    ],
    "orders": [
        ("include/multifd/a.hpp", "int f() { return x.load(std::memory_order_acquire); }\n",
         "a.hpp:1: a comment at the acquire"),
        ("include/multifd/b.hpp", "void g() {\n  x.store(1, std::memory_order_release);  // meets h()\n}\n"
         "int h() { return x.load(std::memory_order_relaxed); }\n", "b.hpp:2: meets h()"),
        ("include/multifd/c.hpp", "void i() {\n  // meets gone()\n  x.store(1, std::memory_order_release);\n}\n",
         "c.hpp:3: meets gone()"),
        ("include/multifd/ok.hpp", "struct S {\n  S() : x(1) {\n    // Sees what\n    // was put: meets push().\n"
         "    if (a &&\n        x.load(std::memory_order_acquire)) y();\n  }\n"
         "  void push() { x.store(1, std::memory_order_release); }  // meets S()\n};\n", None),
    ],
    "policies": [
        ("include/multifd/a.hpp", policy("Antenna").replace("Exemplar:", "See"),
         'a.hpp: Antenna: its text has no "Exemplar:"'),
        ("include/multifd/testing/antenna.hpp", "/// Antenna\n", None),
        ("include/multifd/b.hpp", policy("Beacon").replace("Threads: any. ", ""),
         "b.hpp: Beacon: its text has no \"Threads:\""),
        ("tests/exemplar/beacon.hpp", "static_assert(check_beacon<Lamp>());\n", None),
        ("include/multifd/testing/beacon.hpp", "/// Beacon\n", None),
        ("include/multifd/c.hpp", policy("Cable"), "c.hpp: Cable: tests/exemplar/cable.hpp has no model"),
        ("tests/exemplar/cable.hpp", "static_assert(check_beacon<Lamp>());\n", None),
        ("include/multifd/testing/cable.hpp", "/// Cable\n", None),
        ("include/multifd/d.hpp", policy("Dial"), "d.hpp: Dial: multifd/testing/dial.hpp has no contract"),
        ("tests/exemplar/dial.hpp", "static_assert(check_dial<Knob>());\n", None),
        ("include/multifd/e.hpp", policy("Echo"), "e.hpp: Echo: no test includes its contract"),
        ("tests/exemplar/echo.hpp", "static_assert(check_echo<Wall>());\n", None),
        ("include/multifd/testing/echo.hpp", "/// Echo\n", None),
        ("include/multifd/f.hpp", policy("Fuse").replace("check_fuse", "check_f"),
         "f.hpp: Fuse: there is no check_fuse()"),
        ("tests/exemplar/fuse.hpp", "static_assert(check_fuse<Wire>());\n", None),
        ("include/multifd/testing/fuse.hpp", "/// Fuse\n", None),
        ("include/multifd/g.hpp", policy("Gate"), "g.hpp: Gate: tests/compile/ has no case"),
        ("tests/exemplar/gate.hpp", "static_assert(check_gate<Door>());\n", None),
        ("include/multifd/testing/gate.hpp", "/// Gate\n", None),
        ("include/multifd/ok.hpp", "template <class A>\nconcept HasA = true;\n" + policy("House"), None),
        ("tests/exemplar/house.hpp", "static_assert(check_house<Door>());\n", None),
        ("include/multifd/testing/house.hpp", "/// House\n", None),
        ("tests/compile/all.cpp", "".join(f"check_{each}<A>();\n" for each in SMALL if each != "gate"), None),
        ("tests/contract/exemplar_test.cpp", "".join(f'#include "exemplar/{each}.hpp"\n' for each in SMALL), None),
        ("tests/contract/contract_test.cpp",
         "".join(f'#include "multifd/testing/{each}.hpp"\n' for each in SMALL if each != "echo"), None),
    ],
    "comments": [
        ("include/multifd/error.hpp", "  ROW(bad_option, misuse, \"x\")\n", None),
        ("include/multifd/model.hpp", policy("Beacon"), None),
        ("include/multifd/a.hpp", "class A {\n public:\n  int n();\n};\n", "a.hpp:1: class A does not say its threads"),
        ("include/multifd/b.hpp", "/// Threads: one.\nclass B {\n public:\n  /// Opens. Cost: a thread.\n"
         "  [[nodiscard]] static Result<B> open(int = {});\n private:\n  Result<void> hidden();\n};\n",
         "b.hpp:5: open() does not say its errors"),
        ("include/multifd/c.hpp", "/// Opens. Errors: it may fail.\n[[nodiscard]] inline Result<int> c() {\n  return 1;\n}\n",
         'c.hpp:2: c(): "Errors:" names no error'),
        ("include/multifd/d.hpp", "/// Opens. Errors: Errc::bad_optoin.\nResult<int> d();\n",
         "d.hpp:2: there is no Errc::bad_optoin"),
        ("include/multifd/e.hpp", "/// Works. Threads: any.\nclass E {\n public:\n  ~E() { stop(); }\n};\n",
         "e.hpp:4: nothing says what E's destructor does"),
        ("include/multifd/f.hpp", "/// Settings.\nstruct FOptions {\n  int depth = 0;  ///< batches\n"
         "  std::function<Result<int>()> level{};\n};\n",
         "f.hpp:4: FOptions::level has no text"),
        ("include/multifd/g.hpp", "/// FOptions explains these.\nstruct GOptions {\n  int depth = 0;\n"
         "  int gone{0};\n};\n",
         "g.hpp:4: GOptions::gone has no text"),
        ("include/multifd/h.hpp", "/// A model of Gate.\nclass H {};\n", "h.hpp:2: class H does not say its threads"),
        ("include/multifd/j.hpp", "/// Opens. Errors: ENOMEM.\nResult<int> open();\n", "j.hpp:2: open() does not say what it costs"),
        ("include/multifd/format/k.hpp", "// Bytes.\n#pragma once\n/// Parses.\nResult<int> parse_k();\n",
         "k.hpp:4: parse_k() does not say which section"),
        ("include/multifd/format/l.hpp", "// Section? section 3.\n#pragma once\n/// Parses.\nResult<int> parse_l();\n", None),
        ("include/multifd/engine/i.hpp", "class Inner {};\nResult<int> f();\n", None),
        ("include/multifd/ok.hpp",
         "#define X(a) \\\n  class Y {\n/// A model of Beacon.\nclass Ok {\n public:\n"
         "  Result<int> a();\n};\nnamespace detail {\nclass D {};\n}\n/// Both. Errors: ENOMEM. Threads: any.\n"
         "Result<int> one() {\n  return {};\n}\nResult<int> two();\n"
         "/// Threads: one. Errors: those of one(). Lifetime: the destructor joins.\nstruct S {\n  ~S();\n"
         "  S() : a_{1}, b_(2) {}\n  Result<int> three(std::span<const int> = {}) const\n    requires true\n"
         "  {\n    return {};\n  }\n};\n", None),
    ],
    "programs": [
        ("examples/common/a.cpp", '#include "qemu_relay/b.hpp"\n', "common/a.cpp must not include qemu_relay/b.hpp"),
        ("examples/qemu_relay/b.hpp", '#include "common/c.hpp"\n#include "multifd/multifd.hpp"\n', None),
        ("examples/qemu_relay/c.cpp", '#include "qemu_relay/b.hpp"\n#include "b.hpp"\n', None),
        ("examples/live_migration/d.cpp", '#include "qemu_relay/b.hpp"\n', "d.cpp must not include qemu_relay/b.hpp"),
        ("examples/e.cpp", '#include "qemu_relay/b.hpp"\n', "examples/e.cpp must not include qemu_relay/b.hpp"),
        ("examples/f.cpp", '#include "multifd/engine/pipeline.hpp"\n', "f.cpp must not include multifd/engine/"),
        ("examples/g.cpp", '#include "multifd/qemu/detail/cursor.hpp"\n', "g.cpp must not include multifd/qemu/"),
        ("examples/h.cpp", '#include "multifd/packets/outlet.hpp"\n', "h.cpp must not include multifd/packets/"),
        ("examples/l.cpp", '#include <multifd/transport/detail/wait.hpp>\n', "l.cpp must not include multifd/transport/"),
        ("examples/m.cpp", "// detail::x\nusing multifd::detail::Clock;\n", "m.cpp:2 must not use names of detail::"),
        ("examples/n.cpp", "using namespace multifd::engine;\n", "n.cpp:1 must not use names of engine::"),
        ("examples/o.cpp", "int i = qemu::detail::f();\n", "o.cpp:1 must not use names of detail::"),
        ("examples/p.cpp", "namespace detail {\nint f();\n}\nint i = detail::f() + wire::g();\n", None),
        ("benchmarks/codec/i.cpp", '#include "common/c.hpp"\n', "i.cpp must not include common/c.hpp"),
        ("benchmarks/handoff/j.cpp", '#include "multifd/engine/ring.hpp"\n#include "corpus.hpp"\nengine::Ring r;\n', None),
        ("benchmarks/kernels/k.cpp", '#include "multifd/engine/ring.hpp"\n', "k.cpp must not include multifd/engine/"),
    ],
}


def self_test():
    wrong = []
    for name, cases in BROKEN.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for file, text, _ in [(TOY, "// [format]\n// [format end]\n", None), *cases]:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_text(text)
            said = RULES[name](root)
        expected = [what for _, _, what in cases if what]
        wrong += [f"{name}: not found: {what}" for what in expected if sum(what in each for each in said) != 1]
        wrong += [f"{name}: found too much: {each}" for each in said if not any(what in each for what in expected)]
    return wrong


def main():
    if sys.argv[1:] == ["--self-test"]:
        problems = self_test()
    else:
        problems = [problem for name in sys.argv[1:] or RULES for problem in RULES[name](ROOT)]
    print(*problems, sep="\n")
    print(f"{len(problems)} wrong")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
