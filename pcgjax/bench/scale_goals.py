"""What suite `scale` should reach, which of it is met, and its result in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pcgjax.bench.scale_models import LAYOUTS, ONE
from pcgjax.bench.timing import ratio_text

NO_GPU = "not measured: no GPU"


def goals(result: dict) -> list[dict]:
    """[{what, goal, measured, met}] of a result; what was not measured has None and, in place of `met`, why."""
    judged: list[dict] = []

    def add(what: str, row: Any, goal: float, value: Callable[[Any], float | None], least: bool = True) -> None:
        words = f"{'at least' if least else 'at most'} {goal:.3g}"
        reason = row if isinstance(row, str) else row.get("failed")
        measured = None if reason else value(row)
        met = (measured >= goal if least else measured <= goal) if measured is not None else (reason or "not measured")
        judged.append({"what": what, "goal": words, "measured": measured, "met": met})

    gpu = result["gpu"]
    on_gpu = not isinstance(gpu, str)
    for model, rows in result["layouts"].items():
        for layout, row in rows.items():
            if layout != ONE:
                add(f"{model}, {layout}: loss, relative difference", row, 1e-3, lambda r: r.get("difference"), False)
                if "failed" in row or "wire_bytes" in row:
                    add(f"{model}, {layout}: bytes sent / minimum", row, 1.1, lambda r: r["wire_over_minimum"], False)
            if fsdp := LAYOUTS[layout][2].get("parallel.fsdp"):
                add(f"{model}, {layout}: share of parameters and optimiser state", row, 1.1 / fsdp,
                    lambda r: r["state_bytes"]["share"], False)  # fmt: skip
    for model, row in result["population"].items():
        add(f"{model}: population / runs in a row", row, 4.0 if on_gpu else 0.9, lambda r: r["ratio"])
    add("streamed / resident", result["stream"], 0.9,
        lambda r: r["training"]["rate_over_resident"])  # fmt: skip
    add("peak MiB, streaming a large corpus", result["memory"], 2048, lambda r: r["peak_rss_mib"], False)
    for model, row in gpu["steps"].items() if on_gpu else [("each model", NO_GPU)]:
        add(f"{model}: step / PyTorch eager", row, 3.0, lambda r: r["peers"]["eager"].get("ratio"))
        add(f"{model}: step / torch.compile", row, 1.5, lambda r: r["peers"]["compiled"].get("ratio"))
        add(f"{model}: idle share", row, 0.02, lambda r: r["busy"]["idle_share"], False)
    add("50 epochs, s", gpu["fifty_epochs"] if on_gpu else NO_GPU, 60, lambda r: r["wall_s"], False)
    return judged


def scale_summary(result: dict) -> str:
    """The main figures for a terminal."""
    lines = [f"{'':46}{'loss differs':>13}{'share':>8}{'temp MiB':>10}{'sent KiB':>10}{'/ least':>9}{'steps/s':>9}"]
    for model, rows in result["layouts"].items():
        lines += [_layout_line(f"{model + ', ' + layout:<46}", row) for layout, row in rows.items()]
    for model, row in result["population"].items():
        lines.append(_line(f"{model}: population", row, _population_text))
    lines += _stream_lines(result["stream"])
    lines.append(_line("streaming a large corpus", result["memory"], _memory_text))
    if isinstance(result["gpu"], str):
        lines.append(f"{'GPU':<46} {result['gpu']}")
    else:
        lines += [_line(model, row, _step_text) for model, row in result["gpu"]["steps"].items()]
    missed = [g for g in result["goals"] if g["met"] is not True]
    lines.append(f"goals met: {len(result['goals']) - len(missed)} of {len(result['goals'])}")
    for g in missed:
        measured = "" if g["measured"] is None else f", measured {g['measured']:.3g}"
        lines.append(f"  {'missed' if g['met'] is False else g['met']}: {g['what']}: {g['goal']}{measured}")
    return "\n".join(lines)


def _layout_line(name: str, row: dict) -> str:
    if "failed" in row:
        return f"{name} failed: {row['failed']}"
    share, memory, sent, over = "", "", "", ""
    if "wire_bytes" in row:
        share, memory = f"{row['state_bytes']['share']:.3f}", f"{row['memory_bytes']['temporaries'] / 2**20:.1f}"
        sent = f"{row['wire_bytes'] / 1024:.1f}"
        over = "-" if row["wire_over_minimum"] is None else f"{row['wire_over_minimum']:.3f}"
    return (
        f"{name}{row.get('difference', math.nan):>13.1e}{share:>8}{memory:>10}{sent:>10}{over:>9}"
        f"{row['steps_a_s']:>9.2f}"
    )


def _line(what: str, row: dict, text: Callable[[dict], str]) -> str:
    """What was measured, or why it was not."""
    return f"{what:<46} " + (f"failed: {row['failed']}" if "failed" in row else text(row))


def _population_text(row: dict) -> str:
    return f"{row['members']} members {ratio_text(row['ratio'], row['ratio_range'], 'as many runs in a row')}"


def _stream_lines(row: dict) -> list[str]:
    if "failed" in row:
        return [f"streaming failed: {row['failed']}"]
    loader, rate = row["loader"], row["training"]["rate_over_resident"]
    return [
        f"{'streamed / resident':<46} {rate:.2f}, in blocks of {row['default_mib']:g} MiB",
        f"{'loader alone':<46} {loader['ours_recordings_a_s']:.0f} recordings/s, "
        f"{loader['ratio']:.1f}x PyTorch's DataLoader",
    ]


def _memory_text(row: dict) -> str:
    return (
        f"{row['recordings']} recordings, {row['corpus_mib']:.0f} MiB: peak {row['peak_rss_mib']:.0f} MiB, "
        f"{row['recordings_a_s']:.0f} recordings/s"
    )


def _step_text(row: dict) -> str:
    return (
        f"{row['segments_a_s']:.0f} segments/s, {row.get('share_of_flops', math.nan):.1%} of the FLOP/s, "
        f"{row.get('share_of_bytes', math.nan):.1%} of the bytes/s"
    )
