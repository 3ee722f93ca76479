#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Builds the interop tests' guest, a BIOS image of 64 KiB:
#   sh tests/interop/build_guest.sh OUT [KIB [PAGE [SWEEP [STRIDE]]]]
# with the size of its working set, its pauses after each page and each sweep, and the bytes from page to page; guest.S says
# in which unit, and where they stand in the image, for who would rather change them there.
set -eu
out=${1:?usage: build_guest.sh OUT [WORKING_SET_KIB [PAUSE_PER_PAGE [PAUSE_PER_SWEEP [STRIDE]]]]}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

as --32 --fatal-warnings --defsym WORKING_SET_KIB="${2:-8192}" --defsym PAUSE_PER_PAGE="${3:-0}" \
  --defsym PAUSE_PER_SWEEP="${4:-0}" --defsym STRIDE="${5:-4096}" -o "$work/guest.o" "$here/guest.S"
ld -m elf_i386 -Ttext 0xffff0000 -e start -o "$work/guest.elf" "$work/guest.o"
objcopy -O binary -j .text "$work/guest.elf" "$work/guest.bin"
[ "$(wc -c <"$work/guest.bin")" = 65536 ]
mv "$work/guest.bin" "$out"
