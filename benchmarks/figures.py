#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tables of figures in README.md and benchmarks/README.md, from the raw results in benchmarks/results/.

    python3 benchmarks/figures.py            prints them
    python3 benchmarks/figures.py --check    fails where a document has another table
    python3 benchmarks/figures.py --write    puts them between the documents' markers

Nobody types a figure: after a new measurement, change the names at the top of this file and run --write.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
MACHINE = "AMD-EPYC.gcc-12.2.0.2026-11-22"
COMMIT = "5c458cc"  # of what is not another's
IMAGES = "90b66ab.AMD-EPYC.gcc-12.2.0.2026-11-30"
POSTCOPY = "e6d97c3.AMD-EPYC.gcc-12.2.0.2026-11-30.postcopy.json"
LAZY_RESTORE = "f3bf51e.AMD-EPYC.gcc-12.2.0.2026-11-30.lazy_restore.json"
PATHS = "4d8d21c.AMD-EPYC.gcc-12.2.0.2026-11-30.paths.json"
HYBRID = "62b3c43.AMD-EPYC.gcc-12.2.0.2026-11-30.hybrid.json"
TLS = "66d4c09.Intel-R--Xeon-R--Processor.gcc-12.2.0.2026-11-30.tls.json"
UNTOUCHED = "66d4c09.Intel-R--Xeon-R--Processor.gcc-12.2.0.2026-11-30.untouched.json"
BASE = "7888619.Intel-R--Xeon-R--Processor.gcc-12.2.0.2026-12-01.base.json"
KERNEL_WAYS = "7743cc4.Intel-R--Xeon-R--Processor.gcc-12.2.0.2026-12-01.kernel_ways.json"
CODEC, COLD, OLDER = "ba92cfb", "80a25d0", "6364f99"

MARK = re.compile(r"(<!-- figures: (\w+), made by benchmarks/figures\.py -->\n)(.*?)(<!-- figures: end -->\n)", re.S)


def name(what, commit=COMMIT):
    return f"{commit}.{MACHINE}.{what}"


def read(file):
    text = (RESULTS / file).read_text()
    return json.loads(text) if file.endswith(".json") else text


def command_of(file):
    """What made a result, with this project's usual build folder in place of the one that was used."""
    if file.endswith(".txt"):
        line = read(file).splitlines()[0]
    else:
        line = read(file)["command"]
    line = line if isinstance(line, str) else " ".join(line)
    line = re.sub(r" --json \S+", "", re.sub(r"/tmp/\S+?/build/bench", "build/bench", line))
    return line


def link(file):
    return f"[`{file.replace('.' + MACHINE + '.', '…')}`](results/{file})"


def source(*files, by=None):
    return f"\nFrom {', '.join(map(link, files))}, by `{by or command_of(files[0])}`.\n"


def raw_of(file):
    """The single migrations behind a printed table, where they were kept."""
    raw = file.replace(".txt", ".json")
    return [raw] if (RESULTS / raw).exists() else []


def table(head, rows):
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


# ---- what the results say --------------------------------------------------------------------------------------------

CASE = re.compile(r"^(\w+ \w+ \d+ch \w+), [\d.]+ GiB, median of \d+$")
WAY = re.compile(r"^(\w[\w -]*?) {2,}([\d.]+) +([\d.]+- *[\d.]+) \| +([\d.]+) +[\d.]+ +[\d.]+ \| +([\d.]+)% [^|]*"
                 r"\| +([\d.]+)x")


def side_by_side(file):
    """{case: {way: (GiB/s, "min to max", CPU seconds per GiB, wire in percent, times the case's first way)}}"""
    found, case = {}, None
    for line in read(file).splitlines():
        if head := CASE.match(line):
            case = found.setdefault(head[1], {})
        elif case is not None and (way := WAY.match(line)):
            spread = way[3].replace("- ", "-").replace("-", " to ")
            case[way[1]] = float(way[2]), spread, float(way[4]), float(way[5]), float(way[6])
    return found


