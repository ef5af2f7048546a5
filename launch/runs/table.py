"""The table of runs as text: plain columns, since a rich one takes a millisecond a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.runs.registry import Run

_TITLES = (
    "run",
    "objective",
    "state",
    "step",
    "loss",
    "best",
    "samples/s",
    "ETA",
    "restarts",
    "host",
    "note",
)
_RIGHT = frozenset({"step", "loss", "samples/s", "ETA", "restarts"})
_COLOURS = {"failed": 31, "lost": 31, "stale": 33, "running": 32, "requeued": 33, "done": 2}


def table(found: Sequence[Run], *, width: int | None = None, colour: bool = False) -> str:
    """A line a run below a line of titles; columns that are empty throughout are left out.

    `width`: of the screen, at which notes are cut off.
    """
    cells = [_cells(run) for run in found]
    kept = [n for n, title in enumerate(_TITLES) if n == 0 or any(row[n] for row in cells)]
    wide = {n: max(len(_TITLES[n]), *(len(row[n]) for row in cells), 0) for n in kept}
    lines = []
    for number, row in enumerate([_TITLES, *cells]):
        padded = [row[n].rjust(wide[n]) if _TITLES[n] in _RIGHT else row[n].ljust(wide[n]) for n in kept]
        line = "  ".join(padded).rstrip()[:width]
        code = _COLOURS.get(found[number - 1].state) if number and colour else None
        lines.append(line if code is None else f"\x1b[{code}m{line}\x1b[0m")
    return "\n".join(lines)


def summary(found: Sequence[Run]) -> str:
    """How many there are of each state."""
    states = [run.state for run in found]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(found)} runs" + (f": {', '.join(counts)}" if counts else "")


def _cells(run: Run) -> tuple[str, ...]:
    return (
        run.name,
        run.objective,
        run.state,
        f"{run.step}/{run.total}" if run.total else str(run.step or ""),
        number(run.loss),
        f"{run.best.metric} {run.best.value:.4g}" if run.best else "",
        number(run.samples_per_second),
        duration(run.eta),
        str(run.restarts or ""),
        run.host,
        run.note,
    )


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """To a person's precision: "8 s", "12 min", "3 h 07", "2 d 04 h"."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d} h"
    return f"{hours} h {minutes:02d}" if hours else f"{minutes} min" if minutes else f"{rest} s"
