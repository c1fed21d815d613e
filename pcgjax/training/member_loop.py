"""Trains the members of one program together: the loop of `loop.py`, where every number is one for each member."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from absl import logging

from pcgjax.runs import signals
from pcgjax.runs.best import better_epoch
from pcgjax.runs.config import plain_config, refuse_other_order
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.log import digest, log_line, open_board, plot, rewind
from pcgjax.runtime import checkpoint, distributed, goodput
from pcgjax.tasks.base import TrainState
from pcgjax.training.members import Program
from pcgjax.training.step import Totals, through


class Held(NamedTuple):
    """What a checkpoint holds of the members; every array leads with them."""

    state: TrainState
    totals: Totals
    kept: tuple[Any, Any]  # parameters and the rest of the best epoch so far


class Trained(NamedTuple):
    """What a program's members came to."""

    program: Program
    kept: tuple[Any, Any]
    best: list[dict | None]  # as in the meta of a run's checkpoint
    diverged: list[int | None]  # the first step whose loss was not finite
    answers: dict[str, np.ndarray]  # part -> (M, n, 2 or 3) of the best epochs


class Members(NamedTuple):
    """A program under way, but for its state."""

    program: Program
    numbers: list[int]  # of its members in the population
    workdir: pathlib.Path
    resident: dict | None  # the corpus on the devices
    meta: dict[str, Any]  # of the checkpoints; best and diverged have an entry for each member
    boards: list[Any]  # TensorBoard, to which each member is a run
    last: ocp.CheckpointManager
    clock: goodput.Clock

    def log(self, place: int, step: int, split: str, values: dict) -> None:
        """A line of metrics of the member in this place; of many processes the first writes."""
        if jax.process_index() == 0:
            log_line(self.workdir / "metrics.jsonl", step, split, {"member": self.numbers[place], **values})
            plot(self.boards[place], step, split, values)

    def lines(self) -> str | None:
        """What a checkpoint says of these members' lines of metrics.jsonl, which the first process writes."""
        if jax.process_index():
            return None
        return digest(self.workdir / "metrics.jsonl", functools.partial(_is_of, self.numbers))


