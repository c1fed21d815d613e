"""Wav2Vec2, HuBERT and DistilHuBERT as classifiers: like transformers' own, from a folder, stopped and resumed."""

from __future__ import annotations

import csv
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pcgjax import evaluate, predict, prepare  # noqa: E402
from pcgjax.audio_llm.checkpoints import newest  # noqa: E402
from pcgjax.audio_llm.encoders.clips import Clip, answers, batch_of, clips_of, geometry_of, load_encoder  # noqa: E402
from pcgjax.audio_llm.encoders.model import SIZES, make_encoder  # noqa: E402
from pcgjax.audio_llm.encoders.train import train_encoder  # noqa: E402
from pcgjax.audio_llm.model import ModelError  # noqa: E402
from pcgjax.data.corpus import in_memory  # noqa: E402
from pcgjax.pages import run as run_page  # noqa: E402
from pcgjax.runtime.files import CheckpointError, DamagedError  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "split.kind": "person",
    "split.fractions": (0.5, 0.25, 0.25),
    "features.window_s": 0.7,
    "model.size": "tiny",
    "optimizer.learning_rate": 0.003,
    "optimizer.warmup_steps": 2,
    "train.epochs": 5,
    "train.batch_recordings": 5,
    "train.portion_clips": 8,
    "train.checkpoint_steps": 2,
    "evaluation.resamples": 10,
}


@pytest.fixture(scope="module")
def heard(corpus_folder, tmp_path_factory) -> pathlib.Path:
    """The small corpus, prepared at 16 kHz."""
    out = tmp_path_factory.mktemp("heard") / "prepared"
    prepare.prepare("cinc2016", corpus_folder / "source", out, 16000, workers=1)
    return out


@pytest.fixture(scope="module")
def config_of(heard):
    """config_of("hubert", {"train.epochs": 1}): configs/hubert.py made small."""

    def make(name: str = "wav2vec2", changes: dict | None = None):
        namespace: dict = {}
        exec((ROOT / "configs" / f"{name}.py").read_text(), namespace)
        config = namespace["get_config"]()
        config.update_from_flattened_dict({"data.prepared": str(heard), **SMALL, **(changes or {})})
        return config

    return make


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run that nothing disturbed. Not to be written to."""
    workdir = tmp_path_factory.mktemp("encoder") / "run"
    train_encoder(config_of(), workdir)
    return workdir


def lines(workdir: pathlib.Path) -> list[dict]:
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited", "check")} for line in history]


# ------------------------------------------------------------------------------------------------------ the model


def saved_folder(folder: pathlib.Path, kind: str, **changes) -> pathlib.Path:
    """A random encoder with a classification head, as transformers saves it."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **(SIZES["tiny"] | changes))
    config.num_labels, config.classifier_proj_size = 1, config.hidden_size
    model = transformers.AutoModelForAudioClassification.from_config(config)
    model.save_pretrained(folder)
    with_mask = config.feat_extract_norm == "layer"
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=with_mask, do_normalize=True)
    extractor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("wav2vec2", "wav2vec2", {}),
        ("wav2vec2", "wav2vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}),
        ("distilhubert", "hubert", {"feat_proj_layer_norm": False}),
        ("hubert", "hubert", {"num_hidden_layers": 3}),
    ],
)
def test_a_folder_answers_as_transformers_own_classifier(name, kind, changes, config_of, tmp_path):
    folder = saved_folder(tmp_path / "model", kind, **changes)
    model, extractor = make_encoder(config_of(name, {"model.folder": str(folder)}).model)
    oracle = transformers.AutoModelForAudioClassification.from_pretrained(folder).eval()
    with torch.no_grad():  # its projection before the mean: none
        oracle.projector.weight.copy_(torch.eye(16))
        oracle.projector.bias.zero_()
        model.head.load_state_dict(oracle.classifier.state_dict())
    rng = np.random.default_rng(0)
    waves = [rng.normal(200, 3000, n).astype(np.int16) for n in (16000, 9000)]
    corpus = in_memory([{}, {}], waves, 16000)
    clips = [Clip(0, 0, 16000), Clip(1, 0, 9000)]
    samples, mask = batch_of(corpus, clips, extractor, 16000)
    assert (mask is None) == (changes.get("feat_extract_norm") != "layer")
    for i, wave in enumerate(waves):  # an oracle for normalisation and padding
        normalised = (wave / 32767 - np.mean(wave / 32767)) / np.std(wave / 32767)
        np.testing.assert_allclose(samples[i, : len(wave)], normalised, atol=2e-3)
        assert not samples[i, len(wave) :].any()
    with torch.no_grad():
        logits = model.eval()(samples, mask)
        wanted = oracle(samples, attention_mask=mask).logits[:, 0]
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    assert abs(float(logits[0] - logits[1])) > 1e-4


