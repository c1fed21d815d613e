"""The optax optimizer that a config asks for."""

from __future__ import annotations

import ml_collections
import optax


def make(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """`config`: name (sgd or adam), learning_rate, momentum (sgd).

    Raises:
      ValueError: an unknown name, a learning rate that is not positive, or a momentum outside [0, 1).
    """
    if not config.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate={config.learning_rate}: must be above 0")
    if config.name == "sgd":
        if not 0 <= config.momentum < 1:
            raise ValueError(f"optimizer.momentum={config.momentum}: must be at least 0 and below 1")
        return optax.sgd(config.learning_rate, momentum=config.momentum or None)
    if config.name == "adam":
        return optax.adam(config.learning_rate)
    raise ValueError(f"optimizer.name={config.name!r}: choose sgd or adam")
