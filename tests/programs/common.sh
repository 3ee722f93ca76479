# SPDX-License-Identifier: MIT
#
# Shared by the program tests: sourced with the folder of the programs as $1.
set -eu
programs=$1
work=$(mktemp -d)
receiver=""
cleanup() {
  if [ -n "$receiver" ]; then kill -9 "$receiver" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap cleanup EXIT

die() {
  echo "FAILED: $*" >&2
  for file in "$work"/*.log; do [ -e "$file" ] && sed "s|^|$(basename "$file"): |" "$file" >&2; done
  exit 1
}

# expect_status <status> <text in the output> <command...>
expect_status() {
  wanted=$1
  text=$2
  shift 2
  got=0
  timeout 60 "$@" >"$work/expect.log" 2>&1 || got=$?
  [ "$got" = "$wanted" ] || die "status $got instead of $wanted: $*"
  grep -qF -e "$text" "$work/expect.log" || die "output does not say \"$text\": $*"
}

# Whether this user may have a userfaultfd that serves the kernel's faults, which memory that follows takes.
memory_may_follow() {
  [ "$(id -u)" = 0 ] || [ -r /dev/userfaultfd ] || [ "$(cat /proc/sys/vm/unprivileged_userfaultfd 2>/dev/null)" = 1 ] || {
    echo "skipped: memory that follows: no userfaultfd that serves the kernel's faults"
    return 1
  }
}

# start_receiver <ram_receive options...>: runs in the background; sets $receiver and $address.
start_receiver() {
  rm -f "$work/receiver.log"
  # --foreground: timeout(1) would pass each signal on twice, and the second one ends a program at once.
  timeout --foreground 120 "$programs/ram_receive" "$@" >"$work/receiver.out" 2>"$work/receiver.log" &
  receiver=$!
  for _ in $(seq 500); do
    address=$(sed -n 's/^listening on //p' "$work/receiver.log" 2>/dev/null) || true
    if [ -n "$address" ]; then return; fi
    kill -0 "$receiver" 2>/dev/null || die "ram_receive did not start"
    sleep 0.02
  done
  die "ram_receive does not listen"
}

# receiver_status: waits for the receiver; sets $status.
receiver_status() {
  status=0
  wait "$receiver" || status=$?
  receiver=""
}

# make_image <file> <MiB>: zero, text-like and random stretches.
make_image() {
  : >"$1"
  for i in $(seq "$2"); do
    case $((i % 3)) in
      0) head -c 1048576 /dev/zero ;;
      1) head -c 1048576 /dev/urandom ;;
      2) yes "page $i of the guest's memory, some text" | head -c 1048576 ;;
    esac >>"$1"
  done
}
