"""Numbers of a config that may be tracers: where `population` trains members that differ in them as one program.

A program's shape cannot depend on a traced number, so it is neither checked, which `population` does beforehand, nor
switched off by its value: members in which it is off, such as a dropout of 0, have a program of their own.
"""

from __future__ import annotations

from typing import Any

import jax


def is_known(value: Any) -> bool:
    """Whether a number can be looked at while the program is made."""
    return not isinstance(value, jax.core.Tracer)


def is_on(value: Any, off: float = 0.0) -> bool:
    """Whether what a number asks for happens at all: it is traced, or another than `off`."""
    return not is_known(value) or value != off
