"""End to end on a real SLURM: what was submitted is what trains, and nothing that SLURM does loses a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.errors import RunError
from configs.loading import load
from launch.runs import queue
from launch.runs.registry import look
from launch.slurm import submit
from launch.slurm.cluster import ClusterConfig, load_cluster
from launch.slurm.submission import Submission
from pretrain.config import RunConfig
from pretrain.health.stopping import StopRequest
from pretrain.run.folder import RunFolder
from pretrain.run.main import prepare, train
from tests.slurm.cluster import Cluster, until
from tests.slurm.site import Site
from tests.wandb_files import rows_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
Ranks = Callable[..., list[Any]]
LONG = 300.0
SHORT = ("train.duration=6 steps", "optimizer.warmup=2 steps")


def config(root: Path, digits: Path, *overrides: str, smoke: str = "mae") -> RunConfig:
    settings = [
        f"run.dir={root}",
        f"data.manifest={digits}/train/manifest.json",
        "data.workers=0",
        *overrides,
    ]
    return load(f"configs/smoke/{smoke}.yaml", RunConfig, settings)


def cluster(*overrides: str) -> ClusterConfig:
    return load_cluster("clusters/slurm", ["minutes=60", "signal_delay=60", *overrides])


def two_by_two(*overrides: str) -> ClusterConfig:
    return cluster("nodes=2", "tasks_per_node=2", *overrides)


def prepared(settings: RunConfig, where: ClusterConfig) -> Path:
    return prepare(settings, world_size=where.ranks).root


def rows(root: Path) -> list[dict[str, Any]]:
    path = root / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(root: Path) -> list[float]:
    assert [row["step"] for row in rows(root)] == list(range(1, len(rows(root)) + 1))
    return [row["loss"] for row in rows(root)]


def train_here(root: str) -> str:
    """Run by each forked rank."""
    return train(RunFolder(Path(root)), StopRequest())


def uninterrupted(ranks: Ranks, count: int, settings: RunConfig) -> list[float]:
    folder = prepare(settings, world_size=count)
    ranks(count, train_here, root=str(folder.root), timeout=LONG)
    return losses(folder.root)


def ended(slurm: Cluster, job: str, root: Path) -> None:
    """Wait for the end of a job that is to complete."""
    until(
        lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), f"{job} ends", LONG
    )
    assert slurm.state(job) == "COMPLETED", told(root)


def told(root: Path) -> str:
    """What a job has left to read."""
    files = sorted((root / "logs").glob("*.log")) + sorted((root / "submitit").glob("*_log.*"))
    return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)


def at_step(root: Path, step: int) -> None:
    try:
        until(lambda: len(rows(root)) >= step, f"step {step} of {root}", LONG)
    except TimeoutError as error:
        raise AssertionError(told(root)) from error


def cancelled(root: Path) -> None:
    """Mark the run as one that isn't to come back."""
    record = Submission.of(root)
    assert record is not None
    record.cancel(root)


def attempts(root: Path) -> list[dict[str, Any]]:
    found = RunFolder(root).read_state()["attempts"]
    assert isinstance(found, list)
    return found


def test_two_nodes_with_two_tasks_train_as_one_process_does(
    slurm: Cluster, tmp_path: Path, digits: Path, ranks: Ranks
) -> None:
    """Three objectives as one job array, one at a time: with a decoder, with a queue, with texts."""
    where = two_by_two("parallel=1")
    captioned = (
        "data.demo.samples=128",
        "data.demo.val_samples=32",
        f"data.manifest={tmp_path}/data/shapes/train/manifest.json",
        f"data.tokenizer.path={tmp_path}/data/shapes/words.json",
    )
    asked = {"mae": SHORT, "moco": SHORT, "clip": (*SHORT, *captioned)}
    roots = {
        name: prepared(config(tmp_path / name, digits, *own, smoke=name), where)
        for name, own in asked.items()
    }
    jobs = submit.submit(list(roots.values()), where)
    for job, root in zip(jobs, roots.values(), strict=True):
        ended(slurm, job, root)
    for name, root in roots.items():
        alone = uninterrupted(ranks, 1, config(tmp_path / f"{name}-1", digits, *asked[name], smoke=name))
        assert losses(root) == pytest.approx(alone, rel=1e-4)
        assert attempts(root)[-1]["world_size"] == 4


LONGER = ("train.duration=450 steps", "checkpoint.every=10 steps", "track.wandb=offline")
ENDLESS = ("train.duration=1_000_000 steps", "checkpoint.every=10 steps")
"""Longer than any machine takes to notice what is done to it."""


