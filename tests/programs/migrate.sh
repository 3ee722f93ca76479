#!/bin/sh
# SPDX-License-Identifier: MIT
#
# A running guest migrates with every compressor and zero policy: $2 is the backend.
. "$(dirname "$0")/common.sh"
backend=$2
if [ "$backend" = kvm ]; then
  timeout 100 "$programs/live_migration" --backend auto --memory 16M --working-set 1M --run-before 0.1 --run-after 0.1 \
    >"$work/backend.log" 2>&1 || die "auto: status $?"
  if ! grep -q "backend: kvm" "$work/backend.log"; then
    echo "skipped: $(grep -m 1 "backend: " "$work/backend.log")"
    exit 77
  fi
fi
if memory_may_follow; then
  timeout 100 "$programs/live_migration" --backend "$backend" --memory 48M --working-set 2M --channels 2 --postcopy at-once \
    --run-before 0.1 --run-after 0.1 >"$work/migrate.log" 2>&1 || die "$backend, at once: status $?"
  grep -q " 0 errors" "$work/migrate.log" || die "the guest whose memory followed found errors"
  grep -qE "[1-9][0-9]* pages followed" "$work/migrate.log" || die "no page followed"
fi
channels=1
for compression in none zlib zstd; do
  for zero in none legacy multifd; do
    timeout 100 "$programs/live_migration" --backend "$backend" --memory 48M --working-set 2M --channels "$channels" \
      --compression "$compression" --zero-pages "$zero" --run-before 0.1 --run-after 0.1 --json "$work/report.json" \
      >"$work/migrate.log" 2>&1 || die "$backend $compression $zero: status $?"
    grep -q "backend: $backend" "$work/migrate.log" || die "does not say which backend ran"
    grep -q " 0 errors" "$work/migrate.log" || die "the guest found errors"
    tail -n 1 "$work/migrate.log" | grep -q "12288 pages compared: verified" || die "does not end with verified"
    for key in ok error seconds ram_bytes normal_pages zero_pages wire_bytes gib_per_s channels downtime_ms rounds; do
      grep -q "\"$key\":" "$work/report.json" || die "JSON lacks $key"
    done
    echo "$backend, $compression, zero pages $zero, $channels channels: $(tail -n 1 "$work/migrate.log")"
    channels=$((channels % 4 + 1))
  done
done
