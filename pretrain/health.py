"""What may end a run before its time: a request to stop, updates that can't be applied, a loss that leaps."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import pydantic

from configs.loading import Config
from pretrain.types import Duration, Progress, StepReport, StopReason

_REASONS: Sequence[StopReason] = get_args(StopReason)
"""In order of precedence: where ranks were asked for different reasons, the later one wins."""


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


class StopRequest:
    """A flag that a signal handler may set at any moment; the loop reads it between steps."""

    def __init__(self) -> None:
        self.reason: StopReason | None = None

    def ask(self, reason: StopReason) -> None:
        """The reason that comes later in `StopReason` stands: a job told to come back isn't to stay away."""
        if self.reason is None or _REASONS.index(reason) > _REASONS.index(self.reason):
            self.reason = reason

    @property
    def code(self) -> int:
        return 0 if self.reason is None else _REASONS.index(self.reason)


class Agreement(Protocol):
    """One integer a rank, their maximum a step later: no rank waits for another within a step."""

    def exchange(self, value: int) -> int: ...


class TimeLimit:
    """Tells when it is time to save and leave, so that both are done before the end.

    `ends` is in seconds since 1970. `saving` gives the seconds that a save takes, 0 where none was made yet.
    """

    def __init__(
        self, ends: float, saving: Callable[[], float] = lambda: 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.ends, self.saving, self.clock = ends, saving, clock
        self.first = self.before = clock()
        self.longest = 0.0  # seconds between two looks: a step, with whatever came between

    def near(self) -> bool:
        """Called once after every step."""
        now = self.clock()
        self.longest, self.before = max(self.longest, now - self.before), now
        # Never measured, a save is given a tenth of the time, a minute at most.
        saving = self.saving() or min(60.0, 0.1 * (self.ends - self.first))
        return self.ends - now <= 1.5 * saving + 2 * self.longest


class Stopping:
    """Decides, the same on every rank at the same step, whether to leave, and why."""

    def __init__(
        self,
        request: StopRequest,
        agreement: Agreement,
        stop_after: Duration | None,
        start: Progress,
        batch_size: int,
        limit: TimeLimit | None = None,
    ) -> None:
        """`limit`: where a rank knows of one; it is enough if rank 0 does."""
        self.request, self.agreement, self.start, self.limit = request, agreement, start, limit
        self.started = time.monotonic()
        self.minutes = stop_after.amount if stop_after and stop_after.unit == "min" else None
        self.steps = (
            stop_after.steps(batch_size, start.dataset_size)
            if stop_after and stop_after.unit != "min"
            else None
        )

    def due(self, progress: Progress) -> StopReason | None:
        """Called once after every step by every rank."""
        if self.minutes is not None and time.monotonic() - self.started >= 60 * self.minutes:
            self.request.ask("stop_after")
        if self.limit is not None and self.limit.near():
            self.request.ask("time_limit")
        agreed = self.agreement.exchange(self.request.code)
        if agreed:
            return _REASONS[agreed]
        if self.steps is not None and progress.step - self.start.step >= self.steps:
            return "stop_after"
        return None


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
