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

from benchmarks.registry import make_run, state
from configs.errors import RunError
from launch.ranks.job import DONE, LOST_PEER, OUR_FAULT, STOPPED, USERS_INPUT, Outcome
from launch.runs.registry import look
from launch.slurm import executor, manage, snapshot, task
from launch.slurm import submit as submitting
from launch.slurm.cluster import ClusterConfig
from launch.slurm.submission import Submission
from pretrain.run.folder import RunFolder, now
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


SBATCH = """#!/bin/bash
n=$(($(cat {here}/count 2>/dev/null || echo 0) + 1)); echo $n > {here}/count
grep -E '^#SBATCH --(array|dependency)' "${{@: -1}}" >> {here}/asked
if [ $n -gt {most} ]; then echo "sbatch: error: {refusal}" >&2; exit 1; fi
echo "Submitted batch job $((10 * n))"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A site whose arrays have five tasks at most, and that takes `most` of them; gives what it was asked."""

    def make(most: int = 99, refusal: str = "") -> Path:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        scontrol = "#!/bin/sh\nprintf 'ClusterName = mini\\nMaxArraySize = 5\\n'\n"
        sbatch = SBATCH.format(here=tmp_path, most=most, refusal=refusal)
        silent = "#!/bin/sh\nexit 1\n"
        texts = {"scontrol": scontrol, "sbatch": sbatch, "squeue": silent, "sacct": silent}
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        return tmp_path / "asked"

    return make


def runs(tmp_path: Path, count: int) -> list[Path]:
    folders = [tmp_path / "sweep" / f"run-{number}" for number in range(count)]
    for folder in folders:
        make_run(folder, run=state(status="new", attempts=[]), rows=0)
    return folders


def test_more_runs_than_an_array_may_have_become_several(tmp_path: Path, site: Callable[..., Path]) -> None:
    asked, folders = site(), runs(tmp_path, 12)
    dry = submitting.dry_run(folders, ClusterConfig(), parallel=2)
    assert dry.count("#!/bin/bash") == 3 and dry.count("SLURM_ARRAY_TASK_ID 3: ") == 3
    assert "# array 3 of 3, since MaxArraySize is 5 here; JOB_0 is the id of array 1\n" in dry
    jobs = submitting.submit(folders, ClusterConfig(), parallel=2)
    assert jobs == [f"{base}_{number}" for base in (10, 20, 30) for number in range(4)]
    arrays = [line for line in asked.read_text().splitlines() if "array" in line]
    assert arrays == ["#SBATCH --array=0-3%1"] * 3
    assert "#SBATCH --dependency=afterany:10\n" in asked.read_text()
    record = Submission.of(folders[-1])
    assert record is not None and (record.job_id, record.site, record.name) == ("30_3", "mini", "keel-sweep")


def test_what_was_taken_before_a_refusal_is_recorded(tmp_path: Path, site: Callable[..., Path]) -> None:
    site(most=1, refusal="Batch job submission failed: Job violates accounting/QOS policy (job submit limit, "
         "user's size and/or time limits)")  # fmt: skip
    folders = runs(tmp_path, 6)
    with pytest.raises(RunError) as refused:
        submitting.submit(folders, ClusterConfig(), parallel=2)
    said = str(refused.value)
    assert "of 6 runs 3 were submitted before that" in said and "keel sweep --at-most N" in said
    assert "\n" not in said
    assert [Submission.of(folder) is not None for folder in folders] == [True] * 3 + [False] * 3


def test_each_submission_has_a_higher_number(tmp_path: Path, site: Callable[..., Path]) -> None:
    site()
    (folder,) = runs(tmp_path, 1)
    number = lambda: submitting._number(folder, Submission.of(folder))  # noqa: E731
    assert number() == 1
    submitting.submit([folder], ClusterConfig())
    assert number() == 2
    (folder / "slurm.json").unlink()  # what has started counts as well
    (folder / "incarnation.json").write_text('{"submission": 4, "restart": 0, "job": "3", "cluster": "x"}')
    assert number() == 5


