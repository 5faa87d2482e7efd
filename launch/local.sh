#!/usr/bin/env bash
# Runs a config on this machine:  launch/local.sh [-p PROCESSES] [-d DEVICES] [-n] CONFIG [flags of pjrlhf.main]
#   -p N   start N processes of one run; if one fails, the others are stopped
#   -d N   simulate N devices per process on the CPU, to test a mesh without accelerators
#   -n     print the commands instead of running them
set -euo pipefail
cd "$(dirname "$0")/.."
processes=1 devices="" dry=""
while getopts "p:d:n" option; do
  case "$option" in
    p) processes="$OPTARG" ;;
    d) devices="$OPTARG" ;;
    n) dry=1 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if [ $# -eq 0 ]; then
  echo "usage: launch/local.sh [-p PROCESSES] [-d DEVICES] [-n] CONFIG [flags]" >&2
  exit 2
fi
config="$1"
shift
command=(python -m pjrlhf.main --config="$config" "$@")
# Huge pages for large arrays, where the system allows it, make steps on a CPU 10% faster.
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"
if [ -n "$devices" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi
if [ -n "$dry" ]; then
  echo "XLA_FLAGS='${XLA_FLAGS:-}' GLIBC_TUNABLES='$GLIBC_TUNABLES'"
fi

if [ "$processes" -eq 1 ]; then
  if [ -n "$dry" ]; then
    echo "${command[*]}"
    exit
  fi
  exec "${command[@]}"
fi

port="${PJRLHF_PORT:-$((20000 + RANDOM % 20000))}"
pids=()
for ((i = 0; i < processes; i++)); do
  one=("${command[@]}" --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i")
  if [ -n "$dry" ]; then
    echo "${one[*]}"
  else
    "${one[@]}" &
    pids+=($!)
  fi
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
left=${#pids[@]}
while [ "$left" -gt 0 ]; do
  code=0
  wait -n || code=$?
  running=$(jobs -pr | wc -l)
  if [ "$code" -ne 0 ] && [ "$running" -lt "$left" ] && [ "$status" -eq 0 ]; then
    status=$code
    if [ "$running" -gt 0 ] && [ "$code" -ne 143 ] && [ "$code" -ne 130 ]; then
      echo "local.sh: a process ended with status $code; stopping the others" >&2
      kill -TERM "${pids[@]}" 2>/dev/null || true
      # A process that waits for the lost one inside a step does not handle SIGTERM.
      (sleep 10 && kill -KILL "${pids[@]}" 2>/dev/null) &
      disown
    fi
  fi
  left=$running
done
exit "$status"
