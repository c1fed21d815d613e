"""Training from device memory needs none of the libraries that decode, stream, plot or compare."""

from __future__ import annotations

import json

HEAVY = ("grain", "librosa", "torch", "matplotlib", "sklearn", "soundfile", "soxr", "pandas", "orjson", "pywt", "ray",
         "tensorboardX")  # fmt: skip
MODULES = (
    "ablation", "audio", "audio_llm.questions", "bench", "bench_audio_llm", "bench_ssamba", "checkpoint",
    "classical", "compare", "costs", "datasets.cinc2016", "datasets.circor", "datasets.folder", "datasets.pascal",
    "datasets.synthetic", "distributed", "evaluate", "experiment", "features.filters", "features.spectrogram",
    "features.wavelet", "files", "goodput", "input_pipeline", "kernels.hinf_lstm", "losses", "metrics",
    "models.cnn1d", "models.hinf_lstm", "models.image", "models.segmenter", "models.ssamba", "optimizer", "peers",
    "population", "predict", "prepare", "report", "reproduce", "reproduce_page", "runs", "segment", "segmentation",
    "sharding", "sites", "splits", "tasks", "thresholds", "train", "train_step",
)  # fmt: skip


def test_nothing_heavy_is_imported_before_it_is_needed(run_python):
    imports = "".join(f"import pcgjax.{name}\n" for name in MODULES)
    done = run_python(f"import sys\n{imports}print([name for name in {HEAVY} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_resident_training_runs_without_them(run_python, make_config, tmp_path):
    code = f"""
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Missing())
import ml_collections
from pcgjax import train
train.train(ml_collections.ConfigDict(json.loads(sys.argv[1])), sys.argv[2])
"""
    config = make_config()
    done = run_python(code, config.to_json_best_effort(), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["recordings"] > 0
    # Only the report's figures need matplotlib, and the run says how to have them.
    assert not (tmp_path / "report.html").exists()
    assert "no report.html" in done.stderr
    assert f"python -m pcgjax.report {tmp_path}" in done.stderr
