"""Preparation over the machines of a Ray cluster: each writes whole shards."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from pcgjax.data import PrepareError
from pcgjax.data.shards import Job, decoder_versions, unit_done, unit_key, unit_paths, write_unit
from pcgjax.data.workers import keep_memory


def over_ray(jobs: Sequence[Job], workers: int | None) -> Iterator[tuple[int, str]]:
    """(number, key) of each shard as the machines of a Ray cluster finish them, in any order.

    The cluster is the one the caller is connected to, the one that RAY_ADDRESS names or that `ray start` began on
    this machine; without one, this machine alone. Each machine needs this package, the source and `out` at the
    same paths. `workers` limits how many shards are written at once; default: one a core of the cluster.

    Raises:
      PrepareError: Ray is missing, a shard could not be written, or a machine sees another source or `out`.
    """
    if not jobs:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    try:
        import ray.data
    except ImportError as error:
        fix = "pip install -c constraints.txt -e '.[ray]'"
        raise PrepareError(f"--engine=ray needs Ray Data ({error}): {fix}, on every machine") from None
    out, versions = jobs[0][0], decoder_versions()
    rows = [{"job": pickle.dumps((job, unit_key(job[2], job[3]), versions))} for job in jobs]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised below
    ray.data.DataContext.get_current().enable_progress_bars = False
    connected = ray.is_initialized()
    try:
        if not connected:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        many = ray.data.TaskPoolStrategy(size=workers)
        # A block is what one task gets. Ray runs those again whose machine was lost.
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_write_unit_there, compute=many)
        for row in data.iter_rows():
            if row["problem"]:
                raise PrepareError(row["problem"])
            number, key = row["number"], row["key"]
            if not unit_done(out, number, key):
                shard, _ = unit_paths(out, number)
                machine = row["machine"]
                raise PrepareError(
                    f"{shard}: written on {machine}, not found here: --out must be a folder that all machines share"
                )
            yield number, key
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise PrepareError(f"--engine=ray: {reason}; fix this and run again; finished shards are reused") from error
    finally:
        if not connected:
            ray.shutdown()


def _write_unit_there(row: dict[str, Any]) -> dict[str, Any]:
    """`write_unit` on a machine of the cluster, if that machine has the same versions and sees the same files."""
    job, key, versions = pickle.loads(row["job"])
    out, number, recordings, parameters = job
    machine, problem = socket.gethostname(), ""
    try:
        if not (out / "parts").is_dir():
            problem = f"{out}: not there on {machine}: --out must be a folder that all machines share"
        elif decoder_versions() != versions:
            problem = f"{machine} has {decoder_versions()}, the machine that asks {versions}: install the same on both"
        elif unit_key(recordings, parameters) != key:
            paths = [recording.path for recording in recordings]
            missing = [path for path in paths if not os.path.exists(path)]
            differs = f"{missing[0]}: not there" if missing else f"{paths[0]} to {paths[-1]}: other sizes or times"
            problem = f"{differs} on {machine}: --source must be a folder that all machines share"
        else:
            keep_memory()
            write_unit(job)
    except PrepareError as error:
        problem = f"{error} (on {machine})"
    return {"number": number, "key": key, "machine": machine, "problem": problem}