def rows(file):
    """{what: figure}, of rows.py"""
    return {re.sub(r" the pump's.*| [\d.]+ GiB/s,", "", row["what"]): row["figure"] for row in read(file)["rows"]}


def kernels(file):
    """{what: (the library's ns a page, the baseline's)}"""
    found, before = {}, ""
    for row in read(file)["rows"]:
        what = row["what"]
        if "a producer that skips runs" in what:
            what = f"{before}: a producer that skips runs"
        elif order := re.match(r"the same, (in order|random order)", what):
            what = f"first word not zero, cold, {order[1]}: touching that word alone"
        before = what
        found[what] = row["ns_per_page"], row["baseline_ns_per_page"]
    return found


def producer_costs(what):
    """Of every run there is: rows.py's own and those of the producer alone."""
    costs = [figure for key, figure in rows(name("rows.json")).items() if key.startswith(f"producer, {what},")]
    alone = re.findall(rf"producer, {re.escape(what)}, \d worker\(s\) +([\d.]+) ns", read(name("producer.txt")))
    return sorted(costs + [float(each) for each in alone])


def pipeline(what, key):
    return statistics.median(run[key] for run in read(name("rows.json"))["raw"][f"pipeline/{what}"])


def speed(what):
    return pipeline(what, "bytes_per_second") / 2**30


def times(ratio):
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def spread(values, digits=0):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


# ---- tables ----------------------------------------------------------------------------------------------------------

LABELS = {"zero": "all zero", "library": "shared libraries"}


def against_qemu(file, cases):
    lines = []
    found = side_by_side(file)
    for case in cases:
        pattern, codec, channels, memory = case.split()
        label = LABELS.get(pattern, pattern) + (", fresh destination" if memory == "fresh" else "")
        label += "" if codec == "none" else f", {codec}"
        ways = found[case]
        for way, (gib, between, cpu, wire, ratio) in ways.items():
            who = {"qemu": "QEMU", "ours": "multifd", "pump": "raw sockets", "qemu memfd": "QEMU, memfd"}.get(way)
            who = who or way.replace("qemu", "QEMU").replace("ours", "multifd")
            first = way == next(iter(ways))
            lines.append([label if first else "", who, f"{gib:.2f} ({between})", "" if first else times(ratio),
                          f"{cpu:.2f}", f"{wire:.1f} %"])
    return lines


QEMU_HEAD = ["memory", "way", "GiB/s (spread)", "times QEMU", "CPU s/GiB", "wire"]


def qemu():
    file = name("qemu.txt")
    cases = [case for case in side_by_side(file) if " 2ch " in case]
    return table(QEMU_HEAD, against_qemu(file, cases)) + source(file, *raw_of(file))


def qemu_fresh():
    file = name("qemu-fresh.txt")
    return table(QEMU_HEAD, against_qemu(file, ["random none 2ch fresh"])) + source(file, *raw_of(file))


def qemu_cold():
    file = name("qemu-fresh.txt", COLD)
    by = "side_by_side.py of that commit; today with --pattern random --memory fresh --size 1G --cold-host"
    return table(QEMU_HEAD, against_qemu(file, ["random none 2ch fresh"])) + source(file, by=by)


OTHERS = (("QEMU 10.0, 2 GiB", name("qemu.txt")), ("an older commit of multifd", name("qemu.txt", OLDER)),
          ("another size, 3 GiB", name("qemu-3g.txt")), ("congestion control cubic", name("qemu-cubic.txt")),
          ("QEMU 7.2, 1 GiB", name("qemu-7.2.txt")))


def qemu_others():
    lines = []
    for what, file in OTHERS:
        found = side_by_side(file)
        line = [what]
        for case in ("random none 2ch warm", "mixed none 2ch warm", "zero none 2ch warm", "random none 2ch fresh",
                     "mixed none 2ch fresh"):
            ways = found.get(case)
            line.append("" if not ways else f"{ways['qemu'][0]:.2f}; {ways['ours'][0]:.2f}; "
                                            f"{times(ways['ours'][4])}")
        lines.append(line)
    head = ["run (QEMU GiB/s; multifd GiB/s; ratio)", "random", "mixed", "all zero", "random, fresh", "mixed, fresh"]
    made = [f"* {what}: {', '.join(map(link, [file, *raw_of(file)]))}, by `{command_of([*raw_of(file), file][0])}`"
            for what, file in OTHERS]
    return table(head, lines) + "\n" + "\n".join(made) + "\n"


