"""The segmenter's training task: frames, their labels, shifts and sums are what plain loops give."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from pcgjax import tasks
from pcgjax.data import batches
from pcgjax.data.corpus import in_memory
from pcgjax.data.plan import Geometry, batch_units
from pcgjax.datasets import UNANNOTATED
from pcgjax.features import filters
from pcgjax.segmentation.states import frame_states, target_frames
from pcgjax.tasks.augment import masked_bands, recoloured, stretched
from pcgjax.tasks.base import cut_windows
from pcgjax.tasks.frames import frame_features, frame_hop
from pcgjax.tasks.segmenter import events

RATE_HZ = 1000
STEADY = {"model.dropout": 0.0}  # two passes over the same data give the same


def annotated(length, rng):
    """Spans on the grid of the samples: any state after any other, some stretches without one."""
    edges = np.sort(rng.choice(length, min(length // 30, 40), replace=False)) / RATE_HZ
    spans = [(a, b, int(rng.integers(0, 5))) for a, b in itertools.pairwise(edges)]
    return [span for span in spans if rng.random() < 0.8]


def corpus_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    samples = [(rng.standard_normal(n) * rng.uniform(1000, 9000)).clip(-32767, 32767).astype(np.int16) for n in lengths]
    rows = [{"id": f"r{i}", "annotations": annotated(n, rng)} for i, n in enumerate(lengths)]
    return in_memory(rows, samples, RATE_HZ)


def batch_of(task, corpus, ids):
    ids = np.array([ids], np.int32)
    capacity = int(batch_units(ids[None], corpus.lengths, task.geometry)[0])
    return batches.pack(corpus, task.labels(corpus), ids[0], capacity, task.geometry), capacity


def direct(config, model):
    """(samples with their halo, real) of one window -> logits (T, K)."""

    @jax.jit
    def logits(params, samples, real):
        features, _ = frame_features(config, samples[None], real[None], RATE_HZ)
        return nnx.merge(graphdef, params)(features)[0]

    graphdef, params = nnx.split(model)
    return lambda samples, real: np.asarray(logits(params, samples, real), np.float64)


def loss_of(task, model):
    """(batch, capacity, key) -> `task.loss`, compiled."""
    graphdef, params = nnx.split(model)
    loss = jax.jit(
        lambda batch, capacity, key: task.loss(
            nnx.merge(graphdef, params), batch, capacity, key, jnp.float32(0.5), lambda x: x
        ),
        static_argnums=1,
    )
    return lambda batch, capacity, key: loss(batch, capacity, jax.random.key(key))


def by_hand(config, logits_of, corpus, index, shift=0):
    """(loss, correct, samples) of one recording, window by window."""
    f, target = config.features, config.task.frames
    hop, halo = frame_hop(config, RATE_HZ)
    window = round(f.window_s * RATE_HZ) // hop * hop
    x = corpus.read(index).astype(np.float32) / 32767
    truth = frame_states(
        [(a - shift / RATE_HZ, b - shift / RATE_HZ, s) for a, b, s in corpus.rows[index]["annotations"]],
        len(x) // hop + 1,
        f.step_s,
    )
    wanted = target_frames(truth, target)
    loss, correct, samples = 0.0, 0, 0
    for k in range(max(len(x) // window, 1)):
        padded = np.zeros(window + 2 * halo, np.float32)
        begin = k * window + shift - halo
        own = x[max(begin, 0) : begin + len(padded)]
        padded[max(-begin, 0) :][: len(own)] = own
        real = np.arange(window // hop) * hop + hop // 2 < len(x) - k * window - shift
        logits = logits_of(padded, real)
        for i in np.flatnonzero(real):
            y = wanted[k * window // hop + i] if k * window // hop + i < len(wanted) else 0
            if y < 0:
                continue
            if target == "states":
                loss += np.log(np.exp(logits[i]).sum()) - logits[i][y]
                correct += logits[i].argmax() == y
            else:
                loss += np.logaddexp(0, -logits[i, 0] if y else logits[i, 0])
                correct += (logits[i, 0] > 0) == y
            samples += 1
    return loss, correct, samples


# -------------------------------------------------------------------------------------------------------- labels


def test_events_are_where_states_begin():
    rows = [
        {"annotations": [(0.1, 0.2, 1), (0.2, 0.3, 2), (0.5, 0.5, 3), (0.6, 0.7, 4)]},
        {"annotations": []},
        {"annotations": [(0.0, 0.0002, 1)]},  # less than a sample
    ]
    corpus = in_memory(rows, [np.zeros(800, np.int16)] * 3, RATE_HZ)
    found = events(corpus)
    assert found.dtype == np.int32
    marks = [[(int(e) // 8, int(e) % 8) for e in row if e != np.iinfo(np.int32).max] for row in found]
    assert marks == [[(100, 1), (200, 2), (300, UNANNOTATED), (600, 4), (700, UNANNOTATED)], [], []]
    nothing = in_memory(rows[1:2], [np.zeros(800, np.int16)], RATE_HZ)
    assert events(nothing).shape == (1, 1)


@pytest.mark.parametrize(("target", "bidirectional"), [("states", True), ("cycle", False)])
def test_forward_counts_what_a_loop_counts(target, bidirectional, make_config):
    # Dropout and masks are for training.
    changes = {"task.frames": target, "model.bidirectional": bidirectional, "features.masked_bands": 5}
    config = make_config(changes, "segmenter_small")
    task = tasks.make(config, RATE_HZ)
    corpus = corpus_of([333, 1000, 1001, 2710, 3000])  # shorter than a window, exact multiples, and others
    model = task.init(nnx.Rngs(1))
    batch, capacity = batch_of(task, corpus, [4, 0, -1, 3, 2, 1])
    found = jax.jit(task.forward, static_argnums=2)(model, batch, capacity + 2, jax.random.key(0))
    logits_of = direct(config, model)
    for place, index in enumerate([4, 0, None, 3, 2, 1]):
        expected = (0, 0, 0) if index is None else by_hand(config, logits_of, corpus, index)
        got = [float(x[place]) for x in found]
        assert got[0] == pytest.approx(expected[0], rel=1e-4)
        assert got[1:] == list(expected[1:])


def test_windows_shift_within_the_recording(make_config):
    config = make_config({**STEADY, "task.frames": "annotated"}, "segmenter_small")
    task = tasks.make(config, RATE_HZ)
    corpus = corpus_of([2003])  # room for shifts of 0 to 3 samples
    model = task.init(nnx.Rngs(1))
    batch, capacity = batch_of(task, corpus, [0])
    loss, logits_of = loss_of(task, model), direct(config, model)
    found = [loss(batch, capacity, i) for i in range(25)]
    expected = [by_hand(config, logits_of, corpus, 0, shift) for shift in range(4)]
    shifts = set()
    for objective, counts in found:
        assert int(counts.samples) == 100  # both windows, whole
        distance = [abs(float(objective) - e[0]) for e in expected]
        assert min(distance) < 1e-3
        shifts.add(int(np.argmin(distance)))
    assert shifts == {0, 1, 2, 3}


def test_without_room_nothing_shifts(make_config):
    config = make_config(STEADY, "segmenter_small")
    task = tasks.make(config, RATE_HZ)
    corpus, loss = corpus_of([700, 2000]), loss_of(task, task.init(nnx.Rngs(1)))
    batch, capacity = batch_of(task, corpus, [0, 1])
    assert len({float(loss(batch, capacity, i)[0]) for i in range(5)}) == 1


def test_cut_windows_hold_their_own_recording_and_zeros():
    geometry, halo = Geometry(100, 100, 17, 17), 17
    lengths, shift = np.array([60, 330, 0, 200], np.int32), np.array([0, 30, 0, 0], np.int32)
    rng = np.random.default_rng(0)
    samples = [rng.uniform(1, 2, n).astype(np.float32) for n in lengths]
    capacity = int(geometry.units(lengths).sum())
    buffer = np.zeros(geometry.buffer_rows(capacity, len(lengths)) * filters.ALIGN, np.float32)
    starts, _ = filters.starts_of(lengths, geometry.lead, geometry.gap)
    for start, own in zip(starts, samples, strict=True):
        buffer[start : start + len(own)] = own
    rows = buffer.reshape(-1, filters.ALIGN)
    where = filters.packing(jnp.asarray(lengths), len(rows), geometry.lead, geometry.gap)
    cut = cut_windows(jnp.asarray(rows), where, geometry, capacity + 1, halo, jnp.asarray(shift))
    assert np.asarray(cut.real).tolist() == [True] * capacity + [False]
    assert np.asarray(cut.recording)[:capacity].tolist() == [0, 1, 1, 1, 3, 3]
    for j, (recording, begin) in enumerate([(0, 0), (1, 30), (1, 130), (1, 230), (3, 0), (3, 100)]):
        padded = np.zeros(1000, np.float32)
        padded[300 : 300 + len(samples[recording])] = samples[recording]
        np.testing.assert_array_equal(cut.samples[j], padded[300 + begin - halo : 300 + begin + 100 + halo])
        assert (int(cut.begin[j]), int(cut.real_samples[j])) == (begin, min(100, len(samples[recording]) - begin))


# ------------------------------------------------------------------------------------------------------- features


def test_masked_bands_are_neighbours():
    x = jnp.ones((200, 3, 12))
    masked = np.asarray(masked_bands(jax.random.key(0), x, 4)) == 0
    sizes, firsts = set(), set()
    for item in masked:
        assert (item == item[0]).all()  # in all frames the same
        bands = np.flatnonzero(item[0])
        sizes.add(len(bands))
        if len(bands):
            assert (np.diff(bands) == 1).all()
            firsts.add(int(bands[0]))
    assert sizes == {0, 1, 2, 3, 4}
    assert {0, 11} <= firsts | {int(np.flatnonzero(item[0])[-1]) for item in masked if item.any()}
    assert masked_bands(jax.random.key(0), x, 0) is x


def test_another_stethoscope_changes_bands_and_not_time():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(300, 20, 32)), jnp.float32)
    real = jnp.arange(20)[None] < jnp.asarray(rng.integers(5, 21, 300))[:, None]
    y = np.asarray(recoloured(jax.random.key(0), x, real, 6.0, noise=False))
    assert (y[~np.asarray(real)] == 0).all()
    change = np.where(np.asarray(real)[..., None], y - np.asarray(x), np.nan)
    assert np.nanmax(np.nanstd(change, 1)) < 1e-5  # the same in all frames
    response = np.nanmean(change, 1)
    response -= response.mean(1, keepdims=True)
    db = response * 20 / np.log(10)
    assert 4 < db[:, 0].std() < 8
    assert np.abs(np.diff(db)).max() < 6  # slowly from band to band
    np.testing.assert_allclose([y[i, np.asarray(real)[i]].mean() for i in range(9)], 0, atol=1e-5)
    assert recoloured(jax.random.key(0), x, real, 0.0, noise=False) is x


def test_noise_hides_what_is_soft_and_not_what_is_loud():
    x = jnp.tile(jnp.where(jnp.arange(40)[:, None] % 4 == 0, 3.0, -3.0), (200, 1, 32))
    y = np.asarray(recoloured(jax.random.key(0), x, jnp.ones((200, 40), bool), 0.0, noise=True))
    loud, soft = y[:, ::4].mean((1, 2)), np.delete(y, np.s_[::4], 1).mean((1, 2))
    distance = loud - soft
    assert distance.min() > 1  # the sounds stay
    assert distance.max() > 5  # at some levels nothing is hidden
    assert (distance < 5).mean() > 0.3  # at others much is


def test_stretched_frames_are_the_recordings_own():
    x = jnp.arange(1.0, 101)[None, :, None].repeat(64, 0)
    real = jnp.arange(100)[None].repeat(64, 0) < 90
    y, still_real, source = map(np.asarray, stretched(jax.random.key(0), x, real, 0.2))
    np.testing.assert_array_equal(y[..., 0], np.where(still_real, source + 1, 0))
    assert (source[still_real] < 90).all()
    steps = np.diff(source, axis=1)
    assert steps.min() >= 0
    assert steps.max() == 2
    rates = (source[:, 60] - source[:, 40]) / 20
    assert rates.min() < 0.9
    assert rates.max() > 1.1
    np.testing.assert_allclose(source[:, 50], 50, atol=1)  # about the middle
    beyond = ~still_real & (np.arange(100) < 90)
    assert beyond[:, 0].any()  # where a faster item has ended
    assert not beyond[:, 40:60].any()


def test_stretching_moves_the_labels_along(make_config):
    config = make_config({**STEADY, "features.stretch": 0.2, "features.window_s": 1.0}, "segmenter_small")
    task = tasks.make(config, RATE_HZ)
    half = in_memory(
        [{"id": "a", "annotations": [(0.0, 0.5, 1), (0.5, 1.0, 3)]}], [np.full(1000, 1000, np.int16)], RATE_HZ
    )
    batch, capacity = batch_of(task, half, [0])
    seen = []

    class Told:
        def __call__(self, features, key=None, dropout=0.0):
            seen.append(features)
            return jnp.zeros((*features.shape[:2], 4)).at[..., 0].set(1.0)

    counts = [task.loss(Told(), batch, capacity, jax.random.key(i), 0.5, lambda x: x)[1] for i in range(12)]
    share = np.array([float(c.correct / c.samples) for c in counts])
    np.testing.assert_allclose(share, 0.5, atol=0.03)  # still half of the window is S1
    assert len({int(c.samples) for c in counts}) > 3


def test_training_masks_anew_each_time(make_config):
    config = make_config({**STEADY, "features.masked_bands": 5}, "segmenter_small")
    task = tasks.make(config, RATE_HZ)
    loss = loss_of(task, task.init(nnx.Rngs(1)))
    batch, capacity = batch_of(task, corpus_of([1000]), [0])
    assert len({float(loss(batch, capacity, i)[0]) for i in range(4)}) > 1
    assert loss(batch, capacity, 0)[0] == loss(batch, capacity, 0)[0]


def test_the_running_level_goes_on_from_piece_to_piece(make_config):
    config = make_config({"model.bidirectional": False}, "segmenter_small")
    hop, halo = frame_hop(config, RATE_HZ)
    x = np.random.default_rng(0).standard_normal((2, 60 * hop + 2 * halo)).astype(np.float32)
    features = jax.jit(lambda x, real, level: frame_features(config, x, real, RATE_HZ, level))
    whole, (total, weight) = features(x, np.ones((2, 60), bool), None)
    level, parts = None, []
    for first, stop in ((0, 30), (30, 60)):
        piece = x[:, first * hop : stop * hop + 2 * halo]
        part, level = features(piece, np.ones((2, stop - first), bool), level)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    np.testing.assert_allclose(level[0], total, rtol=1e-5)
    np.testing.assert_allclose(level[1], weight, rtol=1e-5)
    frames = np.exp(-np.arange(60) / 100)  # roughly what the weight sums
    assert float(weight[0]) == pytest.approx(frames.sum(), rel=0.02)


# ------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ({"task.frames": "beats"}, "task.frames='beats': choose one of sounds, cycle, annotated, states"),
    ({"features.step_s": 0.0205}, "features.step_s=0.0205: must be a whole number of samples at 1000 Hz"),
    ({"features.step_s": 0.0}, "features.step_s=0.0: must be a whole number of samples"),
    ({"features.n_fft": 18}, "features.n_fft=18: must be features.step_s, 20 samples, and an even number more"),
    ({"features.n_fft": 65}, "features.n_fft=65: must be features.step_s, 20 samples, and an even number more"),
    ({"features.n_mels": 60}, "features.n_mels.*n_mels=60 is too many"),
    ({"features.high_hz": 501.0}, "features.high_hz.*do not fit a rate of 1000 Hz"),
    ({"features.window_s": 0.01}, "features.window_s=0.01 is shorter than features.step_s=0.02"),
    ({"model.width": 0}, "width=0"),
    ({"model.d_state": 0}, "d_state=0"),
    ({"model.dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_segmenter_config_names_the_field(changes, message, make_config):
    config = make_config(changes, "segmenter_small")
    with pytest.raises(ValueError, match=message):
        tasks.make(config, RATE_HZ).init(nnx.Rngs(0))


def test_unknown_task():
    config = ml_collections.ConfigDict({"task": {"name": "rnn"}})
    with pytest.raises(ValueError, match=r"task\.name='rnn': choose one of cnn, hinf_lstm, image, segmenter"):
        tasks.make(config, RATE_HZ)
