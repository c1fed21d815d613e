"""Losses, gradients and answers of every JAX task are finite on what a sensor may deliver, alone and beside others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pcgjax import tasks
from pcgjax.data.batches import pack
from pcgjax.data.corpus import in_memory
from pcgjax.tasks.base import merge_model, split_model

RATE_HZ, SAMPLES = 1000, 2300
_PLACE = np.arange(SAMPLES)
SIGNALS = {
    "silence": np.zeros(SAMPLES),
    "DC": np.full(SAMPLES, 12345),
    "full-scale square": np.where(_PLACE // 20 % 2, 32767, -32768),
    "one spike": 32767 * np.eye(1, SAMPLES, 1000)[0],
    "one spike at the edge": -32768 * np.eye(1, SAMPLES, 0)[0],
    "the smallest step": np.eye(1, SAMPLES, SAMPLES - 1)[0],
    "tone": 32767 * np.sin(2 * np.pi * 60 * _PLACE / RATE_HZ),
    "tone at half the rate": np.where(_PLACE % 2, 32767, -32767),
    "half a second": 9000 * np.sin(2 * np.pi * 40 * _PLACE[: RATE_HZ // 2] / RATE_HZ),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow)
        for name in ("resnet50", "mobilenet_v3", "segmenter", "ssamba_pretrain")]  # fmt: skip


def corpus_at(rate_hz):
    waves = [np.rint(signal).astype(np.int16) for signal in SIGNALS.values()]
    rows = [
        {"id": name, "person": name, "person_known": True, "database": "a", "labels": {"abnormal": str(i % 2)},
         "annotations": [[0.0, 0.2, 1], [0.2, 0.4, 2], [0.4, 0.5, 3]]}
        for i, name in enumerate(SIGNALS)
    ]  # fmt: skip
    return in_memory(rows, waves, rate_hz)


@pytest.mark.parametrize("name", ["cnn", "hinf_lstm", "vit", "segmenter_small", *SLOW])
def test_losses_gradients_and_answers_are_finite(name, make_config):
    ssamba = name in ("segmenter", "ssamba_pretrain")
    corpus = corpus_at(16000 if ssamba else RATE_HZ)  # at 16 kHz all are shorter than a window
    config = make_config({"features.window_s": 0.5 if ssamba else 1.0}, name)
    task = tasks.make(config, corpus.sample_rate_hz)
    graphdef, params, rest = split_model(task.init(nnx.Rngs(0)))
    labels, geometry, key = task.labels(corpus), task.geometry, jax.random.key(0)
    capacity = int(geometry.units(corpus.lengths).sum())

    @jax.jit
    def all_of(params, batch):
        def loss(params):
            model = merge_model(task, graphdef, params, rest)
            value, counts = task.loss(model, batch, capacity, key, jnp.float32(0.5), lambda x: x)
            return value, counts

        (value, counts), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        answers = task.forward(merge_model(task, graphdef, params, rest), batch, capacity, key)
        return value, counts, gradients, answers

    together = np.arange(len(SIGNALS))
    alone = [np.where(together == i, i, -1) for i in together]
    for ids in (together, *alone):
        found = all_of(params, pack(corpus, labels, ids, capacity, geometry))
        used = ids >= 0
        named = ", ".join(np.array(list(SIGNALS))[used])
        value, counts, gradients, answers = jax.device_get(found)
        assert np.isfinite(value), named
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((counts, gradients))), named
        assert all(np.isfinite(answer[used]).all() for answer in answers), named


def test_W8_samples_that_are_not_int16_are_refused():
    wave = np.sin(_PLACE / 10)
    with pytest.raises(ValueError, match=r"recording x: samples of type float64, need int16"):
        in_memory([{"id": "x"}], [wave], RATE_HZ)
    for value in (1e30, 1e-42, np.nan):
        with pytest.raises(ValueError, match="need int16"):
            in_memory([{"id": "x"}], [np.full(9, value)], RATE_HZ)
    with pytest.raises(ValueError, match=r"recording x: samples of shape \(9, 2\), need \(n,\)"):
        in_memory([{"id": "x"}], [np.zeros((9, 2), np.int16)], RATE_HZ)
    with pytest.raises(ValueError, match="sample_rate_hz=0"):
        in_memory([{"id": "x"}], [np.zeros(9, np.int16)], 0)