def sockets():
    found = rows(name("rows.json"))
    lines = []
    for socket in ("tcp", "unix"):
        for channels in (1, 2, 4, 8, 16, 32):
            case = f"{socket}, {channels} channel(s)"
            ours, pump = (speed(f"{way}/{socket}/channels:{channels}") for way in ("none", "pump"))
            share = found[f"{case}: none, share of"]
            verdict = "" if channels > 8 else "yes" if share >= 95 else "**no**"
            best = found[f"{case}: share of the best"]
            lines.append([socket.upper() if socket == "tcp" else "UNIX", str(channels), f"{ours:.2f}", f"{pump:.2f}",
                          f"{share:.0f} %", verdict, f"{best:.0f} %"])
    head = ["socket", "channels", "multifd GiB/s", "raw sockets GiB/s", "multifd / raw", "at least 95 %",
            "share of multifd's best"]
    return table(head, lines) + source(name("rows.txt"), name("rows.json"))


WAYS_OF_TLS = {"qemu-psk": "QEMU 10.0, pre-shared keys", "qemu-x509": "QEMU 10.0, certificates", "qemu-plain": "QEMU 10.0, plain",
               "ours-plain": "multifd, plain", "ours-gnutls-psk": "multifd, GnuTLS, pre-shared keys",
               "ours-gnutls-x509": "multifd, GnuTLS, certificates", "ours-openssl-psk": "multifd, OpenSSL, pre-shared keys",
               "ours-openssl-x509": "multifd, OpenSSL, certificates"}


def tls():
    report = read(TLS)
    medians, calls = report["medians"], report["system_calls"]
    lines = []
    for way, label in WAYS_OF_TLS.items():
        mine, kind = medians[way], way.rsplit("-", 1)[-1]
        qemu, plain = medians[f"qemu-{kind}"], medians["ours-plain"]
        ours = way.startswith("ours")
        ratio = (lambda key, base: times(mine[key] / base[key]) if ours else "")
        told = calls.get(way)
        lines.append([label, f"{mine['gib_per_s']:.2f} ({mine['slowest']:.2f} to {mine['fastest']:.2f})", f"{mine['cpu_per_gib']:.2f}",
                      ratio("gib_per_s", qemu), ratio("cpu_per_gib", qemu), ratio("cpu_per_gib", plain),
                      f"{told['source'] / 1000:.1f}, {told['destination'] / 1000:.1f}" if told else ""])
    return table(["way", "GiB/s (spread)", "CPU s/GiB", "times QEMU", "its CPU / QEMU's", "its CPU / our plain", "thousand system calls a GiB, source, destination"],
                 lines) + source(TLS)


def ways_beside(runs, base):
    """"GiB/s; times the base's; CPU seconds over the base's", as medians."""
    of = lambda key, some: statistics.median(run[key] for run in some)  # noqa: E731
    speed, cpu = (of(key, runs) / of(key, base) for key in ("gib_per_s", "cpu_s_per_gib"))
    return f"{of('gib_per_s', runs):.2f}; {times(speed)}; {times(cpu)}"


def kernel_ways():
    report = read(KERNEL_WAYS)
    lines = []
    for kind, told in report["kinds"].items():
        plain = told["runs"]["sendmsg"]
        for way, runs in told["runs"].items():
            calls = [statistics.median(run[f"{end}_calls_per_gib"] for run in runs["2"]) / 1000 for end in ("sender", "receiver")]
            lines.append([kind if way == "sendmsg" else "", way, *(ways_beside(runs[n], plain[n]) for n in plain), f"{calls[0]:.1f}, {calls[1]:.1f}"])
        lines += [["", way, "refused", "", "", ""] for way in told["refused"]]
    head = ["connections", "way", "1", "2", "4", "thousand system calls a GiB, sender, receiver"]
    return table(head, lines) + source(KERNEL_WAYS)


