"""When a run counts as sick: updates that can't be applied, a loss that leaps."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import pydantic

from configs.loading import Config
from pretrain.clock import Progress
from pretrain.ports import StepReport


class HealthConfig(Config):
    """When a run counts as sick, and what is done about it.

    `then: roll_back` goes back to the last checkpoint from before the trouble and on with the data after it
    (Chowdhery et al. 2022, arXiv:2204.02311 §5.1); `stop` ends the run, saying which samples it met.
    """

    not_finite: int = pydantic.Field(20, ge=1)  # updates in a row that couldn't be applied
    spike: float | None = pydantic.Field(None, ge=3)  # deviations above the median loss; None: not looked for
    spikes: int = pydantic.Field(10, ge=1)  # losses so high in a row
    then: Literal["stop", "roll_back"] = "stop"
    rollbacks: int = pydantic.Field(3, ge=0)  # at most so many in one go; then it stops
    hang: float | None = pydantic.Field(20.0, gt=1)  # times the median step; None: nobody watches
    hang_at_least: float = pydantic.Field(300.0, gt=0)  # seconds that are never taken for hanging
    restarts: int = pydantic.Field(3, ge=0)  # of local ranks after one was killed or hung


class TroubleError(Exception):
    """A run that is sick: raised on every rank at the same step."""

    def __init__(self, kind: Literal["not_finite", "spike"], step: int, samples: tuple[int, int]) -> None:
        """`step`: updates applied before it began; `samples`: [first, last) position of its batches."""
        self.kind, self.step, self.samples = kind, step, samples
        super().__init__(f"{kind} after step {step}, samples {samples[0]} to {samples[1]}")


class Mean(Protocol):
    """One number a rank, their mean a step later."""

    def exchange(self, value: float) -> float | None: ...


class Health:
    """Judges every step, alike on every rank, and remembers which samples went without effect.

    `ranges`: [first, last) positions of samples that were consumed and not trained on: their update wasn't
    finite, or a rollback skipped or undid them. It is a part of the run's state.
    """

    WINDOW, LEAST = 128, 32

    def __init__(
        self,
        config: HealthConfig,
        batch_size: int,
        losses: Mean | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`losses`: needed where spikes are looked for; `state`: as `state()` gave it, to go on from."""
        found = state or {}
        self.config, self.batch_size, self.losses = config, batch_size, losses
        self.ranges: list[list[int]] = [list(each) for each in found.get("ranges", ())]
        self.window = deque[float](found.get("window", ()), maxlen=self.WINDOW)
        self.in_a_row = int(found.get("in_a_row", 0))
        self.high: list[Progress] = []
        self.before: Progress | None = None

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"ranges": self.ranges, "window": list(self.window), "in_a_row": self.in_a_row}

    @property
    def skipped_batches(self) -> int:
        """Batches of the whole run that had no effect."""
        return sum(last - first for first, last in self.ranges) // self.batch_size

    def applied(self, report: StepReport) -> None:
        """Raises `TroubleError` after too many losses in a row that were far too high."""
        self.in_a_row = 0
        if self.config.spike is None or self.losses is None:
            return
        mean, before = self.losses.exchange(float(report.output.loss)), self.before
        self.before = report.progress
        if mean is not None and before is not None:
            self._judge(mean, before)

    def skipped(self, progress: Progress) -> None:
        """An update wasn't applied; raises `TroubleError` after too many in a row."""
        add_range(self.ranges, progress.samples - self.batch_size, progress.samples)
        self.in_a_row += 1
        if self.in_a_row >= self.config.not_finite:
            first = progress.samples - self.in_a_row * self.batch_size
            raise TroubleError("not_finite", progress.step, (first, progress.samples))

    def _judge(self, loss: float, progress: Progress) -> None:
        if not self._is_high(loss):
            self.window.append(loss)
            self.high = []
            return
        self.high.append(progress)
        if len(self.high) >= self.config.spikes:
            first = self.high[0].samples - self.batch_size
            raise TroubleError("spike", self.high[0].step - 1, (first, progress.samples))

    def _is_high(self, loss: float) -> bool:
        """Further above the median than `spike` deviations, taken from the median deviation."""
        if len(self.window) < self.LEAST:
            return False
        middle = statistics.median(self.window)
        spread = 1.4826 * statistics.median(abs(each - middle) for each in self.window)
        assert self.config.spike is not None
        return not loss <= middle + self.config.spike * max(spread, 0.01 * abs(middle))


def add_range(ranges: list[list[int]], first: int, last: int) -> None:
    """Add [first, last) to sorted ranges, joined where they touch or overlap; in place."""
    merged: list[list[int]] = []
    for begin, end in sorted([*ranges, [first, last]]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    ranges[:] = merged
