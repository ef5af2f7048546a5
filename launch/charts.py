"""Charts as SVG text, drawn by hand: no script is needed to read them, and a page of them needs no network.

Colours are CSS variables (`--run-0` and on), so that a page can have a light and a dark look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

WIDTH, HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
COLOURS = 8
"""Runs after these begin again with the first colour."""

POINTS = 600
"""Most points of a line: more can't be told apart on a screen."""


@dataclass(frozen=True)
class Line:
    """One curve: its points in order of x, both finite."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A stretch of time in one lane: seconds since 1970."""

    lane: int
    start: float
    end: float
    label: str
    good: bool


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points that keep every stretch's lowest and highest: a spike of one step stays."""
    if len(points) <= most:
        return list(points)
    size = len(points) / (most // 2)
    kept: list[tuple[float, float]] = []
    for number in range(most // 2):
        stretch = points[int(number * size) : int((number + 1) * size)]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where they are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(exponents) > 3 else (1, 2, 5)
    found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
    return found if len(found) > 1 else ticks(low, high, 4)


def short(value: float) -> str:
    """1.2M, 350k, 0.0015, 3e-07."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.3g}{letter}"
    return "0" if not size else f"{value:.3g}"


def lines(
    title: str, series: Sequence[Line], *, x_name: str, unit: str = "", logarithmic: bool = False
) -> str:
    """A chart of curves over one axis; empty where there is nothing to draw."""
    series = [Line(s.name, s.colour, thinned(s.points)) for s in series if s.points]
    values = [y for s in series for _, y in s.points]
    if not values:
        return ""
    logarithmic = logarithmic and min(values) > 0 and max(values) > 3 * min(values)
    x_low, x_high = min(s.points[0][0] for s in series), max(s.points[-1][0] for s in series)
    y_low, y_high = _room(min(values), max(values), logarithmic)
    across = _scale(x_low, x_high, _LEFT, WIDTH - _RIGHT)
    up = _scale(y_low, y_high, HEIGHT - _BOTTOM, _TOP, logarithmic)
    marks = powers(y_low, y_high) if logarithmic else ticks(y_low, y_high)
    parts = [_grid([(up(value), short(value)) for value in marks], x_low, x_high, across, x_name)]
    for each in series:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in each.points)
        dots = (
            "".join(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in each.points)
            if len(each.points) <= 40
            else ""
        )
        parts.append(
            f'<g class="line" style="--c:var(--run-{each.colour % COLOURS})" data-name="{escape(each.name)}">'
            f'<polyline points="{path}"/>{dots}</g>'
        )
    return _figure(title, unit, _said(series, unit), "".join(parts), _data(series, across, up))


def _said(series: Sequence[Line], unit: str) -> str:
    """What a reader who can't see the chart is told."""
    told = (f"{s.name} from {short(s.points[0][1])} to {short(s.points[-1][1])}{unit}" for s in series[:6])
    return "; ".join(told)


def _data(series: Sequence[Line], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """Points for the pointer: name, colour, and (place, x, y) of each."""
    rows = [
        f'{{"n":{_json(s.name)},"c":{s.colour % COLOURS},"p":['
        + ",".join(f'[{across(x):.1f},{up(y):.1f},"{short(x)}","{y:.4g}"]' for x, y in s.points)
        + "]}"
        for s in series
    ]
    return f'<script type="application/json">[{",".join(rows)}]</script>'


def _json(text: str) -> str:
    return json.dumps(text).replace("<", "\\u003c").replace("&", "\\u0026")


def _room(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        return low / 1.1, high * 1.1
    space = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low - space if low < 0 or low - space > 0 else 0.0), high + space


def _scale(
    low: float, high: float, start: float, end: float, logarithmic: bool = False
) -> Callable[[float], float]:
    def place(value: float) -> float:
        a, b, v = (math.log(low), math.log(high), math.log(value)) if logarithmic else (low, high, value)
        return start + (end - start) * ((v - a) / (b - a) if b > a else 0.5)

    return place


def _grid(
    marks: Sequence[tuple[float, str]], low: float, high: float, across: Callable[[float], float], name: str
) -> str:
    parts = [
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for y, text in marks
    ]
    base = HEIGHT - _BOTTOM
    for value in ticks(low, high, 4):
        x = across(value)
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{short(value)}</text>')
    parts.append(
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end" class="name">{escape(name)}</text>'
    )
    return "".join(parts)


def _figure(title: str, unit: str, said: str, body: str, data: str = "", height: int = HEIGHT) -> str:
    named = f"{title} ({unit.strip()})" if unit.strip() else title
    return (
        f'<figure class="chart"><figcaption>{escape(named)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{named}: {said}")}">{body}'
        f"</svg>{data}</figure>"
    )


def timeline(title: str, lanes: Sequence[str], bars: Sequence[Bar]) -> str:
    """Bars over the clock, a lane for each run; what lies between two bars is time that nothing trained."""
    if not bars:
        return ""
    low, high = min(bar.start for bar in bars), max(bar.end for bar in bars)
    across = _scale(low, max(high, low + 1), 12, WIDTH - 12)
    height = 30 + 34 * len(lanes)
    parts = []
    for number, name in enumerate(lanes):
        parts.append(f'<text x="12" y="{number * 34 + 13}">{escape(name)}</text>')
    for bar in bars:
        x, width = across(bar.start), max(across(bar.end) - across(bar.start), 2.0)
        kind = "good" if bar.good else "bad"
        parts.append(
            f'<rect x="{x:.1f}" y="{bar.lane * 34 + 18}" width="{width:.1f}" height="12" class="{kind}">'
            f"<title>{escape(bar.label)}</title></rect>"
        )
    for place, anchor in ((low, "start"), (high, "end")):
        when = datetime.fromtimestamp(place, UTC).strftime("%d %b %H:%M")
        parts.append(f'<text x="{across(place):.1f}" y="{height - 6}" text-anchor="{anchor}">{when}</text>')
    said = (
        f"{len(bars)} attempts of {len(lanes)} runs, {sum(not bar.good for bar in bars)} of them interrupted"
    )
    return _figure(title, "", said, "".join(parts), height=height)
