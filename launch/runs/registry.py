"""What runs there are and how each stands: from the run folders alone, and one question to SLURM for all.

No database and no daemon: a listing reads the ends of a few small files in each folder. It imports nothing
heavy, since it is called all day long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from configs.errors import RunError
from launch.runs import queue
from launch.runs.files import Facts, is_echo, last_words, read, run_folders, stayed
from launch.runs.queue import GONE, JobState
from launch.runs.shapes import Row, finite, number

State = Literal[
    "new", "pending", "running", "requeued", "stale", "done", "stopped", "failed", "cancelled", "lost",
    "unreadable",
]  # fmt: skip
"""
new        prepared, never started
pending    waits in the queue for the first time
running    at work
requeued   has run before and waits in the queue to go on
stale      says that it runs, but has been silent, and nobody can tell whether it lives
done       trained to its end
stopped    left early with a checkpoint
failed     ended by an error
cancelled  by keel cancel or scancel
lost       says that it runs, but its job or process is gone
unreadable nobody can tell: run.json is torn, or of another shape
"""

STALE_AFTER = 300.0
"""Seconds without a heartbeat (one comes every 10 s between steps) after which a run's word isn't taken."""

TO_RESUME = frozenset({"preempted", "time_limit", "terminated", "interrupted"})
"""Reasons of a stopped run that nobody wanted for its own sake."""

_LOWER_IS_BETTER = re.compile(r"loss|error|mse|perplexity")
_READERS = 8
"""Threads: on a network's file system the time goes into waiting."""


@dataclass(frozen=True)
class Score:
    """One evaluation: `metric` is "knn/top1", the evaluation's name and the figure's."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Run:
    """A row of the table."""

    path: str
    name: str  # path below the folder that was listed
    objective: str
    state: State
    note: str  # why it waits, was stopped or has failed; empty where all is well
    step: int
    total: int | None
    loss: float | None
    best: Score | None
    samples_per_second: float | None
    eta: float | None  # seconds of training left at the present pace; None where it doesn't run
    restarts: int
    host: str
    job: str | None  # SLURM's id
    heartbeat_age: float | None  # seconds
    reason: str | None  # of the end of the last attempt
    broken: str = ""  # what of its files can't be read; in the note as well

    @property
    def active(self) -> bool:
        return self.state in ("pending", "running", "requeued")

    @property
    def resumable(self) -> bool:
        """Ended against its user's will: what `keel resume ROOT` submits again."""
        return self.state in ("failed", "lost", "stale") or (
            self.state == "stopped" and self.reason in TO_RESUME
        )


def list_runs(
    root: Path,
    *,
    metric: str | None = None,
    lower: bool | None = None,
    stale_after: float = STALE_AFTER,
    now: float | None = None,
) -> list[Run]:
    """Every run at or below `root`, in order of name. `metric`: of evaluations, else each run's first one.

    `lower`: whether less of it is better, None to go by its name. Raises `RunError` where `root` isn't there.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; name one that holds runs")
    with ThreadPoolExecutor(_READERS) as readers:
        facts = list(readers.map(lambda found: read(found, root), sorted(run_folders(root))))
    return judged(facts, metric=metric, lower=lower, stale_after=stale_after, now=now)


def look(runs: Sequence[Path], *, metric: str | None = None) -> list[Run]:
    """The runs in these folders. Raises `RunError` where one is none."""
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise RunError(f"{run}: not a run folder (no config.yaml in it); see keel runs")
    return judged([read(run, run.parent) for run in runs], metric=metric)


def judged(
    facts: Sequence[Facts],
    *,
    metric: str | None = None,
    lower: bool | None = None,
    stale_after: float = STALE_AFTER,
    now: float | None = None,
) -> list[Run]:
    """Files and queue put together; SLURM is asked once for all that aren't done."""
    moment = datetime.now().timestamp() if now is None else now
    asked = [each for each in facts if each.slurm_job and each.run.get("status") != "done"]
    here = queue.site().cluster if any(each.job.get("site") for each in asked) else None
    # Another cluster has the same ids for other jobs.
    ours = [each for each in asked if not here or each.job.get("site") in (None, here)]
    known = queue.states([each.slurm_job for each in ours if each.slurm_job])
    jobs = {each.path: queue.known_as(known.get(each.slurm_job or ""), each.job.get("name")) for each in ours}
    elsewhere = [each for each in asked if each.path not in jobs]
    away = {each.path: f"its job is the cluster {each.job['site']}'s" for each in elsewhere}
    return [
        _run(
            each, jobs.get(each.path), metric=metric, lower=lower, stale_after=stale_after, now=moment,
            away=away.get(each.path, ""),
        )
        for each in facts
    ]  # fmt: skip


