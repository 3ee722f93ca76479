# SPDX-License-Identifier: MIT
"""Takes bytes apart, for the decoders of vectors.py."""


class Refused(Exception):
    """What a receiver answers to bytes that break the format."""


def check(condition, why):
    if not condition:
        raise Refused(why)


class Reader:
    """Takes bytes from the front; remembers which ones a receiver ignores and which belong to a compressor."""

    def __init__(self, data):
        self.data, self.at = data, 0
        self.ignored, self.coded = [], []  # ranges

    def left(self):
        return len(self.data) - self.at

    def take(self, size):
        check(self.left() >= size, f"{size} bytes wanted at {self.at}, {self.left()} there")
        self.at += size
        return self.data[self.at - size : self.at]

    def ignore(self, size):
        self.take(size)
        self.ignored.append(range(self.at - size, self.at))

    def take_coded(self, size):
        self.coded.append(range(self.at, self.at + size))
        return self.take(size)

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def name(self):
        length = self.number(1)
        check(length > 0, "a name without a byte")
        return self.text(length)

    def text(self, length):
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise Refused("a name that is no text") from None

    def field_name(self, size):
        """A name in a field of fixed size: what stands behind the NUL is ignored."""
        field = self.take(size)
        end = field.find(b"\0")
        check(end > 0, "a name that is empty or has no end")
        self.ignored.append(range(self.at - size + end + 1, self.at))
        return field[:end].decode(errors="backslashreplace")
