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

from pretrain.report import charts
from pretrain.report.charts import SHARES, Chart, Shares
from pretrain.report.curves import UNKNOWN, Axis, Line, area, path, short, spread
from pretrain.report.reading import Floats, Picture, Run

WIDE, HIGH = 1000, 300
"""Of a chart's own coordinates. The page stretches them; text isn't in them, so it keeps its size."""

COLOURS = 8
"""Colours there are for runs; the next runs have the same with dashed lines."""

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


def render(runs: Sequence[Run]) -> str:
    """The whole page about `runs` as HTML."""
    folder = files("pretrain.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text()),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = short
    environment.filters["span"] = _span
    shares = [found for n, run in enumerate(runs) if (found := charts.time_shares(n, run)) is not None]
    return environment.get_template("page.html").render(
        runs=[_summary(number, run) for number, run in enumerate(runs)],
        charts=[_drawn(chart, f"main{n}") for n, chart in enumerate(charts.main_charts(runs))],
        shares=[_drawn_shares(each, runs[each.run]) for each in shares],
        share_names=SHARES,
        evaluations=[_drawn(chart, f"eval{n}") for n, chart in enumerate(charts.evaluation_charts(runs))],
        own=[_drawn(chart, f"own{n}") for n, chart in enumerate(charts.own_charts(runs))],
        timeline=_timeline(runs),
        pictures=_pictures(runs),
        differences=_differences(runs),
        style=Markup((folder / "page.css").read_text()),
        script=Markup((folder / "page.js").read_text()),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _summary(number: int, run: Run) -> dict[str, Any]:
    """The facts at the top of the page."""
    columns, state = run.columns, run.state
    speed = columns.get("samples_per_second", np.zeros(0))
    loss = columns.get("loss", np.zeros(0))
    trained = sum(attempt.ended - attempt.started for attempt in run.attempts)
    done, total = state.get("step"), state.get("total_steps")
    return {
        "colour": number % COLOURS,
        "dashed": number >= COLOURS,
        "name": run.name,
        "facts": {
            "Objective": run.settings.get("objective.name", UNKNOWN),
            "Encoder": run.settings.get("encoder.name", UNKNOWN),
            "Status": state.get("status", UNKNOWN),
            "Steps": f"{UNKNOWN if done is None else done} of {UNKNOWN if total is None else total}",
            "Samples": short(float(state["samples"])) if "samples" in state else UNKNOWN,
            "Last loss": short(float(loss[-1])) if len(loss) else UNKNOWN,
            "Samples a second": short(float(np.nanmedian(speed))) if np.isfinite(speed).any() else UNKNOWN,
            "Trained for": _span(trained),
            "Attempts": str(len(run.attempts)),
            "Commit": str(state.get("commit") or UNKNOWN)[:12],
        },
        "settings": {path: _value(value) for path, value in run.settings.items()},
    }


def _drawn(chart: Chart, identity: str) -> dict[str, Any]:
    """Everything of a chart as numbers and paths; places as percentages of its width and height."""
    x, y = chart.x, chart.y
    ends = [float(y.place(np.array([line.last]))[0]) for line in chart.lines]
    labels = spread([1 - end for end in ends], _APART)
    lines = [
        _drawn_line(line, x, y, chart.marked) | {"at": 100 * top}
        for line, top in zip(chart.lines, labels, strict=True)
    ]
    return {
        "id": identity,
        "title": chart.title,
        "meaning": ", ".join(filter(None, [chart.meaning, "logarithmic" if y.log else ""])),
        "lines": lines,
        "x_ticks": _ticks(x),
        "y_ticks": _ticks(y),
        "said": f"{chart.title} over samples. " + " ".join(_said(line) for line in chart.lines),
        "table": [(line.name, _table(line)) for line in chart.lines],
        "data": {
            "x": [x.low, x.high], "y": [y.low, y.high], "log": y.log,
            "lines": [{"name": line.name, "x": _plain(line.x), "y": _plain(line.y)} for line in chart.lines],
        },
    }  # fmt: skip


def _drawn_line(line: Line, x: Axis, y: Axis, marked: bool) -> dict[str, Any]:
    across = x.place(line.x) * WIDE
    known: Any = np.flatnonzero(np.isfinite(line.y)) if marked else []
    mean, low, high = ((1 - y.place(values)) * HIGH for values in (line.y, line.low, line.high))
    bundled = bool(np.nanmax(line.high - line.low) > 0)
    return {
        "name": line.name, "colour": line.colour % COLOURS, "dashed": line.colour >= COLOURS,
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
        "colour": shares.run % COLOURS,
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
                "lasted": _span(a.ended - a.started),
                "calm": a.reason in ("done", "running"),
            }
            for a in run.attempts
        ]  # fmt: skip
        pauses = [_span(later.started - a.ended) for a, later in pairwise(run.attempts)]
        rows.append({"name": run.name, "colour": number % COLOURS, "bars": bars, "pauses": [*pauses, ""]})
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


def _pictures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """By name, then by run, then by step, the newest last."""
    names = dict.fromkeys([*CAPTIONS, *sorted(name for run in runs for name in run.pictures)])
    found = []
    for name in names:
        shown = [
            {
                "name": run.name,
                "colour": number % COLOURS,
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
    )


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that aren't the same in all runs; where they lie is no difference."""
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    sections = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    found = []
    for path_ in sorted(paths, key=lambda path: sections.index(path.partition(".")[0])):
        values = [_value(run.settings[path_]) if path_ in run.settings else UNKNOWN for run in runs]
        if len(set(values)) > 1 and path_ != "run.dir":
            found.append((path_, values))
    return found


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _span(seconds: float) -> str:
    """A duration in the two largest units that say something."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
