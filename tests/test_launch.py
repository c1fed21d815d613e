"""The launchers: what can be known of them without their clusters, and the one for a single machine really run."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
# A process of a cluster: says who it is, then does what --case asks of it.
MEMBER = """
import os, signal, sys, time
given = dict(word.lstrip("-").split("=") for word in sys.argv[1:])
i = int(given["process_id"])
def say(line):  # in one piece, also where PYTHONUNBUFFERED is set
    os.write(1, f"{line}\\n".encode())
def saved(*_):
    say("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, signal.SIG_IGN if given["case"] == "deaf" else saved)
say(f"process {i} of {given['num_processes']} {given['case']}")
if i == 1 and given["case"] in ("fails", "deaf"):
    print("no such field", file=sys.stderr)
    sys.exit(3)
time.sleep(60 if given["case"] in ("waits", "deaf") else 0.5)
sys.exit(1 if given["case"] == "fails" else 0)
"""


def cluster(n: int | str, *words: str, **environment: str) -> subprocess.Popen:
    command = ["bash", str(LAUNCH / "local_cluster.sh"), str(n), *words]
    pipe = subprocess.PIPE
    # What is started from a shell's background ignores Ctrl-C, and bash cannot then trap it.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heeded)


def member(case: str) -> tuple[str, ...]:
    return sys.executable, "-c", MEMBER, f"--case={case}"


def test_local_cluster():
    stdout, stderr = (process := cluster(3, *member("ends"))).communicate(timeout=60)
    assert process.returncode == 0, stderr
    wanted = ["process 0 of 3 ends", "[1] process 1 of 3 ends", "[2] process 2 of 3 ends"]
    assert sorted(stdout.splitlines()) == sorted(wanted)


def test_local_cluster_has_the_status_of_the_first_that_failed():
    _, stderr = (process := cluster(2, *member("fails"))).communicate(timeout=60)
    assert process.returncode == 3
    assert "[1] no such field" in stderr


def test_local_cluster_ends_those_that_do_not_stop():
    began = time.monotonic()
    (process := cluster(2, *member("deaf"), GRACE_S="1")).communicate(timeout=60)
    assert process.returncode == 3
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_cluster_passes_signals_on(number):
    process = cluster(2, *member("waits"))
    told = [process.stdout.readline(), process.stdout.readline()]
    assert all("waits" in line for line in told)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=30)
    assert sorted(stdout.splitlines()) == ["[1] saved", "saved"]
    assert process.returncode == 143


def test_local_cluster_says_what_it_wants():
    for words in ((), ("2",), ("two", "true"), ("0", "true")):
        done = subprocess.run(["bash", LAUNCH / "local_cluster.sh", *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: ")


def test_local_cluster_of_jax():
    code = """
from absl import logging
from pcgjax.runtime import distributed, files
def main(argv):
    with distributed.together():
        import jax
        from jax.experimental import multihost_utils
        print(multihost_utils.process_allgather(jax.process_index()).tolist(), flush=True)
        if jax.process_index() == 1:
            raise ValueError("seed=x: no number")
        multihost_utils.sync_global_devices("the one that does not come")
distributed.define_flags()
files.run(main)
"""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    stdout, stderr = (process := cluster(2, sys.executable, "-c", code, PYTHONPATH=path)).communicate(timeout=120)
    assert process.returncode == 1
    assert {"[0, 1]", "[1] [0, 1]"} <= set(stdout.splitlines())
    assert "[1] error: seed=x: no number" in stderr
    assert re.search(r"^error: process 1 of 2 \(.+\) stopped: ValueError: seed=x: no number$", stderr, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", LAUNCH / name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_sbatch_options():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.split(maxsplit=1)[1] for line in lines if line.startswith("#SBATCH")]
    # sbatch stops to look for options at the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    forms = {
        "job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+",
        "cpus-per-task": r"\d+", "time": r"(\d+-)?\d+:\d\d:\d\d", "output": r"\S*%j\S*", "open-mode": "append",
        "requeue": "", "signal": r"(B:)?[A-Z0-9]+@\d+",
    }  # fmt: skip
    for name, value in given.items():
        assert re.fullmatch(forms[name], value), name
    assert given["ntasks-per-node"] == given["gpus-per-node"]  # JAX gives each task of a node one GPU


def run_with_stand_in(script: str, name: str, words: list[str], tmp_path, body: str, **environment: str):
    """Runs a script where the cluster's own command is a script that writes down how it was called."""
    stand_in = tmp_path / name
    stand_in.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name}" "$@" >>"{tmp_path}/calls"\n{body}\n')
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    return subprocess.run(["bash", LAUNCH / script, *words], env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_sbatch_goes_on_after_the_time_limit(tmp_path, status, requeued):
    run_with_stand_in("slurm.sbatch", "scontrol", [], tmp_path, "")
    words = ["configs/cnn.py", "runs/a b", "--config.seed=1"]
    done = run_with_stand_in("slurm.sbatch", "srun", words, tmp_path, f"exit {status}", SLURM_JOB_ID="7")
    assert done.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    asked = calls[calls.index("python") :]
    wanted = ["python", "-m", "pcgjax.train", "--multi_host", "--config=configs/cnn.py", "--workdir=runs/a b",
              "--config.seed=1"]  # fmt: skip
    assert asked[: len(wanted)] == wanted
    assert (asked[len(wanted) :] == ["scontrol", "requeue", "7"]) == requeued


def test_tpu_pod_quotes_what_it_sends(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("the script sends the last commit, and this is no git checkout")
    words = ["slice", "zone-a", "configs/cnn.py", "/mnt/run's", "--config.train.epochs=2"]
    done = run_with_stand_in("tpu_pod.sh", "gcloud", words, tmp_path, "")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.count("--worker=all") == 2
    assert calls.count("--zone=zone-a") == 2
    (sent,) = (call.removeprefix("--command=") for call in calls if call.startswith("--command="))
    last = sent.rpartition("; ")[2]
    told = subprocess.run(["bash", "-c", f"printf '%s\\n' {last}"], capture_output=True, text=True, check=True)
    wanted = ["python", "-m", "pcgjax.train", "--multi_host", "--config=configs/cnn.py", "--workdir=/mnt/run's",
              "--config.train.epochs=2"]  # fmt: skip
    assert told.stdout.splitlines() == wanted


# Field names of jobset.x-k8s.io/v1alpha2, batch/v1 and v1; the values say what may stand below.
CONTAINER = {"name", "image", "command", "args", "env", "resources", "volumeMounts", "ports", "workingDir"}
POD = {"serviceAccountName", "restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes", "nodeSelector"}
JOB = {"parallelism", "completions", "completionMode", "backoffLimit", "template", "activeDeadlineSeconds"}
JOBSET = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
          "managedBy", "ttlSecondsAfterFinished"}  # fmt: skip
REPLICATED = {"name", "template", "replicas", "groupName", "dependsOn"}


def test_jobset_fields():
    account, role, binding, jobset = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    spec = jobset["spec"]
    assert set(spec) <= JOBSET
    assert set(spec["failurePolicy"]) <= {"maxRestarts", "rules", "restartStrategy"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    (replicated,) = spec["replicatedJobs"]
    assert set(replicated) <= REPLICATED
    job = replicated["template"]["spec"]
    assert set(job) <= JOB
    pod = job["template"]["spec"]
    assert set(pod) <= POD
    (container,) = pod["containers"]
    assert set(container) <= CONTAINER
    assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}

    # What JAX's detection relies on: one indexed job whose pods know their number, at the default subdomain.
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert "subdomain" not in spec["network"]
    assert spec["network"]["enableDNSHostnames"] is True
    # One pod that ends badly ends the job, and the JobSet begins them all anew.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert spec["failurePolicy"]["maxRestarts"] > 0
    # Its own pod and job must be open to it.
    name = account["metadata"]["name"]
    assert pod["serviceAccountName"] == name
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name}]
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role",
                                  "name": role["metadata"]["name"]}  # fmt: skip
    allowed = {(resource, verb) for r in role["rules"] for resource in r["resources"] for verb in r["verbs"]}
    assert {("pods", "list"), ("jobs", "get")} <= allowed
    assert container["command"][:4] == ["python", "-m", "pcgjax.train", "--multi_host"]
