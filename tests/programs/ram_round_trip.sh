#!/bin/sh
# SPDX-License-Identifier: MIT
#
# ram_send to ram_receive: every compressor over TCP and UNIX, with rounds, digests and page sizes.
. "$(dirname "$0")/common.sh"
make_image "$work/image" 24

# round_trip <listen address> <receiver options> -- <sender options>
round_trip() {
  listen=$1
  shift
  receive=""
  while [ "$1" != -- ]; do
    receive="$receive $1"
    shift
  done
  shift
  rm -f "$work/copy"
  # shellcheck disable=SC2086 # a list of words
  start_receiver --listen "$listen" --file "$work/copy" --json "$work/received.json" $receive
  timeout 100 "$programs/ram_send" --connect "$address" --file "$work/image" --json "$work/sent.json" "$@" \
    >"$work/sender.log" 2>&1 || die "ram_send $*"
  receiver_status
  [ "$status" = 0 ] || die "ram_receive $listen: status $status"
  cmp "$work/image" "$work/copy" || die "the copy differs"
  [ ! -e "$work/copy.part" ] || die "a partial file is left"
  for file in sent received; do
    for key in ok error seconds ram_bytes normal_pages zero_pages wire_bytes gib_per_s channels id packets; do
      grep -q "\"$key\":" "$work/$file.json" || die "$file.json lacks $key"
    done
    grep -q '"ok": true' "$work/$file.json" || die "$file.json is not ok"
  done
  echo "$listen $*: equal"
}

for compression in none zlib zstd; do
  for zero in none legacy multifd; do
    round_trip tcp:127.0.0.1:0 -- --channels 4 --compression "$compression" --zero-pages "$zero"
    round_trip "unix:$work/socket" -- --channels 3 --compression "$compression" --zero-pages "$zero" --digest
  done
done
if "$programs/ram_send" --help | grep -q igzip; then # built with ISA-L
  for level in 1 2 3; do
    round_trip tcp:127.0.0.1:0 -- --channels 2 --compression igzip --level "$level"
  done
fi
for way in auto sendmsg splice; do
  round_trip tcp:127.0.0.1:0 -- --channels 2 --way "$way" --zero-pages none
  round_trip "unix:$work/socket" -- --channels 2 --way "$way" --rounds 3 --bandwidth 1G
done
round_trip tcp:127.0.0.1:0 -- --rounds 5 --page-size 65536
round_trip tcp:127.0.0.1:0 --compression zstd --channels 1 -- --compression zstd --level -5 --channels 1 --page-size 16384
round_trip tcp:127.0.0.1:0 -- --peer qemu-7.2 --zero-pages legacy
round_trip "tcp:[::1]:0" --populate --size 24M -- --channels 8

start_receiver --listen tcp:127.0.0.1:0 --discard
timeout 100 "$programs/ram_send" --connect "$address" --file "$work/image" --size 8M --json - >"$work/sent.json" || die "--size"
grep -q '"ram_bytes": 8388608' "$work/sent.json" || die "--size is not what was sent"
receiver_status
[ "$status" = 0 ] || die "--discard: status $status"
"$programs/ram_send" --list-kernels | grep -q chosen || die "no kernel chosen"
