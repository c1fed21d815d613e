#!/usr/bin/env bash
# From nothing to a trained and judged heart-sound classifier.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
bash launch/quickstart.sh [--dataset=NAME --source=DIR] [--out=DIR] [--people=N] [--epochs=N] [--no_control]

Makes .venv, installs pinned versions (with CUDA or TPU support where that hardware is), prepares recordings, trains
the grouped-BCE CNN, evaluates it on held-out people, and leaves metrics.json, predictions.csv, report.html,
checkpoints and a log in --out. Run again, it goes on where it was stopped.

  --dataset=NAME   synthetic (default: recordings are simulated), cinc2016, circor or pascal
  --source=DIR     the folder with the data set in its official layout; for synthetic, where to write it
  --out=DIR        the run's folder (default: runs/quickstart)
  --people=N       how many people to simulate (default: 1200)
  --epochs=N       how long to train (default: 10)
  --no_control     leave out the control run, which trains on shuffled labels and must learn nothing
  --help           this text
TEXT
}

dataset=synthetic source="" out=runs/quickstart people=1200 epochs=10 control=yes
for argument in "$@"; do
  case "$argument" in
    --dataset=*) dataset="${argument#*=}" ;;
    --source=*) source="${argument#*=}" ;;
    --out=*) out="${argument#*=}" ;;
    --people=*) people="${argument#*=}" ;;
    --epochs=*) epochs="${argument#*=}" ;;
    --no_control) control=no ;;
    --help | -h) usage; exit 0 ;;
    *) echo "error: unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done
case "$dataset" in
  synthetic) source="${source:-$out/corpus}" ;;
  cinc2016 | circor | pascal)
    [ -d "$source" ] || { echo "error: --dataset=$dataset needs --source=DIR, a folder that is there; got '$source'" >&2; exit 2; } ;;
  *) echo "error: --dataset=$dataset: choose synthetic, cinc2016, circor or pascal" >&2; exit 2 ;;
esac

source launch/install.sh

began=$SECONDS
mkdir -p "$out"
if [ "$dataset" = synthetic ] && [ ! -e "$source/synthetic.json" ]; then
  echo "== simulating $people people"
  python -m pcgjax.datasets.synthetic --out="$source" --people="$people"
fi
echo "== preparing"
python -m pcgjax.prepare --dataset="$dataset" --source="$source" --out="$out/prepared"

train() {  # WORKDIR SHUFFLE_LABELS
  python -m pcgjax.train --config=configs/cnn.py --workdir="$1" --config.data.prepared="$out/prepared" \
    --config.train.epochs="$epochs" --config.data.shuffle_labels="$2"
}
if [ "$control" = yes ] && [ ! -e "$out/control/metrics.json" ]; then
  echo "== control: the same training on shuffled labels, which should reach an AUC of about 0.5"
  train "$out/control" true
fi
echo "== training"
train "$out" false
echo "done in $((SECONDS - began)) s after the install; open $out/report.html"
