#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Builds and runs every test on Debian 12, from a bare machine on (then as root, to install packages).
#
#   sh tests/run.sh            format, both compilers, sanitizers, no-exceptions build; ends with the ctest of the preset
#                              dev, but for those tests that ran under AddressSanitizer
#   sh tests/run.sh --quick    only that last stage, with all its tests
#   sh tests/run.sh --night    what is too long for that, hours in all: see night() below for the parts and their length
#                              (sh tests/run.sh --night soak kill runs only these)
#
# All stages run even when one fails. The end says how long each took, which tests were skipped and why, and which
# stages failed, as does the exit status.
set -u
cd "$(dirname "$0")/.." || exit 1

quick=no
night=no
case "${1-}" in
  "") ;;
  --quick) quick=yes ;;
  --night)
    night=yes
    shift
    only=$*
    ;;
  *)
    echo "usage: sh tests/run.sh [--quick | --night [part...]]" >&2
    exit 2
    ;;
esac

packages="g++ cmake ninja-build pkg-config libboost-dev libxxhash-dev libisal-dev libgnutls28-dev libssl-dev libzstd-dev
  zlib1g-dev doctest-dev libbenchmark-dev libcli11-dev libfmt-dev nlohmann-json3-dev"
if [ "$quick" = no ]; then
  packages="$packages clang-19 clang-format-19 libclang-rt-19-dev"
fi
# shellcheck source=cmake/install_packages.sh
. cmake/install_packages.sh
# shellcheck disable=SC2086 # a list of words
install_packages $packages || exit 1

# The interop tests' peers. What cannot be had skips its tests, which the end of the output says.
install_packages qemu-system-x86 python3 mmdebstrap || echo "==== without QEMU: interop tests will be skipped" >&2
install_packages iproute2 || echo "==== without iproute2: programs.network and programs.paths will be skipped" >&2
export MULTIFD_QEMU10="${MULTIFD_QEMU10:-$PWD/build/qemu-10.0}"
export MULTIFD_QEMU11="${MULTIFD_QEMU11:-$PWD/build/qemu-11.1}"
# Beside the builds: they come over the network, half a minute each.
install_qemus() {
  sh tests/interop/install_qemu.sh 10.0 "$MULTIFD_QEMU10" || echo "==== without QEMU 10.0: its tests will be skipped"
  sh tests/interop/install_qemu.sh 11.1 "$MULTIFD_QEMU11" || echo "==== without QEMU 11.1: its tests will be skipped"
}
mkdir -p build
install_qemus >build/install-qemu.log 2>&1 &
installing=$!

jobs=${JOBS:-$(nproc)}
if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache
fi

# ThreadSanitizer cannot start where the kernel scatters mappings widely: no address randomisation.
run_tests=""
if setarch "$(uname -m)" -R true 2>/dev/null; then
  run_tests="setarch $(uname -m) -R"
fi

began=$(date +%s)
failed=""
summary=build/summary.txt # a line for each stage: seconds, how it ended, what it was
skips=build/skipped.txt   # a line for each test that was skipped, or that left something out
: >"$summary"
: >"$skips"

# headline <text>
headline() {
  echo
  echo "==== [$(($(date +%s) - began)) s] $*"
}

# stage <name> <command...>: runs one stage and remembers a failure.
stage() {
  name=$1
  shift
  headline "$name"
  stage_began=$(date +%s)
  if "$@"; then
    outcome=ok
  else
    echo "==== FAILED: $name"
    failed="$failed $name"
    outcome=FAILED
  fi
  printf '%6s s  %-6s  %s\n' "$(($(date +%s) - stage_began))" "$outcome" "$name" >>"$summary"
}

# note_skipped <preset>: adds to $skips what that preset's last ctest run has left out, with the reasons that it printed.
note_skipped() {
  logs=build/$1/Testing/Temporary
  [ -e "$logs/LastTest.log" ] || return 0
  whole="" # those of which nothing ran
  if [ -e "$logs/LastTestsDisabled.log" ]; then whole=$(sed 's/^[0-9]*://' "$logs/LastTestsDisabled.log" | tr '\n' ' '); fi
  awk -v preset="$1" -v whole=" $whole" '
    /^[0-9]+\/[0-9]+ Test: / { test = $3; reasons = ""; next }
    /^skipped/ || /MESSAGE: skipped/ {
      sub(/^.*MESSAGE: /, "")
      if (index(reasons, $0) == 0) reasons = reasons (reasons == "" ? "" : "; ") $0
    }
    /^Test (Passed|Skipped|Failed)[.]$/ {
      if (index(whole, " " test " ") != 0) print preset ": " test ": " (reasons == "" ? "skipped, without a reason" : reasons)
      else if (reasons != "") print preset ": " test ", in part: " reasons
    }' "$logs/LastTest.log" >>"$skips"
}

# the_end: what ran, what did not, and the exit status.
the_end() {
  headline "stages"
  cat "$summary"
  headline "skipped: $(wc -l <"$skips")"
  cat "$skips"
  if [ -n "$failed" ]; then
    echo "tests/run.sh: failed stages:$failed" >&2
    exit 1
  fi
  exit 0
}

