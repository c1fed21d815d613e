"""The type of a task, and the pieces that several tasks share."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from pcgjax import thresholds
from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry
from pcgjax.features import filters
from pcgjax.runtime.traced import is_known, is_on

FILTERS = ("none", "zero_phase", "causal")


class Counts(NamedTuple):
    """Sums over a batch's samples: recordings or clips, whichever the loss is over."""

    loss: jax.Array
    correct: jax.Array
    samples: jax.Array


def no_counts() -> Counts:
    return Counts(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


Total = Callable[[jax.Array], jax.Array]  # sums an array over all device groups' shares of a batch


class Inputs(NamedTuple):
    """What a classifier's model is given of a batch: J windows or clips."""

    values: tuple[jax.Array, ...]  # the model's arguments, (J, ...) each
    recording: jax.Array  # (J,) whose it is
    real: jax.Array  # (J,) whether it counts


class Trained(NamedTuple):
    """A run's best model and the recordings that it is judged on."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    corpus: Corpus
    parts: dict[str, np.ndarray]  # validation, test: indices into the corpus
    graphdef: Any
    params: Any
    rest: Any
    meta: dict  # of its checkpoint


class Judgement(NamedTuple):
    """What a task says of a trained model besides its loss; all of it JSON-ready but the examples' samples."""

    results: dict[str, dict]  # joined to metrics.json, part by part
    rows: list[dict]  # of predictions.csv
    examples: list[dict]  # for the report, as `runs.results.save_examples` takes them


def every_row(rows: list[dict], prepared: str) -> list[dict]:
    """A task that learns from all recordings."""
    return rows


def nothing_to_remember(corpus: Corpus, indices: np.ndarray) -> dict:
    """A task whose model is all that it has learned."""
    return {}


def nothing_to_add(trained: Trained) -> Judgement:
    """A task that is judged by its answers, or by its loss alone."""
    return Judgement({}, [], [])


class Task(NamedTuple):
    """One experiment. A batch here is one device group's: samples (M, ALIGN) int16, lengths, labels, ids (R, ...)."""

    geometry: Geometry
    init: Callable[[nnx.Rngs], nnx.Module]
    # (model, batch, capacity, key) -> log p (R,), log (1 - p) (R,) of each recording being positive; of a task that
    # does not classify recordings, each recording's own Counts.
    forward: Callable[[Any, dict, int, jax.Array], tuple[jax.Array, ...]]
    # (model, batch, capacity, key, threshold, total) -> what to differentiate, Counts. The former is a sum: over all
    # groups, and divided by all their samples, it is the loss. The model's running averages change in place.
    loss: Callable[[Any, dict, int, jax.Array, jax.Array, Total], tuple[jax.Array, Counts]]
    labels: Callable[[Corpus], np.ndarray]  # (N, ...) of a corpus' recordings: what batch["labels"] holds
    classifies: bool = True  # recordings
    shapes: int = 8  # of batches, each compiled: more waste less, and take longer to compile
    dtype: Any = jnp.float32  # of the model's arithmetic; parameters, and all sums over time, stay float32
    # Of classifiers: (batch, capacity, key) -> what the model is given; (model, those values) -> what its last unit is
    # given, (J, D).
    inputs: Callable[[dict, int, jax.Array], Inputs] | None = None
    features: Callable[..., jax.Array] | None = None
    # (rows, data.prepared) -> the rows that it can learn from; raises ValueError where there are none.
    usable: Callable[[list[dict], str], list[dict]] = every_row
    # (corpus, training indices) -> JSON-ready, what must be known of the training recordings to use the model.
    remember: Callable[[Corpus, np.ndarray], dict] = nothing_to_remember
    conclude: Callable[[Trained], Judgement] = nothing_to_add


def target_labels(target: str) -> Callable[[Corpus], np.ndarray]:
    """`Task.labels` of a classifier: 0, 1 or NaN (N,) for each recording."""
    return functools.partial(Corpus.labels, target=target)


def design_filter(f: ml_collections.ConfigDict, cutoff_hz: Any, sample_rate_hz: int, kind: str):
    """(second-order sections or None, free samples before a recording, free samples after it)."""
    if f.filter not in FILTERS:
        raise ValueError(f"features.filter={f.filter!r}: choose one of {', '.join(FILTERS)}")
    if is_known(f.noise_snr_db) and not f.noise_snr_db > -float("inf"):
        raise ValueError(f"features.noise_snr_db={f.noise_snr_db}: give decibels, or inf for no noise")
    if f.filter == "none":
        return None, 0, 0
    try:
        sos = filters.butterworth(f.filter_order, cutoff_hz, sample_rate_hz, kind)
    except ValueError as error:
        names = "features.low_hz, features.high_hz" if kind == "bandpass" else "features.high_hz"
        raise ValueError(f"features.filter_order, {names}: {error}") from None
    lead = filters.edge_samples(sos)
    return sos, lead, lead + filters.settling_samples(sos)


def with_noise(batch: dict, where: filters.Packing, snr_db: float, key: jax.Array) -> jax.Array:
    """A batch's samples as float32 with full scale at 1, and white noise where it is asked for."""
    x = batch["samples"].astype(jnp.float32) / 32767
    return filters.add_white_noise(x, where, snr_db, key) if is_on(snr_db, off=float("inf")) else x


class Windows(NamedTuple):
    """Windows, or rows of half-overlapping ones, cut from a packed batch: (J, ...) for a capacity of J."""

    samples: jax.Array  # (J, T), zero after the recording's end
    real_samples: jax.Array  # (J,) how many samples are the recording's
    begin: jax.Array  # (J,) the sample of the recording at which it begins
    recording: jax.Array  # (J,) whose it is
    nth: jax.Array  # (J,) its number within that recording
    windows: jax.Array  # (J,) how many windows that recording has
    real: jax.Array  # (J,) False where the batch does not fill its capacity


def cut_windows(
    x_MxA: jax.Array, where: filters.Packing, geometry: Geometry, capacity: int, halo: int = 0, shift: Any = None
) -> Windows:
    """`halo`: samples to add on either side; `shift` (R,): by how many samples a recording's windows start later."""
    x, lengths, window = x_MxA.reshape(-1), where.lengths, geometry.window
    # Window or row j of the batch is number `nth` of its recording's.
    units = geometry.units(lengths)
    ends = jnp.cumsum(units)
    j = jnp.arange(capacity)
    recording = jnp.searchsorted(ends, j, side="right", method="compare_all").clip(max=len(lengths) - 1)
    nth = j - (ends - units)[recording]
    begin = nth * (window if geometry.shared else geometry.hop)
    if shift is not None:
        begin += shift[recording]
    size = window + 2 * halo
    starts = where.starts[recording] + begin - halo
    samples = jax.vmap(lambda at: jax.lax.dynamic_slice(x, (at,), (size,)))(starts)
    # Where the recording ends within the row, the next one begins: blank it.
    place = begin[:, None] - halo + jnp.arange(size)[None]
    inside = place < lengths[recording][:, None]
    samples = jnp.where(inside & (place >= 0) if halo else inside, samples, 0)
    real_samples = (lengths[recording] - begin).clip(0, window)
    return Windows(samples, real_samples, begin, recording, nth, geometry.windows(lengths)[recording], j < ends[-1])


def split_model(model: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, parameters, the rest) of a model, the latter two trees of plain arrays; `nnx.merge` undoes it."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, nnx.as_pure(params), nnx.as_pure(rest)


def merge_model(task: Task, graphdef: Any, params: Any, rest: Any) -> Any:
    """The model, its parameters in the type in which it computes; gradients come back in their own."""
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(task.dtype), params), rest)


def arithmetic_dtype(model: ml_collections.ConfigDict) -> Any:
    """Of the model's products; parameters stay float32."""
    return jnp.bfloat16 if model.bfloat16 else jnp.float32


class TrainState(NamedTuple):
    """All that the next step depends on besides the data: what a checkpoint holds."""

    step: jax.Array
    params: Any
    rest: Any  # running averages
    opt_state: Any
    sapt: thresholds.State  # of the decision threshold


def initial_state(
    task: Task, update: optax.GradientTransformation, seed: int | jax.Array, sapt: thresholds.State | None = None
) -> TrainState:
    """The state before the first step; without `sapt`, the threshold stays at 0.5."""
    _, params, rest = split_model(task.init(nnx.Rngs(jax.random.key(seed))))
    return TrainState(jnp.zeros((), jnp.int32), params, rest, update.init(params), sapt or thresholds.init(interval=0))
