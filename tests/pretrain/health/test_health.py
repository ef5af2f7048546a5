"""Stopping and skipped updates."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.clock import Duration, Progress
from pretrain.collectives import MeanLater
from pretrain.health.health import Health, HealthConfig, TroubleError, add_range
from pretrain.health.stopping import Stopping, StopRequest, TimeLimit
from pretrain.objective import LossOutput
from pretrain.ports import StepReport, StepSettings, StopReason


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


def test_only_skips_in_a_row_are_trouble() -> None:
    health = Health(HealthConfig(not_finite=3), batch_size=8)
    for number in range(5):
        health.skipped(at(10 * number + 1))
        health.skipped(at(10 * number + 2))
        health.applied(report(10 * number + 3))
    assert health.skipped_batches == 10
    health.skipped(at(61))
    health.skipped(at(62))
    with pytest.raises(TroubleError) as caught:
        health.skipped(at(63))
    assert (caught.value.kind, caught.value.samples) == ("not_finite", (8 * 60, 8 * 63))
    assert health.ranges[0] == [0, 16] and health.ranges[-1] == [480, 504]


def report(step: int, loss: float = 1.0) -> StepReport:
    output = LossOutput(torch.tensor(loss), {})
    return StepReport(at(step), output, None, StepSettings(0.0, 0.0), 0.0, 0.0)  # type: ignore[arg-type]


def losses_of(step: int) -> float:
    """A noisy curve that falls."""
    return 2.0 - 0.002 * step + 0.05 * ((7 * step) % 11 - 5)


def test_a_leap_of_the_loss_is_trouble_and_noise_is_not() -> None:
    health = Health(HealthConfig(spike=8.0, spikes=3), 8, MeanLater())
    for step in range(1, 101):
        health.applied(report(step, losses_of(step)))
    for step in (101, 102):  # two are no trouble yet
        health.applied(report(step, 9.0))
    for step in range(103, 110):
        health.applied(report(step, losses_of(step)))
    for step in (110, 111, 112):
        health.applied(report(step, float("nan") if step == 111 else 9.0))
    with pytest.raises(TroubleError) as caught:
        health.applied(report(113, losses_of(113)))  # what a step gave is known a step later
    assert caught.value.kind == "spike" and caught.value.step == 109
    assert caught.value.samples == (8 * 109, 8 * 112)


def test_what_health_knows_is_state() -> None:
    health = Health(HealthConfig(spike=8.0), 8, MeanLater())
    for step in range(1, 60):
        health.applied(report(step, losses_of(step)))
    health.skipped(at(60))
    again = Health(HealthConfig(spike=8.0), 8, MeanLater(), json.loads(json.dumps(health.state())))
    assert again.state() == health.state() and again.ranges == [[472, 480]] and again.in_a_row == 1


def test_ranges_are_joined() -> None:
    ranges: list[list[int]] = []
    for first, last in ((40, 48), (0, 8), (48, 56), (8, 16), (4, 12)):
        add_range(ranges, first, last)
    assert ranges == [[0, 16], [40, 56]]


def test_a_time_limit_leaves_room_for_saving() -> None:
    now, saving = [1000.0], [0.0]
    limit = TimeLimit(1600.0, lambda: saving[0], clock=lambda: now[0])
    found = []
    for second in range(1010, 1600, 10):
        now[0] = second
        saving[0] = 100.0 if second > 1300 else 0.0
        if limit.near():
            found.append(second)
    assert found[0] == 1430  # 1.5 saves and 2 steps before the end


def test_a_time_limit_stops_by_agreement() -> None:
    limit = TimeLimit(10.0, clock=lambda: 11.0)
    stopping = Stopping(StopRequest(), OneStepLate(), None, at(0), batch_size=8, limit=limit)
    assert [stopping.due(at(1)), stopping.due(at(2))] == [None, "time_limit"]
