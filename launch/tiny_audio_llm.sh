#!/usr/bin/env bash
# bash launch/tiny_audio_llm.sh OUT: teaches a tiny random Qwen2-Audio to hear when a simulated systolic murmur sounds, then
# also how high, and scores it on held-out people (docs/measured/audio_llm.md). Stopped, it goes on with the same command.
set -euo pipefail
[ $# = 1 ] || { echo "usage: bash launch/tiny_audio_llm.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.."
extras=audio-llm
source launch/install.sh
# A second thread helps so small a model little, and rounds otherwise than the figures there.
export JAX_PLATFORMS=cpu OMP_NUM_THREADS=1

[ -e "$out/corpus/synthetic.json" ] || python -m pcgjax.datasets.synthetic --out="$out/corpus" --people=1200 \
  --recordings_per_person=2 --layout=circor --murmur_fraction=0.9 --duration_s=3,3.2 --snr_db=35
python -m pcgjax.prepare --dataset=circor --source="$out/corpus" --out="$out/prepared" --sample_rate_hz=16000
[ -e "$out/tiny/config.json" ] || python -m pcgjax.audio_llm.make_tiny --out="$out/tiny"

learn() { # model, workdir, epochs, tasks; the front end is told where the heartbeats truly are
  python -m pcgjax.audio_llm.train --config=configs/audio_llm.py --model="$1" --workdir="$2" --config.train.epochs="$3" \
    --config.questions.tasks="$4" --config.data.prepared="$out/prepared" --config.data.clip_s=3.2 \
    --config.front_end.kind=crop --config.front_end.segments="$out/corpus/training_data" --config.model.dtype=float32 \
    --config.lora.rank=32 --config.lora.alpha=64.0 --config.lora.dropout=0.0 --config.optimizer.learning_rate=0.0005 \
    --config.train.batch_recordings=8 --config.train.checkpoint_steps=1000
}
learn "$out/tiny" "$out/timing" 60 "('systolic_timing',)"
[ -e "$out/merged/config.json" ] || python -m pcgjax.audio_llm.merge --model="$out/tiny" --out="$out/merged" \
  --adapter="$(find "$out/timing/checkpoints" -path '*/best-*/adapter' | sort | tail -n 1)"
learn "$out/merged" "$out/both" 30 "('systolic_pitch','systolic_timing')"
python -m pcgjax.audio_llm.score --workdir="$out/both" --model="$out/merged" --out="$out/scores"
