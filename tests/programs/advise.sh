#!/bin/sh
# SPDX-License-Identifier: MIT
#
# multifd_advise as people run it: that what it says fits what it has measured, and what it says when something is wrong.
# Which stack is best is this machine's answer, so no test expects one: tests/programs/advise_model_test.cpp asks the
# model, with costs given by hand.
#   advise.sh <folder of the programs> <multifd_advise>
. "$(dirname "$0")/common.sh"
advise=$2
make_image "$work/image" 8
: >"$work/empty"
mkfifo "$work/pipe"

expect_status 0 "--pattern" "$advise" --help
expect_status 2 "one of --image and --pattern" "$advise" --link 1Gbit
expect_status 2 "one of --link and --connect" "$advise" --image "$work/image"
expect_status 2 "one of --image and --pattern" "$advise" --image "$work/image" --pattern zero --link 1Gbit
expect_status 2 "10Gbit, 100Mbit" "$advise" --image "$work/image" --link 10parsec
expect_status 2 "10Gbit, 100Mbit" "$advise" --image "$work/image" --link -1Gbit
expect_status 2 ".svg or .png" "$advise" --image "$work/image" --link 1Gbit --plot picture.bmp
expect_status 2 "--pattern" "$advise" --pattern nonsense --link 1Gbit
expect_status 2 "less than one page" "$advise" --pattern zero,random --size 4096 --link 1Gbit
expect_status 2 "tcp:HOST:PORT" "$advise" --listen nowhere
expect_status 2 "--listen is the other end" "$advise" --listen tcp:127.0.0.1:0 --link 1Gbit
expect_status 1 "No such file" "$advise" --image "$work/missing" --link 1Gbit --json "$work/failed.json"
grep -q '"ok": false' "$work/failed.json" || die "JSON does not say that it failed"
expect_status 1 "empty" "$advise" --image "$work/empty" --link 1Gbit
expect_status 1 "not a regular file" "$advise" --image "$work" --link 1Gbit
expect_status 1 "not a regular file" "$advise" --image "$work/pipe" --link 1Gbit
expect_status 1 "refused" "$advise" --image "$work/image" --connect tcp:127.0.0.1:1
expect_status 1 "gnuplot-nox" env PATH=/nonexistent "$advise" --image "$work/image" --link 1Gbit --plot "$work/p.svg"

# Names that are taken, and what is no file, are refused before anything is measured; nothing waits for a FIFO's reader.
echo "mine" >"$work/taken.svg"
for option in --plot-data --plot; do
  if [ "$option" = --plot ] && ! command -v gnuplot >/dev/null; then continue; fi
  expect_status 1 "taken.svg: exists already" timeout 10 "$advise" --image "$work/image" --link 1Gbit --time 300 \
    "$option" "$work/taken.svg" --json "$work/taken.json"
  [ "$(cat "$work/taken.svg")" = mine ] || die "$option overwrites a file"
  [ "$(grep -c '"ok"' "$work/taken.json")" = 1 ] || die "$option: not one report"
  mkfifo "$work/fifo.svg"
  expect_status 1 "fifo.svg: exists already" timeout 10 "$advise" --image "$work/image" --link 1Gbit --time 300 \
    "$option" "$work/fifo.svg"
  rm "$work/fifo.svg"
done

# answer <what> <options...>: the recommended stack, as "zstd -5, zero pages multifd, 2 channels: ...".
answer() {
  what=$1
  shift
  timeout 100 "$advise" --time 0.2 --cores 2 --json "$work/advice.json" "$@" >"$work/advice.log" 2>&1 || die "status $?: $*"
  if grep -q "does not converge .*<- shortest time" "$work/advice.log"; then die "recommends what does not converge: $*"; fi
  sed -n "s/^[*+] $what: //p" "$work/advice.log" | grep . || die "no line about $what: $*"
  grep -q '"ok": true' "$work/advice.json" || die "JSON does not say ok: $*"
  for key in machine image link costs predictions best bounded_by wire_bytes source_cpu_s destination_cpu_s; do
    grep -q "\"$key\":" "$work/advice.json" || die "JSON has no $key: $*"
  done
}

# wire_mib <compressor> <zero pages>: the smallest prediction of that stack in $work/advice.json, in MiB.
wire_mib() {
  tr -d ' \n' <"$work/advice.json" | grep -o '"predictions":\[.*\]' | grep -o '{[^{}]*"wire_bytes":[^{}]*}' |
    grep "\"compressor\":\"$1\"" | grep "\"zero_pages\":\"$2\"" |
    sed -n 's/.*"wire_bytes":\([0-9.e+]*\).*/\1/p' | sort -g | head -n 1 | awk '{ print int($1 / 1048576) }'
}

