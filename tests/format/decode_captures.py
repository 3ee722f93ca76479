# SPDX-License-Identifier: MIT
"""Decodes recorded multifd migrations and compares the memory that they leave with the source's.

    decode_captures.py [FOLDER...]                each folder: manifest.txt, main.zst, channelN.zst (format/README.md);
                                                  without any: all of tests/golden/captures
    decode_captures.py --self-test [FOLDER...]    changes bits, cuts streams, and checks that this is noticed

One line per folder; exits with 0 only if all is equal, with 77 where libzstd or libxxhash are missing. multifd_decoder.py implements the formats: the order of epochs
is that of format/packets.md section 6 and format/roles.md section 10. What the self-test accepts without an error:
    replaced    a later epoch sends the page again, or it is zero anyway (format/packets.md sections 5.2, 6)
    ignored     the byte's value is ignored (format/packets.md sections 2, 3.1, 3.3, 6.3, 7; format/main_stream.md
                sections 9.7, 9.9, 9.10), or what was cut is optional (format/roles.md section 10 step 10)
    same pages  a compressed payload still decodes to the same pages (format/packets.md section 4)
"""
import random
import sys
from pathlib import Path

from multifd_decoder import COMPRESSION, MAX_BLOCKS, MAX_STREAM, Bad, ZstdStream, decode, xxh3

CAPTURES = Path(__file__).resolve().parent.parent / "golden/captures"


def read_manifest(path):
    manifest = {"stream": {}, "block": {}}
    for line in path.read_text(encoding="utf-8").splitlines()[:MAX_BLOCKS]:
        key, _, value = line.partition(" ")
        if key in ("stream", "block"):
            name, size, digest = value.rsplit(" ", 2)
            manifest[key][name] = int(size), int(digest, 16)
        else:
            manifest[key] = value
    names = ["main"] + [f"channel{index}" for index in range(min(int(manifest["channels"]), 256))]
    if sorted(manifest["stream"]) != sorted(names) or manifest["compression"] not in COMPRESSION:
        raise ValueError("streams or compression")
    if not {"machine", "return-path"} <= manifest.keys():
        raise ValueError("no machine, or no return-path")
    return manifest


def load(folder):
    """The manifest, the streams, and which streams have not their length and digest."""
    try:
        manifest = read_manifest(folder / "manifest.txt")
    except (OSError, ValueError, KeyError) as error:
        raise Bad(f"manifest.txt: {error}") from None
    streams, wrong = {}, []
    for name, (size, digest) in sorted(manifest["stream"].items()):
        try:
            with open(folder / f"{name}.zst", "rb") as file:
                packed = file.read(MAX_STREAM + 1)
            if not 0 <= size <= MAX_STREAM or len(packed) > MAX_STREAM:
                raise Bad("too long")
            streams[name], ended = ZstdStream().decode(packed, size)
        except (Bad, OSError) as error:
            raise Bad(f"{name}.zst: {error}") from None
        if not ended or (len(streams[name]), xxh3(streams[name])) != (size, digest):
            wrong.append(f"length or digest of the stream {name}")
    return manifest, streams, wrong


def wrong_memory(main, manifest):
    """The blocks that are not as in the manifest."""
    found = {name.decode(errors="replace"): (len(block), xxh3(block)) for name, block in main.ram.blocks.items()}
    expected = manifest["block"]
    return [f"memory of {name}" for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def check(folder):
    """Prints the line of a capture. Returns whether all is equal."""
    wrong = []
    try:
        manifest, streams, wrong = load(folder)
        main = decode(streams, manifest)
        wrong += wrong_memory(main, manifest)
    except Bad as error:
        wrong.append(str(error))
    if wrong:
        print(f"{folder.name}: FAILED: " + "; ".join(wrong))
        return False
    ram, packets = main.ram, sum(channel.packets for channel in main.channels)
    unsent = sum(map(len, ram.blocks.values())) // ram.page_size - len(ram.pages)
    print(f"{folder.name}: ok: {len(ram.blocks)} blocks, per {'round' if main.per_round else 'section'}, {main.epoch} "
          f"epochs, {packets} packets, {ram.normal} normal and {ram.zero} zero pages ({ram.repeated} twice in an "
          f"epoch, {unsent} never), {main.devices} devices")
    return True


FLIPS, CUTS = 60, 30                 # of each stream, half at fields, half anywhere


def damages(reader, rng):
    """(position, bit to change), or (position, 0) to cut the stream there."""
    for index in range(FLIPS + CUTS):
        start, size, _ = rng.choice(reader.fields) if index % 2 else (0, len(reader.data), "")
        bit = 1 << rng.randrange(8) if index < FLIPS else 0
        yield (rng.randrange(start, start + size) if size and (bit or index % 4 != 1) else start), bit


def effect(whole, reader, streams, manifest, position, bit):
    """"noticed", why the damage does no harm, or None."""
    data = reader.data
    changed = bytes([data[position] ^ bit]) + data[position + 1:] if bit else b""
    try:
        main = decode(streams | {reader.name: data[:position] + changed}, manifest)
    except Bad:
        return "noticed"
    if wrong_memory(main, manifest):
        return "noticed"
    before, after, never = whole.ram.pages, main.ram.pages, (0, xxh3(bytes(whole.ram.page_size)))
    differ = [page for page in {*before, *after} if before.get(page) != after.get(page)]
    if differ:                       # section 6: a later epoch has these pages; section 5.2: fresh memory is zero
        last = [(before.get(page, never)[:2], after.get(page, never)[:2]) for page in differ]
        return "replaced" if all(old == new or old[1] == new[1] == never[1] for old, new in last) else None
    if all(reader.is_ignored(at, bit or 0xFF) for at in range(position, position + 1 if bit else len(data))):
        return "ignored"
    return "same pages" if manifest["compression"] != "none" and reader.is_payload(position) else None


def self_test(folder):
    """Prints what became of the damages to a capture. Returns whether none did unnoticed harm."""
    counts = dict.fromkeys(("noticed", "replaced", "ignored", "same pages", None), 0)
    try:
        manifest, streams, _ = load(folder)
        whole = decode(streams, manifest)
    except Bad as error:
        print(f"{folder.name}: FAILED: {error}")
        return False
    rng = random.Random(folder.name)
    for reader in [whole.reader] + [channel.reader for channel in whole.channels]:
        for position, bit in damages(reader, rng):
            result = effect(whole, reader, streams, manifest, position, bit)
            counts[result] += 1
            if result is None:
                print(f"{folder.name}: {reader.name} at {position}: {f'bit {bit:#x}' if bit else 'cut'}: not noticed")
    print(f"{folder.name}: self-test {'FAILED' if counts[None] else 'ok'}: {counts['noticed']} noticed; without harm "
          f"{counts['replaced']} in pages that come again or are zero, {counts['ignored']} in ignored bytes, "
          f"{counts['same pages']} in payloads that still decode to the same pages")
    return counts[None] == 0


def run(arguments):
    sys.stdout.reconfigure(errors="backslashreplace")
    function = self_test if "--self-test" in arguments else check
    folders = [Path(argument) for argument in arguments if argument != "--self-test"]
    if any(str(folder).startswith("-") for folder in folders):
        print("usage: decode_captures.py [--self-test] [FOLDER...]", file=sys.stderr)
        return 2
    folders = folders or sorted(path.parent for path in CAPTURES.glob("*/manifest.txt"))
    if not folders:
        print(f"{CAPTURES}: no capture", file=sys.stderr)
        return 1
    return 0 if all([function(folder) for folder in folders]) else 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