def test_the_base_sizes_are_those_published(config_of):
    for name, millions in (("wav2vec2", 94.37), ("hubert", 94.37), ("distilhubert", 23.49)):
        config = config_of(name, {"model.size": "base"})
        with torch.device("meta"):
            model, _ = make_encoder(config.model)
        assert sum(p.numel() for p in model.encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen
        assert all(name.startswith("encoder.feature_extractor.") for name in frozen)


def test_what_a_folder_lacks_is_said(config_of, tmp_path):
    def fails(words: str, folder: pathlib.Path, name: str = "wav2vec2") -> None:
        with pytest.raises(ModelError, match=words):
            make_encoder(config_of(name, {"model.folder": str(folder)}).model)

    fails("no config.json there", tmp_path / "nowhere")
    folder = saved_folder(tmp_path / "model", "wav2vec2")
    fails("model_type is 'wav2vec2'; model.architecture=hubert needs 'hubert'", folder, "hubert")
    fails("num_hidden_layers is 3", saved_folder(tmp_path / "three", "hubert", num_hidden_layers=3), "distilhubert")

    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    fails("cannot be loaded", folder)
    from safetensors.torch import load, save_file

    state = load(content)
    save_file({k: v for k, v in state.items() if "feature_projection" not in k}, weights, {"format": "pt"})
    fails("4 weights are missing .* feature_projection", folder)
    # R6, R5: a NaN is named; a Mac's hidden file is no weight.
    nan = {k: v.clone() for k, v in state.items()}
    nan["wav2vec2.encoder.layers.1.final_layer_norm.bias"][3] = math.nan
    save_file(nan, weights, {"format": "pt"})
    fails(r"encoder\.layers\.1\.final_layer_norm\.bias holds a NaN or an infinity", folder)
    save_file({k: v.half() for k, v in state.items()}, weights, {"format": "pt"})
    (folder / "._model.safetensors").write_bytes(b"Mac OS X")
    make_encoder(config_of("wav2vec2", {"model.folder": str(folder)}).model)
    weights.unlink()
    fails(r"no weights there, need \*.safetensors", folder)
    torch.save(state, folder / "pytorch_model.bin")
    fails("pytorch_model.bin, pickled weights.*save_pretrained", folder)
    # What the message says to do.
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "converted")
    model, _ = make_encoder(config_of(changes={"model.folder": str(tmp_path / "converted")}).model)
    name = "feature_projection.projection.weight"
    np.testing.assert_array_equal(model.encoder.get_parameter(name).detach(), state[f"wav2vec2.{name}"])


# ---------------------------------------------------------------------------------------------------------- clips


def test_clips_are_cut_one_after_another_and_their_probabilities_averaged(config_of):
    config = config_of()
    window = 11200
    rng = np.random.default_rng(1)
    lengths = (2 * window + 500, 6000, 3 * window)
    waves = [rng.normal(0, 2000, n).astype(np.int16) for n in lengths]
    corpus = in_memory([{}] * 3, waves, 16000)
    geometry = geometry_of(config, corpus)
    assert clips_of(corpus, [2, 0, 1], geometry) == [
        (2, 0, window), (2, window, 2 * window), (2, 2 * window, 3 * window), (0, 0, window), (0, window, 2 * window),
        (1, 0, 6000),
    ]  # fmt: skip
    torch.manual_seed(0)
    model, extractor = make_encoder(config.model)
    device = torch.device("cpu")
    log_p = answers(model, extractor, corpus, np.array([2, 0, 1]), config, device)
    samples, _ = batch_of(corpus, clips_of(corpus, [2], geometry), extractor, window)
    with torch.no_grad():
        p = float(torch.sigmoid(model.eval()(samples)).mean())
    np.testing.assert_allclose(log_p[0], [math.log(p), math.log(1 - p)], rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-12)
    # However the clips are portioned out.
    config.train.portion_clips = 1
    one = answers(model, extractor, corpus, np.array([2, 0, 1]), config, device)
    np.testing.assert_allclose(one, log_p, rtol=1e-5)
    corpus = in_memory([{}], [waves[0]], 2000)
    with pytest.raises(ValueError, match="prepare it again with --sample_rate_hz=16000"):
        geometry_of(config, corpus)


