"""What run folders say, as a report needs it: of runs that still go on, too, and of other versions."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from configs.errors import RunError
from configs.loading import leaves
from pretrain.evaluators import schedule
from pretrain.folder import RunFolder
from pretrain.tracking.jsonl import each_row

Floats = npt.NDArray[np.float64]
# As the tracker of files and `keel evaluate kind=pictures` write them.
_PICTURE = re.compile(r"(?:step-(\d+)-|pictures-)?([\w-]+)\.png")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG file of RUN/pictures."""

    path: Path
    step: int | None  # None where its name doesn't say
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class Attempt:
    """From a start of a run to its end or interruption, in seconds since 1970."""

    number: int
    started: float
    ended: float
    reason: str  # "running" or "killed" where nothing was written
    told: Mapping[str, Any]  # run.json's own entry


@dataclass(frozen=True)
class Run:
    """A run, read once."""

    root: Path
    name: str  # as the page calls it; no other run on the page has it
    state: Mapping[str, Any]  # run.json
    settings: Mapping[str, Any]  # config.yaml: dotted path -> value
    columns: Mapping[str, Floats]  # metrics.jsonl: name -> (N,); NaN where a row lacks it or had null
    evaluations: Sequence[Mapping[str, Any]]  # evaluations.jsonl
    pictures: Mapping[str, Sequence[Picture]]  # by name, oldest first
    attempts: Sequence[Attempt]


def read(roots: Sequence[Path]) -> list[Run]:
    """Runs in the order given, each once. Raises `RunError` where a folder is no run or can't be read."""
    places = list(dict.fromkeys(root.expanduser().resolve() for root in roots))
    for given, place in zip(roots, map(Path.resolve, map(Path.expanduser, roots)), strict=True):
        if not RunFolder(place).exists():
            raise RunError(f"{given}: not a run folder (no config.yaml in it); name the folders of runs")
    return [_read(RunFolder(root), name) for root, name in zip(places, _names(places), strict=True)]


def _read(folder: RunFolder, name: str) -> Run:
    state, columns = folder.read_state(), read_columns(folder.metrics_file)
    return Run(
        root=folder.root,
        name=name,
        state=state,
        settings=_settings(folder.config_file),
        columns=columns,
        evaluations=schedule.read(folder.root / "evaluations.jsonl"),
        pictures=_pictures(folder.pictures),
        attempts=list(_attempts(state, columns)),
    )


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def read_columns(path: Path) -> dict[str, Floats]:
    """Every column of a metrics file as (N,) float64. A row is read at a time: a million fit."""
    columns: dict[str, array[float]] = {}
    missing = float("nan")
    count = 0
    for row in each_row(path):
        for name, value in row.items():
            column = columns.setdefault(name, array("d"))
            if len(column) < count:
                column.extend([missing] * (count - len(column)))
            column.append(value if isinstance(value, int | float) else missing)
        count += 1
    for column in columns.values():
        column.extend([missing] * (count - len(column)))
    return {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: can't be read ({' '.join(str(error).split())}); restore it") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: isn't a config but {type(found).__name__}; restore it")
    return dict(leaves(found))


def _pictures(folder: Path) -> dict[str, list[Picture]]:
    found: dict[str, list[Picture]] = {}
    for path in sorted(folder.glob("*.png")):
        named = _PICTURE.fullmatch(path.name)
        with path.open("rb") as file:
            head = file.read(24)
        if named is None or len(head) < 24 or not head.startswith(_PNG):
            continue
        width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
        step = None if named[1] is None else int(named[1])
        found.setdefault(named[2], []).append(Picture(path, step, width, height))
    for own in found.values():
        own.sort(key=lambda picture: (picture.step is None, picture.step or 0))
    return found


def _attempts(state: Mapping[str, Any], columns: Mapping[str, Floats]) -> Iterator[Attempt]:
    entries = state.get("attempts", [])
    for place, told in enumerate(entries):
        number, started = int(told.get("attempt", place + 1)), seconds(told.get("started"))
        if started is None:
            continue
        last = place == len(entries) - 1
        ended, reason = seconds(told.get("ended")), str(told.get("reason", ""))
        if ended is None:
            ended = _last_sign(number, started, state if last else {}, columns)
            alive = last and state.get("status") == "running"
            reason = "running" if alive else str(state["status"]) if last and "status" in state else "killed"
        yield Attempt(number, started, max(ended, started), reason, told)


def _last_sign(number: int, started: float, state: Mapping[str, Any], columns: Mapping[str, Floats]) -> float:
    """When an attempt that wrote no end was last known to live."""
    signs = [started, seconds(state.get("heartbeat")) or started]
    if {"attempt", "time"} <= columns.keys():
        own = columns["time"][columns["attempt"] == number]
        signs += [float(own[-1])] if len(own) and np.isfinite(own[-1]) else []
    return max(signs)


def seconds(moment: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 moment; None where it is none."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None
