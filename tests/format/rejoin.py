# SPDX-License-Identifier: MIT
"""Decodes what connections that return begin with, from the text of include/multifd/format/extension.md alone."""

from reader import check

MAGIC = b"mfrj"
VERDICTS = ("joined", "unknown session", "stale generation", "unknown channel", "over")


def rejoin(reader):
    """The source's side, a channel's up to its first packet."""
    check(reader.take(4) == MAGIC, "magic")
    role, channel = reader.number(1), reader.number(1)
    check(role < 2, "role")
    check(reader.number(2) == 0, "not zero")
    generation, session, received = reader.number(4), reader.take(16).hex(), reader.number(8)
    check(generation > 0, "generation")
    check(reader.number(4) == 0, "not zero")
    if role == 0:
        check(channel == 0, "id of the main connection")
        return {"role": "main", "generation": generation, "session": session, "received": received}
    check(received == 0, "bytes that a channel has received")
    return {"role": "channel", "channel": channel, "generation": generation, "session": session,
            "epoch": reader.number(8)}


def answer(reader, given):
    check(reader.take(4) == MAGIC, "magic")
    verdict = reader.number(1)
    check(1 <= verdict <= len(VERDICTS), "verdict")
    check(reader.number(3) == 0, "not zero")
    check(reader.number(4) == given["generation"], "another generation than was said")
    check(reader.number(4) == 0, "not zero")
    return {"verdict": VERDICTS[verdict - 1], "received": reader.number(8)}