def splice():
    raw = read(KERNEL_WAYS)["pipeline"]
    lines = []
    for socket, label in (("tcp", "TCP, loopback"), ("unix", "UNIX")):
        for channels in (1, 2, 4, 8):
            of = {what: [{"gib_per_s": run["bytes_per_second"] / 2**30, "cpu_s_per_gib": run["cpu_s_per_gib"]}
                         for run in raw[f"pipeline/{what}/{socket}/channels:{channels}"]] for what in ("pump", "none", "splice")}
            lines.append([label if channels == 1 else "", str(channels), *(ways_beside(of[what], of["pump"]) for what in ("none", "splice")),
                          ways_beside(of["splice"], of["none"])])
    return table(["socket", "channels", "`FdTransport`, beside the pump", "`SpliceTransport`, beside the pump", "beside `FdTransport`"], lines) + source(KERNEL_WAYS)


def untouched():
    lines = []
    for way, runs in read(UNTOUCHED)["results"].items():
        column = {key: [run[key] for run in runs] for key in runs[0]}
        du = ", ".join(f"{statistics.median(column[key]):.0f}" for key in ("source_du_mib", "copy_du_mib")) if "copy_du_mib" in column else ""
        lines.append([way, median(column["seconds"], 2), median(column["first_round_s"], 2), du,
                      ", ".join(f"{statistics.median(column[key]):.0f}" for key in ("source_peak_mib", "destination_peak_mib"))])
    return table(["what", "all, s", "first round, s", "`du` of source and copy, MiB", "peak of resident memory, source, destination, MiB"], lines) + source(
        UNTOUCHED, by="python3 benchmarks/untouched.py build/bench --quick --repeat 3")


def older_copy():
    told = read(BASE)
    lines = []
    for way, runs in told["results"].items():
        of = lambda key, runs=runs: statistics.median(run[key] for run in runs)  # noqa: E731
        whole = told["results"][way.rsplit(", ", 1)[0] + ", whole"]
        seconds, wire = (statistics.median(run[key] for run in whole) for key in ("seconds", "wire_bytes"))
        lines.append([way, median([run["seconds"] for run in runs], 2), f"{of('seconds') / seconds:.2f}x", f"{of('compare_s'):.2f}",
                      f"{of('all_s'):.2f}", f"{of('cpu_s'):.2f}", f"{100 * of('wire_bytes') / wire:.1f}"])
    return table(["link, what", "seconds", "of the whole's", "comparing, s", "with both digests of the file, s", "CPU s", "bytes, % of the whole's"], lines) + source(BASE)


def handoff():
    found = rows(name("rows.json"))
    lines = []
    for label, what in (("runs of pages", "runs"), ("every other page of a bitmap", "dirty bitmap, every other page"),
                        ("2 % of a bitmap's pages", "dirty bitmap, 2 % of pages"), ("single pages", "single pages")):
        costs = producer_costs(what)
        lines.append([f"a page at the producer: {label}", f"{spread(costs)} ns, median {statistics.median(costs):.1f} "
                      f"of {len(costs)}", "", ""])
    for workers in (1, 2):
        case = f"hand-off, no work, {workers} worker(s): "
        ours, theirs = found[case + "time a batch"], found[case + "semaphores"]
        lines.append([f"a batch of 128 pages to {workers} worker(s), no work", f"{ours / 1000:.2f} us, "
                      f"{found[case + 'context switches']:.2f} context switches", f"{theirs / 1000:.0f} us",
                      times(theirs / ours)])
    for work in (20, 100, 300):
        for workers in (1, 2, 4):
            case = f"{work} us of work, {workers} worker(s): "
            lines.append([f"batches that are {work} us of work, {workers} worker(s)",
                          f"{found[case + 'context switches']:.2f} context switches", "",
                          times(found[case + "throughput"])])
    lines += [["compile time: umbrella header", f"{found['compile time, umbrella header']:.1f} s", "", ""],
              ["compile time: one stack, both ends, -O2", f"{found['compile time, one stack, both ends, -O2']:.1f} s",
               "", ""],
              ["code of a program that is one stack", f"{found['text of a program that is one stack']:.0f} KiB", "", ""]]
    head = ["what", "multifd", "semaphores", "throughput"]
    return table(head, lines) + source(name("rows.txt"), name("producer.txt"))


