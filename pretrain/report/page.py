"""The page: a template filled with what was drawn, everything inside of one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from pretrain.report import charts, table
from pretrain.report.charts import SHARES, Chart, Shares
from pretrain.report.curves import Axis, Line, area, path, short, spread
from pretrain.report.reading import Floats, Found, Picture, Run, told_apart
from pretrain.report.table import span

WIDE, HIGH = 1000, 300
"""Of a chart's own coordinates. The page stretches them; text isn't in them, so it keeps its size."""

COLOURS = 8
"""Colours there are for runs; the next runs have the same with lines of another kind."""

_LABEL = 12  # letters of a name beside a chart
_STROKES = 4  # kinds of lines: solid, dashed, dotted, both
_MANY = 6  # runs from which on a row says where the time went, in place of a chart

_APART = 0.085  # of a chart's height: a line of text
_TABLE_ROWS = 12
_DOTS = 60
_PICTURE_SIDE = 640  # CSS pixels
_WITH_WORDS, _LEGIBLE = frozenset({"similarities"}), 560
_STEPS_SHOWN = 6  # of a picture, evenly from the first to the newest

CAPTIONS = {
    "reconstructions": "Each row: the image, what was left visible, what the model rebuilt.",
    "neighbours": "Each row: an image, then those whose features are nearest to its own, nearest first. "
    "Framed where it is of another class.",
    "similarities": "Cosine of each caption (down) and each image (across): the diagonal should be darkest. "
    "The nearest image of each caption is framed.",
    "attention": "Each image, and beside it as bright as the last block attends to it.",
    "components": "Each image, and beside it the first three principal components of its patches' features "
    "as colours: what looks alike to the encoder has one colour.",
}
"""What is to be seen, by a picture's name."""


