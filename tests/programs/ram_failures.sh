#!/bin/sh
# SPDX-License-Identifier: MIT
#
# What ram_send and ram_receive say when something is wrong, and that nothing is left behind.
. "$(dirname "$0")/common.sh"
send="$programs/ram_send"
receive="$programs/ram_receive"
make_image "$work/image" 8
head -c 5000 /dev/urandom >"$work/odd"
: >"$work/empty"

expect_status 0 "--zero-pages" "$send" --help
expect_status 2 "--connect (or --path) and --file" "$send"
expect_status 2 "tcp:HOST:PORT" "$send" --connect here --file "$work/image"
expect_status 2 "--channels" "$send" --connect tcp:127.0.0.1:1 --file "$work/image" --channels 0
expect_status 2 "--page-size" "$send" --connect tcp:127.0.0.1:1 --file "$work/image" --page-size 3000
expect_status 1 "No such file" "$send" --connect tcp:127.0.0.1:1 --file "$work/missing"
expect_status 1 "not a multiple" "$send" --connect tcp:127.0.0.1:1 --file "$work/odd"
expect_status 1 "empty" "$send" --connect tcp:127.0.0.1:1 --file "$work/empty"
expect_status 1 "not a regular file" "$send" --connect tcp:127.0.0.1:1 --file "$work"
expect_status 1 "fewer than" "$send" --connect tcp:127.0.0.1:1 --file "$work/image" --size 1G
expect_status 1 "refused" "$send" --connect tcp:127.0.0.1:1 --file "$work/image" --json "$work/failed.json"
grep -q '"ok": false' "$work/failed.json" || die "JSON does not say that it failed"
# Known before anything is connected, not after the work.
expect_status 1 "--json $work/no/report: No such file" "$send" --connect tcp:127.0.0.1:1 --file "$work/image" --json "$work/no/report"
expect_status 1 "--json $work/no/report: No such file" "$receive" --listen tcp:127.0.0.1:0 --file "$work/copy" --json "$work/no/report"
[ ! -e "$work/copy" ] && [ ! -e "$work/copy.part" ] || die "a file is left after a --json that cannot be written"
expect_status 2 "--file or --discard" "$receive" --listen tcp:127.0.0.1:0
expect_status 1 "No such file" "$receive" --listen tcp:127.0.0.1:0 --file "$work/no/such/folder" --populate --size 1M
expect_status 2 "--populate needs --size" "$receive" --listen tcp:127.0.0.1:0 --discard --populate

# Both sides name a mismatch.
mismatch() {
  text=$1
  shift
  start_receiver --listen tcp:127.0.0.1:0 --file "$work/copy" "$@"
  expect_status 1 "$text" "$send" --connect "$address" --file "$work/image" --channels 2
  receiver_status
  [ "$status" = 1 ] || die "receiver status $status: $text"
  grep -qF -e "$text" "$work/receiver.log" || die "the receiver does not say: $text"
  [ ! -e "$work/copy" ] && [ ! -e "$work/copy.part" ] || die "a file is left after: $text"
}
mismatch "setting: channels: the two sides use different numbers of channels: set the same on both (source: 2, destination: 3)" --channels 3
mismatch "setting: compression" --compression zstd
mismatch "(source: none, destination: zstd)" --compression zstd
mismatch "at most 1048576 are taken" --size 1M
expect_status 2 "use legacy or none" "$send" --connect tcp:127.0.0.1:1 --file "$work/image" --peer qemu-8.0 \
  --zero-pages multifd

# SIGINT in the middle, of each side in turn: both end with a message, nothing is left.
for side in sender receiver; do
  start_receiver --listen tcp:127.0.0.1:0 --file "$work/copy"
  timeout --foreground 60 "$send" --connect "$address" --file "$work/image" --bandwidth 1M --channels 4 >"$work/sender.log" 2>&1 &
  sender=$!
  for _ in $(seq 500); do
    if [ -s "$work/copy.part" ]; then break; fi
    sleep 0.02
  done
  # timeout(1) passes the signal on to the program.
  if [ "$side" = sender ]; then kill -INT "$sender"; else kill -INT "$receiver"; fi
  status=0
  wait "$sender" || status=$?
  [ "$status" = 1 ] || die "sender status $status after SIGINT of the $side"
  receiver_status
  [ "$status" = 1 ] || die "receiver status $status after SIGINT of the $side"
  grep -q "cancelled" "$work/sender.log" || die "the sender does not say cancelled after SIGINT of the $side"
  grep -q "cancelled" "$work/receiver.log" || die "the receiver does not say cancelled after SIGINT of the $side"
  [ ! -e "$work/copy" ] && [ ! -e "$work/copy.part" ] || die "a file is left after SIGINT of the $side"
done
echo "failures are named"
