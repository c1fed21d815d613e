"""What a run starts from: parameters of another run, of a published checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from pcgjax.tasks.base import TrainState, split_model
from pcgjax.training.answers import load_model


def carried_over(state: TrainState, workdir: str, groups: tuple[str, ...]) -> TrainState:
    """The state with the parameter groups `groups`, and their running averages, of the best model of `workdir`.

    Raises:
      ValueError: that model has no such group, or one of another shape.
    """
    _, _, _, params, rest, _ = load_model(workdir)

    def take(ours, theirs):
        there = {path: x for path, x in jax.tree_util.tree_leaves_with_path(theirs) if path[0].key in groups}

        def one(path, x):
            if path[0].key not in groups:
                return x
            if path not in there or there[path].shape != x.shape:
                name = path[0].key
                raise ValueError(f"train.start_from={workdir}: its parameters {name!r} are not those of this model")
            return np.asarray(there[path])  # on this process' device: each puts its copy where the state lies

        return jax.tree_util.tree_map_with_path(one, ours)

    return state._replace(params=take(state.params, params), rest=take(state.rest, rest))


def with_encoder(state: TrainState, graphdef: Any, path: str) -> TrainState:
    """The state with SSAMBA's parameters from a checkpoint of the public code's layout, its positions adapted; of an
    image net with ImageNet's weights and running averages.

    Raises:
      ValueError: as `ssamba.load_torch_checkpoint` or `image.load_imagenet`, or a checkpoint of another width or depth.
    """
    from pcgjax.models import image
    from pcgjax.models.imagenet import load_imagenet
    from pcgjax.models.ssamba_checkpoint import load_torch_checkpoint

    model = nnx.merge(graphdef, state.params, state.rest)
    if isinstance(model, image.ImageClassifier):
        _, *loaded = split_model(load_imagenet(model, path))
        # As above, what was loaded; the rest, such as the head, is the state's.
        params, rest = jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else x, loaded)
        return state._replace(params=params, rest=rest)
    encoder = model.encoder
    loaded = split_model(load_torch_checkpoint(path, encoder.frames, encoder.stride))[1]
    there = dict(jax.tree_util.tree_leaves_with_path(loaded))

    def take(place, x):
        # A segmenter has no use for a checkpoint's own head; the predictors of pre-training may be new.
        if place not in there:
            return x
        if there[place].shape != x.shape:
            raise ValueError(
                f"model.checkpoint={path}: {jax.tree_util.keystr(place)} has shape {there[place].shape}, this model "
                f"{x.shape}; set model.width and model.depth to the checkpoint's"
            )
        return np.asarray(there[place])

    return state._replace(
        params=state.params | {"encoder": jax.tree_util.tree_map_with_path(take, state.params["encoder"])}
    )
