"""Stopping and skipped updates."""

from __future__ import annotations

import pytest

from configs.errors import RunError
from pretrain.health import SkippedUpdates, Stopping, StopRequest
from pretrain.types import Duration, Progress, StopReason


class OneStepLate:
    """What the ranks' agreement does on one rank: the value of the step before."""

    def __init__(self) -> None:
        self.last = 0

    def exchange(self, value: int) -> int:
        self.last, before = value, self.last
        return before


def at(step: int) -> Progress:
    return Progress(step=step, samples=8 * step, total_steps=100, dataset_size=80)


@pytest.mark.parametrize("reason", ["preempted", "terminated", "interrupted", "time_limit"])
def test_a_request_is_honoured_a_step_later(reason: StopReason) -> None:
    request = StopRequest()
    stopping = Stopping(request, OneStepLate(), None, at(0), batch_size=8)
    assert stopping.due(at(1)) is None
    request.ask(reason)
    assert stopping.due(at(2)) is None
    assert stopping.due(at(3)) == reason


def test_stop_after_counts_from_this_attempt_on() -> None:
    stopping = Stopping(StopRequest(), OneStepLate(), Duration(5, "steps"), at(20), batch_size=8)
    assert [stopping.due(at(20 + k)) for k in range(1, 6)] == [None] * 4 + ["stop_after"]


def test_minutes_stop_by_agreement() -> None:
    stopping = Stopping(StopRequest(), OneStepLate(), Duration(0, "min"), at(0), batch_size=8)
    assert [stopping.due(at(1)), stopping.due(at(2))] == [None, "stop_after"]


def test_only_skips_in_a_row_end_a_run() -> None:
    skips = SkippedUpdates(most_in_a_row=3)
    for _ in range(5):
        skips.skipped(at(1))
        skips.skipped(at(1))
        skips.applied()
    assert skips.total == 10
    skips.skipped(at(7))
    skips.skipped(at(7))
    with pytest.raises(RunError, match="3 batches in a row after step 7"):
        skips.skipped(at(7))