# ------------------------------------------------------------------------------------------------------- training


def test_a_run_leaves_what_others_read(trained, corpus_folder, tmp_path):
    there = {path.name for path in trained.iterdir()}
    assert there >= {"config.json", "split.json", "metrics.jsonl", "metrics.json", "predictions.csv", "report.html",
                     "examples.npz", "run.json", "tensorboard", "checkpoints"}  # fmt: skip
    assert {path.name.split("-")[0] for path in (trained / "checkpoints").iterdir()} == {"best", "last"}
    history = lines(trained)
    assert [line["split"] for line in history] == ["train", "validation"] * 5 + ["test"]
    assert history[8]["loss"] < history[0]["loss"]
    results = json.loads((trained / "metrics.json").read_text())
    split = json.loads((trained / "split.json").read_text())
    assert results["test"]["recordings"] == len(split["test"]) > 0
    assert results["data"]["parameters"] == 7857
    assert results["best"]["score"] == max(line["auc"] for line in history if line["split"] == "validation")
    run_page.write(trained)

    out = tmp_path / "scores.json"
    scores = evaluate.evaluate(str(trained), "cinc2016", str(corpus_folder / "source"), str(out))
    assert scores["recordings"] == sum(len(split[part]) for part in ("train", "validation", "test"))
    rows = {row["id"]: row for row in csv.DictReader(out.with_suffix(".csv").open())}
    before = [row for row in csv.DictReader((trained / "predictions.csv").open()) if row["split"] == "test"]
    for row in before:
        assert float(rows[row["id"]]["probability"]) == pytest.approx(float(row["probability"]), abs=1e-6)
    wavs = sorted((corpus_folder / "source").rglob(f"{before[0]['id']}.wav"))
    table = predict.predict(str(trained), [str(wavs[0]), str(tmp_path / "none.wav")], str(tmp_path / "answers.csv"))
    assert float(table[0]["probability"]) == pytest.approx(float(before[0]["probability"]), abs=1e-6)
    assert table[1]["error"]


def weights(workdir: pathlib.Path, kind: str) -> dict[str, bytes]:
    folder = newest(workdir, kind)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_stopped_and_resumed_it_is_the_same_run_to_the_last_bit(config_of, trained, tmp_path):
    workdir = tmp_path / "run"

    def stop_after_a_checkpoint() -> None:
        deadline = time.monotonic() + 60
        while newest(workdir, "last") is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # should it come too late, it ends nothing
    thread = threading.Thread(target=stop_after_a_checkpoint)
    thread.start()
    try:
        with pytest.raises(SystemExit) as stopped:
            train_encoder(config_of(), workdir)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (workdir / "metrics.json").exists()
    at = json.loads((newest(workdir, "last") / "meta.json").read_text())["step"]
    assert 2 <= at < 20
    (workdir / "checkpoints" / ".last-00000009.1.tmp").mkdir()  # as one that is killed while it writes leaves it
    train_encoder(config_of(changes={"train.checkpoint_steps": 4}), workdir)
    assert lines(workdir) == lines(trained)
    for kind in ("last", "best"):
        assert weights(workdir, kind) == weights(trained, kind)
    assert not list((workdir / "checkpoints").glob(".*"))
    assert (workdir / "predictions.csv").read_text() == (trained / "predictions.csv").read_text()


def test_another_experiment_does_not_go_on_with_a_run(config_of, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"trained with optimizer\.learning_rate=0.003, now 0.1"):
        train_encoder(config_of(changes={"optimizer.learning_rate": 0.1}), workdir)
    with pytest.raises(CheckpointError, match=r"trained with model\.architecture=wav2vec2, now distilhubert"):
        train_encoder(config_of("distilhubert"), workdir)
    for path in workdir.glob("checkpoints/best-*/model.safetensors"):
        path.write_bytes(b"1234")
    with pytest.raises(DamagedError, match=r"model\.safetensors: damaged, 4 bytes and not the"):
        load_encoder(workdir)
    with pytest.raises(CheckpointError, match="no trained encoder there"):
        load_encoder(tmp_path)


