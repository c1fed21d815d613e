"""Batches: every path to them gives the same ones, they waste little, and a model sees each recording by itself."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import soundfile
from flax import nnx

from pcgjax import prepare, tasks
from pcgjax.data import PrepareError
from pcgjax.data.batches import block, gather_batch, pack, stream
from pcgjax.data.corpus import Corpus, from_prepared, in_memory, in_rows, order_digest
from pcgjax.data.plan import (
    Geometry,
    batch_units,
    choose_capacities,
    epoch_order,
    evaluation_plan,
    padding_waste,
    plan_batches,
)
from pcgjax.features import filters
from pcgjax.features.filters import ALIGN
from pcgjax.models.cnn1d import reference

HALF, QUARTER, APART = Geometry(400, 200, 0, 0), Geometry(400, 300, 0, 0), Geometry(400, 400, 0, 0)
FILTERED = Geometry(400, 200, 27, 700)
ODD = Geometry(402, 201, 5, 3)  # not a multiple of four: windows do not share their convolutions
GEOMETRIES = {"half": HALF, "quarter": QUARTER, "apart": APART, "filtered": FILTERED, "odd": ODD}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def corpus_of(lengths, sample_rate_hz=1000, seed=0):
    rng = np.random.default_rng(seed)
    samples = [rng.integers(-32767, 32768, n).astype(np.int16) for n in lengths]
    labels = [{"abnormal": str(i % 2)} for i in range(len(lengths))]
    rows = [{"id": f"r{i}", "sha256": f"{seed} {n}", "labels": labels[i]} for i, n in enumerate(lengths)]
    return in_memory(rows, samples, sample_rate_hz)


def cinc_like(count=400, seed=0):
    """Lengths at 1000 Hz as in CinC 2016: many of 8 s, many of some 35 s, the rest from 6 to 60 s."""
    rng = np.random.default_rng(seed)
    eight, long, other = 8000, rng.integers(33_000, 37_000, count), rng.integers(6000, 60_000, count)
    kind = rng.choice(3, count, p=[0.45, 0.3, 0.25])
    return np.where(kind == 0, eight, np.where(kind == 1, long, other)).astype(np.int32)


# --------------------------------------------------------------------------------------------------------- counts


@every_geometry
def test_windows_and_units_equal_a_loop(geometry):
    lengths = np.r_[0, 1, np.arange(390, 1300), 5000]
    expected = []
    for length in lengths:
        count, begin = 0, 0
        while begin + geometry.window <= length:
            count, begin = count + 1, begin + geometry.hop
        expected.append(0 if length == 0 else max(count, 1))
    np.testing.assert_array_equal(geometry.windows(lengths), expected)
    # Rows of one window: J of them hold J windows, and J - 1 between.
    rows = [next(j for j in itertools.count() if max(2 * j - 1, 0) >= n) for n in expected]
    units = rows if geometry.shared else expected
    np.testing.assert_array_equal(geometry.units(lengths), units)
    np.testing.assert_array_equal(geometry.units(jnp.asarray(lengths)), units)


def test_which_geometries_share():
    assert [name for name, geometry in GEOMETRIES.items() if geometry.shared] == ["half", "filtered"]


@pytest.mark.parametrize("seed", range(4))
def test_the_buffer_always_suffices(seed):
    rng = np.random.default_rng(seed)
    for _ in range(500):
        window = int(rng.integers(16, 600))
        hop = window // 2 if rng.random() < 0.5 else int(rng.integers(1, window + 1))
        lead = int(rng.integers(0, 100)) * int(rng.integers(0, 2))
        geometry = Geometry(window, hop, lead, lead + int(rng.integers(0, 900)) if lead else 0)
        lengths = rng.integers(0, 4 * window, rng.integers(1, 10))
        exact = rng.random(len(lengths)) < 0.5  # as long as can be without another window
        lengths = np.where(exact, window + hop * rng.integers(0, 5, len(lengths)) - rng.integers(0, 2), lengths)
        capacity = int(geometry.units(lengths).sum())
        size = geometry.buffer_rows(capacity, len(lengths)) * ALIGN
        starts, rows = filters.starts_of(lengths, geometry.lead, geometry.gap)
        assert rows * ALIGN <= size
        # Every window and row that is cut out lies within it, too.
        windows, units = geometry.windows(lengths), geometry.units(lengths)
        reach = units * window if geometry.shared else (windows - 1) * hop + window
        assert ((starts + reach)[lengths > 0] <= size).all()


# --------------------------------------------------------------------------------------------------------- order


def test_epoch_order_holds_every_recording_once():
    indices = np.arange(100, 137, dtype=np.int32)
    orders = [epoch_order(indices, None, jax.random.key(e), 5) for e in range(3)]
    for order in orders:
        assert order.shape == (8, 1, 5)
        assert sorted(order[order >= 0]) == list(indices)
        assert (order.reshape(-1)[:37] >= 0).all()
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], epoch_order(indices, None, jax.random.key(0), 5))


def test_devices_divide_the_same_batches():
    indices = np.arange(50, dtype=np.int32)
    one = epoch_order(indices, None, jax.random.key(0), 8, 1)
    four = epoch_order(indices, None, jax.random.key(0), 8, 4)
    assert four.shape == (7, 4, 2)
    np.testing.assert_array_equal(four.reshape(one.shape), one)
    with pytest.raises(ValueError, match=r"train\.batch_recordings=8 must be a multiple of the 3 groups"):
        epoch_order(indices, None, jax.random.key(0), 8, 3)


def test_balanced_groups_are_drawn_equally_often():
    groups = np.array(["a"] * 70 + ["b"] * 20 + ["c"] * 10)
    drawn = [epoch_order(np.arange(100), groups, jax.random.key(e), 4) for e in range(30)]
    for order in drawn:
        assert (order >= 0).sum() == 100
        counts = [int((groups[order[order >= 0]] == name).sum()) for name in "abc"]
        assert max(counts) <= 34
        assert min(counts) >= 32
        # The smaller groups are gone through evenly before anything repeats more often.
        times = np.bincount(order[order >= 0], minlength=100)[90:]
        assert times.max() - times.min() <= 2
    # Over epochs, everything of the large group has its turn.
    assert len(np.unique(drawn)) == 100


def test_order_digest_changes_with_all_it_should():
    facts = {"train": ["r0", "r1"], "seed": 0, "batch": 4}
    digest = order_digest(corpus_of([500, 600]), **facts)
    assert digest == order_digest(corpus_of([500, 600]), **facts)
    others = [
        order_digest(corpus_of([500, 601]), **facts),
        order_digest(corpus_of([500]), **facts),
        *(order_digest(corpus_of([500, 600]), **(facts | change))
          for change in ({"train": ["r1", "r0"]}, {"seed": 1}, {"batch": 5}, {"more": 1})),
    ]  # fmt: skip
    assert len({digest, *others}) == 7


# ----------------------------------------------------------------------------------------------------- capacities


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_capacities_are_the_best_there_are(seed, most):
    needed = np.random.default_rng(seed).integers(1, 30, 40)
    needed = needed[np.isin(needed, np.unique(needed)[:9])]
    chosen = choose_capacities(needed, most)
    assert len(chosen) <= most
    assert list(chosen) == sorted(set(chosen))

    def spent(capacities):
        return sum(min(c for c in capacities if c >= n) for n in needed)

    sizes = np.unique(needed)
    others = [some for k in range(min(most, len(sizes))) for some in itertools.combinations(sizes[:-1], k)]
    assert spent(chosen) == min(spent((*some, sizes[-1])) for some in others)


def test_capacities_of_many_sizes():
    needed = np.random.default_rng(0).integers(1, 5000, 20_000)
    chosen = choose_capacities(needed)
    assert len(chosen) <= 8
    assert chosen[-1] == needed.max()
    fits = np.asarray(chosen)[np.searchsorted(chosen, needed)]
    assert needed.sum() / fits.sum() > 0.85  # eight even steps over an even distribution waste 1 of 9


def test_plan_gives_each_batch_the_smallest_capacity_that_holds_it():
    lengths = cinc_like()
    order = epoch_order(np.arange(400, dtype=np.int32), None, jax.random.key(0), 8, 2)
    needed = batch_units(order, lengths, HALF)
    for step, ids in enumerate(order):
        assert needed[step] == max(sum(int(HALF.units(lengths[i])) for i in group if i >= 0) for group in ids)
    made = plan_batches(order, lengths, HALF, choose_capacities(needed, 3))
    for step, choice in enumerate(made.capacity):
        assert made.capacities[choice] >= needed[step]
        assert choice == 0 or made.capacities[choice - 1] < needed[step]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("overlap", [0.5, 0.25, 0.0])
def test_padding_wastes_little(batch, overlap):
    lengths, everyone = cinc_like(), np.arange(400, dtype=np.int32)
    geometry = Geometry(2500, round(2500 * (1 - overlap)), 27, 727)
    orders = [epoch_order(everyone, None, jax.random.key(e), batch) for e in range(5)]
    needed = [batch_units(order, lengths, geometry) for order in orders]
    capacities = choose_capacities(np.concatenate(needed))
    for order in orders:
        made = plan_batches(order, lengths, geometry, capacities)
        assert 0 <= padding_waste(made, lengths, geometry) < 0.10
    judged = evaluation_plan(everyone, lengths, geometry, 16)
    assert padding_waste(judged, lengths, geometry) < 0.10


def test_padding_waste_equals_a_count():
    lengths = np.array([1000, 399, 1400], np.int32)
    for geometry, useful in ((APART, 400 * (2 + 1 + 3)), (HALF, 1000 + 400 + 1400)):
        made = evaluation_plan(np.arange(3), lengths, geometry, 3)
        computed = made.capacities[0] * 400
        assert padding_waste(made, lengths, geometry) == pytest.approx(1 - useful / computed)


@pytest.mark.parametrize(("count", "batch", "devices"), [(37, 8, 1), (37, 8, 4), (3, 16, 2), (1, 1, 1), (5, 5, 1)])
def test_evaluation_plan_holds_every_recording_once(count, batch, devices):
    lengths = cinc_like(100)
    indices = np.random.default_rng(0).permutation(100)[:count].astype(np.int32)
    made = evaluation_plan(indices, lengths, HALF, batch, devices)
    assert made.ids.shape[1] == devices
    assert sorted(made.ids[made.ids >= 0]) == sorted(indices)


# -------------------------------------------------------------------------------------------- packing and gathering


def batches_of(corpus, labels, made, geometry, pipeline, start=0):
    """Every batch of a plan, a list of its groups, as the resident or the streamed pipeline gives them to a model."""
    gather = jax.jit(gather_batch, static_argnums=(2, 3))
    devices = made.ids.shape[1] if pipeline == "stream, a block a group" else 1
    if pipeline == "resident":
        data = jax.device_put(block(corpus, labels, np.arange(len(corpus.rows))))
        for ids, choice in list(zip(made.ids, made.capacity, strict=True))[start:]:
            yield [gather(data, of_group, made.capacities[choice], geometry) for of_group in ids]
    else:
        local_devices = range(devices)
        pieces = stream(corpus, labels, made, start, len(made.ids), devices, local_devices, mib=0.03, steps=3)
        for data, ids, capacity, steps in pieces:
            blocks = [jax.tree.map(lambda x, d=d: x[d], data) for d in local_devices]
            for i in range(steps):
                yield [
                    gather(blocks[g * devices // len(ids[i])], ids[i, g], made.capacities[capacity[i]], geometry)
                    for g in range(len(ids[i]))
                ]


@pytest.mark.parametrize("pipeline", ["resident", "stream", "stream, a block a group"])
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (8, 1), (8, 2)])
@every_geometry
def test_every_pipeline_gives_the_packed_batches(geometry, batch, groups, pipeline):
    lengths = np.random.default_rng(1).integers(100, 3000, 21)
    lengths[[3, 7]] = 64 * 20, geometry.window  # exact fits
    corpus = corpus_of(lengths)
    labels = np.arange(21, dtype=np.float32) / 21
    indices = np.random.default_rng(2).permutation(21)[:19].astype(np.int32)
    order = epoch_order(indices, None, jax.random.key(0), batch, groups)
    needed = batch_units(order, corpus.lengths, geometry)
    made = plan_batches(order, corpus.lengths, geometry, choose_capacities(needed, 2))
    for start in (0, len(order) // 2):
        batches = list(batches_of(corpus, labels, made, geometry, pipeline, start))
        assert len(batches) == len(order) - start
        for step, got in enumerate(batches, start):
            assert len(got) == groups
            for ids, of_group in zip(order[step], got, strict=True):
                expected = pack(corpus, labels, ids, made.capacities[made.capacity[step]], geometry)
                # A streamed batch counts its recordings within its block.
                np.testing.assert_array_equal(np.asarray(of_group["ids"]) >= 0, ids >= 0)
                if pipeline == "resident":
                    np.testing.assert_array_equal(of_group["ids"], ids)
                for name in ("samples", "lengths", "labels"):
                    assert of_group[name].dtype == expected[name].dtype
                    np.testing.assert_array_equal(of_group[name], expected[name])


def test_a_process_reads_its_own_recordings_alone():
    lengths = np.random.default_rng(3).integers(400, 900, 40)
    corpus = corpus_of(lengths)
    order = epoch_order(np.arange(40, dtype=np.int32), None, jax.random.key(0), 8, 8)
    made = plan_batches(order, corpus.lengths, APART, (2,))
    seen = []
    watched = Corpus(corpus.rows, 1000, corpus.lengths, lambda index: (seen.append(index), corpus.read(index))[1])
    labels = np.zeros(40, np.float32)
    pieces = list(stream(watched, labels, made, 0, len(order), devices=4, local_devices=(2, 3), mib=0.03))
    assert sorted(seen) == sorted(order[:, 4:].reshape(-1))
    assert pieces[0][0]["samples"].shape[0] == 2
    assert pieces[0][1].shape[1:] == (4, 1)
    # All processes come to blocks of one shape, whatever they hold.
    other = list(stream(corpus, labels, made, 0, len(order), devices=4, local_devices=(0, 1), mib=0.03))
    shapes, other_shapes = ([str(jax.tree.map(np.shape, piece)) for piece in p] for p in (pieces, other))
    assert shapes == other_shapes


def test_packed_samples_are_where_the_filters_look():
    lengths = [500, 1200, 64, 999]
    corpus = corpus_of(lengths)
    for ids, labels in (([2, -1, 0], [1, 0, 1]), ([1, 3, -1], [1, 1, 0])):
        batch = pack(corpus, np.ones(4, np.float32), np.array(ids), 12, FILTERED)
        assert batch["labels"].tolist() == labels
        buffer = batch["samples"]
        where = filters.packing(jnp.asarray(batch["lengths"]), len(buffer), FILTERED.lead, FILTERED.gap)
        recording, inside = np.asarray(where.recording), np.asarray(where.inside)
        for place, index in enumerate(ids):
            samples = inside & (recording == place)[:, None]
            np.testing.assert_array_equal(buffer[samples], corpus.read(index) if index >= 0 else [])
        assert not buffer[~inside].any()


def test_streamed_blocks_have_one_shape_and_stay_small():
    lengths = cinc_like(100)
    corpus = corpus_of(lengths // 20)
    order = epoch_order(np.arange(100, dtype=np.int32), None, jax.random.key(0), 2)
    needed = batch_units(order, corpus.lengths, HALF)
    made = plan_batches(order, corpus.lengths, HALF, choose_capacities(needed))
    pieces = list(stream(corpus, np.zeros(100, np.float32), made, 5, 49, mib=0.03, steps=7))
    assert sum(steps for *_, steps in pieces) == 44
    assert max(steps for *_, steps in pieces) <= 7
    assert len(pieces) > 7  # the size, too, ends a block
    assert len({str(jax.tree.map(lambda x: (x.shape, x.dtype), piece[:3])) for piece in pieces}) == 1
    assert pieces[0][0]["samples"].nbytes < 0.04 * 2**20


def test_streaming_nothing():
    corpus = corpus_of([500, 600])
    made = evaluation_plan(np.arange(2), corpus.lengths, HALF, 1)
    assert list(stream(corpus, np.zeros(2, np.float32), made, 2, 2)) == []


def test_labels_and_size_of_a_corpus(prepared):
    corpus = from_prepared(prepared)
    assert corpus.sample_rate_hz == 1000
    assert corpus.bytes == 2 * sum(len(corpus.read(i)) for i in range(len(corpus.rows)))
    np.testing.assert_array_equal(corpus.labels("abnormal"), [int(row["labels"]["abnormal"]) for row in corpus.rows])
    changed = in_rows(corpus, [{**row, "labels": {}} for row in corpus.rows])
    assert np.isnan(changed.labels("abnormal")).all()


# --------------------------------------------------------------------------------------- the whole way to an answer


@pytest.mark.parametrize(
    ("filter_", "overlap", "window_s"),
    [("zero_phase", 0.5, 0.4), ("causal", 0.5, 0.402), ("none", 0.25, 0.4), ("zero_phase", 0.0, 0.301)],
)
def test_forward_equals_scipy_one_recording_at_a_time(filter_, overlap, window_s, make_config):
    rate_hz = 1000
    config = make_config({"features.filter": filter_, "features.overlap": overlap, "features.window_s": window_s})
    task = tasks.make(config, rate_hz)
    model = task.init(nnx.Rngs(3))
    lengths = [1733, 390, 64, 1200, 801, 400]
    corpus = corpus_of(lengths, seed=4)
    ids = np.array([[0, 1, -1, 2, 3, 4, 5]])
    used = np.where(ids >= 0, corpus.lengths[ids], 0)
    capacity = int(task.geometry.units(used).sum()) + 3
    batch = pack(corpus, np.zeros(6, np.float32), ids[0], capacity, task.geometry)
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda p, b: task.forward(nnx.merge(graphdef, p), b, capacity, jax.random.key(0)))
    log_p, log_q = forward(params, batch)

    sos = scipy.signal.butter(4, (25, 400), "bandpass", fs=rate_hz, output="sos")
    window, hop = task.geometry.window, task.geometry.hop
    for place, index in enumerate(ids[0]):
        if index < 0:
            continue
        x = corpus.read(index).astype(np.float64) / 32767
        if filter_ != "none":
            x = (scipy.signal.sosfiltfilt if filter_ == "zero_phase" else scipy.signal.sosfilt)(sos, x)
        x = (x - x.mean()) / x.std()
        x = np.pad(x, (0, max(window - len(x), 0)))
        windows = np.stack([x[s : s + window] for s in range(0, len(x) - window + 1, hop)])
        p = jax.nn.sigmoid(reference(model, jnp.asarray(windows, jnp.float32))).mean()
        assert float(jnp.exp(log_p[place])) == pytest.approx(float(p), rel=2e-4)
        assert float(jnp.exp(log_q[place])) == pytest.approx(1 - float(p), rel=2e-4)


def test_noise_is_added_before_the_filter(make_config):
    # White noise far above the signal leaves only noise: the answer depends on the key, and on nothing else.
    corpus = corpus_of([1500, 1500])
    answers = {}
    for snr_db in (float("inf"), -60.0):
        task = tasks.make(make_config({"features.noise_snr_db": snr_db}), 1000)
        graphdef, params = nnx.split(task.init(nnx.Rngs(3)))

        @jax.jit
        def forward(params, batch, key, task=task, graphdef=graphdef):
            return task.forward(nnx.merge(graphdef, params), batch, 4, key)[0][0]

        for index, seed in itertools.product((0, 1), (0, 1)):
            batch = pack(corpus, np.zeros(2, np.float32), np.array([index]), 4, task.geometry)
            answers[snr_db, index, seed] = float(forward(params, batch, jax.random.key(seed)))
    clean, noisy = float("inf"), -60.0
    assert answers[clean, 0, 0] == answers[clean, 0, 1] != answers[clean, 1, 0]
    assert answers[noisy, 0, 0] == pytest.approx(answers[noisy, 1, 0], rel=0.02)
    assert answers[noisy, 0, 0] != pytest.approx(answers[noisy, 0, 1], rel=1e-3)


# ----------------------------------------------------------------------------------------------- several folders


@pytest.fixture(scope="module")
def own_sounds(tmp_path_factory):
    """folder/prepared_1000, prepared_2000: three recordings of one's own."""
    folder = tmp_path_factory.mktemp("own")
    for i in range(3):
        samples = np.random.default_rng(i).standard_normal(2000 + 300 * i) / 10
        soundfile.write(folder / f"own{i}.wav", samples, 1000)
    for rate_hz in (1000, 2000):
        prepare.prepare("folder", folder, folder / f"prepared_{rate_hz}", rate_hz, workers=1)
    return folder


def test_folders_are_read_as_one(prepared, own_sounds):
    one, other = (from_prepared(path) for path in (prepared, own_sounds / "prepared_1000"))
    both = from_prepared(f"{prepared},{own_sounds / 'prepared_1000'}")
    assert both.rows == [*one.rows, *other.rows]
    assert both.sample_rate_hz == 1000
    np.testing.assert_array_equal(both.lengths, [*one.lengths, *other.lengths])
    for i in (0, len(one.rows) - 1, len(one.rows), len(both.rows) - 1):
        part, index = (one, i) if i < len(one.rows) else (other, i - len(one.rows))
        np.testing.assert_array_equal(both.read(i), part.read(index))
    assert both.bytes == one.bytes + other.bytes


def test_folders_that_do_not_go_together(prepared, own_sounds):
    with pytest.raises(ValueError, match=r"prepared at different rates, \[1000, 2000\] Hz"):
        from_prepared(f"{prepared},{own_sounds / 'prepared_2000'}")
    with pytest.raises(ValueError, match="recording a0001 is in two of these folders"):
        from_prepared(f"{prepared},{prepared}")
    with pytest.raises(PrepareError, match="nowhere: no prepared data set"):
        from_prepared(f"{prepared},nowhere")
