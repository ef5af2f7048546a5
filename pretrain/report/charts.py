"""Which charts a report has, and what is drawn in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.report.curves import Axis, Line, axis_over, beyond, decades, thinned
from pretrain.report.reading import UNKNOWN, Floats, Run

SHARES = ("computing", "waiting for data", "saving", "evaluating and all else")
"""What the time of a run goes into."""

_BINS = 60
_APART = 20.0  # lines whose largest values lie further apart aren't drawn on one linear scale


@dataclass(frozen=True)
class Chart:
    """Lines of some runs over the samples they have seen."""

    title: str
    meaning: str
    lines: Sequence[Line]
    x: Axis  # samples
    y: Axis
    marked: bool = False  # each point is a measurement of its own, to be seen as one
    beyond: Sequence[Line] = ()  # of the lines, those that leave the scale, which the others would be flat on
    absent: Sequence[str] = ()  # runs that have this figure, but never a finite one


@dataclass(frozen=True)
class Shares:
    """Where the time of one run went, in stretches of its samples."""

    run: int
    x: Axis
    edges: Floats  # (B + 1,) samples
    shares: Floats  # (B, len(SHARES)): of each stretch's wall time, adding up to 1
    total: Floats  # (len(SHARES),): of the whole run's


_MAIN = (
    ("loss", "Loss", "mean over the global batch", False, True),
    ("lr", "Learning rate", "of each step", True, False),
    ("grad_norm", "Gradient norm", "global L2 norm before clipping", False, True),
    ("samples_per_second", "Throughput", "samples a second, all ranks together", True, False),
)
"""Column, title, meaning, from nothing, a chart for each objective: their losses have no common scale."""


def main_charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss, learning rate, gradient norm and throughput."""
    found: list[Chart] = []
    for column, title, meaning, zero, apart in _MAIN:
        groups = by_objective(runs) if apart else {"": range(len(runs))}
        for objective, numbers in groups.items():
            lines, absent = _lines(runs, {n: runs[n].columns.get(column) for n in numbers})
            named = f"{title}, {objective}" if len(groups) > 1 else title
            found += _chart(named, meaning, lines, absent, zero=zero, log=False if zero else None)
    return found


def by_objective(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Numbers of the runs that train by each objective, in order of their first."""
    found: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        found.setdefault(str(run.settings.get("objective.name", UNKNOWN)), []).append(number)
    return found


def own_charts(runs: Sequence[Run]) -> list[Chart]:
    """The objectives' own metrics, by name."""
    names = dict.fromkeys(name for run in runs for name in run.columns if name.startswith("objective/"))
    found: list[Chart] = []
    for name in names:
        lines, absent = _lines(runs, {n: run.columns.get(name) for n, run in enumerate(runs)})
        found += _chart(name.removeprefix("objective/").replace("_", " "), "", lines, absent)
    return found


def evaluation_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each score of each evaluation."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for number, run in enumerate(runs):
        for row in run.evaluations:
            for name, value in row["values"].items():
                own = points.setdefault(f"{row['name']} / {name}", {}).setdefault(number, [])
                own.append((float(row.get("samples", row["step"])), value))
    found: list[Chart] = []
    for title, by_run in points.items():
        lines = [
            thinned(runs[number].name, number, *np.array(sorted(own), dtype=np.float64).T)
            for number, own in by_run.items()
        ]
        absent = [runs[n].name for n, line in zip(by_run, lines, strict=True) if line is None]
        known = [line for line in lines if line is not None]
        found += _chart(title, "", known, absent, log=False, marked=True)
    return found


def _lines(runs: Sequence[Run], columns: Mapping[int, Floats | None]) -> tuple[list[Line], list[str]]:
    """Lines, and the names of runs whose column has no finite value."""
    found, absent = list[Line](), list[str]()
    for number, column in columns.items():
        if column is None or "samples" not in runs[number].columns:
            continue
        line = thinned(runs[number].name, number, runs[number].columns["samples"], column)
        if line is None:
            absent.append(runs[number].name)
        else:
            found.append(line)
    return found, absent


def _chart(
    title: str,
    meaning: str,
    lines: Sequence[Line],
    absent: Sequence[str],
    *,
    zero: bool = False,
    log: bool | None = None,
    marked: bool = False,
) -> Iterable[Chart]:
    if lines:
        out = beyond(lines)
        away = {line.colour for line in out}
        usual = [line for line in lines if line.colour not in away]
        axis = axis_over(usual, zero=zero, log=log)
        tops = [float(np.nanmax(line.high)) for line in usual]
        if zero and min(tops) > 0 and max(tops) > _APART * min(tops):
            # From nothing, as amounts are read, all but the largest would lie on the floor.
            axis = decades(min(tops) / 10, max(tops))
        yield Chart(title, meaning, lines, samples_axis(lines), axis, marked, out, absent)


def samples_axis(lines: Sequence[Line]) -> Axis:
    """From nothing to the last sample; a fork's begins where it does."""
    low, high = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    return Axis(float(low) if low > high / 2 > 0 and low < high else 0.0, float(max(high, 1.0)))


def time_shares(number: int, run: Run) -> Shares | None:
    """Where the wall time went; None for a run with too few rows to tell.

    Between two rows of an attempt a step's `seconds`, of which `data_wait` is waiting, count as many times as
    there were steps; a save's stall is told by the row after it; the rest is evaluating, drawing, logging.
    """
    if not {"attempt", "step", "samples", "time", "seconds", "data_wait"} <= run.columns.keys():
        return None
    column = run.columns
    same = np.diff(column["attempt"]) == 0
    passed, steps = np.diff(column["time"]), np.diff(column["step"])
    waited = column["data_wait"][1:] * steps
    computed = column["seconds"][1:] * steps - waited
    saved = np.nan_to_num(column.get("checkpoint_stall", np.zeros(len(same) + 1))[1:])
    rest = passed - computed - waited - saved
    parts = np.stack([computed, waited, saved, np.maximum(rest, 0)], axis=1)
    good = same & np.isfinite(parts).all(axis=1) & (parts >= 0).all(axis=1)
    if good.sum() < 2:
        return None
    parts, start, end = parts[good], column["samples"][:-1][good], column["samples"][1:][good]
    cuts = np.unique(np.linspace(0, len(parts), min(_BINS, len(parts)) + 1).astype(int))
    binned = np.add.reduceat(parts, cuts[:-1], axis=0)
    edges = np.append(start[cuts[:-1]], end[-1])
    whole = binned.sum(axis=1, keepdims=True)
    total = parts.sum(axis=0)
    shares = binned / np.where(whole > 0, whole, 1)
    return Shares(number, Axis(0.0, float(edges[-1])), edges, shares, total / max(total.sum(), 1e-12))
