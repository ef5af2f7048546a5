"""A table as a source of `keel data pack`: which columns are used, and what each row becomes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.entries import Entry, Offered, SourceOptions, listed, missing, said, stamped
from data_pipeline.label_numbers import labels
from data_pipeline.parquet import read_parquet
from data_pipeline.table import Row, Table, read_text_table

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file"),
    *("image_name", "img", "img_path", "picture"),
)
LABEL_COLUMNS = ("label", "class", "cls", "labels", "category", "target")
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "txt", "texts", "title", "sentence", "sentences", "description"),
    *("sentences_raw", "prompt"),
)


Captions = str | list[str] | None


def from_table(source: Path, options: SourceOptions) -> Offered:
    """The rows of `source` as entries, those that can't be packed too. Raises `DataError`."""
    chosen = (options.path_column, options.caption_column, options.label_column)
    table = _read(source, {name.lower() for name in (*PATH_COLUMNS, *chosen) if name})
    columns = _columns(source, table, options)
    with _readable(source):
        rows = table.rows(columns.used)
    if not rows:
        raise DataError(f"{said(source)}: a table without rows")
    offered = Offered([], (), Books("rows"), notes=[*table.notes, columns.said(table)])
    wrong = {number: row for number, row in enumerate(rows) if isinstance(row, str)}
    numbers = _labels(source, table, rows, columns, options, offered, wrong)
    captions = _captions(rows, columns.caption, wrong)
    lists = any(isinstance(found, list) for found in captions)
    offered.captioned = columns.caption is not None
    if lists:
        offered.notes.append(
            "captions are lists and packed as JSON: train with data.captions=[json.captions]"
        )
    elif _spelt(captions):
        offered.notes.append(
            f"captions in column {said(columns.caption or '')} look like lists spelt as text"
        )
    table_stamp = stamped(source) if columns.path in table.pictures else ()
    for number, row in enumerate(rows):
        fields = _fields(numbers[number], captions[number], lists)
        cell = None if isinstance(row, str) else row.get(columns.path)
        if columns.path in table.pictures:
            entry = _held(source, number, columns.path, cell, fields, table_stamp, wrong.get(number))
        else:
            entry = _named(source, number, cell, fields, wrong.get(number))
        offered.entries.append(entry)
    return offered


def has_path_column(source: Path) -> bool:
    """Whether a table names files, as a hub's metadata do. Raises `DataError` where it can't be read."""
    return _column(_read(source, PATH_COLUMNS).columns, PATH_COLUMNS) is not None


def _read(source: Path, known: Collection[str]) -> Table:
    ending = source.suffix.lower()
    if ending not in TABLES:
        tars = (
            "; tars aren't packed but indexed: keel data index" if ending in (".tar", ".tgz", ".gz") else ""
        )
        raise DataError(
            f"{said(source)}: a table ends in {', '.join(TABLES)}; a folder of pictures will do too{tars}"
        )
    with _readable(source):
        return read_parquet(source) if ending == ".parquet" else read_text_table(source, known)


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Whatever makes a table unreadable, in a line that names it."""
    try:
        yield
    except ValueError as error:
        reason = " ".join(said(str(error)).split())
        raise DataError(
            f"{said(source)}: can't be read as {source.suffix[1:].lower()}: {reason:.300}"
        ) from None
    except OSError as error:
        reason = " ".join(said(error.strerror or str(error)).split())
        raise DataError(f"{said(source)}: can't be read: {reason:.300}") from None


@dataclass(frozen=True)
class _Columns:
    """The columns that are used."""

    path: str
    caption: str | None
    label: str | None

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(name for name in (self.path, self.caption, self.label) if name is not None)

    def said(self, table: Table) -> str:
        roles = {"pictures": self.path, "captions": self.caption, "labels": self.label}
        found = [f"{role} from {said(name)}" for role, name in roles.items() if name is not None]
        unused = [name for name in table.columns if name not in self.used]
        return f"columns: {', '.join(found)}; not used: {listed(unused) or 'none'}"


def _columns(source: Path, table: Table, options: SourceOptions) -> _Columns:
    def of(chosen: str | None, option: str, known: Sequence[str]) -> str | None:
        if chosen is None:
            return _column(table.columns, known)
        if chosen not in table.columns:
            raise DataError(
                f"{said(source)}: {option}: no column {said(chosen)!r}; "
                f"its columns are {listed(table.columns)}"
            )
        return chosen

    path = of(options.path_column, "--path-column", PATH_COLUMNS)
    if path is None:
        behind = any(name.lower() in ("url", "image_url", "urls") for name in table.columns)
        fetch = (
            "; pictures behind URLs have to be fetched first, for instance by img2dataset" if behind else ""
        )
        raise DataError(
            f"{said(source)}: no column of paths; its columns are {listed(table.columns)}; "
            f"name one of them {PATH_COLUMNS[0]}, or give --path-column{fetch}"
        )
    caption = of(options.caption_column, "--caption-column", CAPTION_COLUMNS)
    return _Columns(path, caption, of(options.label_column, "--label-column", LABEL_COLUMNS))


def _column(columns: Sequence[str], known: Sequence[str]) -> str | None:
    return next((column for name in known for column in columns if column.strip().lower() == name), None)


def _labels(
    source: Path,
    table: Table,
    rows: Sequence[Row],
    columns: _Columns,
    options: SourceOptions,
    offered: Offered,
    wrong: dict[int, str],
) -> list[int | None]:
    """Each row's label; what is wrong with one goes to `wrong`, names and account to `offered`."""
    if columns.label is None:
        offered.classes = options.classes
        return [None] * len(rows)
    cells = [None if isinstance(row, str) else row.get(columns.label) for row in rows]
    classes = options.classes or table.classes.get(columns.label, ())
    found = labels(cells, source, classes, options.labels_as_names)
    for number, reason in found.wrong.items():
        wrong.setdefault(number, reason)
    unknown = [row for row, number in enumerate(found.numbers) if number is None and row not in wrong]
    account = offered.also["labels"] = Books("labels")
    account.take(len(rows) - len(unknown))
    account.leave_out("unknown (empty, NaN or -1)", *[f"row {row + 1}" for row in unknown])
    offered.classes = found.classes
    offered.notes += found.notes
    return found.numbers


