"""What may end a run before its time: a request to stop, or updates that can't be applied."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, get_args

from configs.errors import RunError
from pretrain.types import Duration, Progress, StopReason

_REASONS: Sequence[StopReason] = get_args(StopReason)
"""In order of precedence: where ranks were asked for different reasons, the later one wins."""


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


class Stopping:
    """Decides, the same on every rank at the same step, whether to leave, and why."""

    def __init__(
        self,
        request: StopRequest,
        agreement: Agreement,
        stop_after: Duration | None,
        start: Progress,
        batch_size: int,
    ) -> None:
        self.request, self.agreement, self.start = request, agreement, start
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
        agreed = self.agreement.exchange(self.request.code)
        if agreed:
            return _REASONS[agreed]
        if self.steps is not None and progress.step - self.start.step >= self.steps:
            return "stop_after"
        return None


class SkippedUpdates:
    """Counts updates that weren't applied because loss or gradient wasn't finite."""

    def __init__(self, most_in_a_row: int = 20) -> None:
        self.most_in_a_row, self.in_a_row, self.total = most_in_a_row, 0, 0

    def applied(self) -> None:
        self.in_a_row = 0

    def skipped(self, progress: Progress) -> None:
        """Raises `RunError` where nothing has been applied for `most_in_a_row` batches."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.most_in_a_row:
            raise RunError(
                f"loss or gradient was not finite for {self.in_a_row} batches in a row after step "
                f"{progress.step}, and nothing was applied: lower the learning rate, lengthen "
                "optimizer.warmup or set train.precision=fp32"
            )
