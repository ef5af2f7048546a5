"""What is done to runs that exist: their logs read, cancelled, gone on with, the best of them chosen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import RunError
from launch.ranks.logs import rank_log
from launch.runs import queue
from launch.runs.figures import Figures, of_training
from launch.runs.files import evaluations, has_open, holder, lease_held, objective_text
from launch.runs.registry import Run, Score, chosen, list_runs, look, lower_is_better, scores
from launch.runs.shapes import finite

POLL = 0.2
"""Seconds between looks at a log that is followed."""

BY_THE_OBJECTIVE = ("", "objective", "heldout")
"""Parts in front of a metric's name whose figures come from the run's own loss."""

_LONG_LINE = 4096
"""Bytes; where lines are longer, fewer are shown."""


def log_of(run: Path, rank: int | None = None) -> Path:
    """The log of a rank, by default of rank 0, or what its job printed while there is none.

    Raises `RunError` where there is nothing to read.
    """
    log = rank_log(run / "logs", rank or 0)
    if log.is_file():
        return log
    there = sorted(
        path.stem.removeprefix("rank-").lstrip("0") or "0" for path in (run / "logs").glob("rank-*.log")
    )
    if rank is not None and there:
        raise RunError(f"--rank: found {rank}; {run} has logs of {', '.join(there)}")
    from launch.slurm.submission import Submission

    if submission := Submission.of(run):
        files = sorted(Path(submission.log_folder).glob(f"{submission.job_id}_*_log.*"))
        spoken = [path for path in files if path.suffix in (".err", ".out") and path.stat().st_size]
        if spoken:
            return max(spoken, key=lambda path: path.stat().st_mtime)
    raise RunError(f"{run}: nothing was printed yet, so it hasn't started; see keel runs")


def lines(log: Path, last: int, *, follow: bool = False) -> Iterator[str]:
    """The last whole lines of a log (0: all); with `follow`, then every new one, for ever."""
    with log.open("rb") as file:
        if last:  # logs grow to gigabytes
            file.seek(max(0, log.stat().st_size - last * _LONG_LINE))
        there = file.read()
        whole, newline, rest = there.rpartition(b"\n")
        shown = (whole + newline).splitlines()
        for line in shown[-last:] if last else shown:
            yield line.decode(errors="replace")
        while follow:
            if not (new := file.read()):
                time.sleep(POLL)
                continue
            *complete, rest = (rest + new).split(b"\n")
            for line in complete:
                yield line.decode(errors="replace")
        if rest:
            yield rest.decode(errors="replace")


def cancel(folders: Sequence[Path], *, now: bool = False) -> list[tuple[Run, str]]:
    """End runs for good; gives each with what was done. `now`: without waiting for a checkpoint.

    A run is marked before its job is told, so that a job on its way back into the queue stays away. Raises
    `RunError` where a run can't be reached.
    """
    from launch.slurm.submission import Submission

    told = []
    folders = [folder.absolute() for folder in folders]
    found = look(folders)
    records = {folder: Submission.of(folder) for folder in folders}
    here = queue.site().cluster if any(record and record.site for record in records.values()) else None
    for folder, record in records.items():
        if record and not record.is_of(here):
            raise RunError(
                f"{folder}: is job {record.job_id} of the cluster {record.site}, and this is {here}; "
                "cancel it there"
            )
    jobs = queue.states([run.job for run in found if run.job])
    for folder, run in zip(folders, found, strict=True):
        record = records[folder]
        if record and run.state not in ("done", "cancelled"):
            record.cancel(folder)
        job = queue.known_as(jobs.get(run.job or ""), record.name if record else None)
        if run.job and (job is None or job.active):
            saving = job is not None and not job.waiting and not now
            queue.cancel([run.job], to_save=saving)
            told.append((run, f"job {run.job} " + ("saves and ends" if saving else "is cancelled")))
        elif run.active:
            told.append((run, _end_process(folder, now)))
        else:
            told.append((run, f"isn't running: {run.state}"))
    return told


def _end_process(folder: Path, now: bool) -> str:
    process = holder(folder)
    if process is None or not lease_held(folder):
        raise RunError(f"{folder}: runs on another machine without SLURM; press Ctrl-C, or kill it there")
    if not has_open(process, folder / ".lock"):
        # A number that another process has by now, or that a container counts otherwise.
        raise RunError(
            f"{folder}: is held by a process that isn't {process} here, as in a container; end it from there"
        )
    os.kill(process, signal.SIGKILL if now else signal.SIGTERM)
    return f"process {process} " + ("is killed" if now else "saves and ends")


def resumable(folders: Sequence[Path]) -> list[Run]:
    """The runs given, and of folders of runs those that ended against their user's will.

    Raises `RunError` where a run that was named can't be resumed.
    """
    chosen: list[Run] = []
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            chosen += [run for run in list_runs(folder) if run.resumable]
            continue
        (run,) = look([folder])
        if run.active or run.state == "done":
            raise RunError(f"{folder}: is {run.state}, there is nothing to resume")
        if run.state == "unreadable":
            raise RunError(f"{folder}: {run.note}; restore it from a copy, or remove the run")
        chosen.append(run)
    return chosen


def resume(
    runs: Sequence[Run], cluster: str | None = None, nproc: int | None = None, *, say: Callable[[str], None]
) -> int:
    """Submit runs again as they were submitted, or to `cluster`; what never was goes on here, one by one.

    Gives the exit code: 0, or that of the first that failed here. `nproc`: ranks here, else as it had.
    """
    from launch.ranks import local
    from launch.slurm.cluster import ClusterConfig, load_cluster
    from launch.slurm.submission import Submission
    from launch.slurm.submit import submit
    from pretrain.run.folder import RunFolder

    given = load_cluster(cluster) if cluster else None
    groups: dict[str, tuple[ClusterConfig, list[Path]]] = {}
    here: list[Path] = []
    for run in runs:
        record = Submission.of(Path(run.path))
        if given is None and record is None:
            here.append(Path(run.path))
            continue
        where = given or ClusterConfig.model_validate(record.cluster if record else {})
        groups.setdefault(where.model_dump_json(), (where, []))[1].append(Path(run.path))
    for where, folders in groups.values():
        for folder, job in zip(folders, submit(folders, where), strict=True):
            say(f"{folder}: job {job}")
    codes = []
    for path in here:
        own = RunFolder(path)
        attempts = own.read_state().get("attempts") or [{}]
        codes.append(local.launch(own, nproc or attempts[-1].get("world_size", 1)))
        say(f"{path}: {'done' if codes[-1] == 0 else f'exit code {codes[-1]}'}")
    return next((code for code in codes if code), 0)


@dataclass(frozen=True)
class Candidate:
    """A run with what it may be chosen for."""

    run: Run
    score: Score
    exportable: bool  # a checkpoint of that very step is there

    @property
    def comparable(self) -> bool:
        """Whether it has a place among the others: NaN and infinities have none."""
        return finite(self.score.value)


def ranking(root: Path, metric: str, *, lower: bool | None = None) -> list[Candidate]:
    """Runs below `root`, the best first, each by its best score among steps that can be exported.

    Where a run has a checkpoint of none of its evaluated steps, its newest score counts. A figure of
    metrics.jsonl, such as "loss", is the mean over the last fifth of the run's steps. Runs whose value isn't
    finite come last. `lower`: whether less is better, None to go by the metric's name. Raises `RunError`
    where no run has such a score, or where losses of several objectives would be compared.
    """
    from pretrain.checkpoint import published

    lower = lower_is_better(metric) if lower is None else lower
    found, known = [], set()
    for run in list_runs(root):
        path = Path(run.path)
        saved = {one.step for one in published(path)}
        if of_training(metric):
            figures = Figures(path, metric)
            figures.look()
            value = figures.at(figures.newest)
            there = [] if value is None else [Score(metric, value, figures.newest)]
        else:
            rows, _ = evaluations(path)
            known |= {f"{row['name']}/{name}" for row in rows for name in row["values"]}
            there = scores(rows, metric)
        finite_last = [score for score in there if finite(score.value)][-1:] or there[-1:]
        score = chosen([score for score in there if score.step in saved] or finite_last, lower)
        if score is not None:
            found.append(Candidate(run, score, score.step in saved))
    if not found:
        listed = ", ".join(sorted(known)) or "nothing yet"
        raise RunError(f"--metric: no run below {root} has {metric}; evaluated were: {listed}")
    _refuse_several_objectives(root, metric, found)
    sign = 1 if lower else -1
    return sorted(
        found, key=lambda one: (not one.comparable, sign * one.score.value if one.comparable else 0)
    )


def _refuse_several_objectives(root: Path, metric: str, found: Sequence[Candidate]) -> None:
    names = sorted({one.run.objective for one in found})
    if of_training(metric) and len(names) > 1:
        raise RunError(
            f"--metric: {metric} of {' and '.join(names)} can't be compared, and {root} has runs of each; "
            "use an evaluation, such as knn/top1, or name a folder with runs of one"
        )


def differing_objectives(found: Sequence[Candidate]) -> list[str]:
    """Settings of their objective in which runs differ, so that figures of its loss may not be comparable."""
    import yaml

    from configs.loading import leaves

    seen: dict[str, set[str]] = {}
    for one in found:
        text = objective_text(Path(one.run.path) / "config.yaml")
        try:
            settings = yaml.safe_load(text) or {}
        except yaml.YAMLError:
            continue
        for path, value in leaves(settings):
            seen.setdefault(path, set()).add(repr(value))
    return sorted(path for path, values in seen.items() if len(values) > 1)