def test_W2_an_old_best_is_not_taken_for_another_run_s(config_of, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for folder in workdir.glob("checkpoints/last-*"):
        shutil.rmtree(folder)
    other = config_of(changes={"optimizer.learning_rate": 1.0})
    says = r"trained with optimizer\.learning_rate=0\.003, now 1\.0; give another --workdir"
    with pytest.raises(CheckpointError, match=f"run: {says}"):
        train_encoder(other, workdir)
    config = json.loads((workdir / "config.json").read_text())
    for name in ("config.json", "hashes.json"):
        (workdir / name).unlink()
    with pytest.raises(CheckpointError, match=rf"best-\d+: {says}"):
        train_encoder(other, workdir)
    (workdir / "config.json").write_text(json.dumps(config | {"seed": 1}))
    with pytest.raises(CheckpointError, match="trained with seed=0, now 1"):
        load_encoder(workdir)


def test_W3_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(config_of, trained, tmp_path, caplog):
    workdir = shutil.copytree(trained, tmp_path / "run")
    newest_last = newest(workdir, "last")
    flip(newest_last / "optimizer.safetensors")
    (workdir / "checkpoints" / "last-00000099").mkdir()  # R8
    train_encoder(config_of(), workdir)
    assert f"{newest_last.name}/optimizer.safetensors: damaged, its" in caplog.text
    assert "last-00000099: no checkpoint, passed over" in caplog.text
    assert json.loads((workdir / "run.json").read_text())["starts"][-1]["step"] == 18
    assert lines(workdir) == lines(trained)
    for kind in ("last", "best"):
        assert weights(workdir, kind) == weights(trained, kind)
    assert (workdir / "predictions.csv").read_text() == (trained / "predictions.csv").read_text()


def flip(path: pathlib.Path, place: float = 0.7) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.architecture": "whisper"}, "model.architecture='whisper': choose one of wav2vec2, hubert, distil"),
        ({"model.size": "large"}, "model.size='large': choose one of base, tiny"),
        ({"model.dtype": "float16"}, "model.dtype='float16': choose one of float32, bfloat16"),
        ({"optimizer.name": "sgd"}, "optimizer.name='sgd': only adamw"),
        ({"train.portion_clips": 0}, "train.portion_clips=0: must be at least 1"),
        ({"train.select": "wer"}, "train.select='wer': choose one of loss,"),
        ({"features.window_s": 9.0}, "features.window_s=9.0: longer than every recording"),
        ({"features.window_s": 0.05}, "features.window_s=0.05: a clip needs at least 0.1 s"),
    ],
)
def test_a_field_that_does_not_fit_is_named(changes, words, config_of, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_encoder(config_of(changes=changes), tmp_path)


def test_a_loss_that_is_not_finite_names_its_recordings(config_of, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+, recordings \w+, .*learning_rate"):
        train_encoder(config_of(changes={"optimizer.learning_rate": 1e30, "train.epochs": 1}), tmp_path)


def test_bfloat16_and_unfrozen_convolutions_train(config_of, tmp_path):
    changes = {"model.dtype": "bfloat16", "model.freeze_feature_encoder": False, "train.epochs": 1,
               "train.balance": "class"}  # fmt: skip
    results = train_encoder(config_of("distilhubert", changes), tmp_path)
    assert results["data"]["trained"] == results["data"]["parameters"] == 7841
    from safetensors.torch import load_file

    state = load_file(newest(tmp_path, "last") / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


# ----------------------------------------------------------------------------------------------------- the command


def command(heard: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    path = f"--config={ROOT / 'configs' / 'hubert.py'}"
    return [sys.executable, "-m", "pcgjax.train", path, f"--config.data.prepared={heard}", *fields,
            f"--workdir={workdir}", *more]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


@pytest.mark.slow
def test_it_is_the_command_that_trains_every_model(heard, tmp_path):
    words = command(heard, tmp_path, "--dry_run")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "dry_run.json").read_text())["steps_an_epoch"] == 4
    assert "trained 6,737" in done.stdout
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(heard, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = lambda workdir: subprocess.run(
        command(heard, workdir), env=environment(), capture_output=True, text=True, timeout=300
    )
    done = run(straight)
    assert done.returncode == 0, done.stderr[-3000:]
    process = subprocess.Popen(command(heard, killed), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while newest(killed, "last") is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = run(killed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step" in done.stderr
    assert lines(killed) == lines(straight)
    for kind in ("last", "best"):
        assert weights(killed, kind) == weights(straight, kind)
