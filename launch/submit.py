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
    home = _home(folders)
    code = snapshot.take(home / "code")
    logs = home / "submitit"
    logs.mkdir(parents=True, exist_ok=True)
    tasks = [_task(folder, cluster) for folder in folders]
    jobs = slurm.submit(tasks, cluster, folder=logs, code=code, name=_name(folders))
    for folder, job in zip(folders, jobs, strict=True):
        older = before[folder]
        history = [*older.history, older.job_id] if older else []
        settings = cluster.model_dump(mode="json")
        Submission(job, settings, now(), str(logs), str(code), history).write(folder)
    return jobs


def dry_run(folders: Sequence[Path], cluster: ClusterConfig, *, parallel: int | None = None) -> str:
    """The sbatch script and what each task will run. Needs no SLURM and writes nothing."""
    folders = [folder.absolute() for folder in folders]
    cluster = cluster.model_copy(update={"parallel": parallel}) if parallel else cluster
    home = _home(folders)
    script = slurm.script(
        cluster,
        folder=home / "submitit",
        code=snapshot.place(home / "code"),
        name=_name(folders),
        count=len(folders),
    )
    each = f"each of the {cluster.ranks} tasks is rank SLURM_PROCID of"
    if len(folders) == 1:
        tasks = [f"# {each} {_task(folders[0], cluster)}"]
    else:
        tasks = [
            f"# SLURM_ARRAY_TASK_ID {n}: {each} {_task(folder, cluster)}" for n, folder in enumerate(folders)
        ]
    return "\n".join([script.rstrip(), "", *tasks]) + "\n"


def _home(folders: Sequence[Path]) -> Path:
    """Where the code and submitit's files of a submission lie: in the run, or beside several."""
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "submissions"


def _task(folder: Path, cluster: ClusterConfig) -> Train:
    return Train(
        str(folder), cluster.signal_delay, cluster.ranks, cluster.gpus_per_node, cluster.exclude or ""
    )


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
