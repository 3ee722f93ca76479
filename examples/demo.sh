#!/bin/sh
# SPDX-License-Identifier: MIT
#
# The main job in one command: installs what is missing (Debian 12, then as root), builds live_migration, and migrates
# a running 1 GiB guest over 4 channels to a second process.
#
#   sh examples/demo.sh [options of live_migration, e.g. --backend thread --compression zstd]
set -eu
cd "$(dirname "$0")/.."

# shellcheck source=cmake/install_packages.sh
. cmake/install_packages.sh
install_packages g++ cmake ninja-build pkg-config libxxhash-dev libisal-dev libgnutls28-dev libssl-dev libzstd-dev zlib1g-dev \
  libcli11-dev libfmt-dev nlohmann-json3-dev

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache
fi
echo "==== building live_migration"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { cmake --preset release -D MULTIFD_BUILD_TESTS=OFF && cmake --build --preset release --target live_migration; } \
  >"$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi

build/release/examples/live_migration --memory 1G --channels 4 "$@"
