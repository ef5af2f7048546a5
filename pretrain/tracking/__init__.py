"""Where a run's numbers go: metrics.jsonl always, Weights & Biases, the console.

`Track` is the listener: it reduces what a step reported over the ranks when a row is due, and rank 0 gives
the row to every tracker. A row's names are listed in `ROW`; an objective's own metrics stand beside them as
`objective/<name>`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import pydantic
import torch

from configs.loading import Config
from pretrain.clock import Duration, Progress
from pretrain.collectives import all_reduce_mean
from pretrain.ports import Scores, StepReport, StopReason, Tracker
from pretrain.tracking.console import console_tracker
from pretrain.tracking.jsonl import Jsonl, undo_after

ROW: Mapping[str, str] = {
    "attempt": "number of the process group that wrote the row, 1 for the first",
    "step": "applied optimizer steps, strictly increasing within the file",
    "samples": "samples consumed: the data position, which moves on skipped steps too",
    "epoch": "samples over the size of the data set",
    "loss": "this step's loss, mean over the global batch",
    "lr": "learning rate of this step",
    "weight_decay": "weight decay of this step",
    "grad_norm": "global L2 norm of this step's gradient before clipping",
    "samples_per_second": "global throughput since the row before, evaluating and saving left out",
    "data_wait": "seconds a step waited for data: mean since the row before, and over ranks",
    "seconds": "seconds a step took, waiting included: mean since the row before, and over ranks",
    "time": "seconds since 1970 when the row was written",
}
"""The fixed names of a row of metrics.jsonl, and what each means."""


class TrackConfig(Config):
    """How often, and where to, besides RUN/metrics.jsonl."""

    every: Duration = Duration(10, "steps")
    wandb: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online with a key, else offline
    project: str = "keel"
    name: str | None = None  # as shown in W&B; None: the run folder's name
    tags: tuple[str, ...] = ()
    group: str | None = None  # runs that W&B shows together; a sweep's members get the sweep's name
    job_type: str = "pretrain"  # W&B's word for the kinds of runs within a group

    @pydantic.field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, wandb: object) -> object:
        return "off" if wandb is False else wandb  # YAML reads a bare `off` as false

    @pydantic.field_validator("project")
    @classmethod
    def _sendable(cls, project: str) -> str:
        if not 0 < len(project) <= 128 or set(project) & set("/\\#?%:"):
            raise ValueError("W&B's projects have 1 to 128 characters, and none of / \\ # ? % :")
        return project

    @pydantic.field_validator("tags")
    @classmethod
    def _short(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        if any(not 0 < len(tag) <= 64 for tag in tags):
            raise ValueError("W&B's tags have 1 to 64 characters")
        return tags

    @pydantic.field_validator("every")
    @classmethod
    def _countable(cls, every: Duration) -> Duration:
        if every.unit == "min" or every.amount == 0:
            raise ValueError("rows come every so many steps, samples or epochs: say 10 steps")
        return every


def build(
    config: TrackConfig,
    root: Path,
    *,
    run_id: str,
    start: Progress,
    settings: Mapping[str, object],
    console: TextIO | None,
    provenance: Mapping[str, object] | None = None,
    evaluations: Callable[[], Sequence[Mapping[str, Any]]] = list,
) -> list[Tracker]:
    """The trackers of a run that goes on from `start`; for rank 0 only.

    Rows that the resume has undone are moved out of RUN/metrics.jsonl first. `settings` is the whole config
    as plain values, shown in W&B with `provenance` (commit, versions); `console` is where progress is drawn,
    None draws nothing; `evaluations` gives the run's whole record, earlier attempts' included.
    """
    highest = undo_after(root / "metrics.jsonl", start.step)
    trackers: list[Tracker] = [Jsonl(root / "metrics.jsonl", root / "pictures")]
    if config.wandb != "off":
        from pretrain.tracking.wandb import Wandb

        trackers.append(
            Wandb(
                root, mode=config.wandb, project=config.project, name=config.name or root.name,
                tags=config.tags, group=config.group, job_type=config.job_type, run_id=run_id,
                settings={**settings, "provenance": dict(provenance or {})}, already_sent=highest,
                evaluations=evaluations,
            )
        )  # fmt: skip
    if console is not None:
        trackers.append(console_tracker(console, start, title=root.name))
    return trackers


class Track:
    """The listener of every rank; trackers are given on rank 0 only.

    Device tensors are touched only when a row is due, so steps between rows don't wait for the device.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        every_steps: int,
        attempt: int,
        start: Progress,
        beside: Callable[[], Mapping[str, float]] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`beside` gives more of rank 0's figures for a row that is due, such as the loader's counts."""
        self.trackers: Sequence[Tracker] = trackers
        self.every, self.attempt = max(1, every_steps), attempt
        self.before, self.beside, self.clock = start, beside, clock
        self.told: dict[str, float] = {}
        self.waited = self.seconds = 0.0

    def after_step(self, report: StepReport) -> None:
        self.waited += report.data_wait
        self.seconds += report.seconds
        if self.due(report.progress):
            row = self._row(report)
            for tracker in self.trackers:
                tracker.log(row)
            self.before, self.waited, self.seconds = report.progress, 0.0, 0.0
            self.told = {}

    def due(self, progress: Progress) -> bool:
        """Follows from the step alone, so that ranks agree and a resumed run logs the same steps."""
        return progress.step % self.every == 0 or progress.step == 1 or progress.done

    def tell(self, progress: Progress, figures: Mapping[str, float]) -> None:
        """Figures that come now and then, for the next row."""
        self.told |= figures

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        """An evaluator's result, heard on rank 0."""
        for tracker in self.trackers:
            if scores.values:
                tracker.evaluated(progress, scores)
            if scores.pictures:
                tracker.pictures(progress.step, scores.pictures)

    def fail(self, status: str = "failed") -> None:
        """The run ends by an error, or its attempt is given up; those that have ended hear nothing of it."""
        self._end(status)

    def finish(self, progress: Progress, reason: StopReason) -> None:
        self._end(reason)

    def _end(self, status: str) -> None:
        """Each tracker once, all of them although one fails; raises the first failure at the end."""
        failures: list[Exception] = []
        left, self.trackers = self.trackers, ()
        for tracker in left:
            try:
                tracker.finish(status)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _row(self, report: StepReport) -> dict[str, float | int]:
        progress, steps = report.progress, max(1, report.progress.step - self.before.step)
        loss = report.output.loss.detach()
        own = {f"objective/{name}": value for name, value in report.output.metrics.items()}
        values = {"loss": loss, **own}
        values |= {
            "data_wait": torch.tensor(self.waited / steps, device=loss.device),
            "seconds": torch.tensor(self.seconds / steps, device=loss.device),
        }
        mean = {name: float(value) for name, value in all_reduce_mean(values).items()}
        samples = progress.samples - self.before.samples
        return {
            "attempt": self.attempt,
            "step": progress.step,
            "samples": progress.samples,
            "epoch": progress.epoch,
            "loss": mean["loss"],
            "lr": report.settings.lr,
            "weight_decay": report.settings.weight_decay,
            "grad_norm": float(report.update.grad_norm),
            "samples_per_second": samples / max(mean["seconds"] * steps, 1e-9),
            "data_wait": mean["data_wait"],
            "seconds": mean["seconds"],
            "time": self.clock(),
            **{name: mean[name] for name in own},
            **(self.beside() if self.trackers else {}),
            **self.told,
        }
