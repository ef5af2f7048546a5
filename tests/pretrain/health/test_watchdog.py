"""The watchdog: what counts as hanging, and what never does."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from pretrain.health.health import HealthConfig
from pretrain.health.watchdog import WARM_UP, Watchdog, dump
from pretrain.ports import BEYOND_STEPS


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(hang: float | None = 4.0, at_least: float = 10.0) -> tuple[Watchdog, Clock, list[str]]:
    clock, told = Clock(), list[str]()
    config = HealthConfig(hang=hang, hang_at_least=at_least)
    return Watchdog(config, told.append, first_steps=timedelta(seconds=1000), clock=clock), clock, told


def step(watch: Watchdog, clock: Clock, seconds: float, after: float = 0.0) -> None:
    """A step of so many seconds, then listeners for so many."""
    for phase in ("waiting for data", "forward and backward", "optimizer step"):
        watch.enter(phase)
        clock.now += seconds / 3
        watch.check()
    watch.enter(BEYOND_STEPS)
    clock.now += after
    watch.check()


def test_steps_are_compared_with_the_median() -> None:
    watch, clock, told = watched()
    for _ in range(20):
        step(watch, clock, 5.0)
    step(watch, clock, 19.0)
    assert told == []
    watch.enter("waiting for data")
    watch.enter("forward and backward")
    clock.now += 20.5
    watch.check()
    assert told == ["no step for 20 s (allowed: 20 s); this rank is in: forward and backward"]


def test_quick_steps_have_the_least_time() -> None:
    watch, clock, told = watched()
    for _ in range(20):
        step(watch, clock, 0.01)
    step(watch, clock, 9.0)
    assert told == []
    step(watch, clock, 40.0)
    assert told


def test_saving_evaluating_and_the_first_steps_take_as_long_as_they_like() -> None:
    watch, clock, told = watched()
    for _ in range(WARM_UP):
        step(watch, clock, 900.0, after=1e6)
    for _ in range(WARM_UP + 1):
        step(watch, clock, 1.0, after=1e6)
    assert told == []
    watch, clock, told = watched()
    step(watch, clock, 3100.0)
    assert told and "allowed: 1000 s" in told[0]


def test_the_thread_speaks_up_by_itself_and_ends() -> None:
    heard = threading.Event()
    config = HealthConfig(hang=2.0, hang_at_least=0.05)
    with Watchdog(config, lambda message: heard.set(), first_steps=timedelta(seconds=0.05)) as watch:
        watch.enter("waiting for data")
        assert heard.wait(60)
    assert not watch._thread.is_alive()
    with Watchdog(HealthConfig(hang=None), lambda message: None, first_steps=timedelta(0)) as watch:
        assert not watch._thread.is_alive()


def test_a_dump_has_every_stack(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dump("rank 3: no step for 9 s", tmp_path / "nccl.json")
    said = capfd.readouterr().err
    assert said.startswith("rank 3: no step for 9 s\n") and "in test_a_dump_has_every_stack" in said
