#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Builds and runs every test on Debian 12, from a bare machine on (then as root, to install packages).
#
#   sh tests/run.sh            everything: format, both compilers, sanitizers, no-exceptions build; ends with the
#                              whole ctest of the preset dev
#   sh tests/run.sh --quick    only that last stage
#
# All stages run even when one fails; the failed ones are named before the last stage's output and by the exit status.
set -u
cd "$(dirname "$0")/.." || exit 1

quick=no
case "${1-}" in
  "") ;;
  --quick) quick=yes ;;
  *)
    echo "usage: sh tests/run.sh [--quick]" >&2
    exit 2
    ;;
esac

packages="g++ cmake ninja-build pkg-config libboost-dev libxxhash-dev libisal-dev libgnutls28-dev libzstd-dev
  zlib1g-dev doctest-dev libbenchmark-dev libcli11-dev libfmt-dev nlohmann-json3-dev"
if [ "$quick" = no ]; then
  packages="$packages clang-19 clang-format-19 libclang-rt-19-dev"
fi
# shellcheck source=cmake/install_packages.sh
. cmake/install_packages.sh
# shellcheck disable=SC2086 # a list of words
install_packages $packages || exit 1

# The interop tests' peers. What cannot be had skips its tests: ctest's summary names them, each says why.
install_packages qemu-system-x86 python3 mmdebstrap || echo "==== without QEMU: interop tests will be skipped" >&2
install_packages iproute2 || echo "==== without iproute2: programs.network will be skipped" >&2
export MULTIFD_QEMU10="${MULTIFD_QEMU10:-$PWD/build/qemu-10.0}"
sh tests/interop/qemu10.sh "$MULTIFD_QEMU10" || echo "==== without QEMU 10.0: its interop tests will be skipped" >&2

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
  if ! "$@"; then
    echo "==== FAILED: $name"
    failed="$failed $name"
  fi
}

# Formatting of every tracked file of C++.
check_format() {
  files=$(git ls-files '*.hpp' '*.cpp' 2>/dev/null)
  if [ -z "$files" ]; then # not a git work tree
    files=$(find include tests examples -name '*.hpp' -o -name '*.cpp')
  fi
  wrong=""
  for file in $files; do
    clang-format-19 "$file" | cmp -s - "$file" || wrong="$wrong $file"
  done
  if [ -n "$wrong" ]; then
    echo "differ from .clang-format; to put right:  clang-format-19 -i$wrong"
    return 1
  fi
  echo "formatted: $(echo "$files" | wc -l) files"
}

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
  if ! output=$(cmake --preset "$preset" 2>&1); then
    echo "$output"
    return 1
  fi
  # A target that does not build fails the stage but hides neither the others' errors nor their tests.
  built=yes
  # shellcheck disable=SC2086 # a list of words
  cmake --build --preset "$preset" -j "$jobs" ${targets:+--target $targets} -- --quiet -k 0 || built=no
  if [ "${1-}" != no-tests ]; then
    $run_tests ctest --preset "$preset" -j "$jobs" --no-tests=error "$@" || return 1
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

if [ "$quick" = no ]; then
  mkdir -p build
  stage format check_format
  stage noexcept both_noexcept
  # Sanitizers look at what runs: headers, messages and packages are the other stages' work. The matrix of all stacks is
  # the dearest to compile, and made of what the others run. They are clang's, which builds them in half of GCC's time,
  # so they are also where the other compiler's values are looked at.
  units="unit_basics unit_channel unit_compress unit_memory unit_qemu unit_stack unit_transport unit_wire unit_zero"
  # shellcheck disable=SC2086 # a list of words
  stage asan-ubsan build_and_test asan-ubsan only contract fault fuzz golden property system $units
  # The rooms that threads share.
  stage tsan build_and_test tsan only system property stress unit_channel unit_memory unit_transport
  stage messages-clang messages # of wrong policies
fi

# A few seconds for each, of the receivers only for one: they are dear to compile, and differ in their decoders, which
# are here. More is for the night: sh tests/fuzz/run.sh
short_fuzz() {
  if ! echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    clang++-19 -x c++ -fsanitize=fuzzer -o build/has-fuzzer - 2>/dev/null; then
    echo "==== without libFuzzer: skipped"
    return 0
  fi
  JOBS=$jobs sh tests/fuzz/run.sh 3 init_packet packet_header device_state main_stream return_path decode_zlib \
    decode_zstd receiver_none
}
if [ "$quick" = no ]; then
  stage fuzz short_fuzz
fi

if [ -n "$failed" ]; then
  headline "failed so far:$failed"
fi
stage dev build_and_test dev

# ctest's summary is to be the last thing on the screen, so success adds nothing to it.
if [ -n "$failed" ]; then
  echo "tests/run.sh: failed stages:$failed" >&2
  exit 1
fi