def test_a_run_outlives_whatever_slurm_does_to_it(
    slurm: Cluster, tmp_path: Path, digits: Path, ranks: Ranks, site: Site
) -> None:
    """The time limit's signal, a user's, a requeue without warning, and a node's crash, in one run.

    What `keel runs` says of it is looked at all the while.
    """
    where = cluster("nodes=2", "tasks_per_node=1", "signal_delay=30")
    root = prepared(config(tmp_path / "run", digits, *LONGER), where)
    (job,) = submit.submit([root], where)
    with site.looks_at(root) as views:
        at_step(root, 30)
        with standing_still(root) as pids:  # SLURM looks at limits twice a minute
            slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+60")
            until(lambda: any(signalled(pid) for pid in pids), "SLURM's own signal", 90)
        again(root, 2, "preempted")
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

        at_step(root, 70)
        slurm.run("scancel", "--signal=USR2", job)
        again(root, 3, "preempted")

        at_step(root, 150)
        slurm.run("scontrol", "requeue", job)
        again(root, 4)

        at_step(root, 250)
        slurm.crash_node(2)
        slurm.declare_down(2)
        time.sleep(1)
        slurm.start_node(2)
        again(root, 5)
        ended(slurm, job, root)
        until(lambda: views[site.KNOWING][-1:] == ["done"], "the table says that it is done")

    assert losses(root) == uninterrupted(ranks, 2, config(tmp_path / "whole", digits, *LONGER[:2]))
    assert [a["world_size"] for a in attempts(root)] == [2] * 5
    for view, states in views.items():
        # Where the controller doesn't answer, the run's own last word counts: not begun, or saved and left.
        honest = {"pending", "running", "requeued", "done"}
        honest |= {"new", "stopped"} if "squeue fails" in view else set()
        assert set(states) <= honest, (view, states)
    assert "requeued" in views[site.KNOWING]
    assert sent_to_wandb(root)[-1] == len(losses(root))


def again(root: Path, attempt: int, reason: str | None = None) -> None:
    """Wait for an attempt; the one before must have ended so. SLURM hasn't been told of any result."""
    until(lambda: len(attempts(root)) == attempt, f"attempt {attempt}", LONG)
    if reason is not None:
        assert attempts(root)[-2]["reason"] == reason
    assert not list((root / "submitit").glob("*_result.pkl"))


@contextmanager
def standing_still(root: Path) -> Iterator[list[int]]:
    """Meanwhile the run's ranks are stopped, so that a wait for SLURM costs no steps; gives their pids."""
    found = subprocess.run(["pgrep", "-f", f"submitit.*{root}"], capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in found.stdout.split()]
    pids = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def ranks_of(root: Path) -> dict[int, int]:
    """Rank to process id of a run at work."""
    asked = ["pgrep", "-f", f"submitit.*{root}"]
    listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    found = {}
    for pid in map(int, listed):
        if not Path(f"/proc/{pid}/comm").read_text().startswith("python"):
            continue
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(text[13:]): pid for text in variables if text.startswith(b"SLURM_PROCID=")}
    return found


def signalled(pid: int) -> bool:
    """Whether SIGUSR2 waits for a stopped process, or SLURM has woken it and it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1 for mask in masks)


def sent_to_wandb(root: Path) -> list[int]:
    """Steps of the rows that all attempts sent to W&B: under the id of the run, and none twice."""
    files = list((root / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{RunFolder(root).read_state()['id']}"}
    steps = sorted(row["_step"] for path in files for row in rows_of(path))
    assert len(steps) == len(set(steps))
    return steps


def test_a_rank_that_dies_without_a_word_comes_back_with_the_others(
    slurm: Cluster, tmp_path: Path, digits: Path
) -> None:
    """As NCCL's watchdog aborts a rank that has lost its peer."""
    where = cluster("nodes=2", "tasks_per_node=1")
    root = prepared(config(tmp_path / "run", digits, *ENDLESS), where)
    (job,) = submit.submit([root], where)
    at_step(root, 15)
    os.kill(ranks_of(root)[1], signal.SIGABRT)
    again(root, 2)
    assert attempts(root)[1]["from_step"] >= 10
    at_step(root, attempts(root)[1]["from_step"] + 5)
    (run,) = look([root])
    assert (run.state, run.note) == ("running", "")
    cancelled(root)
    slurm.run("scancel", "--signal=TERM", job)
    ended(slurm, job, root)
    assert look([root])[0].state == "cancelled"


