"""The bench's suite for devices, processes and populations: its jobs, the peers of the Mamba models, and the goals."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
import torch

from pcgjax.bench import peers
from pcgjax.bench.corpora import DISTINCT, write_prepared
from pcgjax.bench.device import idle
from pcgjax.bench.scale import Runner, _changes, _corpus, _layout, agreed, fifty_epochs, scale_suite
from pcgjax.bench.scale_goals import NO_GPU, goals, scale_summary
from pcgjax.bench.scale_measures import device_job
from pcgjax.bench.scale_models import LAYOUTS, MODELS, ONE
from pcgjax.bench.scale_training import Training
from pcgjax.data.corpus import from_prepared
from pcgjax.models import segmenter, ssamba
from pcgjax.runs.config import load_config
from pcgjax.tasks.base import split_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return write_prepared(tmp_path_factory.mktemp("scale") / "cnn", 40, (2.0, 2.0), 1000, annotated=True)


@pytest.fixture(scope="module")
def losses(corpus, tmp_path_factory) -> list[float]:
    """Of the first four steps on one device, resident."""
    config = load_config("cnn", _changes("cnn", corpus, True))
    losses, times_s = Training(config, tmp_path_factory.mktemp("one")).losses(4)
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(times_s) == 4
    return losses


def test_simulated_corpus_is_a_prepared_one(corpus):
    read = from_prepared(corpus)
    assert read.sample_rate_hz == 1000
    assert set(read.lengths) == {2000}
    assert len(read.rows) == 40
    first, other = read.read(0), read.read(1)
    assert np.abs(first).max() == 32767
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, read.read(DISTINCT))
    assert all(0 <= start < end <= 2 for start, end, _ in read.rows[0]["annotations"])
    assert read.rows[0]["annotations"]


def test_streamed_steps_are_the_resident_ones(corpus, losses, tmp_path):
    config = load_config("cnn", _changes("cnn", corpus, True))
    streamed = Training(config, tmp_path / "other")
    streamed.steps(0, 4, mib=0.05)
    total = float(streamed.totals.loss)
    assert total == pytest.approx(8 * sum(losses), rel=1e-5)
    assert streamed.windows(4) == 32 * 7  # 2 s in windows of 0.5 s that overlap by half


@pytest.mark.parametrize(
    ("spans", "share", "wall_ns"),
    [
        ([(0, 10), (10, 20)], 0.0, 20),
        ([(5, 10), (15, 25)], 0.25, 20),
        ([(0, 10), (2, 4), (8, 12), (30, 40)], 18 / 40, 40),  # overlapping, and one within another
    ],
)
def test_idle(spans, share, wall_ns):
    for order in (spans, spans[::-1]):
        gaps = idle(order)
        assert gaps["idle_share"] == pytest.approx(share)
        assert gaps["wall_s"] == pytest.approx(wall_ns / 1e9)


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def torch_count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_peers_have_the_models_parameters():
    from flax import nnx

    m = load_config("segmenter_small", {}).model
    ours = nnx.eval_shape(lambda: segmenter.Segmenter(32, 4, m.width, m.depth, m.d_state, m.expand, rngs=nnx.Rngs(0)))
    assert torch_count(peers.Framed(32, 4, m).net) == count(split_model(ours)[1])
    encoder = lambda: ssamba.SSAMBA(32, 4, 64, pretraining=True, rngs=nnx.Rngs(0))
    assert torch_count(peers.Patched(32, 4, 64).net) == count(split_model(nnx.eval_shape(encoder))[1])


def test_peers_scan_runs_both_ways():
    torch.manual_seed(0)
    mixer = peers.mamba_mixer(8, 4)
    x = torch.randn(2, 13, 8)
    changed = x.clone()
    changed[:, 6] += 1
    differs = (mixer(x) - mixer(changed)).abs().amax((0, 2)) > 1e-6
    assert differs.all()
    # Of the forward direction alone what comes before the change stays.
    u = torch.randn(1, 13, 16)
    later = u.clone()
    later[:, 6] += 1
    differs = (mixer.ahead(u) - mixer.ahead(later)).abs().amax((0, 2)) > 1e-6
    assert differs[6:].all()
    assert not differs[:6].any()


def test_peers_learn():
    torch.manual_seed(0)
    m = load_config("segmenter_small", {"model.width": 16, "model.depth": 1, "model.d_state": 4}).model
    framed, frames = peers.Framed(8, 4, m), torch.randn(2, 20, 8)
    losses = [framed.step(frames, frames[..., :4].argmax(-1)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    patched, fbank = peers.Patched(16, 2, 32), torch.randn(2, 32, 128)
    masked = torch.tensor([[1, 3, 4], [2, 5, 15]])
    losses = [patched.step(fbank, masked) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_loader_gives_all_recordings(corpus):
    read = from_prepared(corpus).read
    batches = [[3, 1], [0]]
    loaded = list(peers.recordings_loader(read, batches))
    np.testing.assert_array_equal(loaded[0][1].numpy(), read(1))
    assert [tuple(x.shape) for x in loaded] == [(2, 2000), (1, 2000)]
    short = peers.padded([np.ones(2, np.int16), np.ones(4, np.int16)])
    assert short.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.slow
def test_layout_in_a_process_of_its_own(corpus, losses, tmp_path):
    runner = Runner(tmp_path)
    row = _layout(runner, "cnn", "8 devices, fsdp", corpus, True)
    one = {"losses": losses, "wire_over_minimum": None}
    rows = agreed({ONE: one, "8 devices, fsdp": row})
    assert rows["8 devices, fsdp"]["difference"] < 1e-4
    assert row["state_bytes"]["share"] < 1.1 / 8
    assert 1 <= row["wire_over_minimum"] < 1.1
    failed = runner("layout", "cnn", {"data.prepared": "nowhere"}, 1, steps=1)
    assert "nowhere" in failed["failed"]


def test_goals_and_their_table():
    row = {
        "losses": [1.0], "steps_a_s": 2.0, "state_bytes": {"total": 8, "device": 2, "share": 0.25}, "wire_bytes": 8.0,
        "memory_bytes": {"temporaries": 1024}, "wire_over_minimum": 1.2, "difference": 1e-6,
    }  # fmt: skip
    result = {
        "layouts": {"cnn": {
            ONE: row, "8 devices, fsdp": row, "8 devices, pmap": {"failed": "no memory"},
            "2 processes, pmap": {"losses": [1.0], "steps_a_s": 1.0, "difference": 0.5},
        }},
        "population": {"cnn": {"ratio": 0.95, "ratio_range": [0.9, 1.0], "members": 16}},
        "stream": {"failed": "no disk"},
        "memory": {"recordings": 5, "corpus_mib": 1.0, "peak_rss_mib": 500.0, "recordings_a_s": 3.0},
        "gpu": NO_GPU,
    }  # fmt: skip
    result["goals"] = goals(result)
    judged = {g["what"]: g for g in result["goals"]}
    fsdp = "cnn, 8 devices, fsdp: "
    assert judged[fsdp + "loss, relative difference"]["met"] is True
    assert judged[fsdp + "bytes sent / minimum"]["met"] is False
    assert judged[fsdp + "share of parameters and optimiser state"]["met"] is False
    assert judged["cnn, 8 devices, pmap: bytes sent / minimum"]["met"] == "no memory"
    assert judged["cnn, 2 processes, pmap: loss, relative difference"]["met"] is False
    assert "cnn, 2 processes, pmap: bytes sent / minimum" not in judged
    assert judged["cnn: population / runs in a row"] == {
        "what": "cnn: population / runs in a row", "goal": "at least 0.9", "measured": 0.95, "met": True,
    }  # fmt: skip
    assert judged["streamed / resident"]["met"] == "no disk"
    assert judged["peak MiB, streaming a large corpus"]["met"] is True
    assert judged["50 epochs, s"]["met"] == NO_GPU
    del result["stream"]["failed"]
    result["stream"] |= {
        "training": {"rate_over_resident": 0.97}, "default_mib": 32.0,
        "loader": {"ours_recordings_a_s": 9000.0, "ratio": 2.5},
    }  # fmt: skip
    assert {g["what"]: g for g in goals(result)}["streamed / resident"]["met"] is True
    text = scale_summary(result)
    assert "missed: cnn, 8 devices, fsdp: bytes sent / minimum: at most 1.1, measured 1.2" in text
    assert "0.97, in blocks of 32 MiB" in text
    assert "8 devices, pmap" in text
    assert "failed: no memory" in text
    json.dumps(result)


@pytest.mark.slow
def test_suite(tmp_path):
    result = scale_suite(quick=True)
    assert set(result["layouts"]) == set(MODELS)
    for rows in result["layouts"].values():
        assert set(rows) == set(LAYOUTS)
        for layout, row in rows.items():
            assert row["difference"] < 1e-3, layout
    assert all(row["ratio"] > 0 for row in result["population"].values())
    assert result["stream"]["training"]["rate_over_resident"] > 0
    assert result["memory"]["pipeline"] == "stream"
    assert scale_summary(result)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_step_beside_the_peer(model, tmp_path):
    """What a GPU is measured by, on what there is."""
    prepared = _corpus(tmp_path, model, True)
    config = load_config(model, _changes(model, prepared, True))
    measured = device_job(config, tmp_path / "work", pairs=1, compiled=False)
    assert measured["peers"]["eager"]["ratio"] > 0
    assert measured["segments_a_s"] > 0
    assert measured["ceilings"]["float32_flops_a_s"] > 1e8


@pytest.mark.slow
def test_fifty_epochs_are_a_whole_run(tmp_path):
    corpus = write_prepared(tmp_path / "corpus", 40, (3.0, 3.0), 1000)  # one window of 2.5 s at least
    measured = fifty_epochs(Runner(tmp_path), corpus, epochs=1)
    assert measured["trained_recordings"] == 36
    assert measured["wall_s"] > measured["seconds"]["train"] > 0
