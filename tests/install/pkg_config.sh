#!/bin/sh
# SPDX-License-Identifier: MIT
#
# pkg_config.sh <folder of multifd.pc> <source> <program> <compiler> <flags>...: builds the program and runs it.
set -eu
export PKG_CONFIG_PATH="$1"
source=$2
program=$3
shift 3
# shellcheck disable=SC2046 # the answer is a list of words
"$@" -o "$program" "$source" $(pkg-config --cflags --libs multifd)
exec "$program"