def test_a_rank_that_fails_by_itself_ends_the_job_although_the_others_are_killed(
    slurm: Cluster, tmp_path: Path, digits: Path
) -> None:
    """The exit code of a job is the highest of its ranks: that of one that was torn down."""
    hook = tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import os\n"
        "if os.environ.get('SLURM_PROCID') == '1':\n"
        "    from launch.slurm import task\n"
        "    task.job = lambda *given, **more: 1 / 0\n"
    )
    where = cluster("nodes=2", "tasks_per_node=1", f"environment={{PYTHONPATH: '{hook.parent}'}}")
    root = prepared(config(tmp_path / "run", digits, *ENDLESS), where)
    (job,) = submit.submit([root], where)
    until(lambda: slurm.state(job) == "FAILED", f"{job} fails", LONG)
    assert slurm.run("squeue", "-h", "-t", "pending", "-j", job, check=False) == ""
    assert "ZeroDivisionError" in told(root)
    assert (root / "submitit" / f"{job}.failed").is_file()


def test_a_more_important_job_gets_the_nodes_and_the_run_comes_back(
    slurm: Cluster, tmp_path: Path, digits: Path
) -> None:
    root = prepared(config(tmp_path / "run", digits, *ENDLESS), cluster("nodes=2"))
    (job,) = submit.submit([root], cluster("nodes=2"))
    at_step(root, 20)
    slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    until(lambda: len(attempts(root)) == 2, "the second attempt", LONG)
    assert attempts(root)[0]["reason"] == "preempted"  # saved, rather than killed
    assert attempts(root)[1]["from_step"] >= 20
    slurm.run("scancel", job)


def test_a_cancelled_run_stays_away(slurm: Cluster, tmp_path: Path, digits: Path) -> None:
    """W&B's process dies of the same signal, which is no reason not to save."""
    asked = (*ENDLESS, "track.wandb=offline")
    root = prepared(config(tmp_path / "run", digits, *asked), cluster())
    (job,) = submit.submit([root], cluster())
    at_step(root, 5)
    with pytest.raises(RunError, match=f"is job {job} already"):
        submit.submit([root], cluster())
    cancelled(root)
    slurm.run("scancel", "--signal=TERM", job)
    ended(slurm, job, root)
    assert attempts(root)[-1]["reason"] == "terminated"
    assert list((root / "checkpoints").glob("step-*"))
    (run,) = look([root])
    assert (run.state, run.note) == ("cancelled", "")


def test_a_node_that_failed_twice_is_avoided(slurm: Cluster, tmp_path: Path, digits: Path) -> None:
    """The controller takes its time, so that the requeue's own SIGTERM comes while its command is at work."""
    slow = tmp_path / "slow" / "scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{shutil.which("scontrol")} "$@"; code=$?; sleep 1; exit $code\n')
    slow.chmod(0o755)
    where = cluster(f"setup=['export PATH={slow.parent}:$PATH']")
    root = prepared(config(tmp_path / "run", digits, *SHORT), where)
    (root / "nodes.json").write_text(json.dumps({"starts": [], "failures": {"node1": 2}}))
    (job,) = submit.submit([root], where)
    ended(slurm, job, root)
    starts = json.loads((root / "nodes.json").read_text())["starts"]
    assert [start["hosts"] for start in starts] == [["node1"], ["node2"]]
    assert len(losses(root)) == 6


def test_of_two_starts_at_once_the_newer_wins(
    slurm: Cluster, tmp_path: Path, digits: Path, ranks: Ranks
) -> None:
    """SLURM loses a node that lives on, and runs the job once more while the first start still trains."""
    root = prepared(config(tmp_path / "run", digits, *ENDLESS), cluster())
    (job,) = submit.submit([root], cluster())
    at_step(root, 30)
    slurm.kill_slurmd(1)
    slurm.declare_down(1)
    seen = len(rows(root))
    try:
        until(lambda: len(attempts(root)) == 2, "the second attempt", LONG)
        assert attempts(root)[1]["from_step"] > seen  # the first start did go on for a while
        assert "a newer start of this run has taken over" in told(root)
        at_step(root, attempts(root)[1]["from_step"] + 20)
        cancelled(root)
        slurm.run("scancel", "--signal=TERM", job)
        ended(slurm, job, root)
    finally:
        slurm.crash_node(1)
        slurm.start_node(1)
    as_far = f"train.stop_after={len(rows(root))} steps"
    whole = uninterrupted(ranks, 1, config(tmp_path / "whole", digits, *ENDLESS, as_far))
    assert losses(root) == whole


