"""Prepared runs to jobs: snapshot, submission, record."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import RunError
from launch.runs import queue
from launch.runs.places import writing
from launch.runs.queue import Site
from launch.runs.registry import look
from launch.slurm import executor, snapshot
from launch.slurm.arrays import arrays
from launch.slurm.cluster import ClusterConfig
from launch.slurm.incarnation import Incarnation
from launch.slurm.submission import Submission
from launch.slurm.task import Train
from pretrain.run.folder import now


def submit(folders: Sequence[Path], cluster: ClusterConfig, *, parallel: int | None = None) -> list[str]:
    """Submit the prepared runs in `folders`, several as job arrays; gives their job ids.

    Each run gets a RUN/code with the snapshot and a RUN/slurm.json. Raises `RunError` where one of them is
    still queued or running, or where SLURM refuses; what it took before that is recorded.
    """
    folders = [folder.absolute() for folder in folders]
    require_place(folders, cluster)
    before = {folder: Submission.of(folder) for folder in folders}
    site = queue.site() if cluster.executor == "slurm" else Site()
    _refuse_running(before, site)
    home, name = _home(folders), _name(folders)
    code = snapshot.take(home / "code")
    logs = home / "submitit"
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    tasks = [_task(folder, cluster, _number(folder, before[folder])) for folder in folders]
    jobs: list[str] = []
    ids: list[str] = []  # of whole arrays
    for array in arrays(len(folders), site.max_array, parallel or cluster.parallel):
        where = cluster.model_copy(update={"parallel": array.parallel})
        after = None if array.after is None else ids[array.after]
        try:
            some = executor.submit(
                tasks[array.start : array.stop], where, folder=logs, code=code, name=name, after=after
            )
        except RunError as error:
            raise RunError(_refused(str(error), len(jobs), len(folders))) from error
        jobs += some
        ids.append(some[0].partition("_")[0])
        for folder, job in zip(folders[array.start : array.stop], some, strict=True):
            older = before[folder]
            history = [*older.history, older.job_id] if older else []
            settings = cluster.model_dump(mode="json")
            record = Submission(job, settings, now(), str(logs), str(code), history, None, site.cluster, name)
            record.write(folder)
    return jobs


def _refused(said: str, taken: int, wanted: int) -> str:
    """sbatch's refusal, with what a limit on waiting jobs leaves one to do."""
    before = f"; of {wanted} runs {taken} were submitted before that" if taken else ""
    limit = any(word in said for word in ("job submit limit", "MaxSubmitJob"))
    advice = "; the site limits how many jobs may wait at a time (MaxSubmitJobs): keel sweep --at-most N"
    return said + before + (advice if limit and wanted > 1 else "")


def dry_run(folders: Sequence[Path], cluster: ClusterConfig, *, parallel: int | None = None) -> str:
    """The sbatch scripts and what each task will run. Needs no SLURM and writes nothing."""
    folders = [folder.absolute() for folder in folders]
    require_place(folders, cluster)
    home, limit = _home(folders), None
    if cluster.executor == "slurm" and len(folders) > 1:
        limit = queue.site().max_array
    split = arrays(len(folders), limit, parallel or cluster.parallel)
    each = f"each of the {cluster.ranks} tasks is rank SLURM_PROCID of"
    parts = []
    for place, array in enumerate(split):
        script = executor.script(
            cluster.model_copy(update={"parallel": array.parallel}),
            folder=home / "submitit",
            code=snapshot.place(home / "code"),
            name=_name(folders),
            count=len(array),
            after=None if array.after is None else f"JOB_{array.after}",
        )
        some = folders[array.start : array.stop]
        tasks = [_task(folder, cluster, _number(folder, Submission.of(folder))) for folder in some]
        if len(tasks) == 1:
            lines = [f"# {each} {tasks[0]}"]
        else:
            lines = [f"# SLURM_ARRAY_TASK_ID {n}: {each} {task}" for n, task in enumerate(tasks)]
        if len(split) > 1:
            what = f"# array {place + 1} of {len(split)}, since MaxArraySize is {limit} here"
            waits = "" if array.after is None else f"; JOB_{array.after} is the id of array {array.after + 1}"
            lines.insert(0, what + waits)
        parts.append("\n".join([script.rstrip(), "", *lines]) + "\n")
    return "\n".join(parts)


def require_place(folders: Sequence[Path], cluster: ClusterConfig) -> None:
    """Raises `RunError` where sbatch can't be told of a folder: it has no way to write these characters."""
    if cluster.executor != "slurm":
        return
    for folder in folders:
        odd = sorted({char for char in str(folder) if char in "%'\"\\" or not char.isprintable()})
        if odd:
            raise RunError(
                f"run.dir: {str(folder)!r} has {' '.join(map(repr, odd))} in it, which SLURM's options can't "
                "carry; choose another folder"
            )


def _home(folders: Sequence[Path]) -> Path:
    """Where the code and submitit's files of a submission lie: in the run, or beside several."""
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "submissions"


def _task(folder: Path, cluster: ClusterConfig, number: int) -> Train:
    return Train(
        str(folder), cluster.signal_delay, cluster.ranks, cluster.gpus_per_node, cluster.exclude or "", number
    )


def _number(folder: Path, before: Submission | None) -> int:
    """Which of the run's submissions the next one is: later than any that has been made or has started."""
    made = 0 if before is None else 1 + len(before.history)
    started = Incarnation.newest(folder)
    return 1 + max(made, 0 if started is None else started.submission)


def _refuse_running(before: Mapping[Path, Submission | None], site: Site) -> None:
    """A local submission needs no such question: the lease on its folder answers it."""
    records = {f: r for f, r in before.items() if r and r.cluster.get("executor") == "slurm"}
    here = {f: r for f, r in records.items() if r.is_of(site.cluster)}
    known = queue.states([record.job_id for record in here.values()])
    for folder, record in here.items():
        job = queue.known_as(known.get(record.job_id), record.name)
        if job is not None and job.active:
            raise RunError(
                f"{folder}: is job {record.job_id} already ({job.state}); let it run, or keel cancel it"
            )
    for folder in records.keys() - here.keys():
        (run,) = look([folder])
        if run.state == "running":
            raise RunError(
                f"{folder}: runs on the cluster {records[folder].site} as job {records[folder].job_id}; "
                "cancel it there, or wait until it is silent"
            )


def _name(folders: Sequence[Path]) -> str:
    return f"keel-{folders[0].name if len(folders) == 1 else folders[0].parent.name}"