def test_a_run_of_another_cluster_is_left_alone_while_it_speaks(
    tmp_path: Path, site: Callable[..., Path]
) -> None:
    site()
    (folder,) = runs(tmp_path, 1)
    running = state(status="running", attempts=[{"attempt": 1}], heartbeat=now())
    (folder / "run.json").write_text(json.dumps(running))
    slurm_cluster = {"executor": "slurm"}
    Submission("7", slurm_cluster, "", "", "", site="elsewhere", name="keel-run-0").write(folder)
    with pytest.raises(RunError, match="runs on the cluster elsewhere as job 7; cancel it there"):
        submitting.submit([folder], ClusterConfig())
    with pytest.raises(
        RunError, match="is job 7 of the cluster elsewhere, and this is mini; cancel it there"
    ):
        manage.cancel([folder])
    (run,) = look([folder])
    assert run.state == "running" and run.note.endswith("its job is the cluster elsewhere's")
    (folder / "run.json").write_text(json.dumps(running | {"heartbeat": "2020-01-01T00:00:00+00:00"}))
    assert submitting.submit([folder], ClusterConfig()) == ["10"]


@pytest.mark.parametrize("name", ["it's", 'a"b', "a%j", "a\\b", "a\nb", "a\tb"])
def test_names_that_slurms_options_cant_carry_are_refused_first(
    tmp_path: Path, keel: Callable[..., tuple[int, str, str]], name: str
) -> None:
    folder = tmp_path / name
    for more in ([], ["--dry-run"]):
        code, _, err = keel("submit", "smoke/mae", f"run.dir={json.dumps(str(folder))}", *more)
        assert code == 2 and len(err.splitlines()) == 1, err
        assert "which SLURM's options can't carry; choose another folder" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "Größe 猫", "a=b,c", "x" * 200, "$HOME", "a;b&c"])
def test_other_names_are_carried_through(tmp_path: Path, name: str) -> None:
    script = submitting.dry_run([tmp_path / name], ClusterConfig())
    assert f"keel-{name}" in script and script.startswith("#!/bin/bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


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
    here = executor.Place(1, 2, 1, 2, 0, ("here",), "7", tmp_path)
    monkeypatch.setattr(executor, "place", lambda: here)
    monkeypatch.setattr(task, "_hold_signals", lambda: None)  # those of the tests' own process
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match=line):
        task.Train(str(tmp_path), 60, **given)()
    assert [path.name for path in tmp_path.iterdir()] == ["7.failed"]  # for the batch script


def end_of_task(root: str, outcome: Outcome, cancelled: bool) -> int:
    """Exit code of a process that runs a task whose training ends so. Run in a forked rank."""
    if cancelled:
        Submission("1", {}, "", "", "", cancelled="now").write(Path(root))
    if (pid := os.fork()) == 0:
        task.VERDICT = task.KILL_WAIT = 0.1
        task.job = lambda path, hung: outcome  # type: ignore[assignment]
        task._threads = lambda path: "1"  # type: ignore[assignment]
        here = executor.Place(1, 2, 1, 2, 0, ("here",), "7", Path(root))
        executor.place = lambda: here  # type: ignore[assignment]
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
        (Outcome(STOPPED, "preempted"), False, executor.REQUEUE),
        (Outcome(STOPPED, "preempted"), True, 0),
        (Outcome(STOPPED, "time_limit"), False, executor.REQUEUE),
        (Outcome(STOPPED, "terminated"), False, 0),
        (Outcome(LOST_PEER), False, executor.REQUEUE),
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
        here = executor.Place(1, 2, 1, 2, 0, ("here",), "7", Path(root))
        executor.place = lambda: here  # type: ignore[assignment]
        task.Train(root, 0.5, ranks=2)()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_save_that_outlasts_the_time_doesnt_cost_the_requeue(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(1, outstays_its_time, root=str(tmp_path)) == [executor.REQUEUE]
