"""Heart-sound models in JAX: phonocardiogram classification and segmentation built for throughput."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pathlib

    from pcgjax.api import Model

__version__ = "0.1.0"


def load(workdir: str | pathlib.Path) -> Model:
    """The best model of a training's folder, for use from Python: see `pcgjax.api.Model`.

    Raises:
      ValueError (also CheckpointError): no trained model there, or a damaged one.
    """
    from pcgjax import api

    return api.Model(workdir)
