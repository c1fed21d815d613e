#!/usr/bin/env bash
# bash launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR [--config.a.b=v ...]: trains on all hosts of the TPU slice NAME.
# Copies the last commit there, installs it on the first start, and starts the command on every host at once. WORKDIR
# and --config.data.prepared must be on a file system that all hosts share, as a bucket mounted by gcsfuse. Run again,
# it goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 4 ]; then
  echo "usage: bash launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR [--config.a.b=v ...]" >&2
  exit 2
fi
name="$1" zone="$2"
on_all=(--zone="$zone" --worker=all)
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
git archive --format=tar.gz --output="$folder/pcgjax.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$folder/pcgjax.tar.gz" "$name:" "${on_all[@]}"
printf -v train '%q ' python -m pcgjax.train --multi_host --config="$3" --workdir="$4" "${@:5}"
gcloud compute tpus tpu-vm ssh "$name" "${on_all[@]}" \
  --command="set -e; mkdir -p pcgjax; tar -xzf pcgjax.tar.gz -C pcgjax; cd pcgjax; source launch/install.sh; $train"
