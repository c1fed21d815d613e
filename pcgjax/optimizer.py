"""The optax optimizer that a config asks for."""

from __future__ import annotations

import jax
import ml_collections
import optax


def make(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """`config`: name (sgd or adam), learning_rate, momentum (sgd), frozen (top-level parameter groups that stay).

    Raises:
      ValueError: an unknown name, a learning rate that is not positive, or a momentum outside [0, 1); on `init`, a
        frozen group that the model does not have.
    """
    if not config.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate={config.learning_rate}: must be above 0")
    frozen = tuple(config.get("frozen", ()))
    if not frozen:
        return _update(config)

    def kinds(params):
        groups = {path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        if missing := set(frozen) - groups:
            known = ", ".join(sorted(groups))
            raise ValueError(f"optimizer.frozen={frozen}: no parameters {min(missing)!r} among {known}")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if path[0].key in frozen else "trained", params
        )

    return optax.multi_transform({"trained": _update(config), "frozen": optax.set_to_zero()}, kinds)


def _update(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    if config.name == "sgd":
        if not 0 <= config.momentum < 1:
            raise ValueError(f"optimizer.momentum={config.momentum}: must be at least 0 and below 1")
        return optax.sgd(config.learning_rate, momentum=config.momentum or None)
    if config.name == "adam":
        return optax.adam(config.learning_rate)
    raise ValueError(f"optimizer.name={config.name!r}: choose sgd or adam")
