# SPDX-License-Identifier: MIT
#
# multifd_simulate as people run it. What its rules do is simulate_test.cpp's.
#   simulate.sh <folder of the programs> <multifd_simulate>
. "$(dirname "$0")/common.sh"
simulate=$2

expect_status 0 "--generate" "$simulate" --help
expect_status 2 "--generate" "$simulate" --generate nonsense
expect_status 2 "--rule" "$simulate" --rule nonsense
expect_status 2 ".svg or .png" "$simulate" --plot picture.bmp
expect_status 2 "--price-above" "$simulate" --price-within 20 --price-above 10
expect_status 2 "--write-trace needs one --generate" "$simulate" --write-trace "$work/trace.json"
expect_status 1 "No such file" "$simulate" --trace "$work/missing.json" --json "$work/failed.json"
grep -q '"ok": false' "$work/failed.json" || die "no report of a failure"
echo "no trace" >"$work/text.json"
expect_status 1 "no JSON" "$simulate" --trace "$work/text.json"
echo '{"format": "multifd-trace", "version": 1, "sets": []}' >"$work/empty.json"
expect_status 1 "ram_pages is missing" "$simulate" --trace "$work/empty.json"

# A generated trace in a file is that trace.
"$simulate" --generate phases --seed 3 --write-trace "$work/trace.json" >"$work/write.log" 2>&1 || die "--write-trace"
expect_status 1 "exists already" "$simulate" --generate phases --seed 3 --write-trace "$work/trace.json"
"$simulate" --generate phases --seed 3 --traces 1 --json - >"$work/made.json" 2>"$work/made.log" || die "made"
"$simulate" --trace "$work/trace.json" --json - >"$work/read.json" 2>"$work/read.log" || die "read"
for file in made read; do
  tr -d ' \n' <"$work/$file.json" | grep -o '"rules":\[[^]]*\]' >"$work/$file.rules" || die "no rules in $file.json"
done
cmp "$work/made.rules" "$work/read.rules" || die "another outcome from the file"

# So is what a migration reports of itself.
cat >"$work/report.json" <<'END'
{"ok": true, "rounds": [
  {"begin_s": 0.06, "sync_s": 0, "send_s": 1.1, "dirty_pages": 131072, "again_pages": 16385, "stopped": false},
  {"begin_s": 1.17, "sync_s": 0.002, "send_s": 0.21, "dirty_pages": 16385, "again_pages": 10971, "stopped": false},
  {"begin_s": 1.39, "sync_s": 0.002, "send_s": 0.2, "dirty_pages": 10971, "again_pages": 0, "stopped": true}],
 "downtime_parts_ms": {"sync": 0, "pages": 200, "device_state": 5, "round_trip": 1}}
END
expect_status 0 "report.json" "$simulate" --trace "$work/report.json" --trials
expect_status 1 "that failed" "$simulate" --trace "$work/failed.json"

# The tables say what every rule did, and why.
"$simulate" --generate dips,sync --traces 2 --trials --plot-data "$work/data.txt" >"$work/table.txt" 2>"$work/table.log" ||
  die "table"
for text in oracle "QEMU 11.1" "Cloud Hypervisor v53" "KubeVirt VEP 291" "KubeVirt VEP 248" dips/2 sync/1 because; do
  grep -qF -e "$text" "$work/table.txt" || die "the table does not say \"$text\""
done
grep -q "^oracle" "$work/data.txt" || die "no oracle in the picture's table"
expect_status 0 "held" "$simulate" --generate working_set --traces 25 --rule qemu --throttle auto-converge --trials

if command -v gnuplot >/dev/null; then
  "$simulate" --generate steps --traces 3 --plot "$work/rules.svg" >"$work/plot.log" 2>&1 || die "--plot"
  grep -q "live migration" "$work/rules.svg" || die "no picture"
else
  expect_status 1 "gnuplot-nox" "$simulate" --plot "$work/p.svg"
fi
