#!/bin/sh
# SPDX-License-Identifier: MIT
. "$(dirname "$0")/common.sh"
expect_status 0 "verified" "$programs/custom_policy" --channels 3 --memory 16M
expect_status 0 '"ok": true' "$programs/custom_policy" --memory 4M --json -
expect_status 2 "--memory" "$programs/custom_policy" --memory 5000
expect_status 0 "user-written" "$programs/custom_policy" --help