# 256 MiB of zeros are a list of pages, under 1 MiB, where zero pages are looked for; else they travel.
answer "shortest time" --pattern zero --size 256M --sample 16M --link 1Gbit >/dev/null
for zero in legacy multifd; do
  [ "$(wire_mib none $zero)" -lt 1 ] || die "zero pages $zero: $(wire_mib none $zero) MiB on the wire"
done
[ "$(wire_mib none none)" -ge 256 ] || die "zero pages none: $(wire_mib none none) MiB on the wire"
# What cannot be compressed stays as it is, and what can becomes less.
answer "shortest time" --pattern random --size 16M --link 100Gbit >/dev/null
[ "$(wire_mib none multifd)" -ge 16 ] && [ "$(wire_mib zstd multifd)" -ge 15 ] || die "random pages shrink"
answer "shortest time" --pattern guest,text --size 16M --link 1Gbit >/dev/null
[ "$(wire_mib none multifd)" -gt "$(wire_mib zstd multifd)" ] || die "text does not shrink"
answer "shortest time" --image "$work/image" --link 50MiB/s --rtt 1 --dirty-rate 1M --working-set 4M --verify \
  --verify-rounds 1 >/dev/null
grep -q "least CPU" "$work/advice.log" || die "no mark"
grep -q "^verified" "$work/advice.log" || die "--verify prints nothing"
grep -q '"verified":' "$work/advice.json" || die "--verify is not in the JSON"
grep -q '"converges": true' "$work/advice.json" || die "a megabyte per second does not converge"

# The two ends of a link; what a stranger sends does no harm.
timeout --foreground 100 "$advise" --listen tcp:127.0.0.1:0 >"$work/listen.out" 2>"$work/listen.log" &
receiver=$!
for _ in $(seq 500); do
  address=$(sed -n 's/^listening on //p' "$work/listen.log" 2>/dev/null) || true # the shell may not have made it yet
  if [ -n "$address" ]; then break; fi
  sleep 0.02
done
answer "shortest time" --image "$work/image" --connect "$address" --channels 1,2 >/dev/null
receiver_status
[ "$status" = 0 ] || die "--listen: status $status"
grep -q '"connections": 2' "$work/advice.json" || die "the link was not measured with two connections"

# A signal ends it in the middle.
timeout --foreground 60 "$advise" --image "$work/image" --link 1Gbit --time 300 --plot-data "$work/signal.txt" \
  >"$work/signal.log" 2>&1 &
receiver=$!
for _ in $(seq 500); do
  if [ -e "$work/signal.txt.part" ]; then break; fi # signals are caught by then
  sleep 0.02
done
kill -INT "$receiver"
receiver_status
[ "$status" = 1 ] || die "status $status after SIGINT"
grep -q "cancelled" "$work/signal.log" || die "does not say cancelled after SIGINT"
[ ! -e "$work/signal.txt" ] && [ ! -e "$work/signal.txt.part" ] || die "a file is left after SIGINT"

if command -v gnuplot >/dev/null; then
  answer "shortest time" --image "$work/image" --link 10Gbit --plot "$work/p.svg" --plot-data "$work/p.txt" >/dev/null
  grep -q "<svg" "$work/p.svg" || die "the plot is no SVG"
  [ "$(grep -c '^[0-9]' "$work/p.txt")" -gt 100 ] || die "the plot's table is too short"
  [ "$(head -1 "$work/p.txt" | awk -F '\t' '{ print NF }')" -le 10 ] || die "too many lines in the plot"
fi
# 16 MiB at 1 Gbit/s take a tenth of a second, whatever the CPU: with 5 ms of downtime nothing converges.
timeout 100 "$advise" --time 0.2 --cores 2 --json "$work/advice.json" --pattern random --size 16M --link 1Gbit \
  --dirty-rate 10G --max-downtime 5 >"$work/advice.log" 2>&1 || die "status $? without a recommendation"
grep -q "^no recommendation: .*no stack converges" "$work/advice.log" || die "does not say that no stack converges"
grep -q "a downtime of [0-9]" "$work/advice.log" || die "does not say which downtime would do"
if grep -q "shortest time:\|least CPU:" "$work/advice.log"; then die "recommends a stack that does not converge"; fi
for key in shortest_time least_cpu; do grep -q "\"$key\": null" "$work/advice.json" || die "$key is not null"; done
# With 64 kB of working set everything does.
answer "shortest time" --pattern random --size 16M --link 1Gbit --dirty-rate 10G --working-set 64K --max-downtime 5 >/dev/null
grep -q "while the guest writes" "$work/advice.log" || die "does not say how long it takes while the guest writes"
grep -q "decided by" "$work/advice.log" || die "does not say by which rule ties were decided"
echo "advice is sound"
