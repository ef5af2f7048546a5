"""From what a source calls its classes to label numbers: numbers stay, names are numbered in order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import DataError
from data_pipeline.entries import listed, missing, said

MOST = (1 << 31) - 1  # the highest label that the loader reads
UNKNOWN = -1  # how many tables spell a row without a class

_NAMED = 1000  # so many numbers get names without further thought
_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?", re.ASCII)
_AS_NAMES = "--labels-as-names gives each a number of its own and keeps it as the class's name"


@dataclass
class Labels:
    """The labels of a table's rows."""

    numbers: list[int | None]  # of each row; None: unknown
    classes: tuple[str, ...] = ()
    wrong: dict[int, str] = field(default_factory=dict)  # by row: what makes it no label
    notes: list[str] = field(default_factory=list)


def numbers_of(
    names: Sequence[str], classes: Sequence[str], source: Path
) -> tuple[list[int], tuple[str, ...]]:
    """Numbers for class folders `names`, sorted: their order, or that of `classes` where it is given."""
    if not classes:
        return list(range(len(names))), tuple(names)
    number_of = _by_name(classes)
    unknown = [name for name in names if name not in number_of]
    if unknown:
        raise DataError(
            f"{said(source)}: class folders {listed(unknown)} aren't in the list of classes; "
            f"it has {listed(classes)}"
        )
    return [number_of[name] for name in names], tuple(classes)


def labels(cells: Sequence[object], source: Path, classes: Sequence[str], as_names: bool) -> Labels:
    """Labels from a table's column. Raises `DataError` where the column as a whole can't be understood."""
    found, wrong = [], {}
    for row, cell in enumerate(cells):
        try:
            found.append(_read(cell))
        except ValueError as error:
            found.append(None)
            wrong[row] = str(error)
    if not as_names and str(UNKNOWN) not in classes:
        found = [None if one == UNKNOWN else one for one in found]
    known = {one for one in found if one is not None}
    if not known and not wrong:
        raise DataError(
            f"{said(source)}: row 1: its label is empty, and so is every other; leave the column out"
        )
    strange = [one for one in known if str(one) not in set(classes)]
    if classes and not strange:
        return _named(found, tuple(classes), wrong)
    if all(isinstance(one, int) for one in known) and not (as_names and not classes):
        return _numbered(found, tuple(classes), wrong)
    if classes:
        raise DataError(
            f"{said(source)}: labels {listed(sorted(map(str, strange)))} aren't in the list of classes; "
            f"it has {listed(classes)}"
        )
    if not as_names and any(isinstance(one, int) for one in known):
        number = next(row for row, one in enumerate(found) if isinstance(one, int))
        name = next(row for row, one in enumerate(found) if isinstance(one, str))
        raise DataError(
            f"{said(source)}: row {number + 1} has the number {found[number]} for a label, row {name + 1} "
            f"the name {said(str(found[name]))!r}; numbers stay as they are and names are numbered, so a "
            f"column has to hold one of both; {_AS_NAMES}"
        )
    return _named(found, _ordered(known), wrong)


def _read(cell: object) -> int | str | None:
    """A number, a name, or None for nothing. Raises ValueError that says what is wrong."""
    if missing(cell):
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return cell
    if not isinstance(cell, str):
        raise ValueError(f"its label is {cell!r:.60}; a label is a whole number or a name")
    text = cell.strip()
    if not _NUMBER.fullmatch(text):
        return text
    if len(text) > 40:
        raise ValueError(f"its label {text[:40]}... has {len(text)} digits")
    return int(text.partition(".")[0])


def _named(found: Sequence[int | str | None], classes: tuple[str, ...], wrong: dict[int, str]) -> Labels:
    number_of = _by_name(classes)
    return Labels([None if one is None else number_of[str(one)] for one in found], classes, wrong)


def _numbered(found: Sequence[int | str | None], classes: tuple[str, ...], wrong: dict[int, str]) -> Labels:
    """Numbers as they are. Each gets a name where they are dense, so that the number of classes is known."""
    numbers: list[int | None] = []
    most = len(classes) - 1 if classes else MOST
    for row, one in enumerate(found):
        numbers.append(one if isinstance(one, int) else None)
        if isinstance(one, int) and not 0 <= one <= most:
            wrong[row] = f"its label is {one}; a label is a number from 0 to {most}, or -1 for unknown"
            if not classes and one > most:
                wrong[row] += f"; {_AS_NAMES}"
    known = {one for row, one in enumerate(numbers) if one is not None and row not in wrong}
    highest = max(known, default=-1)
    if classes or not known or highest < max(_NAMED, 2 * len(known)):
        return Labels(numbers, classes or tuple(str(number) for number in range(highest + 1)), wrong)
    note = (
        f"labels go up to {highest}, but only {len(known)} numbers occur: they are packed as they are, and "
        f"classes have no names; {_AS_NAMES}"
    )
    return Labels(numbers, (), wrong, [note])


def _ordered(known: set[int | str]) -> tuple[str, ...]:
    if all(isinstance(one, int) for one in known):
        return tuple(str(one) for one in sorted(known, key=int))
    return tuple(sorted(str(one) for one in known))


def _by_name(classes: Sequence[str]) -> Mapping[str, int]:
    numbers: dict[str, int] = {}
    for number, name in enumerate(classes):
        if name in numbers:
            raise DataError(
                f"the list of classes has {said(name)!r} twice, as {numbers[name]} and {number}; a class "
                "that is looked up by its name needs one of its own"
            )
        numbers[name] = number
    return numbers
