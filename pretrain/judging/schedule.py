"""Evaluations while training, when the config says so, and their record in RUN/evaluations.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from data_pipeline.tokenize import Tokenizer
from data_pipeline.types import ViewSpec
from pretrain import collectives, encoders
from pretrain.clock import Progress
from pretrain.judging.features import NotFiniteError
from pretrain.judging.subject import EvaluatorConfig, Subject
from pretrain.objective import Objective
from pretrain.ports import Engine, Scores, StepReport, StopReason

log = logging.getLogger(__name__)


class Evaluate:
    """A listener that judges the model at the scheduled steps and at the end of training.

    Whether an evaluation is due follows from the step alone, so ranks agree without talking, and a resumed
    run evaluates where an uninterrupted one does. Training is left exactly as it was.
    """

    def __init__(
        self,
        evaluations: Sequence[EvaluatorConfig],
        look: Callable[[], AbstractContextManager[Subject]],
        record: Path,
        *,
        batch_size: int,
        dataset_size: int,
        tell: Callable[[Progress, Scores], None] | None = None,
    ) -> None:
        """`record` is RUN/evaluations.jsonl; `tell` hears every score on rank 0, for trackers."""
        refuse_equal_names(evaluations)
        self.evaluations, self.look, self.record, self.tell = tuple(evaluations), look, record, tell
        self.every = {
            e.title: e.every.steps(batch_size, dataset_size) for e in evaluations if e.every is not None
        }
        self.done = {(row["step"], row["name"]) for row in read(record)}

    def after_step(self, report: StepReport) -> None:
        step = report.progress.step
        self._evaluate(
            [e for e in self.evaluations if e.title in self.every and step % self.every[e.title] == 0],
            report.progress,
        )

    def finish(self, progress: Progress, reason: StopReason) -> None:
        if reason == "done":
            self._evaluate(self.evaluations, progress)

    def _evaluate(self, evaluations: Sequence[EvaluatorConfig], progress: Progress) -> None:
        due = [e for e in evaluations if (progress.step, e.title) not in self.done]
        if not due:
            return
        with self.look() as subject:
            scores = list(_judged(due, subject, progress))
        self.done |= {(progress.step, evaluation.title) for evaluation in due}
        # Nobody goes on before rank 0 is done: the others would seem to hang in their next step.
        collectives.from_main(lambda: self._tell(progress, scores))

    def _tell(self, progress: Progress, scores: Sequence[Scores]) -> None:
        for score in scores:
            write(self.record, progress, score)
            if self.tell is not None:
                self.tell(progress, score)


def _judged(evaluations: Sequence[EvaluatorConfig], subject: Subject, progress: Progress) -> Iterator[Scores]:
    """Scores of those that can be made: that a run has diverged is for the watch over its losses to say."""
    for evaluation in evaluations:
        try:
            scores = evaluation.build()(subject)
            known = evaluation.figures()
            if known is not None and (more := set(scores.values) - set(known)):
                raise ValueError(
                    f"evaluations of kind {evaluation.kind} don't name all figures: {sorted(more)}"
                )
            yield scores
        except NotFiniteError as error:
            if collectives.rank() == 0:
                log.warning("step %d: no figure of %s: %s", progress.step, evaluation.title, error)


@contextmanager
def trained_subject(
    engine: Engine,
    *,
    view: ViewSpec,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> Iterator[Subject]:
    """The model an engine is training, every parameter whole, as evaluators see it."""
    with engine.whole_parameters() as objective:
        assert isinstance(objective, Objective)
        yield Subject(
            encoder=objective.encoder,
            encode=partial(encoders.features, objective.encoder),
            view=view,
            device=engine.device,
            objective=objective,
            batch_size=batch_size,
            workers=workers,
            tokenizer=tokenizer,
        )


def refuse_equal_names(evaluations: Sequence[EvaluatorConfig]) -> None:
    """Raises `ConfigError` where two evaluations would be logged under one name."""
    titles = [evaluation.title for evaluation in evaluations]
    for number, title in enumerate(titles):
        if title in titles[:number]:
            raise ConfigError(f"evaluate.{number}.name: {title} is taken by another one; give it a name")


def write(record: Path, progress: Progress, scores: Scores) -> None:
    """Append one line in one write: step, samples, name, values, details.

    A line that a kill has torn is closed first, so that it can't swallow this one.
    """
    row = {
        "step": progress.step, "samples": progress.samples, "name": scores.kind,
        "values": jsonable(scores.values), "details": dict(scores.details),
    }  # fmt: skip
    with record.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" * torn + json.dumps(row, allow_nan=False) + "\n").encode())


def jsonable(values: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: null for what isn't finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read(record: Path) -> list[dict[str, Any]]:
    """Every whole line of evaluations.jsonl, oldest first; empty where there is none.

    A figure that wasn't finite is NaN.
    """
    if not record.is_file():
        return []
    rows = []
    for line in record.read_text().splitlines():
        try:
            row = json.loads(line)
            values = {name: _figure(value) for name, value in row["values"].items()}
            rows.append(row | {"step": int(row["step"]), "name": str(row["name"]), "values": values})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut short by a kill, or no score: that evaluation is simply done again
    return rows


def _figure(value: Any) -> float:
    return math.nan if value is None else float(value)