def train_program(
    program: Program, numbers: list[int], folder: pathlib.Path, workdir: pathlib.Path, clock: goodput.Clock
) -> Trained:
    """Trains the members `numbers` of a population, from the checkpoint in `folder` on where it holds one."""
    members, stored, step = start(program, numbers, folder, workdir, clock)
    t, spe = program.config.train, program.experiment.steps_an_epoch
    # So that a signal is heard as soon as by a lone run.
    stretch = max(t.checkpoint_steps // (1 if program.together else program.spread.share), 1)
    stop, bar = 0, tqdm.tqdm(
        total=program.last_step, initial=step, desc=f"train {len(numbers)}", unit="step", mininterval=1.0,
        disable=jax.process_index() > 0,
    )  # fmt: skip
    try:
        with signals.collected() as received, bar:
            while step < program.last_step and not stop:
                to_save = t.checkpoint_steps - step % t.checkpoint_steps
                until = min((step // spe + 1) * spe, step + to_save, step + stretch)
                pieces = program.pieces(members.resident, step, until)
                state, totals = through(pieces, program.advance, (stored.state, stored.totals), clock)
                stored = stored._replace(state=state, totals=totals)
                with clock("train"):
                    counts = program.spread.get(stored.totals)  # waits for the devices
                bar.update(until - step)
                step = until
                stop = distributed.stop_signal(received[0] if received else 0)
                note_divergence(members, counts)
                if step % spe == 0:
                    stored = end_epoch(members, stored, counts, step)
                    bar.set_postfix(loss=f"{np.mean(counts.loss / np.maximum(counts.samples, 1)):.3f}")
                if step % t.checkpoint_steps == 0 or step % spe == 0 or stop:
                    with clock("save"):
                        # A copy, for it is written while training goes on.
                        meta = json.loads(json.dumps(members.meta)) | {"log": members.lines()}
                        checkpoint.save(members.last, step, stored._asdict(), meta)
    finally:
        with clock("save"):
            members.last.wait_until_finished()
        for board in filter(None, members.boards):
            board.close()
    members.last.close()
    if stop:
        logging.info("%s", goodput.sentence(clock.spent()))
        signals.leave(stop, step)
    with clock("validate"):
        answers = {part: judge(*stored.kept, members.resident) for part, judge in program.judged.items()}
    return Trained(program, stored.kept, members.meta["best"], members.meta["diverged"], answers)


def start(
    program: Program, numbers: list[int], folder: pathlib.Path, workdir: pathlib.Path, clock: goodput.Clock
) -> tuple[Members, Held, int]:
    """(members, their state, its step): from the beginning, or from the checkpoint in `folder`.

    Raises:
      CheckpointError: a checkpoint of another order of data.
    """
    experiment, log = program.experiment, workdir / "metrics.jsonl"
    resident, first_process = experiment.resident(), jax.process_index() == 0
    meta: dict[str, Any] = {
        "members": [plain_config(config) for config in program.configs], "order_sha256": experiment.digest,
        "best": [None] * len(numbers), "diverged": [None] * len(numbers),
    }  # fmt: skip
    state, step, written = program.first_states(), 0, None
    # What is kept is apart from the state, which is donated.
    stored = Held(program.spread.put(state), program.no_totals(), program.spread.put((state.params, state.rest)))

    def if_ours(saved: dict) -> dict:
        refuse_other_order(saved["order_sha256"], experiment.digest, workdir)
        return stored._asdict()

    if newest := checkpoint.restore(folder, if_ours):
        step, values, saved = newest
        checkpoint.drop_after(folder, step, aside=True)
        stored = Held(**values)
        meta |= {"best": saved["best"], "diverged": saved["diverged"]}
        written = saved.get("log")
        logging.info("members %s: resuming at step %d", numbers, step)
    if first_process:
        ours = functools.partial(_is_of, numbers)
        rewind(log, lambda line: not ours(line) or line["step"] <= step, written, ours)
    boards = [open_board(workdir, step, f"member{number}") if first_process else None for number in numbers]
    last = checkpoint.manager(folder)
    return Members(program, numbers, workdir, resident, meta, boards, last, clock), stored, step


def _is_of(numbers: list[int], line: dict) -> bool:
    """Whether a line of metrics.jsonl is of one of these members."""
    return line.get("member") in numbers


def note_divergence(members: Members, counts: Totals) -> None:
    """Keeps in the meta the first step of each member whose loss was not finite."""
    for i, bad_step in enumerate(counts.bad_step):
        if bad_step >= 0 and members.meta["diverged"][i] is None:
            members.meta["diverged"][i] = int(bad_step)
            logging.warning("member %d diverged at step %d", members.numbers[i], bad_step)


def end_epoch(members: Members, stored: Held, counts: Totals, step: int) -> Held:
    """Logs the epoch of each member, validates, moves thresholds (SAPT), keeps the models that are the best so far."""
    program, meta, clock = members.program, members.meta, members.clock
    experiment, spread = program.experiment, program.spread
    labels, classifies = experiment.labels[experiment.parts["validation"]], program.task.classifies
    select, epoch = program.config.train.select, step // experiment.steps_an_epoch
    with clock("validate"):
        answers = program.judged["validation"](stored.state.params, stored.state.rest, members.resident)
        thresholds_used = spread.get(stored.state.sapt.threshold)
        stored = stored._replace(totals=program.no_totals())
        if classifies:
            p = spread.put(np.exp(answers[..., 0]).clip(0, 1))
            sapt = program.update_thresholds(stored.state.sapt, p, labels)
            stored = stored._replace(state=stored.state._replace(sapt=sapt))
    better = np.zeros(len(answers), bool)
    for i, answer in enumerate(answers):
        n, seconds = max(int(counts.samples[i]), 1), clock.spent()
        values = {"loss": float(counts.loss[i]) / n, "accuracy": float(counts.correct[i]) / n, "epoch": epoch}
        members.log(i, step, "train", values | {"seconds": seconds["train"], "waited": seconds["wait"]})
        if not np.isfinite(answer).all():  # the last step's update was too much
            meta["diverged"][i] = step if meta["diverged"][i] is None else meta["diverged"][i]
            continue
        threshold = float(thresholds_used[i])
        scores = validation_scores(classifies, answer, labels, threshold)
        best = better_epoch(meta["best"][i], scores, select, step, epoch, threshold)
        if best is not None and meta["diverged"][i] is None:
            meta["best"][i], better[i] = best, True
        members.log(i, step, "validation", scores | {"epoch": epoch})
    return stored._replace(kept=program.pick(spread.put(better), (stored.state.params, stored.state.rest), stored.kept))


def save_best(trained: Trained, place: int, folder: pathlib.Path) -> tuple[dict, Any, Any]:
    """Writes a member's best model as a run's, to `folder`/checkpoints/best; returns (meta, params, rest)."""
    program, best = trained.program, trained.best[place]
    experiment = program.experiment
    assert best is not None
    meta = {
        "config": plain_config(program.configs[place]),
        "order_sha256": experiment.digest,
        "sample_rate_hz": experiment.corpus.sample_rate_hz,
        "best": best,
        **program.task.remember(experiment.corpus, experiment.parts["train"]),
    }
    params, rest = program.spread.one(trained.kept, place)
    if jax.process_index() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # another member may have been the best
    distributed.stop_signal(0)  # all wait for the first
    manager = checkpoint.manager(folder / "checkpoints" / "best")
    checkpoint.save(manager, best["step"], {"params": params, "rest": rest}, meta)
    manager.wait_until_finished()
    manager.close()
    return meta, *jax.device_get((params, rest))
