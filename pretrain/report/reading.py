"""What run folders say, as a report needs it: of runs that still go on, too, and of other versions."""

from __future__ import annotations

import os
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
from pretrain.judging import schedule
from pretrain.run.folder import RunFolder
from pretrain.tracking.jsonl import each_row

Floats = npt.NDArray[np.float64]
# As the tracker of files and `keel evaluate kind=pictures` write them.
_PICTURE = re.compile(r"(?:step-(\d+)-|pictures-)?([\w-]+)\.png")
_HASH = re.compile(r"-[0-9a-f]{8}$")
_BREAK = re.compile(r"[-_/, ]")
_PNG = b"\x89PNG\r\n\x1a\n"


UNKNOWN = "\u2013"
"""What stands where nothing is known."""


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
    name: str  # as the page calls it: what tells it from the other runs on the page
    full: str  # the last parts of its path, as many as it takes
    state: Mapping[str, Any]  # run.json
    settings: Mapping[str, Any]  # config.yaml: dotted path -> value
    columns: Mapping[str, Floats]  # metrics.jsonl: name -> (N,); NaN where a row lacks it or had null
    evaluations: Sequence[Mapping[str, Any]]  # evaluations.jsonl
    pictures: Mapping[str, Sequence[Picture]]  # by name, oldest first
    attempts: Sequence[Attempt]
    captions: Mapping[tuple[str, int], Sequence[str]]  # (picture, step) -> texts that belong to it
    status: str = UNKNOWN  # as `keel runs` says; by run.json alone where nobody has asked
    note: str = ""  # why

    def last(self, column: str) -> float | None:
        """The newest row's value, NaN where it wasn't finite; None without a row."""
        found = self.columns.get(column)
        return None if found is None or not len(found) else float(found[-1])

    @property
    def step(self) -> int | None:
        """Steps done: what is further, the rows of metrics or the last heartbeat."""
        return self._furthest("step")

    @property
    def samples(self) -> int | None:
        return self._furthest("samples")

    def _furthest(self, name: str) -> int | None:
        known = [self.state.get(name), self.last(name)]
        numbers = [int(value) for value in known if isinstance(value, int | float) and np.isfinite(value)]
        return max(numbers, default=None)

    @property
    def failed(self) -> bool:
        """Whether it ended as nobody wanted."""
        return self.status in ("failed", "lost")


@dataclass(frozen=True)
class Found:
    """Runs, and what was named besides but can't be shown: (place, why)."""

    runs: Sequence[Run]
    left_out: Sequence[tuple[str, str]] = ()


def read(roots: Sequence[Path], states: Mapping[Path, tuple[str, str]] | None = None) -> Found:
    """Runs in the order given, each once; of another folder all runs below it.

    `states`: (status, note) by absolute path, of who has asked for more than files. Raises `RunError` where a
    path isn't there, or no run is found that can be read.
    """
    places, left_out = run_folders(roots)
    runs: list[Run] = []
    for place, name, full in zip(places, names(places), _full_names(places), strict=True):
        try:
            runs.append(_read(RunFolder(place), name, full, (states or {}).get(place)))
        except RunError as error:
            left_out.append((full, str(error)))
        except (TypeError, ValueError, KeyError, AttributeError, AssertionError, OSError) as error:
            what = " ".join(str(error).split()) or type(error).__name__
            left_out.append((full, f"{place}: its files can't be read ({what}); restore them"))
    if not runs:
        raise RunError("; ".join(why for _, why in left_out))
    return Found(runs, left_out)


def run_folders(roots: Sequence[Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Folders of runs, absolute, and what of `roots` is none and holds none. Raises `RunError`."""
    places: dict[Path, None] = {}
    left_out = []
    for root in roots:
        place = root.expanduser().absolute()
        if not os.path.exists(place):  # noqa: PTH110  # Path's raises for a name that is too long
            raise RunError(f"{root}: not a run folder: there is nothing; name folders of runs")
        below = list(_below(place.resolve()))
        places |= dict.fromkeys(below)
        if not below:
            left_out.append((str(root), f"{root}: not a run folder (no config.yaml in it)"))
    if not places:
        raise RunError(
            "; ".join(why for _, why in left_out) + "; name folders of runs, or one that holds some"
        )
    return list(places), left_out


def _below(root: Path) -> Iterator[Path]:
    if RunFolder(root).exists():
        yield root
    elif root.is_dir():
        try:
            inside = sorted(each for each in root.iterdir() if each.is_dir() and not each.is_symlink())
        except OSError:
            return
        for each in inside:
            if not each.name.startswith(".") and each.name != "submissions":
                yield from _below(each)


def _read(folder: RunFolder, name: str, full: str, told: tuple[str, str] | None) -> Run:
    state, columns = folder.read_state(), read_columns(folder.metrics_file)
    status, note = told or (str(state.get("status", "new")), str(state.get("error") or ""))
    return Run(
        root=folder.root,
        name=name,
        full=full,
        status=status,
        note=note,
        state=state,
        settings=_settings(folder.config_file),
        columns=columns,
        evaluations=(scores := schedule.read(folder.root / "evaluations.jsonl")),
        captions=dict(_captions(scores)),
        pictures=_pictures(folder.pictures),
        attempts=list(_attempts(state, columns)),
    )


def _full_names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        found = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(found)) == len(found):
            break
    return found


def names(places: Sequence[Path]) -> list[str]:
    """What tells runs apart: `_full_names` without the beginning that all have and a sweep's hash at the end.

    A beginning goes in whole words: "mae-lr=0.1" and "mae-lr=0.2" are "lr=0.1" and "lr=0.2".
    """
    found = _full_names(places)
    plain = [_HASH.sub("", name) for name in found]
    return told_apart(plain if len(set(plain)) == len(plain) > 1 else found)


def told_apart(found: Sequence[str]) -> list[str]:
    """Different names without the words that all begin with."""
    if len(found) < 2:
        return list(found)
    first, last = min(found), max(found)
    alike = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    cut = max((place.end() for place in _BREAK.finditer(first[:alike])), default=0)
    short = [name[cut:] for name in found]
    return short if all(short) else list(found)


def _captions(scores: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, int], list[str]]]:
    for row in scores:
        details = row.get("details")
        told = details.get("captions") if isinstance(details, dict) else None
        for name, texts in (told if isinstance(told, dict) else {}).items():
            if isinstance(texts, list):
                yield (str(name), row["step"]), [str(text) for text in texts]


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
        try:
            with path.open("rb") as file:
                head = file.read(24)
        except OSError:
            continue
        if named is None or len(head) < 24 or not head.startswith(_PNG):
            continue
        width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
        step = None if named[1] is None else int(named[1])
        found.setdefault(named[2], []).append(Picture(path, step, width, height))
    for own in found.values():
        own.sort(key=lambda picture: (picture.step is None, picture.step or 0))
    return found


def _attempts(state: Mapping[str, Any], columns: Mapping[str, Floats]) -> Iterator[Attempt]:
    entries = state.get("attempts") or []
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