def _captions(rows: Sequence[Row], column: str | None, wrong: dict[int, str]) -> list[Captions]:
    found: list[Captions] = []
    for number, row in enumerate(rows):
        try:
            found.append(
                _caption(row.get(column)) if column is not None and not isinstance(row, str) else None
            )
        except ValueError as error:
            found.append(None)
            wrong.setdefault(number, str(error))
    return found


def _caption(cell: object) -> Captions:
    """A text, several, or None where there is none. Raises ValueError for anything else."""
    if missing(cell):
        return None
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return str(cell)
    found: list[object] = cell if isinstance(cell, list) else [cell]
    texts = [one for one in found if isinstance(one, str)]
    strange = [one for one in found if not isinstance(one, str)]
    if strange:
        raise ValueError(
            f"its caption is {said(repr(cell))[:60]}, of type {type(strange[0]).__name__}; "
            "a caption is a text, a number or a list of texts"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(
            "its caption isn't UTF-8 text: half of a surrogate pair, or another encoding"
        ) from None
    if isinstance(cell, list):
        return [text for text in texts if text.strip()]
    return texts[0]


def _spelt(captions: Sequence[Captions]) -> bool:
    """Whether all captions are lists written out, as a table of text that was made from lists has them."""
    found = [one.strip() for one in captions if isinstance(one, str)]
    return bool(found) and all(one[0] == "[" and one[-1] == "]" for one in found)


def _fields(label: int | None, caption: Captions, lists: bool) -> tuple[tuple[str, bytes], ...]:
    fields = {}
    if label is not None:
        fields["cls"] = str(label).encode()
    if caption and lists:
        texts = [caption] if isinstance(caption, str) else caption
        fields["json"] = json.dumps({"captions": texts}, ensure_ascii=False).encode()
    elif isinstance(caption, str):
        fields["txt"] = caption.encode()
    return tuple(fields.items())


def _held(
    source: Path,
    number: int,
    column: str,
    cell: object,
    fields: tuple[tuple[str, bytes], ...],
    stamp: tuple[int, ...],
    wrong: str | None,
) -> Entry:
    """A row that holds the picture itself; its cell is the path that stands beside it, if any."""
    name = cell if isinstance(cell, str) and cell else f"row {number + 1}"
    place = f"{said(source)}: row {number + 1}"
    return Entry(name, place, source, fields, (column, number), stamp, wrong)


def _named(
    source: Path, number: int, cell: object, fields: tuple[tuple[str, bytes], ...], wrong: str | None
) -> Entry:
    """A row that names the picture's file."""
    place, stamp = f"{said(source)}: row {number + 1}", tuple[int, ...]()
    if wrong is None and missing(cell):
        wrong = "its path is empty"
    elif wrong is None and not isinstance(cell, str):
        wrong = f"its path is {said(repr(cell))[:60]}; a path is text"
    if not isinstance(cell, str):
        return Entry(f"row {number + 1}", place, source, fields, None, stamp, wrong)
    path = source.parent / cell
    try:
        stamp = stamped(path)
    except (OSError, ValueError) as error:
        wrong = wrong or _unfound(source, cell, error)
    shown = said(cell if "://" in cell else path)
    return Entry(cell, f"{place}: {shown}", path, fields, None, stamp, wrong)


def _unfound(source: Path, cell: str, error: OSError | ValueError) -> str:
    """What is wrong with a path, and what may be meant."""
    if cell.startswith("file://"):
        return "a URL; write the path without file://"
    if "://" in cell:
        return "a URL; pictures are packed from files: fetch them first, for instance by img2dataset"
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"can't be read: {getattr(error, 'strerror', None) or error}"
    meant = ""
    if "\\" in cell:
        meant = "; write / where it has \\"
    elif cell.startswith("~"):
        meant = "; ~ isn't expanded: write the whole path"
    elif cell != cell.strip():
        meant = f"; found {cell!r}, with white space around it"
    elif not Path(cell).is_absolute():
        meant = f"; paths are relative to the table's folder {said(source.parent)}"
    return f"no such picture, though the table names it{meant}"