# Formatting of every tracked file of C++.
check_format() {
  files=$(git ls-files '*.hpp' '*.cpp' 2>/dev/null)
  if [ -z "$files" ]; then # not a git work tree
    files=$(find include tests examples -name '*.hpp' -o -name '*.cpp')
  fi
  # shellcheck disable=SC2016 # the inner shell's
  wrong=$(echo "$files" | xargs -n 16 -P "$jobs" sh -c '
    for file; do clang-format-19 "$file" | cmp -s - "$file" || echo "$file"; done' sh)
  if [ -n "$wrong" ]; then
    echo "differ from .clang-format; to put right:  clang-format-19 -i" $wrong
    return 1
  fi
  echo "formatted: $(echo "$files" | wc -l) files"
}

# It is in the build's cache, so each run says it anew.
left_out=""

# build_and_test <preset> [no-tests | only <test binary>... | ctest options...]
build_and_test() {
  preset=$1
  shift
  targets=""
  if [ "${1-}" = only ]; then
    shift
    targets=$*
    set -- -R "^($(echo "$targets" | tr ' ' '|'))[.]"
  fi
  if ! output=$(cmake --preset "$preset" -D "MULTIFD_LEAVE_OUT_TESTS=$left_out" 2>&1); then
    echo "$output"
    return 1
  fi
  # A target that does not build fails the stage but hides neither the others' errors nor their tests.
  built=yes
  # shellcheck disable=SC2086 # a list of words
  cmake --build --preset "$preset" -j "$jobs" ${targets:+--target $targets} -- --quiet -k 0 || built=no
  if [ "$preset" = dev ]; then
    wait "$installing"
    cat build/install-qemu.log
  fi
  if [ "${1-}" != no-tests ]; then
    tested=yes
    # Twice as many as there are processors: half of them wait.
    $run_tests ctest --preset "$preset" -j $((2 * jobs)) -LE night --no-tests=error "$@" || tested=no
    note_skipped "$preset"
    [ "$tested" = yes ] || return 1
  fi
  [ "$built" = yes ]
}

# Both compilers at once: each build is one long translation unit.
both_noexcept() {
  build_and_test noexcept-clang no-tests >build/noexcept-clang.log 2>&1 &
  clang=$!
  build_and_test noexcept no-tests
  status=$?
  wait "$clang" || status=1
  cat build/noexcept-clang.log
  return "$status"
}

# The static assertions' texts, by the other compiler.
messages() {
  cmake --preset dev-clang >build/messages-clang.log 2>&1 || {
    cat build/messages-clang.log
    return 1
  }
  ctest --preset dev-clang -L compile -j "$jobs" --no-tests=error
}

# selected <part>: whether this part of the night is to run.
selected() {
  case " $only " in
    "  " | *" $1 "*) ;;
    *) return 1 ;;
  esac
}

# part <name> <command...>: one part of the night, with its output in build/night/<name>.log. Status 77: skipped.
part() {
  name=$1
  shift
  selected "$name" || return 0
  headline "$name: $*"
  log=build/night/$name.log
  part_began=$(date +%s)
  status=0
  timeout --foreground "${MULTIFD_NIGHT_LIMIT:-6h}" "$@" >"$log" 2>&1 || status=$?
  tail -n 3 "$log"
  grep -h "^skipped" "$log" | sort -u | sed "s/^/$name: /" >>"$skips"
  case $status in
    0) outcome=ok ;;
    77) outcome=skipped ;;
    *)
      outcome="FAILED"
      failed="$failed $name"
      echo "==== FAILED: $name: status $status; all of it: $log"
      grep -E "FAIL|ERROR|HANG|WARNING: ThreadSanitizer" "$log" | head -n 20
      ;;
  esac
  printf '%6s s  %-7s  %s\n' "$(($(date +%s) - part_began))" "$outcome" "$name" >>"$summary"
}