def render(found: Found) -> str:
    """The whole page about some runs as HTML."""
    runs = found.runs
    folder = files("pretrain.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text()),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = short
    shares = [each for n, run in enumerate(runs) if (each := charts.time_shares(n, run)) is not None]
    return environment.get_template("page.html").render(
        runs=[_run(number, run) for number, run in enumerate(runs)],
        columns=table.columns(runs),
        shared=table.shared(runs),
        left_out=found.left_out,
        charts=[_drawn(chart, f"main{n}") for n, chart in enumerate(charts.main_charts(runs))],
        shares=[_drawn_shares(each, runs[each.run]) for each in shares],
        share_names=SHARES,
        shares_as_table=len(runs) >= _MANY,
        evaluations=[_drawn(chart, f"eval{n}") for n, chart in enumerate(charts.evaluation_charts(runs))],
        own=[_drawn(chart, f"own{n}") for n, chart in enumerate(charts.own_charts(runs))],
        timeline=_timeline(runs),
        pictures=_pictures(runs),
        differences=table.differences(runs),
        style=Markup((folder / "page.css").read_text()),
        script=Markup((folder / "page.js").read_text()),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _run(number: int, run: Run) -> dict[str, Any]:
    return {
        "number": number, "style": _style(number), "name": run.name, "full": run.full, "status": run.status,
        "failed": run.failed, "note": run.note,
        "settings": {path: table.text_of(value) for path, value in run.settings.items()},
    }  # fmt: skip


def _style(number: int) -> str:
    """Classes of a run's colour and, beyond as many as there are colours, of the kind of its line."""
    return f"c{number % COLOURS} d{number // COLOURS % _STROKES}"


def _drawn(chart: Chart, identity: str) -> dict[str, Any]:
    """Everything of a chart as numbers and paths; places as percentages of its width and height."""
    x, y = chart.x, chart.y
    ends = [min(1.0, max(0.0, float(y.place(np.array([line.last]))[0]))) for line in chart.lines]
    labels = spread([1 - end for end in ends], _APART)
    brief = told_apart([line.name for line in chart.lines])
    lines = [
        _drawn_line(line, x, y, chart.marked) | {"at": 100 * top, "brief": _middle_out(name)}
        for line, top, name in zip(chart.lines, labels, brief, strict=True)
    ]
    return {
        "id": identity,
        "title": chart.title,
        "meaning": ", ".join(filter(None, [chart.meaning, "logarithmic" if y.log else ""])),
        "lines": lines,
        "crowded": len(chart.lines) > COLOURS,
        "notes": _notes(chart),
        "smooth": not chart.marked,
        "x_ticks": _ticks(x),
        "y_ticks": _ticks(y),
        "said": f"{chart.title} over samples. " + " ".join(_said(line) for line in chart.lines),
        "table": [(line.name, _table(line)) for line in chart.lines],
        "data": {
            "x": [x.low, x.high], "y": [y.low, y.high], "log": y.log,
            "lines": [
                {"name": line.name, "run": line.colour, "x": _plain(line.x), "y": _plain(line.y)}
                for line in chart.lines
            ],
        },
    }  # fmt: skip


def _middle_out(name: str) -> str:
    """A name that fits beside a chart: its beginning and its end, which is what mostly tells it apart."""
    return name if len(name) <= _LABEL else f"{name[:2]}\u2026{name[3 - _LABEL :]}"


def _drawn_line(line: Line, x: Axis, y: Axis, marked: bool) -> dict[str, Any]:
    across = x.place(line.x) * WIDE
    known: Any = np.flatnonzero(np.isfinite(line.y)) if marked else []
    # What leaves the scale runs along its edge.
    mean, low, high = ((1 - y.place(v).clip(0, 1)) * HIGH for v in (line.y, line.low, line.high))
    bundled = bool(np.nanmax(line.high - line.low) > 0)
    return {
        "name": line.name, "run": line.colour, "style": _style(line.colour),
        "path": path(across, mean), "band": area(across, low, high) if bundled else "",
        "dots": [(100 * across[place] / WIDE, 100 * mean[place] / HIGH) for place in known[-_DOTS:]],
        "last": short(line.last), "lost": line.lost,
    }  # fmt: skip


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    values = axis.ticks()
    return [
        (100 * float(place), short(value))
        for place, value in zip(axis.place(np.array(values)), values, strict=True)
    ]


def _notes(chart: Chart) -> list[str]:
    """What the lines don't show: runs without a finite value, values that are lost, lines off the scale."""
    found = [
        f"{line.name} leaves the scale: up to {short(float(np.nanmax(line.high)))}" for line in chart.beyond
    ]
    lost = [f"{line.name} ({line.lost})" for line in chart.lines if line.lost]
    if lost:
        found.append(f"values that aren't finite: {', '.join(lost)}")
    if chart.absent:
        found.append(f"no finite value: {', '.join(chart.absent)}")
    return found


def _said(line: Line) -> str:
    finite = line.y[np.isfinite(line.y)]
    lost = f", {line.lost} values not finite" if line.lost else ""
    span = f"from {short(float(finite[0]))} to {short(float(finite[-1]))}"
    return (
        f"{line.name}: {span}, between {short(np.nanmin(line.low))} and {short(np.nanmax(line.high))}{lost}."
    )


def _table(line: Line) -> list[tuple[str, str]]:
    """Some of a line's points, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(line.x) - 1, min(_TABLE_ROWS, len(line.x))).astype(int))
    return [(short(float(line.x[place])), short(float(line.y[place]))) for place in chosen]


def _plain(values: Floats) -> list[float | None]:
    """For JSON, to six digits."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def _drawn_shares(shares: Shares, run: Run) -> dict[str, Any]:
    across = shares.x.place(shares.edges) * WIDE
    steps = np.repeat(across, 2)[1:-1]
    tops = np.concatenate([np.zeros((len(shares.shares), 1)), shares.shares.cumsum(axis=1)], axis=1)
    edges = [np.repeat((1 - top) * HIGH, 2) for top in tops.T]
    parts = [f"{share:.1%} {name}" for name, share in zip(SHARES, shares.total, strict=True)]
    return {
        "name": run.name,
        "run": shares.run,
        "style": _style(shares.run),
        "parts": [float(share) for share in shares.total],
        "areas": [area(steps, lower, upper) for lower, upper in pairwise(edges)],
        "totals": [f"{share:.1%}" for share in shares.total],
        "x_ticks": _ticks(shares.x),
        "said": f"Where the time of {run.name} went: {', '.join(parts)}.",
    }


def _timeline(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Attempts of all runs on one clock, which leaves out nothing."""
    attempts = [attempt for run in runs for attempt in run.attempts]
    if not attempts:
        return None
    first, last = min(a.started for a in attempts), max(a.ended for a in attempts)
    length = max(last - first, 1.0)
    rows = []
    for number, run in enumerate(runs):
        bars = [
            {
                "left": 100 * (a.started - first) / length, "width": 100 * (a.ended - a.started) / length,
                "number": a.number, "reason": a.reason, "told": a.told,
                "began": datetime.fromtimestamp(a.started, UTC).strftime("%Y-%m-%d %H:%M:%S"),
                "lasted": span(a.ended - a.started),
                "calm": a.reason in ("done", "running"),
            }
            for a in run.attempts
        ]  # fmt: skip
        pauses = [span(later.started - a.ended) for a, later in pairwise(run.attempts)]
        rows.append({"name": run.name, "run": number, "bars": bars, "pauses": [*pauses, ""]})
    unit, name = next(
        (unit, name)
        for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if length >= 2 * unit or unit == 1
    )
    return {"rows": rows, "ticks": _ticks(Axis(0.0, length / unit)), "unit": name}


@dataclass(frozen=True)
class _Shown:
    """One version of a picture, inside of the page."""

    label: str
    source: str  # data: URL
    width: int
    height: int
    across: int  # CSS pixels at most, so that a tall sheet isn't higher than a screen
    least: int  # CSS pixels at least: words stay legible on a phone, where the sheet is scrolled
    alt: str
    captions: Sequence[str]  # that belong to it, in the letters they were written in


def _pictures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """By name, then by run, then by step, the newest last."""
    names = dict.fromkeys([*CAPTIONS, *sorted(name for run in runs for name in run.pictures)])
    found = []
    for name in names:
        shown = [
            {
                "name": run.name,
                "run": number,
                "style": _style(number),
                "steps": [_shown(name, run, each) for each in chosen],
            }
            for number, run in enumerate(runs)
            if (chosen := _some(run.pictures.get(name, ())))
        ]
        if shown:
            found.append({"title": name, "caption": CAPTIONS.get(name, ""), "runs": shown})
    return found


def _some(pictures: Sequence[Picture]) -> list[Picture]:
    if not pictures:
        return []
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(_STEPS_SHOWN, len(pictures))).astype(int))
    return [pictures[place] for place in chosen]


def _shown(name: str, run: Run, picture: Picture) -> _Shown:
    label = f"step {picture.step}" if picture.step is not None else "after training"
    said = CAPTIONS.get(name, "")
    return _Shown(
        label=label,
        source="data:image/png;base64," + base64.b64encode(picture.path.read_bytes()).decode(),
        width=picture.width,
        height=picture.height,
        across=round(_PICTURE_SIDE * min(1.0, max(0.35, picture.width / picture.height))),
        least=min(picture.width, _LEGIBLE) if name in _WITH_WORDS else 0,
        alt=f"{name} of {run.name}, {label}. {said}".strip(),
        captions=run.captions.get((name, picture.step), ()) if picture.step is not None else (),
    )