def _run(
    facts: Facts,
    job: JobState | None,
    *,
    metric: str | None,
    lower: bool | None,
    stale_after: float,
    now: float,
    away: str,
) -> Run:
    run, last = facts.run, facts.rows[-1] if facts.rows else {}
    attempts = run.get("attempts") or []
    age = _age(run.get("heartbeat"), now)
    state, note = judge(
        run, cancelled=bool(facts.job.get("cancelled")), submitted=facts.slurm_job is not None,
        job=job, held=facts.held, age=age, stale_after=stale_after,
    )  # fmt: skip
    if state in ("failed", "lost") and not note:
        note = last_words(facts)
    if state in ("failed", "lost") and job is not None and not note:
        known = ", ".join(filter(None, [f"SLURM: {job.state}", job.reason]))
        known = f"SLURM knows no job {facts.slurm_job}" if job.state == GONE else known
        note = f"{known}, and nothing was printed; see that its nodes can write to {facts.path}"
    if facts.unknown and state not in ("pending", "running", "requeued"):
        state, note = "unreadable", ""
    if state == "new" and away:
        note = ""  # it isn't SLURM that doesn't answer
    why = stayed(facts) if state in ("stopped", "failed", "lost") else ""
    note = "; ".join(filter(None, [facts.broken, note, why and f"not run again: {why}", away]))
    step, total = max(last.get("step", 0), run.get("step", 0)), run.get("total_steps")
    pace = [row["seconds"] for row in facts.rows if finite(row.get("seconds")) and row["seconds"] > 0]
    eta = None
    if state == "running" and pace and total:
        eta = (total - step) * sum(pace) / len(pace)
    return Run(
        path=str(facts.path), name=facts.name, objective=facts.objective, state=state, note=note,
        broken=facts.broken,
        step=step, total=total, loss=last.get("loss"), best=best(facts.evaluations, metric, lower=lower),
        samples_per_second=last.get("samples_per_second"), eta=eta,
        restarts=max(0, len(attempts) - 1), host=(job.nodes if job else "") or run.get("host") or "",
        job=facts.slurm_job, heartbeat_age=age, reason=_reason(attempts),
    )  # fmt: skip


def judge(
    run: Row,
    *,
    cancelled: bool = False,
    submitted: bool = False,
    job: JobState | None = None,
    held: bool | None = None,
    age: float | None = None,
    stale_after: float = STALE_AFTER,
) -> tuple[State, str]:
    """(state, why) of a run: what it says of itself, held against what its job and its process do.

    `run`: run.json; `job`: None where SLURM isn't asked or doesn't answer; `held`: see `Facts`; `age`: of
    the heartbeat, in seconds.
    """
    status, attempts = run.get("status", "new"), run.get("attempts") or []
    error = str(run.get("error") or "")
    if status == "failed" and is_echo(error):
        # The word of a rank that lost a peer: what became of the job, or what ended the peer, says more.
        status, error = "failed" if job is None and not submitted else "running", ""
    silent = status == "running" and age is not None and age > stale_after
    if status == "done":
        return "done", ""
    if job is not None and job.waiting:
        return ("requeued" if attempts or job.restarts else "pending"), job.reason
    if (job is not None and job.active) or held:
        return "running", f"no heartbeat for {age:.0f} s" if silent else ""
    if cancelled or (job is not None and job.state == "CANCELLED" and status != "failed"):
        return "cancelled", ""
    if status == "failed":
        return "failed", error
    if status == "stopped":
        return "stopped", _reason(attempts) or ""
    if job is not None:
        return _without_a_word(job)
    if status == "running":
        return ("lost", "") if held is False and not submitted else ("stale" if silent else "running", "")
    return "new", "submitted, but SLURM doesn't answer" if submitted else ""


def _reason(attempts: Sequence[Row]) -> str | None:
    """Why the last attempt ended, None where it hasn't."""
    reason = attempts[-1].get("reason") if attempts else None
    return reason if isinstance(reason, str) else None


def _without_a_word(job: JobState) -> tuple[State, str]:
    """Of a run whose job has ended while the run itself says nothing of an end."""
    if job.state in ("FAILED", "OUT_OF_MEMORY"):
        return "failed", "" if job.state == "FAILED" else "SLURM: out of memory"
    return "lost", "" if job.state in (GONE, "COMPLETED") else f"SLURM: {job.state}"


def best(evaluations: Sequence[Row], metric: str | None = None, *, lower: bool | None = None) -> Score | None:
    """The best value of "knn/top1" and the like; by default of the first metric.

    `lower`: whether less is better, None to go by the name. What isn't finite is never the best; where
    nothing else is there, the newest value is given.
    """
    for row in evaluations:
        if metric is None and row["values"]:
            metric = f"{row['name']}/{next(iter(row['values']))}"
    found = scores(evaluations, metric) if metric else []
    return chosen(found, lower_is_better(metric or "") if lower is None else lower)


def chosen(found: Sequence[Score], lower: bool) -> Score | None:
    """The best score of a run's, or the newest where none is finite; None of none."""
    known = [score for score in found if finite(score.value)]
    if not known:
        return found[-1] if found else None
    return (min if lower else max)(known, key=lambda score: score.value)


def scores(evaluations: Sequence[Row], metric: str) -> list[Score]:
    """All values of one metric, oldest first, NaN and infinities among them."""
    name, _, figure = metric.rpartition("/")
    rows = (row for row in evaluations if row["name"] == name)
    values = ((number(row["values"].get(figure)), row["step"]) for row in rows)
    return [Score(metric, value, step) for value, step in values if value is not None]


def lower_is_better(metric: str) -> bool:
    """Of losses and errors, by their names."""
    return _LOWER_IS_BETTER.search(metric.rpartition("/")[2].lower()) is not None


def _age(heartbeat: str | None, now: float) -> float | None:
    try:
        return None if heartbeat is None else max(0.0, now - datetime.fromisoformat(heartbeat).timestamp())
    except (ValueError, OverflowError):
        return None


def sorter(key: str) -> Callable[[Run], tuple[bool, Any]]:
    """Order by a column, what is missing or not finite last. Raises `RunError` naming the columns."""
    columns = list(Run.__dataclass_fields__)
    if key not in columns:
        raise RunError(f"--sort: found {key}; there are {', '.join(columns)}")

    def place(run: Run) -> tuple[bool, Any]:
        value = getattr(run, key)
        value = value.value if isinstance(value, Score) else value
        if key == "job" and isinstance(value, str):  # 9_2, 9_10, 10_0
            value = tuple(int(digits) for digits in re.findall(r"\d+", value))
        missing = value is None or (isinstance(value, float) and not finite(value))
        return missing, 0 if missing else value

    return place
