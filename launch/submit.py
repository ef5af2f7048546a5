"""Prepared runs to jobs: snapshot, submission, record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from configs.errors import RunError
from launch import queue, slurm, snapshot
from launch.cluster import ClusterConfig
from launch.submission import Submission
from launch.task import Train
from pretrain.folder import now


def submit(folders: Sequence[Path], cluster: ClusterConfig, *, parallel: int | None = None) -> list[str]:
    """Submit the prepared runs in `folders`, several as one job array; gives their job ids.

    Each run gets a RUN/code with the snapshot and a RUN/slurm.json. Raises `RunError` where one of them is
    still queued or running, or where SLURM refuses.
    """
    folders = [folder.absolute() for folder in folders]
    before = {folder: Submission.of(folder) for folder in folders}
    _refuse_running(before)
    cluster = cluster.model_copy(update={"parallel": parallel}) if parallel else cluster
    home = (
        folders[0]
        if len(folders) == 1
        else Path(os.path.commonpath([folder.parent for folder in folders])) / "submissions"
    )
    code = snapshot.take(home / "code")
    logs = home / "submitit"
    logs.mkdir(parents=True, exist_ok=True)
    tasks = [Train(str(folder), cluster.signal_delay, cluster.exclude or "") for folder in folders]
    jobs = slurm.submit(tasks, cluster, folder=logs, code=code, name=_name(folders))
    for folder, job in zip(folders, jobs, strict=True):
        older = before[folder]
        history = [*older.history, older.job_id] if older else []
        settings = cluster.model_dump(mode="json")
        Submission(job, settings, now(), str(logs), str(code), history).write(folder)
    return jobs


def dry_run(folder: Path, cluster: ClusterConfig) -> str:
    """The sbatch script and what each task will run. Needs no SLURM and writes nothing."""
    script = slurm.script(
        cluster, folder=folder / "submitit", code=folder / "code" / "<hash of the code>", name=_name([folder])
    )
    each = f"launch.task.Train({str(folder)!r}): rank SLURM_PROCID of {cluster.ranks} of that run"
    return f"{script.rstrip()}\n\n# each of the {cluster.ranks} tasks: {each}\n"


def _refuse_running(before: dict[Path, Submission | None]) -> None:
    """A local submission needs no such question: the lease on its folder answers it."""
    jobs = {f: r.job_id for f, r in before.items() if r and r.cluster["executor"] == "slurm"}
    known = queue.states(jobs.values())
    for folder, job in jobs.items():
        if job in known and known[job].active:
            raise RunError(
                f"{folder}: is job {job} already ({known[job].state}); let it run, or keel cancel it"
            )


def _name(folders: Sequence[Path]) -> str:
    return f"keel-{folders[0].name if len(folders) == 1 else folders[0].parent.name}"
