#!/bin/sh
# SPDX-License-Identifier: MIT
#
# ram_send to ram_receive under TLS: round trips with certificates and with pre-shared keys, and every way in which the
# two sides may not trust each other, each with its own message. $2 makes certificates and keys.
. "$(dirname "$0")/common.sh"
"$2" "$work/tls"
make_image "$work/image" 12

# Each of the libraries that are built, at either end; the programs' own choice elsewhere. A library's option, if there is
# that library: else the other one is meant.
library() {
  if "$programs/ram_send" --help | grep -qE "tls-library.*$1"; then echo "--tls-library $1"; fi
}
gnutls=$(library gnutls)
openssl=$(library openssl)

# round_trip <listen address> <receiver's options> <sender's options...>
round_trip() {
  rm -f "$work/copy"
  # shellcheck disable=SC2086 # a list of words
  start_receiver --listen "$1" --file "$work/copy" $2
  shift 2
  timeout 60 "$programs/ram_send" --connect "$address" --file "$work/image" "$@" >"$work/sender.log" 2>&1 ||
    die "ram_send $*"
  receiver_status
  [ "$status" = 0 ] || die "ram_receive: status $status"
  cmp "$work/image" "$work/copy" || die "the copy differs"
  if grep -q heard "$work/receiver.log"; then die "the receiver does not know that the source has heard"; fi
}
# shellcheck disable=SC2086 # a list of words
{
  round_trip tcp:127.0.0.1:0 "--tls-dir $work/tls/good $gnutls" --tls-dir "$work/tls/good" --channels 4 $openssl
  round_trip tcp:127.0.0.1:0 "--tls-psk $work/tls/keys.psk $openssl" --tls-psk "$work/tls/keys.psk" --channels 2 $gnutls
}
round_trip "unix:$work/socket" "--tls-dir $work/tls/good" --tls-dir "$work/tls/good" --tls-hostname localhost \
  --channels 2 --compression zstd --zero-pages legacy
round_trip tcp:127.0.0.1:0 "--tls-psk $work/tls/keys.psk" --tls-psk "$work/tls/keys.psk" --channels 3 --rounds 3
round_trip tcp:127.0.0.1:0 "--tls-psk $work/tls/keys.psk" --tls-psk "$work/tls/keys.psk" --tls-user somebody

# Over two paths, one of them under a cap.
rm -f "$work/copy"
start_receiver --listen tcp:127.0.0.1:0 --file "$work/copy" --tls-dir "$work/tls/good"
timeout 60 "$programs/ram_send" --path "127.0.0.2=$address,channels=2,cap=100M" --path "=$address" --file "$work/image" \
  --tls-dir "$work/tls/good" >"$work/sender.log" 2>&1 || die "ram_send over two paths: $(cat "$work/sender.log")"
receiver_status
[ "$status" = 0 ] || die "ram_receive: status $status"
cmp "$work/image" "$work/copy" || die "the copy differs"
grep -q "by path: 127.0.0.2=$address .*, $address " "$work/sender.log" || die "$(cat "$work/sender.log")"

# agreed <cipher> <receiver's options> <sender's options...>: both sides say at the end which cipher was used.
agreed() {
  cipher=$1
  listening="$2 --json $work/receiver.json"
  shift 2
  round_trip tcp:127.0.0.1:0 "$listening" --json "$work/sender.json" "$@"
  for end in sender receiver; do
    grep -qxF -e "  \"tls_cipher\": $cipher," "$work/$end.json" || die "the $end's JSON does not say $cipher"
  done
  [ "$cipher" = null ] || for said in "$work/sender.log" "$work/receiver.out"; do
    grep -qF -e "verified; $(echo "$cipher" | tr -d \")" "$said" || die "$said does not say $cipher"
  done
}
aes='"TLS1.3 AES-128-GCM"'
chacha='"TLS1.3 CHACHA20-POLY1305"'
# What the CPU has instructions for; on a machine of another kind than x86 and arm64: nothing.
fast=$chacha
if grep -qw aes /proc/cpuinfo && grep -qwE "pclmulqdq|pmull" /proc/cpuinfo; then fast=$aes; fi
agreed null ""
for credentials in "--tls-psk $work/tls/keys.psk $gnutls" "--tls-dir $work/tls/good $openssl"; do
  # shellcheck disable=SC2086 # lists of words
  {
    agreed "$fast" "$credentials" $credentials
    agreed "$chacha" "$credentials --tls-cipher chacha20" $credentials --tls-cipher aes
    agreed "$aes" "$credentials --tls-cipher aes" $credentials --tls-cipher chacha20
  }
done

