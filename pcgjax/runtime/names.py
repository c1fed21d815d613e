"""A name that is not there, answered with those that are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def by_likeness(word: str, names: Iterable[str]) -> list[str]:
    """The names, the one most like `word` first."""

    def likeness(name: str) -> float:
        short, long = sorted((word.lower(), name.lower()), key=len)
        if word.lower() == "".join(part[:1] for part in name.lower().split("_")):  # lr: learning_rate
            return 2.0
        return difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio() + (short in long) / 2

    return sorted(dict.fromkeys(map(str, names)), key=likeness, reverse=True)


def nearest(word: str, names: Iterable[str], has: str = "it has") -> str:
    """'nearest: epochs; it has epochs, remat, ...', for the end of a message; `has`: how the list begins."""
    ordered = by_likeness(word, names)
    if not ordered:
        return f"{has} nothing"
    shown = ", ".join(ordered[:30]) + (", ..." if len(ordered) > 30 else "")
    return f"nearest: {ordered[0]}; {has} {shown}"
