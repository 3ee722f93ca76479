# SPDX-License-Identifier: MIT
#
# The documented table of peers is the library's: ram_send prints it.
#   peers.sh <folder of the programs>
. "$(dirname "$0")/common.sh"
readme=$(dirname "$0")/../../include/multifd/README.md

timeout 60 "$programs/ram_send" --list-peers >"$work/peers.log" || die "--list-peers failed"
[ "$(wc -l <"$work/peers.log")" -ge 8 ] || die "--list-peers prints too little"
while IFS= read -r line; do
  grep -qxF -e "$line" "$readme" || die "include/multifd/README.md lacks the line: $line"
done <"$work/peers.log"
