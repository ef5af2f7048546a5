"""Submission by the executors that need no SLURM, and what a task's end means to the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import RunError
from launch import slurm, snapshot, task
from launch.job import DONE, LOST_PEER, OUR_FAULT, STOPPED, USERS_INPUT, Outcome
from launch.submission import Submission
from pretrain.folder import RunFolder
from tests.slurm.cluster import until

Ranks = Callable[..., list[Any]]
FAILED = 1
"""Exit code of a task that raised."""


def submit(root: Path, *more: str) -> dict[str, str]:
    command = [sys.executable, "-P", "-m", "launch", "submit", "configs/smoke/mae.yaml", f"run.dir={root}"]
    command += ["data.workers=0", "--cluster", "clusters/local", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    said = done.stdout if "--json" in more else "{}"
    return dict(json.loads(said))


def test_debug_runs_in_the_process_that_submits(tmp_path: Path) -> None:
    submit(tmp_path / "run", "+executor=debug", "+tasks_per_node=1")
    assert RunFolder(tmp_path / "run").read_state()["status"] == "done"


def test_local_runs_in_the_background(tmp_path: Path) -> None:
    root = tmp_path / "run"
    said = submit(root, "--json")
    until(lambda: RunFolder(root).read_state()["status"] == "done", "the run is done", 120)
    assert RunFolder(root).read_state()["attempts"][0]["world_size"] == 2
    record = Submission.of(root)
    assert record is not None and record.job_id == said["job"] and Path(record.code).is_dir()
    assert {path.name for path in (root / "logs").iterdir()} == {"rank-00000.log", "rank-00001.log"}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "launch",
        "submit",
        "smoke/mae",
        f"run.dir={tmp_path}/run",
        "--dry-run",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("#!/bin/bash")
    assert f"tasks is rank SLURM_PROCID of Train(root='{tmp_path}/run', signal_delay=120, ranks=1" in said
    assert f"PYTHONPATH={snapshot.place(tmp_path / 'run' / 'code')}$" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"ranks": 4}, r"nodes, tasks_per_node: .* makes 4 ranks, but SLURM has started 2 on here;"),
        (
            {"ranks": 2, "gpus_per_node": 2},
            r"gpus_per_node: found 2, but 0 can be seen on .* each rank .* needs",
        ),
    ],
)
def test_an_allocation_that_isnt_the_clusters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, int], line: str
) -> None:
    here = slurm.Place(1, 2, 1, 2, 0, ("here",), "7", tmp_path)
    monkeypatch.setattr(slurm, "place", lambda: here)
    monkeypatch.setattr(task, "_hold_signals", lambda: None)  # those of the tests' own process
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match=line):
        task.Train(str(tmp_path), 60, **given)()
    assert not list(tmp_path.iterdir())


def end_of_task(root: str, outcome: Outcome, cancelled: bool) -> int:
    """Exit code of a process that runs a task whose training ends so. Run in a forked rank."""
    if cancelled:
        Submission("1", {}, "", "", "", cancelled="now").write(Path(root))
    if (pid := os.fork()) == 0:
        task.VERDICT = task.KILL_WAIT = 0.1
        task.job = lambda path, hung: outcome  # type: ignore[assignment]
        task._threads = lambda path: "1"  # type: ignore[assignment]
        here = slurm.Place(1, 2, 1, 2, 0, ("here",), "7", Path(root))
        slurm.place = lambda: here  # type: ignore[assignment]
        try:
            task.Train(root, 60, ranks=2)()
        except task.TaskFailedError:
            os._exit(FAILED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("outcome", "cancelled", "code"),
    [
        (Outcome(DONE, "done"), False, 0),
        (Outcome(STOPPED, "stop_after"), False, 0),
        (Outcome(STOPPED, "preempted"), False, slurm.REQUEUE),
        (Outcome(STOPPED, "preempted"), True, 0),
        (Outcome(STOPPED, "time_limit"), False, slurm.REQUEUE),
        (Outcome(STOPPED, "terminated"), False, 0),
        (Outcome(LOST_PEER), False, slurm.REQUEUE),
        (Outcome(LOST_PEER), True, 0),
        (Outcome(OUR_FAULT), False, FAILED),
        (Outcome(USERS_INPUT), False, FAILED),
    ],
)
def test_what_an_end_means(
    tmp_path: Path, ranks: Ranks, outcome: Outcome, cancelled: bool, code: int
) -> None:
    assert ranks(1, end_of_task, root=str(tmp_path), outcome=outcome, cancelled=cancelled) == [code]


def outstays_its_time(root: str) -> int:
    """A save that hangs in C, where no Python handler can run."""
    if (pid := os.fork()) == 0:
        task.MARGIN = 0.0

        def hang(path: Path, hung: object) -> Outcome:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
            os.kill(os.getpid(), signal.SIGUSR2)
            os.system("sleep 60")
            return Outcome(DONE, "done")

        task.job = hang  # type: ignore[assignment]
        task._threads = lambda path: "1"  # type: ignore[assignment]
        here = slurm.Place(1, 2, 1, 2, 0, ("here",), "7", Path(root))
        slurm.place = lambda: here  # type: ignore[assignment]
        task.Train(root, 0.5, ranks=2)()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_save_that_outlasts_the_time_doesnt_cost_the_requeue(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(1, outstays_its_time, root=str(tmp_path)) == [slurm.REQUEUE]
