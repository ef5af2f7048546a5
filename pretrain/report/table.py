"""The table of runs, and what differs between them, as cells to be shown and sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.report.charts import by_objective
from pretrain.report.curves import short
from pretrain.report.reading import UNKNOWN, Run

MOST_SETTINGS = 12
"""Settings with a column in the table of runs; all that differ are further down."""

NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by; None comes last."""

    text: str
    order: float | str | None = None
    note: str = ""  # what a pointer that rests on it is told
    ill: bool = False  # to be marked


@dataclass(frozen=True)
class Column:
    """A cell for each run."""

    title: str
    cells: Sequence[Cell]
    note: str = ""
    number: bool = False


@dataclass(frozen=True)
class Differences:
    """Settings that aren't the same in all runs."""

    within: Sequence[tuple[str, Sequence[str]]] = ()  # differ between runs of one objective: path, by run
    objectives: Sequence[str] = ()
    between: Sequence[
        tuple[str, Sequence[str]]
    ] = ()  # the same in all runs of an objective: path, by objective


def columns(runs: Sequence[Run]) -> list[Column]:
    """How each run stands, the settings that vary, its evaluations, and what else is known of it."""
    return [
        Column("State", [_state(run) for run in runs]),
        Column("Steps", [_steps(run) for run in runs], number=True),
        Column("Last loss", [_loss(run) for run in runs], "of the newest row of metrics", number=True),
        *_settings(runs),
        *_evaluations(runs),
        *_facts(runs),
    ]


def _state(run: Run) -> Cell:
    return Cell(run.status, run.status, run.note, run.failed)


def _steps(run: Run) -> Cell:
    done, total = run.step, run.state.get("total_steps")
    shown = UNKNOWN if done is None else str(done)
    return Cell(f"{shown} of {total}" if isinstance(total, int) else shown, done)


def _loss(run: Run) -> Cell:
    return _figure(run.last("loss"))


def _figure(value: float | None, note: str = "") -> Cell:
    if value is None:
        return Cell(UNKNOWN, None, note)
    if not math.isfinite(value):
        return Cell(NOT_FINITE, None, note, ill=True)
    return Cell(short(value), value, note)


def _settings(runs: Sequence[Run]) -> list[Column]:
    """Of the settings that vary between runs of one objective."""
    found = differences(runs).within[:MOST_SETTINGS] if len(runs) > 1 else ()
    paths = [path for path, _ in found]
    return [
        Column(_last_part(path, paths), [Cell(value, _order(value)) for value in values], path)
        for path, values in found
    ]


def _last_part(path: str, paths: Sequence[str]) -> str:
    """As much of the end of a dotted path as tells it from the others."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if sum(other == end or other.endswith("." + end) for other in paths) == 1:
            return end
    return path


def _order(value: str) -> float | str | None:
    if value == UNKNOWN:
        return None
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _evaluations(runs: Sequence[Run]) -> list[Column]:
    """The newest figure of each evaluation."""
    newest: dict[str, dict[int, tuple[int, float]]] = {}
    for number, run in enumerate(runs):
        for row in run.evaluations:
            for name, value in row["values"].items():
                newest.setdefault(f"{row['name']}/{name}", {})[number] = (row["step"], value)
    return [
        Column(
            title,
            [
                _figure(by_run[n][1], f"at step {by_run[n][0]}") if n in by_run else Cell(UNKNOWN)
                for n in range(len(runs))
            ],
            "the newest evaluation",
            number=True,
        )
        for title, by_run in newest.items()
    ]


def _facts(runs: Sequence[Run]) -> list[Column]:
    """What is left; what all of several runs have in common is said once, by `shared`."""
    found = [
        Column("Objective", [_text(run.settings.get("objective.name")) for run in runs]),
        Column("Encoder", [_text(run.settings.get("encoder.name")) for run in runs]),
        Column("Samples", [_count(run.samples) for run in runs], number=True),
        Column("Samples a second", [_speed(run) for run in runs], "the median", number=True),
        Column("Trained for", [_trained(run) for run in runs], number=True),
        Column("Attempts", [_count(len(run.attempts)) for run in runs], number=True),
        Column("Commit", [_text(str(run.state.get("commit") or UNKNOWN)[:12]) for run in runs]),
    ]
    common = shared(runs)
    return [column for column in found if column.title not in common]


def shared(runs: Sequence[Run]) -> dict[str, str]:
    """Objective, encoder and commit where they are the same in all of several runs."""
    facts: dict[str, Callable[[Run], object]] = {
        "Objective": lambda run: run.settings.get("objective.name"),
        "Encoder": lambda run: run.settings.get("encoder.name"),
        "Commit": lambda run: str(run.state.get("commit") or "")[:12] or None,
    }
    found = {}
    for name, of in facts.items():
        values = {of(run) for run in runs}
        if len(runs) > 1 and len(values) == 1 and None not in values:
            found[name] = str(values.pop())
    return found


def _text(value: object) -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(str(value), str(value))


def _count(value: int | None) -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(short(float(value)), value)


def _speed(run: Run) -> Cell:
    speed = run.columns.get("samples_per_second", np.zeros(0))
    return _figure(float(np.nanmedian(speed)) if np.isfinite(speed).any() else None)


def _trained(run: Run) -> Cell:
    seconds = sum(attempt.ended - attempt.started for attempt in run.attempts)
    return Cell(span(seconds), seconds)


def differences(runs: Sequence[Run]) -> Differences:
    """What differs; where runs lie, and paths inside of their folders, are no difference."""
    paths = dict.fromkeys(path for run in runs for path in run.settings if path != "run.dir")
    sections = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    ordered = sorted(paths, key=lambda path: sections.index(path.partition(".")[0]))
    groups = by_objective(runs)
    within, between = [], []
    for path in ordered:
        values = [_value(run, path) for run in runs]
        if len(set(values)) == 1:
            continue
        by_group = [{values[number] for number in numbers} for numbers in groups.values()]
        if any(len(found) > 1 for found in by_group):
            within.append((path, values))
        else:
            between.append((path, [found.pop() for found in by_group]))
    # What varies as a sweep's settings do comes before what only some runs have at all.
    within.sort(key=lambda row: (-len(groups) if UNKNOWN not in row[1] else 0, -len(set(row[1]))))
    return Differences(within, list(groups), between)


def _value(run: Run, path: str) -> str:
    if path not in run.settings:
        return UNKNOWN
    told = run.settings[path]
    text = text_of(told)
    place = str(run.settings.get("run.dir") or run.root)
    return "RUN" + text[len(place) :] if isinstance(told, str) and text.startswith(place + "/") else text


def text_of(value: object) -> str:
    """A setting as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def span(seconds: float) -> str:
    """A duration in the two largest units that say something."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
