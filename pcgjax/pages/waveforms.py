"""Waveforms: of classified examples, and of segmented ones with their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcgjax import metrics
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE
from pcgjax.pages import page
from pcgjax.pages.page import BLUE, INK, LINE, MUTED, ORANGE, TEAL
from pcgjax.pages.words import DECISIONS, word_of
from pcgjax.segmentation.scores import SEGMENTATION_HEADLINE

STATE_COLOURS = {"S1": (S1, BLUE), "systole": (SYSTOLE, TEAL), "S2": (S2, ORANGE), "diastole": (DIASTOLE, LINE)}
_SHOWN_S = 5.0  # of an example: some five heartbeats
_SHOWN_SEGMENTED_S = 8.0


def example_figures(examples: Sequence[Mapping[str, Any]] | None) -> str:
    if not examples:
        return page.absent("No waveforms: the run left no examples.npz, or no predictions.csv to name them.")
    parts = []
    for title, right in (("Right, and sure of it", True), ("Wrong, and sure of it", False)):
        own = [e for e in examples if (e["label"] == e["decision"]) == right]
        cards = "".join(_example(e, TEAL if right else ORANGE) for e in own)
        none = page.absent("None were kept: every answer was of the other kind.")
        parts.append(f'<h3>{title}</h3><div class="grid two">{cards or none}</div>')
    return "".join(parts)


def _example(example: Mapping[str, Any], colour: str) -> str:
    from scipy import signal

    rate, waveform = example["sample_rate_hz"], np.asarray(example["waveform"], np.float64)
    shown = waveform[: max(2, int(_SHOWN_S * rate))]
    block = max(1, len(shown) // 900)
    used = shown[: len(shown) // block * block].reshape(-1, block)
    t = np.arange(len(used)) * block / rate
    length = min(len(shown), max(8, int(0.064 * rate)))
    f, _, power = signal.spectrogram(shown, rate, nperseg=length, noverlap=length * 3 // 4, nfft=2 * length)
    keep = f <= min(rate / 2, 600)
    level = 10 * np.log10(power[keep] + 1e-20)
    level = np.clip(level - level.max(), -60, 0)

    def paint(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.25])
        top.fill_between(t, used.min(1), used.max(1), color=colour, linewidth=0.7)
        top.set_yticks([])
        top.spines["left"].set_visible(False)
        edges = (0, len(shown) / rate, 0, f[keep][-1])
        bottom.imshow(level, origin="lower", aspect="auto", extent=edges, cmap="magma", interpolation="none")
        bottom.set_title("Hz", color=MUTED, fontweight="normal", fontsize=10)
        bottom.set_xlabel("s")
        bottom.grid(False)
        bottom.set_xlim(0, len(shown) / rate)

    truth, called = DECISIONS[example["label"]], DECISIONS[example["decision"]]
    alt = f"Waveform and spectrogram of recording {example['id']}: truth {truth}, called {called}"
    whole = f" First {len(shown) / rate:.0f} of {len(waveform) / rate:.0f} s." if len(shown) < len(waveform) else ""
    name, database, person, word = (page.escape(example[field]) for field in ("id", "database", "person", "class"))
    caption = (
        f"<b>{name}</b> · {database} · person {person}<br>"
        f"Truth <b>{truth}</b> ({word}), called <b>{called}</b> with probability of abnormal "
        f"<b>{page.number(example['probability'])}</b>.{whole}"
    )
    return page.card("", page.svg(460, 250, alt, paint), caption)


def segmented_figures(examples: Sequence[Mapping[str, Any]] | None) -> str:
    if not examples:
        return page.absent("No recordings: the run left no segments.npz.")
    kinds = ("Best", "Median", "Worst") if len(examples) == 3 else ("",) * len(examples)
    return "".join(map(_segmented_figure, examples, kinds))


def _segmented_figure(example: Mapping[str, Any], kind: str) -> str:
    rate, samples = example["sample_rate_hz"], np.asarray(example["samples"], np.float64)
    annotated = [start_s for start_s, _, state in example["truth"] if state]
    begin_s = min(annotated[0] if annotated else 0.0, max(0.0, len(samples) / rate - _SHOWN_SEGMENTED_S))
    first = int(begin_s * rate)
    shown = samples[first : first + int(_SHOWN_SEGMENTED_S * rate)]
    end_s = begin_s + len(shown) / rate
    block = max(1, len(shown) // 1800)
    used = shown[: len(shown) // block * block].reshape(-1, block)
    t = begin_s + np.arange(len(used)) * block / rate

    def paint(figure: Any) -> None:
        from matplotlib.patches import Patch

        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
        top.fill_between(t, used.min(1), used.max(1), color=MUTED, linewidth=0.7)
        top.set_yticks([])
        for y, name in enumerate(("predicted", "truth")):
            for state, colour in STATE_COLOURS.values():
                bars = [(a, b - a) for a, b, s in example[name] if s == state and a < end_s and b > begin_s]
                bottom.broken_barh(bars, (y - 0.4, 0.8), facecolors=colour, linewidth=0)
        bottom.set_yticks([0, 1], ["predicted", "truth"])
        bottom.tick_params(axis="y", colors=INK, length=0)
        bottom.set_xlim(begin_s, end_s)
        bottom.set_xlabel("s")
        for ax in (top, bottom):
            ax.spines["left"].set_visible(False)
            ax.grid(False, axis="y")
        handles = [Patch(color=colour, label=name) for name, (_, colour) in STATE_COLOURS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=4)

    found = {word_of(m): metrics.finite(example["score"].get(m)) for m in SEGMENTATION_HEADLINE[:2]}
    told = ", ".join(f"{name} {page.number(value)}" for name, value in found.items())
    alt = f"Waveform of recording {example['id']} with its true and predicted states: {told}"
    part = f" {end_s - begin_s:.0f} of {len(samples) / rate:.0f} s, from where the annotation begins."
    caption = f"<b>{page.escape(example['id'])}</b> · {told}.{part if len(shown) < len(samples) else ''}"
    return page.card(kind, page.svg(960, 230, alt, paint), caption)
