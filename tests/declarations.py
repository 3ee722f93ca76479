# SPDX-License-Identifier: MIT
"""Takes the declarations of a header apart, with their comments: enough of C++ for this library's own headers, as
clang-format leaves them. house.py reads them."""

import re

# Comments and strings, as blanks of the same length.
BLANKED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.S)
NAMESPACE = re.compile(r"\s*(?:inline\s+)?namespace\s*([\w:]*)")
TYPE = re.compile(r"\s*(?:template\s*<.*>\s*)?(class|struct|union)\s+(?:alignas\([^)]*\)\s+)?([\w:]+)[^()=]*$", re.S)
ACCESS = ("public", "private", "protected")


class Scope:
    """A namespace or a type. `key`: "class", "struct", "namespace"."""

    def __init__(self, key, name, comment, public):
        self.key, self.name, self.comment = key, name, comment
        self.public = public
        self.hidden = key == "namespace" and "detail" in name


class Declaration:
    """`head`: its text up to the body or the semicolon, without comments. `comment`: of its own; `shared`: that of a group
    of functions in which it stands. `scopes`: from the outermost. `opens`: the Scope, where it is a type."""

    def __init__(self, head, comment, shared, line, scopes, opens=None):
        self.head, self.comment, self.shared, self.line, self.scopes, self.opens = head, comment, shared, line, scopes, opens
        self.public = all(scope.public and not scope.hidden for scope in scopes)


class Reader:
    def __init__(self, text):
        self.text = text
        self.source = text.splitlines()
        self.code = BLANKED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        self.scopes = [Scope("namespace", "", "", True)]
        self.found = []
        self.last_line, self.last_comment = -2, ""

    def line(self, at):
        return self.text.count("\n", 0, at)

    def add(self, begin, end, opens=None):
        first, last = self.line(begin), self.line(end)
        above = first
        while above > 0 and self.source[above - 1].lstrip().startswith("///"):
            above -= 1
        lines = self.source[above:first] + [each[each.index("///"):] for each in self.source[first:last + 1] if "///<" in each]
        comment = " ".join(" ".join(re.sub(r"^\s*///<?", "", each) for each in lines).split())
        shared = comment or (self.last_comment if self.last_line == first - 1 else "")
        self.found.append(Declaration(self.code[begin:end], comment, shared, first + 1, list(self.scopes), opens))
        self.last_line, self.last_comment = last, shared
        return comment

    def behind_block(self, at):
        depth = 0
        while at < len(self.code):
            depth += {"{": 1, "}": -1}.get(self.code[at], 0)
            at += 1
            if depth == 0:
                break
        return at

    def read(self):
        code, start, at, parens = self.code, 0, 0, 0
        while at < len(code):
            char = code[at]
            head = code[start:at]
            begin = start + len(head) - len(head.lstrip())
            if char == "#" and not head.strip():  # a directive, with its continued lines
                while at < len(code) and code[at] != "\n":
                    at += 2 if code[at] == "\\" else 1
                start = at
                continue
            parens += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
            if parens > 0:
                pass
            elif char == ":" and head.strip() in ACCESS:
                self.scopes[-1].public = head.strip() == "public"
                start = at + 1
            elif char == "}":
                self.scopes.pop()
                start = at + 1
            elif char == ";":
                if head.strip():
                    self.add(begin, at)
                start = at + 1
            elif char == "{" and (head.rstrip().endswith("=") or not code[at - 1].isspace()):  # an initialiser
                at = self.behind_block(at)
                continue
            elif char == "{":
                start = at + 1
                if namespace := NAMESPACE.match(head):
                    self.scopes.append(Scope("namespace", namespace[1], "", True))
                elif kind := TYPE.match(head):
                    opens = Scope(kind[1], kind[2], "", kind[1] != "class")
                    opens.comment = self.add(begin, at, opens)
                    self.scopes.append(opens)
                else:
                    end = self.behind_block(at)
                    self.add(begin, at)
                    self.last_line = self.line(end)
                    at = start = end
                    continue
            at += 1
        return self.found


def read(text):
    """All declarations of a header, in order."""
    return Reader(text).read()
