#!/bin/sh
# SPDX-License-Identifier: MIT
#
# The README's VMM: its guest goes on in another process, from where it was; and stays where nobody takes it.
. "$(dirname "$0")/common.sh"
vmm=$programs/vmm_in_sixty_lines

expect_status 1 "the guest stays: " "$vmm" connect "unix:$work/nobody"
expect_status 2 "usage: " "$vmm" listen nowhere

timeout 60 "$vmm" listen "unix:$work/vmm" >"$work/there.log" 2>&1 &
there=$!
tries=0
while [ ! -S "$work/vmm" ]; do
  tries=$((tries + 1))
  [ $tries -lt 1000 ] || die "the destination does not listen: $(cat "$work/there.log")"
  sleep 0.01
done
timeout 60 "$vmm" connect "unix:$work/vmm" >"$work/here.log" 2>&1 || die "source: $(cat "$work/here.log")"
wait $there || die "destination: $(cat "$work/there.log")"
here=$(sed -n 's/^the guest has gone, at \([0-9]*\)$/\1/p' "$work/here.log")
there=$(sed -n 's/^the guest goes on here, at \([0-9]*\)$/\1/p' "$work/there.log")
[ -n "$here" ] && [ "$here" -gt 0 ] && [ "$there" -ge "$here" ] || die "the guest was at $here, and is at $there"
echo "the guest was at $here, and goes on at $there"
