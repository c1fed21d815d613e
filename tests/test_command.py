"""The command pcgjax, in a clone and from a wheel."""

from __future__ import annotations

import ast
import pathlib
import shutil
import subprocess
import sys
import zipfile

from pcgjax import __version__
from pcgjax.__main__ import COMMANDS, first_line
from tests.conftest import ROOT


def pcgjax(*words: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pcgjax", *words], cwd=cwd, capture_output=True, text=True)


def test_every_door_is_a_command():
    doors = set()
    for path in (ROOT / "pcgjax").rglob("*.py"):
        ends = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        if any("files.run(main" in ast.unparse(node) for node in ends):
            doors.add(".".join(path.relative_to(ROOT / "pcgjax").with_suffix("").parts).removesuffix(".__main__"))
    assert doors - {*COMMANDS} == {"bench.scale_jobs"}  # which the bench starts
    assert {*COMMANDS} <= doors


def test_commands_and_configs_are_listed():
    told = pcgjax()
    assert told.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in told.stdout
    assert "Trains what a config describes: the one loop." in told.stdout
    configs = pcgjax("configs").stdout.splitlines()
    assert [line.split()[0] for line in configs] == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert first_line(ROOT / "configs" / "cnn.py") in configs[2]


def test_a_command_is_its_module(tmp_path):
    assert pcgjax("--version").stdout == f"pcgjax {__version__}\n"
    wrong = pcgjax("trainn")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: pcgjax trainn: no such command; nearest: train; there are train, ")
    # Several processes decode: each of them starts from the command's module.
    done = pcgjax("prepare", "--dataset=synthetic", "--source=s", "--out=p", "--workers=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "manifest.json").exists()
    told = pcgjax("train", "--config=cnn", "--help", cwd=tmp_path).stdout
    assert "--workdir: The run's folder" in told
    assert "  --config.optimizer.learning_rate=0.01" in told


def test_the_wheel_holds_configs_and_templates(tmp_path):
    for name in ("pcgjax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in [*ROOT.glob("configs/*.py"), *ROOT.glob("pcgjax/pages/templates/*"), *ROOT.glob("pcgjax/runs/*.py")]:
        inside = f"pcgjax/{path.relative_to(ROOT)}" if path.parent == ROOT / "configs" else str(path.relative_to(ROOT))
        assert inside in names
