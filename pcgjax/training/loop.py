"""The one loop: train an epoch (one compiled program where the corpus fits the device), validate, save.

Read this first. What a config makes of data and devices is in `experiment.py`, one step in `step.py`, the first state
and a resumed one in `start.py`, the files that a finished run leaves in `conclude.py`.
"""

from __future__ import annotations

import json
import pathlib

import jax
import ml_collections
import numpy as np
from absl import logging

from pcgjax.runs import lock, schema, signals
from pcgjax.runs.best import better_epoch
from pcgjax.runs.config import plain_config
from pcgjax.runs.judge import validation_scores
from pcgjax.runs.seal import refuse_other_run
from pcgjax.runtime import checkpoint, distributed, goodput, sharding
from pcgjax.tasks.base import TrainState
from pcgjax.training.conclude import conclude_run
from pcgjax.training.experiment import set_up
from pcgjax.training.look_ahead import report_costs
from pcgjax.training.start import Run, compile_steps, start
from pcgjax.training.step import Totals, through, zero_totals


def train(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False, checked: bool = False
) -> dict:
    """Trains, evaluates and reports one run; returns what it writes to metrics.json.

    dry_run: compile, write what a step costs to dry_run.json, and return that.
    checked: `schema.check` has passed the config, of which this is a variant or a stage.
    Raises:
      ValueError (also PrepareError, SplitError, LeakError, CheckpointError): a config field, a prepared folder, a
        split or a checkpoint that does not fit, naming it.
      FloatingPointError: a loss that is not finite, naming the step and its recordings.
    """
    if not checked:
        schema.check(config)
    with lock.held(workdir, jax.process_index() == 0):
        return _train(config, pathlib.Path(workdir), dry_run)


def _train(config: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> dict:
    clock = goodput.Clock()
    workdir.mkdir(parents=True, exist_ok=True)
    refuse_other_run(workdir, plain_config(config))
    experiment = set_up(config, workdir)
    trace = goodput.Trace(config.profile, workdir / "profile")
    compiled = compile_steps(config, experiment)
    facts = experiment.facts(compiled.abstract.params, config.seed)
    logging.info("%s", json.dumps(facts))
    if dry_run:
        return report_costs(workdir, experiment, compiled, facts, config.seed)
    run, state, totals = start(config, workdir, experiment, compiled, clock, trace)
    state, step, stop = train_epochs(run, state, totals)
    logging.info("%s", goodput.sentence(clock.spent()))
    if stop:
        if run.board:
            run.board.close()
        signals.leave(stop, step)
    return conclude_run(run, state, facts)


def train_epochs(run: Run, state: TrainState, totals: Totals) -> tuple[TrainState, int, int]:
    """Trains to the last step or to a signal; returns (state, its step, the signal's number or 0)."""
    experiment, layout, t = run.experiment, run.compiled.layout, run.config.train
    step, stop, spe = int(state.step), 0, experiment.steps_an_epoch
    state, totals = layout.spread(state), layout.spread(totals)
    with signals.collected() as received, run.closing(), run.progress(step) as bar:
        while step < run.last_step and not stop:
            epoch, within = divmod(step, spe)
            plan = experiment.plan(run.config.seed, epoch)
            run.trace.before(step)
            to_save = t.checkpoint_steps - step % t.checkpoint_steps
            until = run.trace.until(step, min((epoch + 1) * spe, step + to_save)) - epoch * spe
            pieces = experiment.pieces(run.resident, plan, within, until, layout.pmap)
            if not layout.pmap:  # put here what the steps take, or it would cross to the devices unasked
                pieces = (sharding.put_missing(layout.mesh, piece) for piece in pieces)
            state, totals = through(pieces, run.compiled.steps, (state, totals), run.clock)
            with run.clock("train"):
                counts = jax.device_get(layout.gather(totals))  # waits for the device
            bar.update(until - within)
            step += until - within
            run.trace.after(step)
            stop = distributed.stop_signal(received[0] if received else 0)
            refuse_non_finite(run, counts)
            if until == spe:
                state, totals, shown = end_epoch(run, state, counts, step)
                bar.set_postfix(shown)
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if step % t.checkpoint_steps == 0 or until == spe or stop:
                with run.clock("save"):
                    values = {"state": layout.gather(state), "totals": layout.gather(totals)}
                    checkpoint.save(run.last, step, values, run.meta | {"log": run.lines()})
        run.trace.stop()
    return layout.gather(state), step, stop


def refuse_non_finite(run: Run, counts: Totals) -> None:
    """Raises FloatingPointError where a loss was not finite, naming its step and recordings."""
    if counts.bad_step < 0:
        return
    step, experiment = int(counts.bad_step), run.experiment
    epoch, within = divmod(step, experiment.steps_an_epoch)
    ids = experiment.order_of(run.config.seed, epoch)[within].reshape(-1)
    names = ", ".join(experiment.corpus.rows[i]["id"] for i in ids if i >= 0)
    raise FloatingPointError(
        f"the loss was not finite at step {step}, recordings {names}; lower optimizer.learning_rate="
        f"{run.config.optimizer.learning_rate} or look at those recordings"
    )


def end_epoch(run: Run, state: TrainState, counts: Totals, step: int) -> tuple[TrainState, Totals, dict[str, str]]:
    """Logs the epoch, validates, moves the threshold (SAPT) and keeps the model where it is the best so far.

    Returns: the state, totals for the next epoch, and what the progress bar shows.
    """
    experiment, layout, select = run.experiment, run.compiled.layout, run.config.train.select
    labels, classifies = experiment.labels[experiment.parts["validation"]], experiment.task.classifies
    epoch, seconds, n = step // experiment.steps_an_epoch, run.clock.spent(), max(int(counts.samples), 1)
    values = {"loss": float(counts.loss) / n, "accuracy": float(counts.correct) / n}
    run.log(step, "train", values | {"epoch": epoch, "seconds": seconds["train"], "waited": seconds["wait"]})
    with run.clock("validate"):
        totals, gathered = layout.spread(sharding.put(layout.mesh, zero_totals())), layout.gather(state)
        answers = run.predict["validation"](gathered.params, gathered.rest)
        threshold = float(gathered.sapt.threshold)
        scores = validation_scores(classifies, answers, labels, threshold)
        if classifies:
            probabilities = np.exp(answers[:, 0]).clip(0, 1)
            sapt = run.update_threshold(gathered.sapt, *jax.device_put((probabilities, labels)))
            state = state._replace(sapt=layout.spread(sharding.put(layout.mesh, sapt)))
    run.log(step, "validation", scores | {"epoch": epoch})
    if best := better_epoch(run.meta["best"], scores, select, step, epoch, threshold):
        run.meta["best"] = best
        with run.clock("save"):
            run.last.wait_until_finished()  # of two at once the processes' barriers get mixed up
            checkpoint.save(run.best, step, {"params": gathered.params, "rest": gathered.rest}, run.meta)
            run.best.wait_until_finished()
    return state, totals, {"loss": f"{values['loss']:.3f}", f"val_{select}": f"{scores[select]:.3f}"}
