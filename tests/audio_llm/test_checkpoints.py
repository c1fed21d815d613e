"""Checkpoints of the PyTorch trainers: hashed, the last two kept, damaged ones named, those of other runs refused."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch

from pcgjax.audio_llm import checkpoints
from pcgjax.runtime.files import CheckpointError, DamagedError

CONFIG = {"seed": 0, "task": {"name": "audio_llm"}, "optimizer": {"schedule": "cosine"}}


def make_run(workdir: pathlib.Path, steps: int = 3, config: dict | None = None) -> pathlib.Path:
    """Checkpoints of steps 10, 20, ..., each a last and a best that it names."""
    from safetensors.torch import save_file

    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config or CONFIG))
    for step in range(10, 10 * steps + 1, 10):

        def write_weights(folder: pathlib.Path, step: int = step) -> None:
            (folder / "adapter").mkdir()
            save_file({"w": torch.full((3, 4), float(step))}, folder / "adapter" / "adapter_model.safetensors")

        meta = {"config": config or CONFIG, "base": "b", "order": "o", "state": {"best": {"step": step}}}
        moments = {f"w|{name}": torch.ones(3, 4) for name in ("exp_avg", "exp_avg_sq")} | {"w|step": torch.tensor(1.0)}
        checkpoints.write(workdir, "best", step, write_weights, None, meta)
        checkpoints.write(workdir, "last", step, write_weights, moments, meta)
    return workdir


def names(workdir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def best(workdir: pathlib.Path) -> str:
    return checkpoints.best_adapter(workdir).parent.name


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_two_of_each_kind_are_kept_and_what_a_last_names(tmp_path):
    workdir = make_run(tmp_path, 4)
    assert names(workdir) == ["best-00000030", "best-00000040", "last-00000030", "last-00000040"]
    meta = json.loads((workdir / "checkpoints" / "last-00000040" / "meta.json").read_text())
    assert (meta["step"], meta["pcgjax"]) == (40, checkpoints.pcgjax.__version__)
    for step in (41, 42):  # a run that goes on from last-30 needs best-30
        checkpoints.write(workdir, "best", step, lambda folder: (folder / "adapter").mkdir(), None, {})
    assert "best-00000030" in names(workdir)


FILES = ("adapter/adapter_model.safetensors", "meta.json", "hashes.json", "optimizer.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, pathlib.Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_W3_damage_is_named_and_the_checkpoint_before_it_used(name, damage, tmp_path, caplog):
    workdir = make_run(tmp_path)
    for kind in ("last", "best"):
        if (path := workdir / "checkpoints" / f"{kind}-00000030" / name).exists():
            damage(path)
    harmless = name == "hashes.json" and damage is pathlib.Path.unlink  # as an older version wrote it
    folder, meta = checkpoints.intact(workdir, "last")
    assert folder.name == ("last-00000030" if harmless else "last-00000020")
    assert meta["step"] == checkpoints.step_of(folder)
    if not harmless:
        assert f"last-00000030/{name}: " in caplog.text
        assert "the checkpoint before it, last-00000020, is used" in caplog.text
    if name != "optimizer.safetensors":
        assert best(workdir) == ("best-00000030" if harmless else "best-00000020")


def test_W3_where_both_are_damaged_they_are_called_damaged(tmp_path):
    workdir = make_run(tmp_path)
    for step in (20, 30):
        flip(workdir / "checkpoints" / f"best-000000{step}" / "adapter" / "adapter_model.safetensors")
        flip(workdir / "checkpoints" / f"last-000000{step}" / "meta.json")
    with pytest.raises(
        DamagedError, match=r"best-00000030/adapter\S+ damaged.*best-00000020/adapter\S+ damaged.*remove"
    ):
        best(workdir)
    with pytest.raises(DamagedError, match=r"last-00000030/meta\.json: damaged.*last-00000020/meta\.json: damaged"):
        checkpoints.intact(workdir, "last")


def test_W3_two_exchanged_checkpoints_are_told_apart(tmp_path):
    workdir = make_run(tmp_path)
    older, newer = (workdir / "checkpoints" / f"best-000000{step}" for step in (20, 30))
    older.rename(workdir / "x")
    newer.rename(older)
    (workdir / "x").rename(newer)
    with pytest.raises(DamagedError, match="best-00000030: not the checkpoint of its name, but that of step 20"):
        best(workdir)


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(tmp_path):
    from safetensors import SafetensorError

    workdir = make_run(tmp_path)
    before = names(workdir)

    def full(folder: pathlib.Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"last-00000040: cannot be written: .*No space left"):
        checkpoints.write(workdir, "last", 40, full, None, {})
    assert names(workdir) == before


def test_a_best_that_is_missing_is_said(tmp_path, caplog):
    workdir = make_run(tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "best-00000030")
    assert best(workdir) == "best-00000020"
    assert "its best is of step 30, which is not there; best-00000020 is used" in caplog.text


def test_R8_odd_folders_are_named_and_passed_over(tmp_path, caplog):
    workdir = make_run(tmp_path)
    for name in ("best-00000077", "best-x", "5", "last-", "last-00000099"):
        (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "best-00000088").write_text("a file")
    (workdir / "checkpoints" / ".DS_Store").write_text("hidden")
    assert best(workdir) == "best-00000030"
    assert checkpoints.intact(workdir, "last")[0].name == "last-00000030"
    for name in ("best-00000077", "best-x", "5", "last-", "last-00000099", "best-00000088"):
        assert f"checkpoints/{name}: no checkpoint, passed over" in caplog.text
    assert ".DS_Store" not in caplog.text


def test_W2_a_best_of_another_run_is_refused(tmp_path):
    workdir = make_run(tmp_path)
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"seed": 1}))
    with pytest.raises(CheckpointError, match=r"best-00000030: trained with seed=0, now 1; give another --workdir"):
        best(workdir)
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"parallel": {"fsdp": 2}}))
    assert best(workdir) == "best-00000030"  # where it is computed is free
    for more, match in (
        ({"base": "c"}, r"other base weights \(b, now c\)"),
        ({"order": "p"}, r"another order of data"),
    ):
        with pytest.raises(CheckpointError, match=match):
            checkpoints.refuse_foreign_best(workdir, CONFIG, checkpoints.FREE, **more)
    for folder in (workdir / "checkpoints").glob("best-*"):
        (folder / "meta.json").unlink()
        (folder / "hashes.json").unlink()
    with pytest.raises(CheckpointError, match="nothing says which run it is of"):
        checkpoints.refuse_foreign_best(workdir, CONFIG, checkpoints.FREE)


def test_old_checkpoints_still_load_and_a_cut_one_is_damaged(tmp_path):
    workdir = make_run(tmp_path)
    for folder in (workdir / "checkpoints").iterdir():
        (folder / "hashes.json").unlink()
    assert best(workdir) == "best-00000030"
    weights = workdir / "checkpoints" / "best-00000030" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert best(workdir) == "best-00000020"


def test_what_is_of_later_steps_than_a_run_goes_on_from_is_removed(tmp_path, caplog):
    workdir = make_run(tmp_path)
    checkpoints.forget_later(workdir, 20, 20)
    assert names(workdir) == ["best-00000020", "last-00000020"]
    assert "last-00000030: of a later step than the run goes on from; removed" in caplog.text
    checkpoints.forget_later(workdir, 20, None)
    assert names(workdir) == ["last-00000020"]


def test_moments_and_weights_of_other_shapes_are_named(tmp_path):
    from safetensors.torch import save_file

    workdir = make_run(tmp_path)
    folder = workdir / "checkpoints" / "last-00000030"
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.AdamW([weight])
    checkpoints.put({"w": weight}, folder, optimizer)
    assert bool((weight == 30).all())
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(CheckpointError, match="its adapter is not this configuration's: w"):
        checkpoints.put({"w": torch.nn.Parameter(torch.zeros(1, 4))}, folder)
    for moments in ({"w|exp_avg": torch.ones(3, 4)}, {"v|step": torch.ones(())}):
        save_file(moments, folder / "optimizer.safetensors")
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: not of this configuration: [vw]"):
            checkpoints.put({"w": weight}, folder, optimizer)