def zero():
    lines = []
    for what, (ours, base) in kernels(name("kernels.json")).items():
        lines.append([what, f"{ours:.1f}", f"{base:.1f}", times(base / ours)])
    return table(["what", "ns a page", "baseline's", "ratio"], lines) + source(name("kernels.txt"), name("kernels.json"))


def missed():
    """Every goal that the measurement did not reach."""
    lines = []
    for row in read(name("rows.json"))["rows"]:
        if row["reached"] == "NO":
            lines.append([str(row["row"]), row["what"], f"{row['figure']:.1f} {row['unit']}", row["target"]])
    for row in read(name("kernels.json"))["rows"]:
        if row["reached"] is False:
            lines.append([str(row["row"]), row["what"], times(row["ratio"]), times(row["to_reach"])])
    for row in read(name("qemu.json"))["rows"]:
        if not row["reached"]:
            lines.append([str(row["row"]), row["figure"], f"{row['value']:.2f}", f"{row['goal']}"])
    files = name("rows.json"), name("kernels.json"), name("qemu.json")
    by = "sh benchmarks/measure.sh build/bench rows kernels qemu"
    return table(["row", "what", "measured", "goal"], lines) + source(*files, by=by)


def codec():
    lines = []
    for pattern in ("guest", "library", "mixed"):
        for case in ("zlib/1", "igzip/1", "zstd/1", "zstd/-1", "zstd/-5", "zstd/-20"):
            cells = []
            for way in ("compress", "decompress"):
                line = next(line for line in read(name("codec.txt", CODEC)).splitlines()
                            if line.startswith(f"{way}/{pattern}/{case} "))
                cells.append(line.split())
            (_, fast, faster, ratio, size), (_, back, backer, _, _) = cells
            lines.append([LABELS.get(pattern, pattern), case.replace("/", " "), fast, faster, back, backer, ratio, size])
    head = ["pages", "codec", "encode MB/s", "times plain", "decode MB/s", "times plain", "ratio", "bytes / plain's"]
    files = name("codec.txt", CODEC), name("codec.json", CODEC)
    by = "bench_codec --benchmark_repetitions=5 --benchmark_enable_random_interleaving=true"
    return table(head, lines) + source(*files, by=by)


def images():
    lines = []
    found = read(f"{IMAGES}.images.json")
    labels = {"save": "save, tmpfs", "restore fresh": "restore, tmpfs, fresh memory", "restore touched": "restore, tmpfs, touched memory",
              "cold": "restore, cold disk", "stop": "a dump's stop of a running guest"}
    ways = {("cold", "multifd"): "multifd, mapped-ram-zst", ("stop", "QEMU"): "`dump-guest-memory`",
            ("stop", "multifd"): "`qemu_dump --format elf`", ("stop", "nothing"): "no dump"}
    before = ""
    for row in found["rows"]:
        if "way" not in row:
            sizes = row["bytes"]
            lines.append(["file, guest-like data", "mapped-ram-zst", f"{sizes['mapped-ram-zst'] / 2**20:.0f} MiB of {sizes['raw'] / 2**20:.0f}",
                          times(row["ratio"]), times(row["goal"])])
            continue
        part, way = row["part"], row["way"]
        spread = f"{row['seconds']:.3f} s ({min(row['samples']):.3f} to {max(row['samples']):.3f})"
        lines.append(["" if part == before else labels[part], ways.get((part, way), way), spread,
                      "" if way in ("QEMU", "nothing") else times(row["ratio"]), times(row["goal"]) if row["goal"] else ""])
        before = part
    return table(["what", "way", "time", "times QEMU", "goal"], lines) + source(f"{IMAGES}.images.txt", f"{IMAGES}.images.json")


