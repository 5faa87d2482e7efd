#!/usr/bin/env bash
# Runs a config on a Cloud TPU slice of any size:  launch/tpu_pod.sh [options] CONFIG [flags of pjrlhf.main]
#   -t NAME    name of the TPU (created if it does not exist)
#   -z ZONE    for example us-east5-b
#   -a TYPE    accelerator, for example v5litepod-16, v5p-16, v6e-256
#   -r IMAGE   runtime, for example v2-alpha-tpuv5-lite (default: by accelerator)
#   -b BUCKET  shared by all workers; gcsfuse mounts it as ./bucket, and the run directory is bucket/runs/NAME
#   -q         request a queued resource and wait for capacity
#   -s         spot capacity: cheaper, can be preempted; the same command resumes from the last checkpoint
#   -d         delete the TPU after the run
#   -n         print the commands instead of running them
# Requires the gcloud command, logged in, with a default project.
set -euo pipefail
cd "$(dirname "$0")/.."
name="" zone="" type="" runtime="" bucket="" queued="" spot="" delete="" dry=""
while getopts "t:z:a:r:b:qsdn" option; do
  case "$option" in
    t) name="$OPTARG" ;;
    z) zone="$OPTARG" ;;
    a) type="$OPTARG" ;;
    r) runtime="$OPTARG" ;;
    b) bucket="$OPTARG" ;;
    q) queued=1 ;;
    s) spot=1 ;;
    d) delete=1 ;;
    n) dry=1 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if [ $# -eq 0 ] || [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$bucket" ]; then
  echo "usage: launch/tpu_pod.sh -t NAME -z ZONE -a TYPE -b BUCKET [-r IMAGE] [-q] [-s] [-d] [-n] CONFIG [flags]" >&2
  exit 2
fi
config="$1"
shift
if [ -z "$runtime" ]; then
  case "$type" in
    v5lite*) runtime="v2-alpha-tpuv5-lite" ;;
    v5p*) runtime="v2-alpha-tpuv5" ;;
    v6e*) runtime="v2-alpha-tpuv6e" ;;
    *) runtime="tpu-ubuntu2204-base" ;;
  esac
fi

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu=(gcloud compute tpus tpu-vm)
place=(--zone="$zone")
spot_flag=()
if [ -n "$spot" ]; then
  spot_flag=(--spot)
fi
if [ -n "$dry" ] || ! "${tpu[@]}" describe "$name" "${place[@]}" > /dev/null 2>&1; then
  if [ -n "$queued" ]; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
      --accelerator-type="$type" --runtime-version="$runtime" "${spot_flag[@]}"
    while [ -z "$dry" ]; do
      state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
      echo "queued resource $name: $state"
      case "$state" in
        ACTIVE) break ;;
        FAILED | SUSPENDED) exit 1 ;;
      esac
      sleep 30
    done
  else
    run "${tpu[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --version="$runtime" "${spot_flag[@]}"
  fi
fi

bundle=$(mktemp -d)/pjrlhf.tar.gz
run tar czf "$bundle" setup.cfg pyproject.toml README.md LICENSE pjrlhf configs
run "${tpu[@]}" scp "$bundle" "$name:pjrlhf.tar.gz" "${place[@]}" --worker=all
apt=https://packages.cloud.google.com/apt
fuse="curl -fsSL $apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null"
fuse+=" && echo deb [signed-by=/usr/share/keyrings/cloud.google.asc] $apt gcsfuse-\$(lsb_release -cs) main"
fuse+=" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null && sudo apt-get update -qq && sudo apt-get install -qq gcsfuse"
setup="mkdir -p pjrlhf/bucket && tar xzf pjrlhf.tar.gz -C pjrlhf && { command -v gcsfuse > /dev/null || { $fuse; }; }"
setup+=" && cd pjrlhf && { mountpoint -q bucket || gcsfuse --implicit-dirs $bucket bucket; }"
setup+=" && python3 -m venv --clear ../venv && ../venv/bin/pip install -q -e '.[tpu]'"
run "${tpu[@]}" ssh "$name" "${place[@]}" --worker=all --command="$setup"
printf -v flags ' %q' --config="$config" --workdir="bucket/runs/$name" --distributed=on "$@"
status=0
run "${tpu[@]}" ssh "$name" "${place[@]}" --worker=all --command="cd pjrlhf && ../venv/bin/python -m pjrlhf.main$flags" || status=$?
run mkdir -p "runs/$name"
run gcloud storage cp -r "gs://$bucket/runs/$name/report" "runs/$name" || echo "tpu_pod.sh: no report found" >&2
if [ -n "$delete" ]; then
  if [ -n "$queued" ]; then
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${place[@]}" --quiet
  fi
fi
exit "$status"
