"""The optax optimizer that a config asks for."""

from __future__ import annotations

import jax
import ml_collections
import optax

from pcgjax.runs.schema import OPTIMIZERS, SCHEDULES
from pcgjax.runtime.traced import is_known, is_on


def make(config: ml_collections.ConfigDict, steps: int = 0) -> optax.GradientTransformation:
    """`config`: name (sgd, adam or adamw), learning_rate, momentum (sgd), weight_decay (adamw, of matrices only),
    schedule (constant, or cosine: from warmup_steps on down to 0 at `steps`, the last one), clip_norm (of the gradient;
    0: none), frozen (top-level parameter groups that stay). What a config leaves out is off.

    Raises:
      ValueError: an unknown name, or a number outside its range; on `init`, a frozen group that the model has not.
    """
    if is_known(config.learning_rate) and not config.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate={config.learning_rate}: must be above 0")
    frozen = tuple(config.get("frozen", ()))
    if not frozen:
        return _update(config, steps)

    def kinds(params):
        groups = {path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        if missing := set(frozen) - groups:
            known = ", ".join(sorted(groups))
            raise ValueError(f"optimizer.frozen={frozen}: no parameters {min(missing)!r} among {known}")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if path[0].key in frozen else "trained", params
        )

    return optax.multi_transform({"trained": _update(config, steps), "frozen": optax.set_to_zero()}, kinds)


def _update(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    rate, clip_norm = _schedule(config, steps), config.get("clip_norm", 0.0)
    if is_known(clip_norm) and clip_norm < 0:
        raise ValueError(f"optimizer.clip_norm={clip_norm}: must be at least 0")
    if config.name == "sgd":
        if is_known(config.momentum) and not 0 <= config.momentum < 1:
            raise ValueError(f"optimizer.momentum={config.momentum}: must be at least 0 and below 1")
        update = optax.sgd(rate, momentum=config.momentum if is_on(config.momentum) else None)
    elif config.name == "adam":
        update = optax.adam(rate)
    elif config.name == "adamw":
        if is_known(config.weight_decay) and config.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={config.weight_decay}: must be at least 0")
        update = optax.adamw(
            rate, weight_decay=config.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        )
    else:
        raise ValueError(f"optimizer.name={config.name!r}: choose one of {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.clip_by_global_norm(clip_norm), update) if is_on(clip_norm) else update


def _schedule(config: ml_collections.ConfigDict, steps: int) -> optax.ScalarOrSchedule:
    name, warmup = config.get("schedule", "constant"), config.get("warmup_steps", 0)
    if name == "constant":
        return config.learning_rate
    if name != "cosine":
        raise ValueError(f"optimizer.schedule={name!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < steps:
        raise ValueError(f"optimizer.warmup_steps={warmup}: must be at least 0 and below the {steps} steps of the run")
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    return lambda step: config.learning_rate * shape(step)