def median(values, digits):
    return f"{statistics.median(values):.{digits}f} ({spread(values, digits)})"


def postcopy():
    samples = read(POSTCOPY)["samples"]
    p99 = {way: statistics.median(run["p99_us"] for run in runs) for way, runs in samples.items()}
    labels = {"floor": "multifd, nothing in the background", "qemu": "QEMU 11.1, postcopy-preempt", "qemu-plain": "QEMU 11.1, without preempt"}
    lines = []
    for way, runs in samples.items():
        channels, _, lane = way.partition(" ")
        label = labels.get(way) or f"multifd, {channels} in the background, {'urgent lane' if lane == 'on' else 'no lane'}"
        lines.append([label, *(median([run[key] for run in runs], 0) for key in ("p50_us", "p99_us", "p999_us")),
                      times(p99[way] / p99["floor"]), times(p99["qemu"] / p99[way]), median([run["seconds"] for run in runs], 1)])
    return table(["way, page connections", "p50, us", "p99, us", "p99.9, us", "p99 / floor's", "QEMU's p99 / it", "all pages, s"], lines) + source(
        POSTCOPY, by="python3 benchmarks/postcopy.py --build build/bench")


def lazy_restore():
    lines, loops, loads = [], {}, {}
    for row in read(LAZY_RESTORE)["rows"]:
        image, way = row["image"], row["way"]
        if way == "full load":
            loads[image] = row["first"]
        if way == "eager loop":
            loops[image] = row["seconds"]
        lazy = way.startswith("lazy")
        lines.append([image, way, median([1000 * run["first"] for run in row["samples"]], 1), median([run["seconds"] for run in row["samples"]], 2),
                      times(loads[image] / row["first"]) if lazy else "", times(loops[image] / row["seconds"]) if lazy else ""])
    return table(["image", "way", "first page, ms", "all pages, s", "sooner than the full load", "speed / eager loop's"], lines) + source(LAZY_RESTORE)


def hybrid():
    lines = []
    for guest, ways in read(HYBRID)["samples"].items():
        for way, runs in ways.items():
            good = [run for run in runs if "error" not in run]
            lines.append([guest, way, *(median([run[key] for run in good], digits) if good else "" for key, digits in
                                        (("downtime_ms", 0), ("seconds", 1))), f"{len(good)} of {len(runs)}"])
    return table(["guest", "way", "stands still, ms", "all, s", "migrated"], lines) + source(HYBRID)


def paths():
    samples = read(PATHS)["samples"]
    rate = {way: statistics.median(run["mb_per_s"] for run in runs) for way, runs in samples.items()}
    lines = []
    for way, runs in samples.items():
        kind = "qemu: " if way.startswith("qemu: ") else ""
        one, slow = rate[f"{kind}one 1 Gbit"], rate[f"{kind}one 300 Mbit"]
        plain = way.removeprefix(kind)
        sides = ("QEMU 10.0, `qemu_relay`, QEMU 10.0" if kind else "`ram_send`, `ram_receive`")
        against = (f"{rate[way] / one:.2f}x the first alone" if plain.endswith("1 + 1 Gbit") else
                   f"{100 * rate[way] / (one + slow):.1f} % of the sum" if "+" in plain else "")
        carried = " and ".join(f"{statistics.median(run['interfaces'][i] for run in runs) / 1e6:.0f}" for i in range(2))
        lines.append([sides, plain, median([run["mb_per_s"] for run in runs], 1), carried, against])
    return table(["programs", "networks", "MB/s", "interfaces carried, MB", "against"], lines) + source(PATHS)


def path_caps():
    runs = read(PATHS)["caps"]
    lines = [[what, *(median([100 * run[what][key] for run in runs], 2) for key in ("interface", "path"))] for what in runs[0]]
    return table(["path, cap", "% of it at the interface", "as the path counts"], lines) + source(PATHS)


