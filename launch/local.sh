#!/usr/bin/env bash
# Runs a config on this machine:  launch/local.sh [-d DEVICES] CONFIG [flags of pjrlhf.main]
#   -d N   split the CPU into N devices, to try a mesh without accelerators
#   -n     print the command instead of running it
set -euo pipefail
cd "$(dirname "$0")/.."
devices="" dry=""
while getopts "d:n" option; do
  case "$option" in
    d) devices="$OPTARG" ;;
    n) dry=1 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if [ $# -eq 0 ]; then
  echo "usage: launch/local.sh [-d DEVICES] [-n] CONFIG [flags]" >&2
  exit 2
fi
config="$1"
shift
command=(python -m pjrlhf.main --config="$config" "$@")
if [ -n "$devices" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi
if [ -n "$dry" ]; then
  echo "XLA_FLAGS='${XLA_FLAGS:-}' ${command[*]}"
else
  exec "${command[@]}"
fi
