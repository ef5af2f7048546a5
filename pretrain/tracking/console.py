"""Progress for a person: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor

from pretrain.clock import Progress
from pretrain.ports import Scores, Tracker

LINE_EVERY = 5.0
"""Seconds between lines where there is no terminal, so that a log stays readable."""


def console_tracker(stream: TextIO, start: Progress, *, title: str) -> Tracker:
    """A bar where `stream` is a terminal, plain lines where it isn't."""
    return BarOnTerminal(stream, start, title) if stream.isatty() else Lines(stream, start, title)


class Lines:
    """One plain line at most every `LINE_EVERY` seconds, the first and the last row always."""

    def __init__(
        self, stream: TextIO, start: Progress, title: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream, self.total, self.title, self.clock = stream, start.total_steps, title, clock
        self.last = float("-inf")
        self.remaining = Remaining(start, clock)

    def log(self, row: Mapping[str, float | int]) -> None:
        remaining = self.remaining(int(row["step"]))
        if self.clock() - self.last >= LINE_EVERY or row["step"] == self.total:
            self.last = self.clock()
            self._say(f"step {row['step']}/{self.total}  {figures(row)}  left {remaining}")

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        self._say(f"step {progress.step}/{self.total}  {scores_line(scores)}")

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Not for the console."""

    def finish(self, status: str) -> None:
        self._say(status)

    def _say(self, text: str) -> None:
        print(f"{self.title}: {text}", file=self.stream, flush=True)


class BarOnTerminal:
    """One line that is redrawn, so that log lines can be printed above it by whoever prints them."""

    def __init__(self, stream: TextIO, start: Progress, title: str) -> None:
        # Standard streams are log files here, so rich must not take them over.
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[text]}"),
            console=Console(file=stream), redirect_stdout=False, redirect_stderr=False, refresh_per_second=5,
        )  # fmt: skip
        self.total = start.total_steps
        self.task = self.bar.add_task(title, total=self.total, completed=start.step, text="starting")
        self.remaining = Remaining(start, time.monotonic)
        self.bar.start()
        self.bar.console.show_cursor(True)  # rich would leave it hidden if this process were killed

    def log(self, row: Mapping[str, float | int]) -> None:
        step = int(row["step"])
        text = f"{step}/{self.total}  {figures(row)}  left {self.remaining(step)}"
        self.bar.update(self.task, completed=step, text=text)

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        self.bar.console.print(f"step {progress.step}  {scores_line(scores)}", markup=False, highlight=False)

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Not for the console."""

    def finish(self, status: str) -> None:
        self.bar.stop()


class Remaining:
    """Time to the end at this attempt's own speed, evaluating and saving included."""

    def __init__(self, start: Progress, clock: Callable[[], float]) -> None:
        self.total, self.clock = start.total_steps, clock
        self.first: tuple[int, float] | None = None

    def __call__(self, step: int) -> str:
        """h:mm:ss, or "?" before two rows were seen: the first step's warm-up would mislead."""
        now = self.clock()
        if self.first is None:
            self.first = (step, now)
        done = step - self.first[0]
        if done <= 0:
            return "0:00:00" if step >= self.total else "?"
        seconds = round((now - self.first[1]) / done * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def figures(row: Mapping[str, float | int]) -> str:
    """Loss, learning rate, samples a second, share of time spent waiting for data."""
    waiting = row["data_wait"] / max(row["seconds"], 1e-9)
    return (
        f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"{row['samples_per_second']:.0f} samples/s  data wait {waiting:.0%}"
    )


def scores_line(scores: Scores) -> str:
    """The name of an evaluation and its values."""
    return f"{scores.kind}: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.values.items())