# night: hours. What a part needs is built ahead of it; a part that fails does not keep the next from running.
night() {
  mkdir -p build/night
  wait "$installing"
  cat build/install-qemu.log
  part build sh -c '
    cmake --preset dev -D MULTIFD_LEAVE_OUT_TESTS= &&
    cmake --build --preset dev -j "$1" -- --quiet &&
    for preset in tsan asan-ubsan; do
      cmake --preset $preset && cmake --build --preset $preset -j "$1" --target system -- --quiet || exit 1
    done
    cmake --preset bench && cmake --build --preset bench -j "$1" -- --quiet' sh "$jobs"
  # All of GCC's, also those that are labelled night.
  # shellcheck disable=SC2086 # a list of words
  part ctest $run_tests ctest --preset dev -j "$jobs"
  if selected ctest; then note_skipped dev; fi
  # Every operation of every stack fails once, not every nth. (45 min)
  part faults env MULTIFD_TEST_FULL=1 build/dev/tests/fault
  # 2,000 cancels at random moments, and reads and writes outside of objects.
  for preset in tsan asan-ubsan; do
    # shellcheck disable=SC2086 # a list of words
    part "cancels-$preset" $run_tests env "MULTIFD_CANCELS=${MULTIFD_CANCELS:-2000}" "build/$preset/tests/system" \
      '--source-file=*/cancel_sweep_test.cpp'
  done
  # 500 cancels and 500 losses of whole migrations, and one side killed or stopped at an operation of its links.
  for preset in dev asan-ubsan; do
    # shellcheck disable=SC2086 # a list of words
    part "moments-$preset" $run_tests env "MULTIFD_MOMENTS=${MULTIFD_MOMENTS:-500}" "MULTIFD_CUTS=${MULTIFD_CUTS:-200}" "MULTIFD_KILLS=${MULTIFD_KILLS:-500}" \
      "build/$preset/tests/system" '--source-file=*/migrate_moments_test.cpp,*/migrate_kill_test.cpp,*/migrate_postcopy_*_test.cpp'
  done
  part kill python3 -B tests/programs/kill.py build/dev/examples "${MULTIFD_KILLS:-100}"
  part guests python3 -B tests/programs/guests.py build/dev/examples "${MULTIFD_KILLS:-500}"
  part images env "MULTIFD_FLIPS=${MULTIFD_FLIPS:-1000}" "MULTIFD_KILLS=${MULTIFD_KILLS:-50}" \
    python3 -B tests/programs/images.py build/dev/examples
  part signals python3 -B tests/programs/signals.py build/dev/examples --tries 10
  # All cases of the live QEMUs, where the default run has a covering choice.
  interop="--programs build/dev/examples"
  part interop-lab python3 -B tests/interop/lab.py --self-test
  for tool in dump images analysis relay relay_faults failures; do
    # shellcheck disable=SC2086 # a list of words
    part "interop-$tool" python3 -B "tests/interop/$tool.py" $interop --full --json "build/night/$tool.json"
  done
  # shellcheck disable=SC2086 # a list of words
  part interop-tls python3 -B tests/interop/tls.py $interop --full --tls-files build/dev/tests/programs/make_tls_files
  # shellcheck disable=SC2086 # a list of words
  part interop-memory python3 -B tests/interop/memory.py $interop
  # shellcheck disable=SC2086 # a list of words
  part interop-sparse python3 -B tests/interop/sparse.py $interop
  part soak build/dev/tests/soak/soak --minutes "${MULTIFD_SOAK_MINUTES:-60}" --json build/night/soak.json
  # So many seconds for each of the fourteen targets, $jobs at once.
  part fuzz env "JOBS=$jobs" sh tests/fuzz/run.sh "${MULTIFD_FUZZ_SECONDS:-1800}"
  for name in $only; do
    grep -q " $name\$" "$summary" || failed="$failed $name(unknown)"
  done
  the_end
}

if [ "$night" = yes ]; then
  night
fi

if [ "$quick" = no ]; then
  stage format check_format
  stage noexcept both_noexcept
  # Sanitizers check what runs: headers, messages and packages are the other stages' work. The matrix of all stacks is
  # the most expensive to compile, and made of what the others run. They are clang's, which builds them in half of GCC's time,
  # so they are also where the other compiler's values are looked at.
  # GCC's values of these are the night's.
  dear="contract fault fuzz golden property system unit_basics unit_compress unit_ends unit_engine unit_format unit_image
    unit_memory unit_packets unit_postcopy unit_qemu unit_stack unit_transport unit_zero"
  # shellcheck disable=SC2086 # a list of words
  stage asan-ubsan build_and_test asan-ubsan only $dear
  # shellcheck disable=SC2086 # a list of words
  dev_left_out=$(echo $dear unit_migrate | tr ' ' ';' | sed 's/unit_/unit\//g') # tsan runs that one
  # The rooms that threads share.
  stage tsan build_and_test tsan only system property stress unit_ends unit_engine unit_image unit_memory unit_migrate unit_packets unit_postcopy unit_transport
  stage messages-clang messages # of wrong policies
fi

# A few seconds for each, of the receivers only for one: they are expensive to compile, and differ in their decoders, which
# are here. More is for the night: sh tests/fuzz/run.sh
short_fuzz() {
  if ! echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    clang++-19 -x c++ -fsanitize=fuzzer -o build/has-fuzzer - 2>/dev/null; then
    echo "fuzz: skipped: clang++-19 has no libFuzzer here" | tee -a "$skips"
    return 0
  fi
  JOBS=$jobs sh tests/fuzz/run.sh 3 init_packet packet_header device_state main_stream return_path decode_zlib \
    decode_zstd receiver_none mapped_ram seekable_zstd
}
if [ "$quick" = no ]; then
  stage fuzz short_fuzz
fi

left_out=${dev_left_out-}
if [ "$quick" = no ]; then
  # Clang's texts of these were looked at; GCC's are the night's.
  stage dev build_and_test dev -E '^compile[.].*_with'
else
  stage dev build_and_test dev
fi
the_end
