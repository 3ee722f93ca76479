# SPDX-License-Identifier: MIT
# shellcheck shell=sh
#
# install_packages <package>...: installs those that are missing, and says so; does nothing when all are there.
# Sourced by tests/run.sh and examples/demo.sh.

install_packages() {
  missing=""
  for package in "$@"; do
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
      missing="$missing $package"
    fi
  done
  if [ -z "$missing" ]; then
    return 0
  fi
  if ! command -v apt-get >/dev/null; then
    echo "needs these Debian packages:$missing" >&2
    return 1
  fi
  echo "==== installing:$missing"
  if [ "$(id -u)" != 0 ]; then
    echo "needs to be root to install them" >&2
    return 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  # shellcheck disable=SC2086 # a list of words
  apt-get -q -o DPkg::Lock::Timeout=120 update >/dev/null &&
    apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends $missing >/dev/null
}
