"""What may end a run before its time, in good order: a request to stop, or a limit of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, get_args

from pretrain.clock import Duration, Progress
from pretrain.ports import StopReason

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
