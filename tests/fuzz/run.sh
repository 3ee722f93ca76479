#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Builds the fuzz targets (preset fuzz: clang, libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer) and runs them.
#
#   sh tests/fuzz/run.sh [SECONDS [TARGET...]]     all targets, 1800 seconds each
#
# Each starts from tests/fuzz/corpus and from what earlier runs found, kept in build/fuzz/corpus. An input that breaks
# something is kept in build/fuzz/findings, and its target's output in build/fuzz/logs; the exit status is then 1. To
# see a finding again:  build/fuzz/tests/fuzz/fuzz_TARGET FILE
#
# JOBS=N runs N targets at once.
set -u
cd "$(dirname "$0")/../.." || exit 1

seconds=${1:-1800}
[ $# -gt 0 ] && shift
case "$seconds" in
  *[!0-9]* | "")
    echo "usage: sh tests/fuzz/run.sh [SECONDS [TARGET...]]" >&2
    exit 2
    ;;
esac

build=build/fuzz
mkdir -p build
if ! cmake --preset fuzz >build/fuzz-configure.log 2>&1; then
  cat build/fuzz-configure.log
  exit 1
fi
rm build/fuzz-configure.log
all=$(cat "$build/fuzz-targets.txt")
targets=${*:-$all}
binaries=""
for target in $targets; do
  if ! echo "$all" | grep -qx "$target"; then
    echo "run.sh: no target $target; there are: $(echo "$all" | tr '\n' ' ')" >&2
    exit 2
  fi
  binaries="$binaries fuzz_$target"
done
# shellcheck disable=SC2086 # a list of words
cmake --build --preset fuzz --target $binaries -- --quiet || exit 1

mkdir -p "$build/logs" "$build/findings"

# run_one <target> <seconds>: never fails; what came of it is in its log and its status file.
run_one() {
  corpus=$build/corpus/$1
  mkdir -p "$corpus"
  # What a receiver may take in one piece: a payload buffer and a zstd window of 1 MiB each. ASan keeps freed memory for
  # a while, which is not the target's.
  ASAN_OPTIONS=quarantine_size_mb=16:allocator_may_return_null=1 \
    "$build/tests/fuzz/fuzz_$1" -max_total_time="$2" -timeout=20 -rss_limit_mb=768 -malloc_limit_mb=8 \
    -max_len=65536 -len_control=20 -reload=0 -print_final_stats=1 -verbosity=1 -artifact_prefix="$build/findings/$1-" \
    "$corpus" "tests/fuzz/corpus/$(echo "$1" | sed s/igzip/zlib/)" >"$build/logs/$1.log" 2>&1
  echo $? >"$build/logs/$1.status"
}

jobs=${JOBS:-1}
running=0
for target in $targets; do
  run_one "$target" "$seconds" &
  running=$((running + 1))
  if [ "$running" -ge "$jobs" ]; then
    wait
    running=0
  fi
done
wait

# The last "cov: C ft: F" of a log, and its final statistics.
failed=""
printf '%-16s %10s %8s %6s %7s %8s  %s\n' target executions exec/s cov ft peak-MiB result
for target in $targets; do
  log=$build/logs/$target.log
  result=ok
  if [ "$(cat "$build/logs/$target.status")" != 0 ]; then
    failed="$failed $target"
    result="FINDING: $(grep -m 1 -E 'does not hold|ERROR:|runtime error' "$log" | cut -c 1-120)"
  fi
  awk -v target="$target" -v result="$result" '
    { for (i = 1; i < NF; ++i) { if ($i == "cov:") cov = $(i + 1); if ($i == "ft:") ft = $(i + 1) } }
    $1 == "stat::number_of_executed_units:" { units = $2 }
    $1 == "stat::average_exec_per_sec:" { speed = $2 }
    $1 == "stat::peak_rss_mb:" { peak = $2 }
    END { printf "%-16s %10s %8s %6s %7s %8s  %s\n", target, units, speed, cov, ft, peak, result }' "$log"
done
if [ -n "$failed" ]; then
  echo "run.sh: findings in $build/findings, logs in $build/logs:$failed" >&2
  exit 1
fi