# A guest migrates under TLS.
migrate() {
  timeout 60 "$programs/live_migration" --backend thread --memory 16M --working-set 1M --channels 2 --run-before 0.1 \
    --run-after 0.1 "$@" >"$work/migrate.log" 2>&1 || die "live_migration $*"
  tail -n 1 "$work/migrate.log" | grep -q "4096 pages compared: verified" || die "live_migration: not verified"
}
# shellcheck disable=SC2086 # a list of words
migrate --tls-dir "$work/tls/good" $gnutls
migrate --tls-psk "$work/tls/keys.psk" --tls-cipher chacha20
grep -qF "; TLS1.3 CHACHA20-POLY1305" "$work/migrate.log" || die "live_migration does not name the cipher"
# The connections that its memory follows on are encrypted as well, and their cap is another one.
for credentials in "--tls-psk $work/tls/keys.psk" "--tls-dir $work/tls/good"; do
  memory_may_follow || break
  # shellcheck disable=SC2086 # a list of words
  timeout 60 "$programs/live_migration" --backend thread --memory 16M --working-set 1M --channels 2 --run-before 0.1 \
    --run-after 0.1 --postcopy at-once --postcopy-bandwidth 100M $credentials >"$work/migrate.log" 2>&1 ||
    die "live_migration --postcopy at-once $credentials"
  grep -q " 0 errors" "$work/migrate.log" || die "the guest whose memory followed under TLS found errors"
  grep -qE "[1-9][0-9]* pages followed" "$work/migrate.log" || die "no page followed under TLS"
done
expect_status 1 "certificate is for another name" "$programs/live_migration" --backend thread --memory 16M \
  --working-set 1M --tls-dir "$work/tls/name"

# refused <text of the sender> <text of the receiver> <receiver's options> <sender's options...>: the sender fails. The
# receiver says why, and goes on waiting, because that connection may not be the source's; and then it is served.
refused() {
  says=$1
  other_says=$2
  # shellcheck disable=SC2086
  start_receiver --listen tcp:127.0.0.1:0 --discard --accept-timeout 20s $3
  shift 3
  expect_status 1 "$says" "$programs/ram_send" --connect "$address" --file "$work/image" --connect-timeout 5s "$@"
  kill -0 "$receiver" || die "the receiver has ended"
  for _ in $(seq 200); do
    if grep -qF -e "$other_says" "$work/receiver.log"; then break; fi
    sleep 0.02
  done
  grep -qF -e "$other_says" "$work/receiver.log" || die "the receiver does not say \"$other_says\""
  kill "$receiver"
  receiver_status
  [ "$status" = 1 ] || die "a cancelled ram_receive: status $status"
}
tls=$work/tls
mkdir "$tls/mixed"
cp "$tls/good/ca-cert.pem" "$tls/other/client-cert.pem" "$tls/other/client-key.pem" "$tls/mixed"
good="--tls-dir $tls/good"
refused "certificate is not from this side's authority" "refused this side" "--tls-dir $tls/other" --tls-dir "$tls/good"
refused "refused this side" "certificate is not from this side's authority" "$good" --tls-dir "$tls/mixed"
refused "certificate has expired" "refused this side" "--tls-dir $tls/expired" --tls-dir "$tls/good"
refused "refused this side" "certificate has expired" "$good" --tls-dir "$tls/expired"
refused "certificate is for another name" "refused this side" "--tls-dir $tls/name" --tls-dir "$tls/good"
refused "refused this side" "the peer has no certificate" "$good" --tls-dir "$tls/bare"
refused "pre-shared keys differ" "pre-shared keys differ" "--tls-psk $tls/keys.psk" --tls-psk "$tls/other.psk"
refused "share no way to do TLS" "share no way to do TLS" "--tls-psk $tls/keys.psk" --tls-dir "$tls/good"
refused "" "the peer does not speak TLS" "$good" --channels 2
refused "is TLS on at the peer, too?" "speaks TLS, which is off here" "" --tls-dir "$tls/good"

# Wrong use, and files that are not there.
expect_status 2 "" "$programs/ram_send" --connect tcp:127.0.0.1:1 --file "$work/image" --tls-dir a --tls-psk b
expect_status 2 "--tls-hostname" "$programs/ram_send" --connect "unix:$work/none" --file "$work/image" --tls-dir "$tls/good"
expect_status 1 "ca-cert.pem: No such file" "$programs/ram_send" --connect tcp:127.0.0.1:1 --file "$work/image" --tls-dir "$work"
expect_status 1 "no line USER:HEXKEY for this user" "$programs/ram_send" --connect tcp:127.0.0.1:1 --file "$work/image" \
  --tls-psk "$tls/keys.psk" --tls-user nobody

# Without TLS it is said once when others can reach the address, and not on loopback.
warning="not encrypted"
start_receiver --listen tcp::0 --discard
grep -qF "$warning" "$work/receiver.log" || die "no word about encryption"
kill "$receiver"
receiver_status
start_receiver --listen tcp:127.0.0.1:0 --discard
if grep -qF "$warning" "$work/receiver.log"; then die "a warning on loopback"; fi
kill "$receiver"
receiver_status
