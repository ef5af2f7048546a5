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
from launch import queue
from launch.queue import GONE, JobState
from launch.run_files import Facts, Row, is_echo, last_words, read, run_folders

State = Literal[
    "new", "pending", "running", "requeued", "stale", "done", "stopped", "failed", "cancelled", "lost"
]
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
    root: Path, *, metric: str | None = None, stale_after: float = STALE_AFTER, now: float | None = None
) -> list[Run]:
    """Every run at or below `root`, in order of name. `metric`: of evaluations, else each run's first one.

    Raises `RunError` where `root` isn't there.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; name one that holds runs")
    with ThreadPoolExecutor(_READERS) as readers:
        facts = list(readers.map(lambda found: read(found, root), sorted(run_folders(root))))
    return judged(facts, metric=metric, stale_after=stale_after, now=now)


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
    stale_after: float = STALE_AFTER,
    now: float | None = None,
) -> list[Run]:
    """Files and queue put together; SLURM is asked once for all that aren't done."""
    moment = datetime.now().timestamp() if now is None else now
    asked = [each.slurm_job for each in facts if each.slurm_job and each.run.get("status") != "done"]
    known = queue.states(asked)
    return [_run(each, known.get(each.slurm_job or ""), metric, stale_after, moment) for each in facts]


def _run(facts: Facts, job: JobState | None, metric: str | None, stale_after: float, now: float) -> Run:
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
    step, total = max(int(last.get("step", 0)), int(run.get("step", 0))), run.get("total_steps")
    pace = [row["seconds"] for row in facts.rows if row.get("seconds")]
    eta = None
    if state == "running" and pace and total:
        eta = (total - step) * sum(pace) / len(pace)
    return Run(
        path=str(facts.path), name=facts.name, objective=facts.objective, state=state, note=note,
        step=step, total=total, loss=last.get("loss"), best=best(facts.evaluations, metric),
        samples_per_second=last.get("samples_per_second"), eta=eta,
        restarts=max(0, len(attempts) - 1), host=(job.nodes if job else "") or run.get("host") or "",
        job=facts.slurm_job, heartbeat_age=age, reason=attempts[-1].get("reason") if attempts else None,
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
        return "stopped", str((attempts[-1].get("reason") if attempts else None) or "")
    if job is not None:
        return _without_a_word(job)
    if status == "running":
        return ("lost", "") if held is False and not submitted else ("stale" if silent else "running", "")
    return "new", "submitted, but SLURM doesn't answer" if submitted else ""


def _without_a_word(job: JobState) -> tuple[State, str]:
    """Of a run whose job has ended while the run itself says nothing of an end."""
    if job.state in ("FAILED", "OUT_OF_MEMORY"):
        return "failed", "" if job.state == "FAILED" else "SLURM: out of memory"
    return "lost", "" if job.state in (GONE, "COMPLETED") else f"SLURM: {job.state}"


def best(evaluations: Sequence[Row], metric: str | None = None) -> Score | None:
    """The best value of "knn/top1" and the like, the lowest of a loss; by default the first metric."""
    for row in evaluations:
        values = row.get("values") or {}
        if metric is None and values:
            metric = f"{row.get('name')}/{next(iter(values))}"
    found = scores(evaluations, metric) if metric else []
    if not found:
        return None
    return (min if lower_is_better(metric or "") else max)(found, key=lambda score: score.value)


def scores(evaluations: Sequence[Row], metric: str) -> list[Score]:
    """All values of one metric, oldest first."""
    name, _, figure = metric.rpartition("/")
    rows = (row for row in evaluations if row.get("name") == name)
    values = ((row.get("values", {}).get(figure), row.get("step", 0)) for row in rows)
    return [
        Score(metric, float(value), int(step)) for value, step in values if isinstance(value, int | float)
    ]


def lower_is_better(metric: str) -> bool:
    """Of losses and errors, by their names."""
    return _LOWER_IS_BETTER.search(metric.rpartition("/")[2].lower()) is not None


def _age(heartbeat: str | None, now: float) -> float | None:
    try:
        return None if heartbeat is None else max(0.0, now - datetime.fromisoformat(heartbeat).timestamp())
    except ValueError:
        return None


def sorter(key: str) -> Callable[[Run], tuple[bool, Any]]:
    """Order by a column, what is missing last. Raises `RunError` naming the columns."""
    columns = list(Run.__dataclass_fields__)
    if key not in columns:
        raise RunError(f"--sort: found {key}; there are {', '.join(columns)}")

    def place(run: Run) -> tuple[bool, Any]:
        value = getattr(run, key)
        value = value.value if isinstance(value, Score) else value
        return value is None, 0 if value is None else value

    return place
