"""Lines for a screen from columns of any length, and the axes they are drawn on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.report.reading import UNKNOWN, Floats

POINTS = 300
"""Points of a line at most: a phone has as many pixels across, a desktop's chart twice as many."""


@dataclass(frozen=True)
class Line:
    """A column over samples, thinned to at most `POINTS` places; a place without a finite value is NaN."""

    name: str
    colour: int  # the run's number
    x: Floats  # (P,) rising
    y: Floats  # (P,) mean of what lies at each place
    low: Floats  # (P,) smallest of it
    high: Floats  # (P,) largest of it
    lost: int  # values that weren't finite

    @property
    def last(self) -> float:
        """The newest finite value."""
        return float(self.y[np.isfinite(self.y)][-1])


def thinned(name: str, colour: int, x: Floats, y: Floats, points: int = POINTS) -> Line | None:
    """`y` over `x`, both (N,), in equally long stretches of rows; None without a finite value.

    Mean, smallest and largest of each stretch are kept, so that no spike is lost.
    """
    known = np.isfinite(x)
    x, y = x[known], y[known]
    finite = np.isfinite(y)
    if not finite.any():
        return None
    cuts = np.unique(np.linspace(0, len(x), min(points, len(x)) + 1).astype(int))
    starts = cuts[:-1]
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    empty = counts == 0

    def each(function: np.ufunc, filler: float) -> Floats:
        found = function.reduceat(np.where(finite, y, filler), starts).astype(np.float64)
        found[empty] = np.nan
        return found

    places = np.add.reduceat(x, starts) / np.diff(cuts)
    # The line ends where the run does, not in the middle of the last stretch.
    places[0], places[-1] = x[0], x[-1]
    mean = each(np.add, 0.0) / np.where(empty, 1, counts)
    return Line(
        name, colour, places, mean, each(np.minimum, np.inf), each(np.maximum, -np.inf), int((~finite).sum())
    )


@dataclass(frozen=True)
class Axis:
    """From low to high; a share of its length for every value."""

    low: float
    high: float
    log: bool = False

    def place(self, values: Floats) -> Floats:
        """0 at the low end, 1 at the high end."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        scaled = np.log10(np.maximum(values, self.low)) if self.log else values
        placed: Floats = (scaled - low) / (high - low)
        return placed

    def ticks(self, about: int = 4) -> list[float]:
        """Round values within the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, -(-(last - first + 1) // (about + 2)))
            return [10.0**power for power in range(first, last + 1, every)]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((power * nice for nice in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def axis_over(lines: Sequence[Line], *, log: bool | None = None, zero: bool = False) -> Axis:
    """The axis that shows all of `lines`: logarithmic where they span more than a factor of 30.

    `zero`: from nothing, as amounts are to be read.
    """
    low = min(float(np.nanmin(line.low)) for line in lines)
    high = max(float(np.nanmax(line.high)) for line in lines)
    if log is None:
        # The first steps of a run are left out: their height is seen on either scale.
        usual = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
        bottom, top = np.quantile(usual, [0.02, 0.98])
        log = bool(low > 0 and top > 30 * bottom)
    if log and low > 0:
        return decades(low, high)
    if zero:
        low = min(low, 0.0)
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    room = (high - low) * 0.04
    return Axis(low if zero and low == 0 else low - room, high + room)


def decades(low: float, high: float) -> Axis:
    """A logarithmic axis from a whole power of ten to another, or at least one tick would be missing."""
    return Axis(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9), log=True)


def beyond(lines: Sequence[Line]) -> list[Line]:
    """Those of three or more lines that would flatten all others: usually 30 times as large as most.

    At most a half of them, so that what is usual stays the measure.
    """
    if len(lines) < 3:
        return []
    sizes = [float(np.quantile(np.abs(line.y[np.isfinite(line.y)]), 0.9)) for line in lines]
    middle = float(np.median(sizes))
    return [line for line, size in zip(lines, sizes, strict=True) if size > 30 * max(middle, 1e-300)]


def path(x: Floats, y: Floats) -> str:
    """An SVG path through the points, both (P,) in pixels; it breaks where a value is NaN.

    A point between two breaks is drawn as a short stroke, so that it can be seen.
    """
    parts, drawing = [], False
    finite = np.isfinite(y)
    for place, known in enumerate(finite.tolist()):
        if not known:
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{x[place]:.1f} {y[place]:.1f}")
        alone = not drawing and not finite[place + 1 : place + 2].any()
        if alone:
            parts.append("h0.1")
        drawing = True
    return "".join(parts)


def area(x: Floats, low: Floats, high: Floats) -> str:
    """An SVG path around what lies between two lines; places without a value are left out."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() < 2:
        return ""
    there = [f"{a:.1f} {b:.1f}" for a, b in zip(x[known], high[known], strict=True)]
    back = [f"{a:.1f} {b:.1f}" for a, b in zip(x[known][::-1], low[known][::-1], strict=True)]
    return "M" + "L".join([*there, *back]) + "Z"


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Places in [0, 1] near to `wanted`, at least `apart` from each other while there is room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    apart = min(apart, 1 / max(1, len(wanted)))
    placed: list[float] = []
    for number in order:
        placed.append(max(wanted[number], placed[-1] + apart) if placed else max(wanted[number], 0.0))
    ceiling = 1.0
    for place in reversed(range(len(placed))):
        placed[place] = ceiling = min(placed[place], ceiling)
        ceiling -= apart
    found = [0.0] * len(wanted)
    for number, value in zip(order, placed, strict=True):
        found[number] = value
    return found


def short(value: float) -> str:
    """A number as an axis or a label shows it, to three digits: 12.8M, 0.45, 4.5e-4, 2.5e19."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 0.9995e15:
        return _power(f"{value:.2e}")
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit * 0.9995:
            return f"{value / (1e3 if name == 'k' else unit):.3g}{name}"
    if size < 1e-4:
        return _power(f"{value:.2e}")
    return f"{value:.4g}"


def _power(text: str) -> str:
    """2.50e+19 -> 2.5e19."""
    digits, power = text.split("e")
    return f"{float(digits):g}e{int(power)}"
