"""Training from device memory needs none of the libraries that decode, stream, plot or compare."""

from __future__ import annotations

import json
import pkgutil

import pcgjax

HEAVY = ("grain", "librosa", "torch", "matplotlib", "sklearn", "soundfile", "soxr", "pandas", "orjson", "pywt", "ray",
         "tensorboardX", "jinja2")  # fmt: skip
# What computes with PyTorch, imports it where it is read.
PYTORCH = ("pcgjax.audio_llm.", "pcgjax.bench.peers")
LIGHT = ("pcgjax.audio_llm.questions",)


def modules() -> list[str]:
    """Every module of the package, but the commands' `__main__` and what computes with PyTorch."""
    names = [module.name for module in pkgutil.walk_packages(pcgjax.__path__, "pcgjax.")]
    return [
        name for name in names if not name.endswith(".__main__") and (name in LIGHT or not name.startswith(PYTORCH))
    ]


def test_nothing_heavy_is_imported_before_it_is_needed(run_python):
    imports = "".join(f"import {name}\n" for name in modules())
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
from pcgjax.training.loop import train
train(ml_collections.ConfigDict(json.loads(sys.argv[1])), sys.argv[2])
"""
    config = make_config()
    done = run_python(code, config.to_json_best_effort(), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["recordings"] > 0
    # Only the report's figures need matplotlib, and the run says how to have them.
    assert not (tmp_path / "report.html").exists()
    assert "no report.html" in done.stderr
    assert f"python -m pcgjax.report {tmp_path}" in done.stderr
