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
SHOWN_S = 5.0  # of an example: some five heartbeats
_SHOWN_SEGMENTED_S = 8.0


def draw_waveform(ax: Any, samples: np.ndarray, rate_hz: float, points: int, colour: str, begin_s: float = 0.0) -> None:
    """Draws samples (n,) as a band between the least and the greatest of each of about `points` stretches."""
    block = max(1, len(samples) // points)
    stretches = samples[: len(samples) // block * block].reshape(-1, block)
    time_s = begin_s + np.arange(len(stretches)) * block / rate_hz
    ax.fill_between(time_s, stretches.min(1), stretches.max(1), color=colour, linewidth=0.7)


def draw_states(
    ax: Any, spans: Sequence[Sequence[float]], begin_s: float, end_s: float, y: float, height: float
) -> None:
    """Draws the states of spans (start_s, end_s, state) between two times as coloured bars from `y` upwards."""
    for state, colour in STATE_COLOURS.values():
        bars = [(a, b - a) for a, b, s in spans if s == state and a < end_s and b > begin_s]
        ax.broken_barh(bars, (y, height), facecolors=colour, linewidth=0)


def state_legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, (_, colour) in STATE_COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=4)


def example_figure(example: Mapping[str, Any]) -> page.Html:
    """The waveform and spectrogram of a classified recording, of `runs.results.read_examples`."""
    from scipy import signal

    rate, waveform = example["sample_rate_hz"], np.asarray(example["waveform"], np.float64)
    shown = waveform[: max(2, int(SHOWN_S * rate))]
    length = min(len(shown), max(8, int(0.064 * rate)))
    f, _, power = signal.spectrogram(shown, rate, nperseg=length, noverlap=length * 3 // 4, nfft=2 * length)
    in_band = f <= min(rate / 2, 600)
    level = 10 * np.log10(power[in_band] + 1e-20)
    level = np.clip(level - level.max(), -60, 0)

    def paint(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.25])
        draw_waveform(top, shown, rate, 900, TEAL if example["label"] == example["decision"] else ORANGE)
        top.set_yticks([])
        top.spines["left"].set_visible(False)
        edges = (0, len(shown) / rate, 0, f[in_band][-1])
        bottom.imshow(level, origin="lower", aspect="auto", extent=edges, cmap="magma", interpolation="none")
        bottom.set_title("Hz", color=MUTED, fontweight="normal", fontsize=10)
        bottom.set_xlabel("s")
        bottom.grid(False)
        bottom.set_xlim(0, len(shown) / rate)

    truth, called = DECISIONS[example["label"]], DECISIONS[example["decision"]]
    alt = f"Waveform and spectrogram of recording {example['id']}: truth {truth}, called {called}"
    part = f" First {len(shown) / rate:.0f} of {len(waveform) / rate:.0f} s." if len(shown) < len(waveform) else ""
    return page.card("", page.svg(460, 250, alt, paint), page.example_caption(example, truth, called, part))


def segmented_figures(examples: Sequence[Mapping[str, Any]] | None) -> page.Html:
    """Segmented recordings, the best first, of `runs.results.read_segmented`."""
    if not examples:
        return page.absent("No recordings: the run left no segments.npz.")
    kinds = ("Best", "Median", "Worst") if len(examples) == 3 else ("",) * len(examples)
    return page.join(map(_segmented_figure, examples, kinds))


def _segmented_figure(example: Mapping[str, Any], kind: str) -> page.Html:
    rate, samples = example["sample_rate_hz"], np.asarray(example["samples"], np.float64)
    annotated = [start_s for start_s, _, state in example["truth"] if state]
    begin_s = min(annotated[0] if annotated else 0.0, max(0.0, len(samples) / rate - _SHOWN_SEGMENTED_S))
    first = int(begin_s * rate)
    shown = samples[first : first + int(_SHOWN_SEGMENTED_S * rate)]
    end_s = begin_s + len(shown) / rate

    def paint(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
        draw_waveform(top, shown, rate, 1800, MUTED, begin_s)
        top.set_yticks([])
        for y, name in enumerate(("predicted", "truth")):
            draw_states(bottom, example[name], begin_s, end_s, y - 0.4, 0.8)
        bottom.set_yticks([0, 1], ["predicted", "truth"])
        bottom.tick_params(axis="y", colors=INK, length=0)
        bottom.set_xlim(begin_s, end_s)
        bottom.set_xlabel("s")
        for ax in (top, bottom):
            ax.spines["left"].set_visible(False)
            ax.grid(False, axis="y")
        state_legend(figure)

    scores = {word_of(m): metrics.finite(example["score"].get(m)) for m in SEGMENTATION_HEADLINE[:2]}
    summary = ", ".join(f"{name} {page.number(value)}" for name, value in scores.items())
    alt = f"Waveform of recording {example['id']} with its true and predicted states: {summary}"
    part = f" {end_s - begin_s:.0f} of {len(samples) / rate:.0f} s, from where the annotation begins."
    caption = page.bold(example["id"]) + f" · {summary}.{part if len(shown) < len(samples) else ''}"
    return page.card(kind, page.svg(960, 230, alt, paint), caption)