def readme():
    """At most ten rows, of README.md."""
    lines = []
    found, fresh = side_by_side(name("qemu.txt")), side_by_side(name("qemu-fresh.txt"))

    def beside_qemu(label, ways, ours="ours", theirs="qemu"):
        (gib, _, cpu, _, ratio), (base, _, base_cpu, *_) = ways[ours], ways[theirs]
        lines.append([label, f"{gib:.2f} GiB/s, {cpu:.2f} CPU s/GiB", f"QEMU: {base:.2f}, {base_cpu:.2f}",
                      times(ratio)])

    beside_qemu("random pages", found["random none 2ch warm"])
    beside_qemu("mixed: 40 % zero, 40 % guest-like, 20 % random", found["mixed none 2ch warm"])
    beside_qemu("random, destination memory never touched", fresh["random none 2ch fresh"])
    beside_qemu("mixed, zstd 1", found["mixed zstd 2ch warm"], "ours zstd 1", "qemu zstd 1")
    beside_qemu("mixed, zlib 1 by `Igzip`", found["mixed zlib 2ch warm"], "ours igzip 1", "qemu zlib 1")
    for socket, label in (("tcp", "TCP"), ("unix", "UNIX sockets")):
        ours, pump = ([speed(f"{way}/{socket}/channels:{n}") for n in (1, 2, 4, 8)] for way in ("none", "pump"))
        lines.append([f"random, {label}, 1 / 2 / 4 / 8 channels", " / ".join(f"{gib:.1f}" for gib in ours) + " GiB/s",
                      "raw sockets: " + " / ".join(f"{gib:.1f}" for gib in pump),
                      " / ".join(f"{100 * a / b:.0f}" for a, b in zip(ours, pump)) + " %"])
    splice, pump = ([statistics.median(run["bytes_per_second"] for run in read(KERNEL_WAYS)["pipeline"][f"pipeline/{what}/unix/channels:{n}"]) / 2**30
                     for n in (1, 2, 4, 8)] for what in ("splice", "pump"))
    lines.append(["the same by `SpliceTransport`, on the Xeon", " / ".join(f"{gib:.1f}" for gib in splice) + " GiB/s",
                  "raw sockets: " + " / ".join(f"{gib:.1f}" for gib in pump),
                  " / ".join(f"{100 * a / b:.0f}" for a, b in zip(splice, pump)) + " %"])
    tls_speed, plain = (speed(f"{way}/tcp/channels:2") for way in ("tls", "none"))
    lines.append(["random under TLS, 2 channels", f"{tls_speed:.2f} GiB/s", f"plain: {plain:.2f}",
                  times(tls_speed / plain)])
    ours, base = kernels(name("kernels.json"))["8 GiB, 90 % untouched, anonymous"]
    lines.append(["first round of 8 GiB, 90 % never touched, `ResidencyAware`", f"{ours:.0f} ns a page",
                  f"reading all of it: {base:.0f} ns", times(base / ours)])
    return table(["memory", "multifd", "beside it, in the same run", "ratio"], lines)


def documents():
    """(path, its text, its text with the tables of today)"""
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md"):
        text = path.read_text()
        yield path, text, MARK.sub(lambda mark: mark[1] + globals()[mark[2]]() + mark[4], text)


def main():
    parser = argparse.ArgumentParser(description="the documents' tables of figures, from benchmarks/results/")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail where a document has another table")
    what.add_argument("--write", action="store_true", help="put them into the documents")
    options = parser.parse_args()
    wrong = 0
    for path, old, new in documents():
        marks = MARK.findall(new)
        if options.write:
            path.write_text(new)
        elif options.check:
            for (_, table_name, before, _), (_, _, after, _) in zip(MARK.findall(old), marks):
                if before != after:
                    wrong += 1
                    print(f"{path.relative_to(ROOT)}: its table {table_name} is not what benchmarks/results/ makes:\n{after}")
        else:
            print("\n".join(made for _, _, made, _ in marks))
        if not marks:
            wrong += 1
            print(f"{path.relative_to(ROOT)}: has no table of figures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
