"""One figure of a run, step by step, for whoever looks again and again while it trains."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

from pydantic_core import from_json

from launch.runs import shapes
from launch.runs.shapes import Row, number

SPAN = 0.2
"""Part of the way to a step over which a noisy figure of metrics.jsonl is averaged."""

_BLOCK = 1 << 20


def of_training(metric: str) -> bool:
    """Whether a metric is a figure of metrics.jsonl ("loss", "objective/...") rather than an evaluation's."""
    return metric.rpartition("/")[0] in ("", "objective")


class Figures:
    """A metric's value at each step, read as far as the file has grown since the last look.

    A file that was replaced or cut, as after a rollback, is read anew. What isn't a row with a step, or has
    no such figure, counts for nothing.
    """

    def __init__(self, run: Path, metric: str) -> None:
        self.metric, self.training = metric, of_training(metric)
        self.file = run / ("metrics.jsonl" if self.training else "evaluations.jsonl")
        self.values: dict[int, float] = {}
        self.bytes_read = 0
        self._name, _, self._figure = metric.rpartition("/")
        # Most rows of a long file needn't be parsed: this is in every one that counts.
        self._sign = json.dumps(metric if self.training else self._figure).encode()
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def look(self) -> None:
        """Read what is new."""
        try:
            file = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            now = os.fstat(file)
            if (now.st_dev, now.st_ino) != self._identity or now.st_size < self._offset:
                self.values, self._offset, self._identity = {}, 0, (now.st_dev, now.st_ino)
            rest = b""
            while block := os.pread(file, _BLOCK, self._offset + len(rest)):
                self.bytes_read += len(block)
                whole, newline, torn = (rest + block).rpartition(b"\n")
                self._offset += len(whole) + len(newline)
                rest = torn
                for line in whole.split(b"\n"):
                    if self._sign in line:
                        self._take(line)
        except OSError:
            return
        finally:
            os.close(file)

    @property
    def newest(self) -> int:
        """The newest step that has a value, 0 without any."""
        return max(self.values, default=0)

    def at(self, step: int) -> float | None:
        """The newest score up to `step`; of a figure of training, its mean over the last fifth of the way.

        None where there is no such figure yet.
        """
        before = {each: value for each, value in self.values.items() if each <= step}
        if not before:
            return None
        newest = before[max(before)]
        if not self.training:
            return newest
        near = [value for each, value in before.items() if each > (1 - SPAN) * step]
        return statistics.fmean(near) if near else newest

    def _take(self, line: bytes) -> None:
        try:
            found = from_json(line)
        except ValueError:
            return
        (rows, _) = (shapes.metrics if self.training else shapes.evaluations)([found])
        for row in rows:
            value = self._value(row)
            if value is not None:
                self.values[row["step"]] = value

    def _value(self, row: Row) -> float | None:
        if self.training:
            return number(row.get(self.metric))
        return number(row["values"].get(self._figure)) if row["name"] == self._name else None
