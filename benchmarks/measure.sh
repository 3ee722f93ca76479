#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Measures everything, on a machine that does nothing else: some 25 minutes. Leaves raw results and what was printed in
# benchmarks/results/, named COMMIT.CPU.COMPILER.DATE.WHAT. The documents' figures come from there: benchmarks/figures.py.
#
#   cmake --preset bench && cmake --build --preset bench && sh benchmarks/measure.sh [build/bench [what...]]
#
# what: rows kernels codec qemu images advise
set -eu
cd "$(dirname "$0")/.."
build=$(cd "${1:-build/bench}" && pwd)
[ $# -eq 0 ] || shift
what=${*:-rows kernels codec qemu images advise}

cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1 | tr -c 'A-Za-z0-9\n' '-')
compiler=$(g++ -dumpfullversion)
mkdir -p benchmarks/results
prefix=benchmarks/results/$(git describe --always --dirty).$cpu.gcc-$compiler.$(date +%F)

# keep <what> <command...>: prints what the command prints, and keeps it.
keep() {
  name=$1
  shift
  echo "==== $name: $*"
  { echo "$*" && "$@"; } >"$prefix.$name.txt" 2>&1 || { tail -n 20 "$prefix.$name.txt"; echo "FAILED: $name"; }
  tail -n +2 "$prefix.$name.txt"
}

for each in $what; do
  case $each in
    rows) keep rows benchmarks/rows.py "$build" --json "$prefix.rows.json" ;;
    kernels) keep kernels benchmarks/kernels/rows.py "$build/benchmarks/bench_kernels" --json "$prefix.kernels.json" ;;
    codec)
      "$build/benchmarks/bench_codec" --benchmark_repetitions=5 --benchmark_enable_random_interleaving=true \
        --benchmark_out="$prefix.codec.json" --benchmark_out_format=json >/dev/null 2>&1
      keep codec python3 benchmarks/codec/table.py "$prefix.codec.json"
      ;;
    qemu) keep qemu benchmarks/qemu/side_by_side.py --build "$build" --json "$prefix.qemu.json" ;;
    images) keep images python3 benchmarks/images.py --build "$build" --json "$prefix.images.json" ;;
    advise)
      rm -f "$prefix.advise.svg" # an earlier run's: multifd_advise overwrites no picture
      keep advise "$build/benchmarks/multifd_advise" --pattern mixed --sample 512M --link loopback \
        --destination warm --verify --json "$prefix.advise.json" --plot "$prefix.advise.svg"
      ;;
    *)
      echo "measure.sh: $each: rows, kernels, codec, qemu, images or advise" >&2
      exit 2
      ;;
  esac
done
