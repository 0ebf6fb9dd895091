#!/usr/bin/env bash
# Two hosts on one machine: network namespaces a and b with addresses and host names of their own,
# joined by one cable. As root. TWO_HOSTS names the pair (default: two), so that several can live.
#   two_hosts.sh up | down            make them, remove them (removing twice is fine)
#   two_hosts.sh cut | mend           pull the cable, plug it in
#   two_hosts.sh on a|b COMMAND ...   run there; the process becomes COMMAND, so signals reach it
set -eu
pair=${TWO_HOSTS:-two}
net=10.77.5

up() {
  for host in a b; do
    ip netns add "$pair-$host"
    ip -n "$pair-$host" link set lo up
    mkdir -p "/etc/netns/$pair-$host"  # `ip netns exec` lays it over /etc
    printf '127.0.0.1 localhost\n%s.1 host-a\n%s.2 host-b\n' $net $net > "/etc/netns/$pair-$host/hosts"
  done
  ip -n "$pair-a" link add cable type veth peer name cable netns "$pair-b"
  ip -n "$pair-a" addr add $net.1/24 dev cable
  ip -n "$pair-b" addr add $net.2/24 dev cable
  ip -n "$pair-a" link set cable up
  ip -n "$pair-b" link set cable up
}

down() {
  for host in a b; do
    ip netns del "$pair-$host" 2>/dev/null || true
    rm -rf "/etc/netns/$pair-$host"
  done
}

on() {
  local host=$1
  shift
  exec ip netns exec "$pair-$host" unshare --uts sh -c 'hostname "$0" && exec "$@"' "host-$host" "$@"
}

case ${1:-} in
  up | down | on) "$@" ;;
  cut) ip -n "$pair-a" link set cable down ;;
  mend) ip -n "$pair-a" link set cable up ;;
  *) sed -n '2,7s/^# //p' "$0"; exit 2 ;;
esac