def test_the_job_runs_the_code_that_was_submitted(slurm: Cluster, tmp_path: Path, digits: Path) -> None:
    tree = tmp_path / "tree"
    for package in ("configs", "data_pipeline", "pretrain", "launch"):
        shutil.copytree(package, tree / package)
    marked = tree / "launch" / "slurm" / "task.py"
    marked.write_text(marked.read_text() + '\nimport sys\nprint("as submitted", file=sys.stderr)\n')
    root = tmp_path / "run"
    asked = [
        "configs/smoke/mae.yaml", f"run.dir={root}", f"data.manifest={digits}/train/manifest.json",
        "data.workers=0", "train.duration=2 steps", "optimizer.warmup=1 steps", "+extra={begin: now+10}",
    ]  # fmt: skip
    said = slurm.run(
        "python", "-P", "-m", "launch", "submit", *asked, "--cluster", "clusters/slurm", "--json",
        PYTHONPATH=str(tree),
    )  # fmt: skip
    marked.write_text('raise SystemExit("the tree was edited")\n')
    ended(slurm, json.loads(said)["job"], root)
    assert "as submitted" in told(root)


def test_the_dry_run_is_what_slurm_takes(slurm: Cluster, tmp_path: Path) -> None:
    where = two_by_two("memory_gb=1.5", "exclusive=true", "parallel=3", 'extra={comment: "two words"}')
    script = tmp_path / "job.sh"
    script.write_text(submit.dry_run([tmp_path / "run"], where))
    slurm.run("sbatch", "--test-only", str(script))
    subprocess.run(["bash", "-n", str(script)], check=True)
    members = [tmp_path / "sweep" / name for name in "abc"]
    script.write_text(submit.dry_run(members, where, parallel=2))
    assert "#SBATCH --array=0-2%2\n" in script.read_text()
    slurm.run("sbatch", "--test-only", str(script))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["partition=nowhere"], "invalid partition"),
        (["memory_gb=900"], "Memory specification can not be satisfied"),
        (["gpus_per_node=9", "tasks_per_node=9"], "Invalid generic resource"),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words(
    slurm: Cluster, tmp_path: Path, digits: Path, settings: list[str], said: str
) -> None:
    root = prepared(config(tmp_path / "run", digits), cluster())
    with pytest.raises(RunError, match=said) as refusal:
        submit.submit([root], cluster(*settings))
    assert str(refusal.value).startswith("sbatch refused the job: ") and "\n" not in str(refusal.value)
    assert Submission.of(root) is None


def test_an_error_of_the_run_is_the_jobs_failure(slurm: Cluster, tmp_path: Path, digits: Path) -> None:
    """As a manifest that isn't there on the node: known only once the job runs."""
    copy = tmp_path / "data"
    shutil.copytree(digits, copy)
    root = prepared(config(tmp_path / "run", copy), cluster())
    copy.rename(tmp_path / "elsewhere")
    (job,) = submit.submit([root], cluster())
    until(lambda: slurm.state(job).startswith("FAILED"), f"{job} fails", LONG)
    (run,) = look([root])
    assert (run.state, run.note.partition(";")[0]) == (
        "failed", f"{copy}/train/manifest.json: no such manifest"
    )  # fmt: skip


def test_a_job_that_dies_without_a_word_is_told_by_whoever_knows(
    slurm: Cluster, tmp_path: Path, digits: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run folder can't be written to on the nodes; controller, accounting or nobody remembers it."""
    root = prepared(config(tmp_path / "run", digits), cluster())
    slurm.hide(root)
    try:
        (job,) = submit.submit([root], cluster())
        until(lambda: slurm.state(job) == "FAILED", f"{job} fails", LONG)
    finally:
        slurm.show(root)
    monkeypatch.setattr(queue, "states", partial(queue.states, timeout=2.0))
    silent = f", and nothing was printed; see that its nodes can write to {root}"
    forgotten = ("lost", f"SLURM knows no job {job}{silent}")
    expected = {
        (): ("failed", f"SLURM: FAILED, JobLaunchFailure{silent}"),
        ("squeue forgets",): ("failed", f"SLURM: FAILED{silent}"),
        ("squeue forgets", "sacct fails"): forgotten,
        ("squeue forgets", "sacct hangs"): forgotten,
        ("squeue fails", "sacct hangs"): ("new", "submitted, but SLURM doesn't answer"),
    }
    for trouble, said in expected.items():
        with site.trouble(*trouble):
            (run,) = look([root])
        assert (run.state, run.note) == said, trouble
    assert look([root])[0].resumable
