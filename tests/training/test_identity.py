"""What a workdir was made from, and whether its files are still what was written (cases W1 to W3 and R8)."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import assert_same_run, lines_of

from pcgjax import report
from pcgjax.data import splits
from pcgjax.pages import run as run_page
from pcgjax.runs import log
from pcgjax.runs.results import read_json, read_predictions
from pcgjax.runtime import checkpoint, hashes
from pcgjax.runtime.digest import digests
from pcgjax.runtime.files import CheckpointError, DamagedError
from pcgjax.training.answers import load_model
from pcgjax.training.loop import train


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of a finished run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def newest(folder: pathlib.Path) -> pathlib.Path:
    return max(folder.iterdir(), key=lambda path: int(path.name))


def flip(path: pathlib.Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- what it is made from


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"split.kind": "leave_database_out", "split.database": "cinc2016-a"}, "kind='person'.*'leave_database_out'"),
        ({"split.kind": "personn"}, "kind"),
        ({"split.fractions": (0.6, 0.2, 0.2)}, r"fractions=\[0.65, 0.15, 0.2\], .* \[0.6, 0.2, 0.2\]"),
        ({"seed": 1}, "seed=0, asked for is 1"),
        ({"task.target": "murmur"}, "target='abnormal', asked for is 'murmur'"),
    ],
)
def test_W1_a_split_that_a_failed_start_left(changes, named, make_config, trained, tmp_path):
    shutil.copy(trained / "split.json", tmp_path)
    with pytest.raises(ValueError, match=named):
        train(make_config(changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_W1_a_split_file_of_another_kind(make_config, trained, tmp_path):
    config = make_config({"split.file": str(trained / "split.json"), "split.kind": "person_kfold"})
    with pytest.raises(splits.SplitError, match=r"kind='person', asked for is 'person_kfold'; set split.kind"):
        train(config, tmp_path / "run")
    # Its seed and fractions are its own matter.
    config = make_config({"split.file": str(trained / "split.json"), "split.fractions": (0.6, 0.2, 0.2)})
    train(config, tmp_path / "dry", dry_run=True)


def test_W1_a_damaged_split(workdir, make_config):
    text = (workdir / "split.json").read_text()
    (workdir / "split.json").write_text(text.replace('"seed": 0', '"seed": 8'))
    with pytest.raises(splits.SplitError, match=r"split.json: damaged, it is not the split that was saved"):
        train(make_config(), workdir)


@pytest.mark.parametrize("lost", ["last", "both"])
def test_W2_another_seed_in_a_workdir_without_its_last_checkpoint(lost, workdir, make_config):
    shutil.rmtree(workdir / "checkpoints" / ("last" if lost == "last" else ""))
    before = (workdir / "predictions.csv").read_bytes()
    with pytest.raises(CheckpointError, match=r"trained with seed=0, now 1; give another --workdir"):
        train(make_config({"seed": 1, "train.epochs": 1}), workdir)
    assert (workdir / "predictions.csv").read_bytes() == before


def test_W2_the_same_run_begins_anew_without_its_last_checkpoint(workdir, make_config):
    shutil.rmtree(workdir / "checkpoints" / "last")
    results = train(make_config({"train.epochs": 1}), workdir)
    assert results["best"]["epoch"] == 1
    assert {line.get("epoch", 1) for line in lines_of(workdir)} == {1}


def test_W2_a_best_model_of_another_run(workdir, make_config):
    config = json.loads((workdir / "config.json").read_text())
    config["seed"] = 5
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "hashes.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json says seed=5, the checkpoint 0: they are of two runs"):
        load_model(workdir)


def test_W2_a_declined_save_is_an_error(tmp_path):
    manager = checkpoint.manager(tmp_path / "last")
    checkpoint.save(manager, 5, {"x": jnp.ones(3)}, {})
    manager.wait_until_finished()
    with pytest.raises(CheckpointError, match=r"step 3 was not written, since step 5 is there"):
        checkpoint.save(manager, 3, {"x": jnp.ones(3)}, {})
    checkpoint.save(manager, 5, {"x": jnp.zeros(3)}, {"anew": True})  # the same step is written anew
    manager.wait_until_finished()
    step, state, meta = checkpoint.require(tmp_path / "last", {"x": jnp.ones(3)})
    assert (step, meta["anew"]) == (5, True)
    np.testing.assert_array_equal(state["x"], np.zeros(3))
    manager.close()


# ------------------------------------------------------------------------------------------------------ what is damaged


def test_W3_flipped_bits_of_a_checkpoint(workdir):
    """Every bit that changes the model is found; the checkpoint before is used, and a warning names the damaged one."""
    best = workdir / "checkpoints" / "best"
    for other in best.iterdir():
        if other != newest(best):
            shutil.rmtree(other)
    wanted = digests(load_model(workdir)[3:5])
    rng, damaged = np.random.default_rng(0), 0
    paths = [path for path in sorted(newest(best).rglob("*")) if path.is_file() and path.stat().st_size]
    for number in range(24):
        path = paths[number % len(paths)]
        content = path.read_bytes()
        flip(path, int(rng.integers(len(content))), int(rng.integers(8)))
        try:
            assert digests(load_model(workdir)[3:5]) == wanted
        except DamagedError:
            damaged += 1
        path.write_bytes(content)
    assert damaged >= 4


def test_W3_the_checkpoint_before_a_damaged_one_is_used(workdir, trained, make_config, caplog):
    for path in newest(workdir / "checkpoints" / "last").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            flip(path, path.stat().st_size // 2)
    step = newest(workdir / "checkpoints" / "last").name
    train(make_config(), workdir)
    assert f"checkpoints/last/{step}: damaged" in caplog.text
    assert len(list((workdir / "checkpoints").glob(f"damaged-last-{step}-*"))) == 1
    assert lines_of(workdir) == lines_of(trained)
    assert (workdir / "predictions.csv").read_text() == (trained / "predictions.csv").read_text()


@pytest.mark.parametrize("lost", ["all", "a line", "nothing"])
def test_lines_of_the_log_that_an_unfinished_run_lost(workdir, make_config, caplog, lost):
    (workdir / "hashes.json").unlink()  # as of a run that was killed
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if lost == "all":
        path.unlink()
    elif lost == "a line":
        path.write_text("".join(lines[1:]))
    train(make_config(), workdir)
    said = f"{path}: the {0 if lost == 'all' else 11} lines up to the checkpoint are not the 12 that this run wrote"
    assert (said in caplog.text) == (lost != "nothing")
    assert "lines up to the checkpoint" not in caplog.text or lost != "nothing"


def test_R8_an_empty_folder_among_checkpoints(workdir, trained, make_config, caplog):
    (workdir / "checkpoints" / "last" / "99999").mkdir()
    (workdir / "checkpoints" / "best" / "99999").mkdir()
    load_model(workdir)
    assert "best/99999: damaged or not a checkpoint" in caplog.text
    shutil.rmtree(workdir / "checkpoints" / "best" / "99999")
    train(make_config(), workdir)
    assert "last/99999: damaged or not a checkpoint" in caplog.text
    assert_same_run(workdir, trained)


def test_files_of_a_finished_run_are_compared(workdir):
    for name, read in (("metrics.json", read_json), ("predictions.csv", read_predictions), ("config.json", read_json)):
        flip(workdir / name, 40)
        with pytest.raises(DamagedError, match=f"{name}: damaged, its .* bytes are not those that were written"):
            read(workdir / name)
        with pytest.raises(DamagedError, match=name):
            hashes.check(workdir)
        flip(workdir / name, 40)
    page = run_page.write(workdir).read_text()  # drawn anew, it is entered anew
    assert page
    hashes.check(workdir)
    (workdir / "hashes.json").write_text((workdir / "hashes.json").read_text().replace('"bytes": ', '"bytes": 1'))
    with pytest.raises(DamagedError, match=r"hashes.json: damaged"):
        read_json(workdir / "metrics.json")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "predictions.csv", "examples.npz", "metrics.json"])
def test_a_missing_file_of_a_finished_run_is_named(workdir, name):
    (workdir / name).unlink()
    with pytest.raises(DamagedError, match=f"{name}: missing, it was written with"):
        report.report([str(workdir)])
    if name == "config.json":
        with pytest.raises(DamagedError, match=f"{name}: missing, it was written with"):
            load_model(workdir)


def test_verify_names_what_is_damaged(workdir, prepared, tmp_path):
    assert report.verify(workdir) == []
    flip(workdir / "report.html", 100)
    last = next(path for path in newest(workdir / "checkpoints" / "last").rglob("*") if path.is_file())
    last.unlink()
    assert [line.partition(":")[0] for line in sorted(report.verify(workdir))] == [str(last), f"{workdir}/report.html"]
    shutil.copytree(workdir, workdir / "control")
    (workdir / "control" / "hashes.json").unlink()
    assert f"{workdir}/control/hashes.json: missing; the files beside it were not compared" in report.verify(workdir)
    (workdir / "hashes.json").unlink()
    with pytest.raises(ValueError, match=r"no hashes.json: not a run, one that has not ended"):
        report.verify(workdir)
    shutil.copytree(prepared, tmp_path / "prepared")
    assert report.verify(tmp_path / "prepared") == []
    flip(tmp_path / "prepared" / "records.jsonl", 30)
    assert len(report.verify(tmp_path / "prepared")) == 1


def test_a_run_that_goes_on_is_not_drawn(workdir, make_config):
    (workdir / "hashes.json").unlink()
    text = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(text.replace('"epochs": 6', '"epochs": 9'))
    with pytest.raises(ValueError, match=r"metrics.json is of 6 epochs and the run goes on to 9"):
        report.report([str(workdir)])


def test_a_changed_digit_in_the_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log.log_line(path, 3, "train", {"loss": 0.25})
    log.log_line(path, 3, "validation", {"loss": 0.5})
    assert log.history(path)[0] == {"step": 3, "split": "train", "loss": 0.25}
    text = path.read_text()
    path.write_text(text.replace("0.25", "0.35"))
    with pytest.raises(DamagedError, match=r"metrics.jsonl, line 1: damaged"):
        log.history(path)
    path.write_text(text.replace('"check"', '"chekk"'))
    with pytest.raises(DamagedError, match=r"metrics.jsonl, line 1: damaged"):
        log.history(path)


def test_a_run_of_an_earlier_version_goes_on(workdir, trained, make_config):
    """Without hashes, digests and checks, as they were written before."""
    (workdir / "hashes.json").unlink()
    split = json.loads((workdir / "split.json").read_text())
    split.pop("sha256")
    (workdir / "split.json").write_text(json.dumps(split))
    for path in workdir.glob("checkpoints/*/*/meta/metadata"):
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in meta.items() if k not in ("arrays", "sha256", "pcgjax")}))
    log.write_lines(workdir / "metrics.jsonl", [])
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "check"}) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    train(make_config(), workdir)
    assert_same_run(workdir, trained)


# ---------------------------------------------------------------------------------------------------------- the digest


@pytest.mark.parametrize("dtype", ["float32", "int32", "int8", "bool", "float16", "bfloat16", "uint32"])
def test_a_digest_is_the_same_compiled_and_by_numpy(dtype):
    from pcgjax.runtime.digest import _compiled, sums_of

    rng = np.random.default_rng(0)
    for shape in ((), (5,), (8, 3), (8, 4, 2)):
        x = np.asarray(rng.normal(size=shape) * 50).astype(jnp.dtype(dtype))
        with np.errstate(over="ignore"):
            by_numpy = sums_of(np, x)
        np.testing.assert_array_equal(by_numpy, np.asarray(_compiled(jnp.asarray(x))))


def test_a_digest_finds_each_bit_and_each_exchange():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5)).astype(np.float32)
    seen = {str(digests(x))}
    for place in range(x.size):
        for bit in range(32):
            y = x.copy()
            y.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
            seen.add(str(digests(y)))
    assert len(seen) == 1 + x.size * 32
    for one in range(x.size):
        for other in range(one):
            y = x.copy().reshape(-1)
            y[[one, other]] = y[[other, one]]
            seen.add(str(digests(y.reshape(x.shape))))
    assert len(seen) == 1 + x.size * 32 + x.size * (x.size - 1) // 2


def test_a_digest_does_not_depend_on_the_devices(run_python):
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pcgjax.runtime.digest import digests
x = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
mesh = jax.make_mesh((4, 2), ("a", "b"))
for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec("a", "b"), PartitionSpec(None, ("b",))):
    print(digests({"x": jax.device_put(x, NamedSharding(mesh, spec))}) == digests({"x": x}))
"""
    run = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert run.stdout.split() == ["True"] * 4, run.stderr


def test_a_digest_names_shape_and_type():
    one = digests({"a": np.zeros((2, 3), np.float32), "b": [np.ones(2, np.int8)]})
    assert [entry[:2] for entry in one.values()] == [[[2, 3], "float32"], [[2], "int8"]]
    assert jax.tree.leaves(one)
