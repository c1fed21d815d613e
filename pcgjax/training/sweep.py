"""What `config.sweep` asks for: values of fields, the members that they make, and which share a compiled program."""

from __future__ import annotations

import ast
import collections
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import ml_collections

from pcgjax.runs.config import Fields, flat_fields

# Numbers that change no shape, so that one program takes them as data. A field that is not here is still swept, as
# programs of its own. Where such a number is off (0, or no noise), nothing of it is in the program, as in a lone run.
TRACED = (
    "features.noise_snr_db", "features.response_db", "features.stretch", "features.top_db", "loss.alpha", "loss.slope",
    "model.dropout", "optimizer.clip_norm", "optimizer.learning_rate", "optimizer.momentum", "optimizer.weight_decay",
)  # fmt: skip
FREE = ("seed", "train.start_from")  # and these are no part of a program


def swept_values(config: ml_collections.ConfigDict) -> dict[str, list]:
    """The fields that `config.sweep` gives values, in order of the alphabet, and these; {} where nothing is swept.

    Raises:
      ValueError: values that the field cannot have, or one twice.
    """
    swept = {}
    for field, text in flat_fields(config.sweep).items():
        if not text:
            continue
        present = functools.reduce(operator.getitem, field.split("."), config)
        try:
            swept[field] = _values(text, present)
        except (ValueError, SyntaxError, KeyError, TypeError):
            raise ValueError(f"sweep.{field}={text}: give values such as {present}, with commas between") from None
        if len(set(swept[field])) < len(swept[field]):
            raise ValueError(f"sweep.{field}={text}: the same value twice")
    return swept


def members_of(swept: dict[str, list]) -> list[Fields]:
    """The fields of each member: every combination of the values that are swept, the last field's first."""
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def _values(text: str, like: Any) -> list:
    if isinstance(like, tuple | list):
        values = ast.literal_eval(f"[{text}]")
        if not all(isinstance(value, tuple) for value in values):
            raise ValueError("need tuples")
        return values
    words = [word.strip() for word in text.split(",")]
    if isinstance(like, bool):
        return [{"true": True, "false": False}[word.lower()] for word in words]
    return [type(like)(word) for word in words]


def programs(members: Sequence[Fields]) -> list[list[int]]:
    """The members, by number, that each program trains."""
    together = collections.defaultdict(list)
    for number, member in enumerate(members):
        structure = [(field, value if _shapes_program(field, value) else None) for field, value in member.items()]
        together[repr(structure)].append(number)
    return list(together.values())


def _shapes_program(field: str, value: Any) -> bool:
    """Whether members that differ in this field are programs of their own."""
    return field not in FREE and not (field in TRACED and value not in (0.0, math.inf))
