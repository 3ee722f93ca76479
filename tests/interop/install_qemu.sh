#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Puts a newer QEMU into a folder of its own, beside the QEMU of Debian 12: `sh tests/interop/install_qemu.sh 10.0 DIR`,
# or 11.1.
#
# They cannot share a root: QEMU loads its modules from one fixed folder and aborts on those of another build. So DIR
# becomes a small root of Debian packages (about 400 MB, 30 s), from the mirror that apt on this machine already uses;
# DIR/qemu runs QEMU inside it, in a mount namespace of its own that ends with it. Prints DIR/qemu's version; does
# nothing else when it works already.
set -eu
version=${1:?usage: install_qemu.sh VERSION DIR}
tree=${2:?usage: install_qemu.sh VERSION DIR}
mkdir -p "$(dirname "$tree")"
tree=$(cd "$(dirname "$tree")" && pwd)/$(basename "$tree")

# works: whether DIR/qemu is there, and of this version, which it prints.
works() {
  [ -x "$tree/qemu" ] && timeout 60 "$tree/qemu" --version 2>/dev/null | grep -F "version $version."
}

case $version in
  10.0 | 11.1) ;;
  *)
    echo "install_qemu.sh knows where QEMU 10.0 and 11.1 are, not $version" >&2
    exit 2
    ;;
esac
if works; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
  echo "needs to be root to install QEMU $version" >&2
  exit 1
fi

# The mirror's address, from apt's own sources: the one that has this machine's Debian.
. /etc/os-release
# shellcheck disable=SC2016 # apt's own placeholders
mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
  awk -v release="${VERSION_CODENAME:?}" '$2 == release && $3 == "main" { print $1; exit }')
if [ -z "$mirror" ]; then
  echo "no Debian mirror among apt's sources" >&2
  exit 1
fi

packages=base-files,libc6,libc-bin,dash,coreutils,qemu-system-x86
install_from() { # <suites, the newest last>
  rm -rf "$tree"
  set -- "$@"
  sources=""
  for suite in "$@"; do
    sources="${sources}deb $mirror $suite main
"
  done
  newest=$suite
  # Backports are not taken unless asked for: ask for all of them, it is a tree for one program.
  printf '%s' "$sources" | timeout 600 mmdebstrap --quiet --variant=extract --include="$packages" \
    --aptopt="APT::Default-Release \"$newest\"" --aptopt='Acquire::Retries "2"' \
    --aptopt='APT::Install-Recommends "false"' "$1" "$tree" -
}

# Debian's suites that have or had it.
install() {
  case $version in
    10.0) install_from trixie || install_from bookworm bookworm-backports ;;
    11.1) install_from trixie trixie-backports || install_from forky ;;
  esac
}
if ! install; then
  rm -rf "$tree"
  echo "QEMU $version cannot be had from apt's mirror" >&2
  exit 1
fi

chroot "$tree" ldconfig
mkdir -p "$tree/dev" "$tree/proc" "$tree/sys" "$tree/tmp"
# The process that unshare replaces stays the same one, so the caller of the wrapper can end QEMU by its pid.
cat >"$tree/qemu" <<'WRAPPER'
#!/bin/sh
# Written by tests/interop/install_qemu.sh: runs the QEMU of this folder, with /tmp and the working folder as they are outside.
tree=$(cd "$(dirname "$0")" && pwd)
exec unshare -m --propagation private sh -c '
  tree=$1; work=$2; shift 2
  mkdir -p "$tree$work"
  for each in /dev /proc /sys /tmp; do mount --rbind "$each" "$tree$each" || exit 1; done
  case $work in /tmp/* | /dev/* | /) ;; *) mount --rbind "$work" "$tree$work" || exit 1 ;; esac
  exec chroot "$tree" /usr/bin/env -C "$work" /usr/bin/qemu-system-x86_64 "$@"
' sh "$tree" "$PWD" "$@"
WRAPPER
chmod +x "$tree/qemu"
if ! works; then
  echo "apt's mirror has another QEMU than $version there: $(timeout 60 "$tree/qemu" --version 2>&1 | head -n 1)" >&2
  rm -rf "$tree"
  exit 1
fi
