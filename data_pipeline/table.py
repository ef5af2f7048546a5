"""The rows of a CSV, TSV or JSONL table, as they stand there: no row is lost, none is guessed at."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_LONGEST = 1 << 30  # bytes of a cell


Row = Mapping[str, object] | str
"""The cells of a row by column, or what is wrong with it."""


@dataclass(frozen=True)
class Table:
    """A table that was opened; `rows` gives some columns of every row."""

    columns: tuple[str, ...]
    rows: Callable[[Collection[str]], list[Row]]
    notes: tuple[str, ...] = ()
    pictures: frozenset[str] = frozenset()  # columns that hold pictures themselves: their cells are names
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names that the file has for labels


def read_text_table(source: Path, known: Collection[str]) -> Table:
    """Read `source`. Of several separators that fit, the one that shows a column of `known` (lower case).

    Raises OSError, and ValueError that says why the table as a whole can't be read.
    """
    ending, text = source.suffix.lower(), _text(source.read_bytes())
    return _json_lines(text) if ending == ".jsonl" else _separated(text, ending, known)


def _text(data: bytes) -> str:
    """UTF-8, bytes that aren't kept: a path may hold them."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")


def _separated(text: str, ending: str, known: Collection[str]) -> Table:
    usual = "\t" if ending == ".tsv" else ","
    separator = _separator(text, usual, known)
    before = csv.field_size_limit(_LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        heading = [name.strip() for name in next(reader, [])]
        rows = [_cells(heading, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num}: {error}; put a text with quotes or separators in quotes, quotes doubled"
        ) from None
    finally:
        csv.field_size_limit(before)
    twice = [name for name in heading if name and heading.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}; rename one")
    notes = () if separator == usual else (f"columns are separated by {_SEPARATORS[separator]}s",)
    return Table(tuple(heading), lambda wanted: rows, notes)


def _separator(text: str, usual: str, known: Collection[str]) -> str:
    """The usual one, unless the heading has a known column only with another."""
    heading = text.lstrip("\r\n").splitlines()[0] if text.strip() else ""
    for separator in (usual, *_SEPARATORS):
        names = [name.strip().strip('"').strip().lower() for name in heading.split(separator)]
        if any(name in known for name in names):
            return separator
    return usual


def _cells(heading: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(heading):
        return (
            f"has {len(cells)} cells, but there are {len(heading)} columns; "
            "put texts with separators in quotes, and give every column a cell"
        )
    return dict(zip(heading, cells, strict=True))


def _json_lines(text: str) -> Table:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for line in text.split("\n"):  # splitlines() breaks at signs that may stand in a JSON text
        if not line.strip():
            continue
        row = _json_row(line)
        rows.append(row)
        if not isinstance(row, str):
            columns.update(dict.fromkeys(row))
    if rows and not columns:
        raise ValueError(f"row 1: {rows[0]}")
    return Table(tuple(columns), lambda wanted: rows)


def _json_row(line: str) -> Row:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"isn't JSON: {error or 'nested too deeply'}"
    if not isinstance(row, dict):
        return 'isn\'t a JSON object: a line looks like {"path": ..., "caption": ...}'
    return row if row else "is empty"
