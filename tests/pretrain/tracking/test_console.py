"""What a person sees."""

from __future__ import annotations

import contextlib
import io
import os

from pretrain.clock import Progress
from pretrain.ports import Scores
from pretrain.tracking.console import BarOnTerminal, Lines, Remaining, console_tracker

START = Progress(step=0, samples=0, total_steps=200, dataset_size=1000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(step: int) -> dict[str, float | int]:
    return {
        "step": step, "loss": 0.43219, "lr": 1.5e-3, "samples_per_second": 812.4,
        "data_wait": 0.02, "seconds": 0.2,
    }  # fmt: skip


def test_lines_come_now_and_then_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, START, "demo", clock)
    for step in range(1, 201):
        clock.now += 0.125
        lines.log(row(step))
    lines.evaluated(START, Scores("knn", {"top1": 61.25}))
    lines.finish("done")
    shown = stream.getvalue().splitlines()
    assert shown[0] == ("demo: step 1/200  loss 0.4322  lr 1.50e-03  812 samples/s  data wait 10%  left ?")
    assert shown[1].startswith("demo: step 41/200 ")
    assert shown[1].endswith("left 0:00:20")
    assert [line.split()[2] for line in shown if "loss" in line] == [
        "1/200", "41/200", "81/200", "121/200", "161/200", "200/200",
    ]  # fmt: skip
    assert shown[-2:] == ["demo: step 0/200  knn: top1 61.25", "demo: done"]


def test_remaining_time_is_that_of_this_attempt() -> None:
    clock = Clock()
    remaining = Remaining(Progress(step=100, samples=0, total_steps=200, dataset_size=1), clock)
    assert remaining(101) == "?"
    clock.now = 99.0
    assert remaining(102) == "2:41:42"
    assert remaining(200) == "0:00:00"


def all_of(terminal: int) -> bytes:
    """What was written to the other end, which is closed: a read may give a part only."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # EIO at the end
        while part := stream.read(1 << 16):
            shown += part
    return shown


def test_on_a_terminal_there_is_a_bar_that_stays_on_its_line() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream:
        bar = console_tracker(stream, START, title="demo")
        assert isinstance(bar, BarOnTerminal)
        bar.log(row(50))
        bar.evaluated(START, Scores("knn", {"top1": 61.25}))
        bar.finish("done")
    shown = all_of(ours).decode()
    assert "50/200  loss 0.4322" in shown
    assert "knn: top1 61.25" in shown


def test_elsewhere_there_are_lines() -> None:
    assert isinstance(console_tracker(io.StringIO(), START, title="demo"), Lines)
