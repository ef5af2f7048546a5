"""The best checkpoint by an evaluation's figure is saved when it is met, and pinned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import ConfigError
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointConfig, Checkpointer
from pretrain.clock import Progress
from pretrain.collectives import from_main
from pretrain.judging.schedule import read
from pretrain.judging.subject import EvaluatorConfig
from pretrain.ports import Scores, StepReport, StopReason


def require_known(config: CheckpointConfig, evaluations: Sequence[EvaluatorConfig]) -> None:
    """Raises `ConfigError` where `checkpoint.best` names no evaluation of the run, or no figure of it."""
    if config.best is None:
        return
    name, _, figure = config.best.rpartition("/")
    names = [each.title for each in evaluations]
    if name not in names or not figure:
        raise ConfigError(
            f"checkpoint.best: found {config.best}, but it reads EVALUATION/FIGURE, such as knn/top1; "
            f"the evaluations of this run: {', '.join(names) or 'none'}"
        )
    figures = evaluations[names.index(name)].figures()
    if figures is not None and figure not in figures:
        raise ConfigError(
            f"checkpoint.best: found {config.best}, but {name} has no figure {figure}; it has: "
            f"{', '.join(figures) or 'none'}"
        )


class KeepBest:
    """A listener that acts after `Evaluate` and before the checkpointer; on every rank alike.

    What it knows is in the pin and in RUN/evaluations.jsonl, so a restart changes nothing.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        evaluations: Sequence[EvaluatorConfig],
        run_dir: Path,
        saver: Checkpointer,
        sizes: tuple[int, int],
    ) -> None:
        """`sizes`: global batch and data set. `config.best` is set and known."""
        assert config.best is not None
        self.name, _, self.figure = config.best.rpartition("/")
        self.sign = 1 if config.best_is == "highest" else -1
        self.reason, self.run_dir, self.saver = f"best {config.best}", run_dir, saver
        period = next(each.every for each in evaluations if each.title == self.name)
        self.every = None if period is None else period.steps(*sizes)

    def after_step(self, report: StepReport) -> None:
        step = report.progress.step
        if self.every is None or step % self.every:
            return
        value = from_main(lambda: self._found(step))
        if value is not None:
            self.saver.save(report.progress, then=lambda name: self.pin(name, value))

    def hear(self, progress: Progress, scores: Scores) -> None:
        """On rank 0: the last evaluation comes when the last checkpoint lies there already."""
        if scores.kind == self.name and progress.done:
            there = [each for each in checkpoint.published(self.run_dir) if each.step == progress.step]
            if there:
                self.pin(there[0].path.name, float(self._figure_of(scores.values)))

    def finish(self, progress: Progress, reason: StopReason) -> None:
        """Nothing is left to do."""

    def pin(self, name: str, value: float) -> None:
        """Pin checkpoint `name`, on rank 0, where its value is better than that of the pinned one."""
        if self._better(value):
            checkpoint.pin(self.run_dir, self.reason, name, value=value)

    def _found(self, step: int) -> float | None:
        """The figure at `step` where it is better than all before."""
        rows = read(self.run_dir / "evaluations.jsonl")
        found = [row["values"] for row in rows if row["step"] == step and row["name"] == self.name]
        if not found:
            return None
        value = float(self._figure_of(found[-1]))
        return value if self._better(value) else None

    def _figure_of(self, values: Mapping[str, float]) -> float:
        if self.figure not in values:
            raise ConfigError(
                f"checkpoint.best: {self.name} has no figure {self.figure}; it has: {', '.join(values)}"
            )
        return values[self.figure]

    def _better(self, value: float) -> bool:
        """NaN and infinities, as of a run that diverges, are never the best: else nothing could beat them."""
        if not math.isfinite(value):
            return False
        pinned = checkpoint.pins(self.run_dir).get(self.reason)
        if (
            pinned is None
            or not isinstance(pinned["value"], int | float)
            or not math.isfinite(pinned["value"])
        ):
            return True
        return self.sign * value > self.sign * float(pinned["value"])
