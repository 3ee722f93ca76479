# SPDX-License-Identifier: MIT
"""ram_image: formats there and back, damage, what is no image, guests that are mostly holes, kills in the middle.

    python3 tests/programs/images.py build/dev/examples [CASE...]

The images are made here, from format/mapped_ram.md alone. MULTIFD_FLIPS=1000 and MULTIFD_KILLS=50 try more.
"""

import argparse
import contextlib
import filecmp
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import survivors
from files import Lab, check
from survivors import MIB, Folder, Process

PAGE = 4096
TEXT = b"".join(b"line %d of a page that compresses as a guest's pages do\n" % n for n in range(4096))


def named(name):
    return bytes([len(name)]) + name.encode()


def write_image(path, blocks, machine="pc-q35-9.0", devices=b""):
    """A mapped-ram file. blocks: {idstr: (bytes, {page number: its bytes})}, largest first."""
    with open(path, "wb") as file:
        file.write(b"QEVM" + struct.pack(">I", 3))
        file.write(b"\7" + struct.pack(">I", len(machine)) + machine.encode())
        file.write(b"\5" + named("configuration/capabilities") + struct.pack(">II", 1, 1) + named("mapped-ram"))
        file.write(b"\1" + struct.pack(">I", 1) + named("ram") + struct.pack(">II", 0, 4))
        file.write(struct.pack(">Q", sum(size for size, _ in blocks.values()) | 4))
        for idstr, (size, pages) in blocks.items():
            file.write(named(idstr) + struct.pack(">Q", size))
            bitmap_at = file.tell() + 28
            words = (size // PAGE + 63) // 64
            pages_at = (bitmap_at + 8 * words + MIB - 1) // MIB * MIB
            file.write(struct.pack(">IQQQ", 1, PAGE, bitmap_at, pages_at))
            for number in {page // 8 for page in pages}:
                bits = sum(1 << bit for bit in range(8) if 8 * number + bit in pages)
                file.seek(bitmap_at + number)
                file.write(bytes([bits]))
            for number, content in pages.items():
                file.seek(pages_at + number * PAGE)
                file.write(content)
            file.seek(pages_at + size)
        end = struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", 1)
        file.write(end + b"\3" + struct.pack(">I", 1) + end)
        description = json.dumps({"page_size": PAGE, "devices": []}).encode()
        file.write(devices + b"\0\6" + struct.pack(">I", len(description)) + description)
    return path


def guest_pages(count, seed=1):
    """Pages as a guest has them: half of them text, a quarter noise, the rest zero."""
    dice = random.Random(seed)
    pages = {}
    for number in range(count):
        kind = dice.random()
        if kind < 0.5:
            start = dice.randrange(len(TEXT) - PAGE)
            pages[number] = TEXT[start : start + PAGE]
        elif kind < 0.75:
            pages[number] = dice.randbytes(PAGE)
    return pages


def small_image(lab, seed=1, name="image"):
    return write_image(lab.home / name, {"pc.ram": (16 * MIB, guest_pages(4096, seed)), "vga.vram": (256 * 1024, {3: b"x" * PAGE}),
                                         "pc.bios": (128 * 1024, guest_pages(32, seed + 1))})


def ram_image(lab, *options, limit=60):
    done = subprocess.run([lab.programs / "ram_image", *map(str, options)], capture_output=True, text=True, timeout=limit)
    check(done.returncode == 0, f"ram_image {options}: status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done


def told(lab, *options):
    return json.loads(ram_image(lab, *options, "--json", "-").stdout)


def convert(lab, image, form, name, *options):
    output = lab.home / name
    ram_image(lab, "convert", "--to", form, *options, image, output)
    return output


def same(a, b):
    check(filecmp.cmp(a, b, shallow=False), f"{a.name} and {b.name} differ")


# ---- cases


def there_and_back(lab):
    """Bit for bit, whatever level, frame size and number of threads."""
    image = small_image(lab)
    for number, options in enumerate(((), ("--image-level", 3), ("--image-level", -5), ("--frame-size", "64K", "--threads", 1),
                                      ("--frame-size", "1M", "--threads", 8))):
        packed = convert(lab, image, "mapped-ram-zst", f"packed-{number}", *options)
        same(image, convert(lab, packed, "mapped-ram", f"back-{number}"))
        ram_image(lab, "verify", packed)
        check(packed.stat().st_size < image.stat().st_size, "not smaller")
    again = convert(lab, packed, "mapped-ram-zst", "again")
    same(lab.home / "packed-0", again)
    same(image, convert(lab, image, "mapped-ram", "copy"))
    data = sum(map(len, guest_pages(4096).values()))
    held = (lab.home / "copy").stat().st_blocks * 512
    check(held < data + 2 * MIB, f"the copy takes {held} bytes of the disk, for {data} of data")


def other_programs_read_it(lab):
    """zstd -l lists it, zstd -d makes the mapped-ram file of it."""
    if not shutil.which("zstd"):
        return "skipped: no program zstd"
    image = small_image(lab)
    packed = convert(lab, image, "mapped-ram-zst", "packed")
    listed = subprocess.run(["zstd", "-l", packed], capture_output=True, text=True, timeout=60)
    check(listed.returncode == 0 and "packed" in listed.stdout, f"zstd -l: {listed.stderr}")
    back = lab.home / "back"
    subprocess.run(["zstd", "-q", "-d", packed, "-o", back], check=True, timeout=60)
    same(image, back)


def what_info_says(lab):
    image = small_image(lab)
    packed = convert(lab, image, "mapped-ram-zst", "packed")
    for path, form in ((image, "mapped-ram"), (packed, "mapped-ram-zst")):
        info = told(lab, "info", path)
        check(info["format"] == form and info["machine"] == "pc-q35-9.0" and info["page_size"] == PAGE, info)
        check(info["ram_bytes"] == 16 * MIB + 384 * 1024, info)
        blocks = {block["name"]: block for block in info["blocks"]}
        check(blocks["pc.ram"]["stored_pages"] == len(guest_pages(4096)), blocks)
        check(blocks["vga.vram"]["stored_pages"] == 1, blocks)


def every_flipped_byte(lab):
    """Is found by verify, wherever in the file; MULTIFD_FLIPS of them."""
    image = write_image(lab.home / "image", {"pc.ram": (4 * MIB, guest_pages(1024))})
    packed = convert(lab, image, "mapped-ram-zst", "packed")
    size = packed.stat().st_size
    dice = random.Random(int(time.time()))
    count = int(os.environ.get("MULTIFD_FLIPS", "100"))
    # The ends, where the tables are, as often as the rest.
    places = [dice.randrange(size) if n % 2 else max(0, size - 1 - dice.randrange(2000)) for n in range(count)]
    for place in places:
        bits = 1 << dice.randrange(8)
        with open(packed, "r+b") as file:
            file.seek(place)
            before = file.read(1)[0]
            file.seek(place)
            file.write(bytes([before ^ bits]))
        done = subprocess.run([lab.programs / "ram_image", "verify", packed], capture_output=True, text=True, timeout=60)
        check(done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1,
              f"byte {place} of {size}, bits {bits:#x}: status {done.returncode}: {done.stdout} {done.stderr}")
        with open(packed, "r+b") as file:
            file.seek(place)
            file.write(bytes([before]))
    ram_image(lab, "verify", packed)
    return f"{count} of {count} found"


def what_is_no_image(lab):
    """One line that says what is wrong, nothing left behind."""
    image = small_image(lab)
    packed = convert(lab, image, "mapped-ram-zst", "packed")
    content, whole = packed.read_bytes(), image.read_bytes()
    cases = {"empty": (b"", "main stream ended in the middle"), "text": (b"hello, world\n" * 100, "no QEVM"),
             "cut-packed": (content[:-1], "seek table"), "cut-packed-half": (content[: len(content) // 2], "seek table"),
             "cut": (whole[:-10], "ended in the middle"), "cut-half": (whole[: len(whole) // 2], "outside the file"),
             "frame": (content[:200000], "seek table")}
    for name, (data, text) in cases.items():
        path = lab.home / name
        path.write_bytes(data)
        for command in (["info", path], ["verify", path], ["convert", "--to", "mapped-ram", path, lab.home / "out"],
                        ["convert", "--to", "mapped-ram-zst", path, lab.home / "out"], ["diff", path, image]):
            lab.refused(text, "ram_image", *command)
        lab.refused(text, "qemu_load", "--input", path, "--connect", "tcp:127.0.0.1:9")
        check(not list(lab.home.glob("out*")), "something was left")
    lab.refused("exists already", "ram_image", "convert", "--to", "mapped-ram", image, packed)
    lab.refused("No such file", "ram_image", "info", lab.home / "nothing")
    lab.refused("not a regular file", "ram_image", "info", "/dev/null")


def what_differs(lab):
    a, b = small_image(lab), small_image(lab, name="same")
    packed = convert(lab, b, "mapped-ram-zst", "packed")
    check(told(lab, "diff", a, packed)["differ"] is False, "the same memory differs")
    pages = guest_pages(4096)
    del pages[next(iter(pages))]  # one becomes zero
    pages[4000] = b"\1" * PAGE
    other = write_image(lab.home / "other", {"pc.ram": (16 * MIB, pages), "vga.vram": (256 * 1024, {3: b"x" * PAGE, 5: b"\0" * PAGE}),
                                             "pc.bios": (128 * 1024, guest_pages(32, 2))})
    done = subprocess.run([lab.programs / "ram_image", "diff", "--json", "-", packed, other], capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)
    check(done.returncode == 1 and found["differ"] is True, found)
    blocks = {block["name"]: block for block in found["blocks"]}
    check(blocks["pc.ram"]["differing_pages"] == 2 and blocks["vga.vram"]["differing_pages"] == 0, blocks)
    check(4000 * PAGE in blocks["pc.ram"]["first_offsets"], blocks)
    short = write_image(lab.home / "short", {"pc.ram": (8 * MIB, {})})
    lab.refused("RAM block", "ram_image", "diff", a, short)


def only_what_differs(lab):
    """An incremental image is small, needs its base and no other, and is folded by convert."""
    base_image = small_image(lab)
    base = convert(lab, base_image, "mapped-ram-zst", "base")
    pages = guest_pages(4096)
    for number in range(100, 120):
        pages[number] = bytes([number]) * PAGE
    later_image = write_image(lab.home / "later-image", {"pc.ram": (16 * MIB, pages), "vga.vram": (256 * 1024, {3: b"x" * PAGE}),
                                                         "pc.bios": (128 * 1024, guest_pages(32, 2))})
    later = convert(lab, later_image, "mapped-ram-zst", "later", "--make-base", base)
    check(later.stat().st_size * 5 < base.stat().st_size, "not small")
    lab.refused("name that base", "ram_image", "info", later)
    lab.refused("not the image that the incremental one was made against", "ram_image", "info", "--base",
                convert(lab, later_image, "mapped-ram-zst", "another"), later)
    ram_image(lab, "verify", "--base", base, later)
    same(later_image, convert(lab, later, "mapped-ram", "folded", "--base", base))
    ram_image(lab, "diff", "--base", base, later, later_image)


def mostly_holes(lab):
    """64 GiB of which 200 MiB are used: little memory, little disk. How long it takes is said, and no verdict."""
    dice = random.Random(1)
    noise = memoryview(dice.randbytes(4 * MIB))  # views: what this process takes, wait4() counts as its child's
    pages = {}
    for stretch in range(50):  # 4 MiB each
        first = dice.randrange(16 * 1024 * 1024 - 1024)
        pages |= {first + n: noise[n * PAGE : n * PAGE + PAGE] for n in range(1024)}
    image = write_image(lab.home / "image", {"pc.ram": (64 << 30, pages)})
    said = []
    for name, command in (("pack", ("convert", "--to", "mapped-ram-zst", image, lab.home / "packed")),
                          ("unpack", ("convert", "--to", "mapped-ram", lab.home / "packed", lab.home / "back")),
                          ("verify", ("verify", lab.home / "packed")),
                          ("diff", ("diff", image, lab.home / "packed"))):
        began = time.monotonic()
        with subprocess.Popen([lab.programs / "ram_image", *map(str, command)], stdout=subprocess.DEVNULL) as program:
            _, status, used = os.wait4(program.pid, 0)
            program.returncode = os.waitstatus_to_exitcode(status)
        check(program.returncode == 0, f"{name}: status {program.returncode}")
        memory = used.ru_maxrss // 1024
        check(memory < 200, f"{name}: {memory} MiB of memory")
        said.append(f"{name} {time.monotonic() - began:.1f} s {memory} MiB")
    for name in ("packed", "back"):
        held = (lab.home / name).stat().st_blocks * 512 // MIB
        check(held < 300, f"{name}: {held} MiB on the disk")
        said.append(f"{name}: {held} MiB on the disk")
    return ", ".join(said)


def killed_in_the_middle(lab):
    """At MULTIFD_KILLS random moments: nothing that looks whole, and the next run is not disturbed."""
    image = small_image(lab)
    packed = convert(lab, image, "mapped-ram-zst", "packed")
    dice = random.Random(int(time.time()))
    count = int(os.environ.get("MULTIFD_KILLS", "10"))
    took = {}
    for form, source in (("mapped-ram-zst", image), ("mapped-ram", packed)):
        began = time.monotonic()
        convert(lab, source, form, f"timed-{form}")
        took[form] = time.monotonic() - began
    whole = 0
    for number in range(count):
        form, source = (("mapped-ram-zst", image), ("mapped-ram", packed))[number % 2]
        output = lab.home / "killed"
        with Process(lab.folder, "ram_image", [lab.programs / "ram_image", "convert", "--to", form, source, output]) as program:
            time.sleep(dice.uniform(0, 1.2 * took[form]))  # a moment, not a wait
            program.kill()
        if output.exists():
            whole += 1
            ram_image(lab, "verify", output)
            ram_image(lab, "diff", source, output)
            output.unlink()
        convert(lab, source, form, "killed")  # takes the leftover's place
        output.unlink()
        check(not list(lab.home.glob("killed*")), "something was left")
    return f"{count} kills, {whole} came too late"


def signals_end_it(lab):
    """The first one, soon, without a trace. Input that takes its time: noise, at a high level."""
    image = write_image(lab.home / "image", {"pc.ram": (256 * MIB, {n: TEXT[n % 900 : n % 900 + PAGE] for n in range(0, 65536, 2)})})
    command = [lab.programs / "ram_image", "convert", "--to", "mapped-ram-zst", "--image-level", "22", image, lab.home / "out"]
    for number in (signal.SIGINT, signal.SIGTERM):
        with Process(lab.folder, "ram_image", command) as program:
            survivors.wait_for("a part", 20, lambda: list(lab.home.glob("out*")))
            os.kill(program.pid, number)
            status = program.wait_exit(20)
            check(status == 1 and "cancelled by a signal" in program.stderr(), f"status {status}: {program.stderr()}")
            check(not list(lab.home.glob("out*")), "something was left")


def has_ended(process):
    """Whoever inherits it may be slow to collect it."""
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def commands_end_with_it(lab):
    """A signal ends qemu_dump and qemu_load, and the command at the other end of their pipe with all that it started."""
    image = small_image(lab)
    for name, options in (("qemu_dump", ("--format", "mapped-ram", "--output", lab.home / "out", "--listen")),
                          ("qemu_load", ("--input", image, "--connect"))):
        pid = lab.home / "pid"
        # The command neither writes nor reads.
        command = [lab.programs / name, "--channels", "0", *options, f"exec:sleep 1000 & echo $! > {pid}.new; mv {pid}.new {pid}; wait"]
        for number in (signal.SIGINT, signal.SIGTERM):
            with Process(lab.folder, name, command) as program:
                survivors.wait_for("the command", 20, pid.exists)
                sleeper = Path(f"/proc/{int(pid.read_text())}")
                check(sleeper.exists(), "no command runs")
                os.kill(program.pid, number)
                status = program.wait_exit(20)
                check(status == 1 and "cancelled" in program.stderr(), f"{name}: status {status}: {program.stderr()}")
                survivors.wait_for("the command's end", 20, lambda sleeper=sleeper: has_ended(sleeper))
                check(not list(lab.home.glob("out*")), "something was left")
            pid.unlink()


CASES = [there_and_back, other_programs_read_it, what_info_says, every_flipped_byte, what_is_no_image, what_differs,
         only_what_differs, mostly_holes, killed_in_the_middle, signals_end_it, commands_end_with_it]


def main():
    parser = argparse.ArgumentParser(description="ram_image and its files")
    parser.add_argument("programs", type=lambda text: Path(text).resolve())
    parser.add_argument("only", nargs="*")
    options = parser.parse_args()

    def run(case):
        with Folder() as folder, contextlib.ExitStack() as stack:
            return case(Lab(folder, options.programs, stack))

    return survivors.run_cases([(case.__name__.replace("_", " "), lambda case=case: run(case)) for case in CASES
                                if not options.only or case.__name__ in options.only])


if __name__ == "__main__":
    raise SystemExit(main())
