#!/bin/sh
# SPDX-License-Identifier: MIT
#
# What live_migration says when it cannot.
. "$(dirname "$0")/common.sh"
migrate="$programs/live_migration"
expect_status 0 "--max-downtime" "$migrate" --help
expect_status 2 "--channels" "$migrate" --channels 0
expect_status 2 "--channels" "$migrate" --channels 256
expect_status 2 "--compression" "$migrate" --compression lzma
expect_status 2 "level" "$migrate" --memory 16M --working-set 1M --compression zlib --level 99
expect_status 2 "tcp:HOST:PORT" "$migrate" --connect nonsense
expect_status 1 "Connection refused" "$migrate" --memory 16M --working-set 1M --connect tcp:127.0.0.1:1
# A guest that dirties memory faster than the capped link carries it: says so, and does not hang.
expect_status 1 "does not converge" "$migrate" --backend thread --memory 32M --working-set 8M --dirty-rate 0 \
  --zero-pages multifd --bandwidth 40M --switch fixed --max-downtime 5 --max-rounds 3 --json "$work/report.json"
grep -q '"ok": false' "$work/report.json" || die "JSON does not say that it failed"
# SIGINT in the middle of a slow migration.
"$migrate" --backend thread --memory 64M --working-set 2M --bandwidth 4M --channels 2 >"$work/slow.log" 2>&1 &
pid=$!
receiver=$pid # for cleanup
for _ in $(seq 500); do
  if grep -q "dirty pages" "$work/slow.log"; then break; fi
  sleep 0.02
done
kill -INT "$pid"
status=0
wait "$pid" || status=$?
receiver=""
[ "$status" = 1 ] || die "status $status after SIGINT"
grep -q "cancelled" "$work/slow.log" || die "does not say that it was cancelled"
echo "failures are named"
