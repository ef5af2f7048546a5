"""What `keel data pack` can be given: a folder of pictures, a table, or a hub's folder with a table in it."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.entries import ENDINGS, Offered, SourceOptions, said
from data_pipeline.folder import HUB_TABLES, Files, Walk, from_folder
from data_pipeline.rows import from_table, has_path_column


def offered(source: Path, options: SourceOptions, avoid: Collection[Path] = ()) -> Offered:
    """All that `source` holds, but for what lies in `avoid`. Raises `DataError`, also where it is nothing."""
    try:
        source.stat()
        if not source.is_dir():
            return from_table(source, options)
        table = next((source / name for name in HUB_TABLES if (source / name).is_file()), None)
    except FileNotFoundError:
        raise DataError(f"{said(source)}: no such folder or table") from None
    except OSError as error:
        raise DataError(f"{said(source)}: can't be read: {error.strerror}") from None
    if table is not None and options.sidecars and has_path_column(table):
        found = _hub(source, table, options, avoid)
    else:
        found = from_folder(source, options, avoid)
    if not found.entries:
        left = "".join(f"\n{said(source)}: {line}" for line in found.books.lines())
        raise DataError(
            f"{said(source)}: no pictures found; known endings are "
            f"{', '.join(ending[1:] for ending in ENDINGS)}{left}"
        )
    return found


def _hub(source: Path, table: Path, options: SourceOptions, avoid: Collection[Path]) -> Offered:
    """The pictures that a folder's own table names, and an account of the folder's other files."""
    found = from_table(table, options)
    found.notes.insert(0, f"by the table {table.name} that lies in the folder")
    books = found.also["files"] = Books("files")
    walk = Walk(source, books, avoid, used=table)
    files, folders = walk.top()
    for folder in folders:
        files.add(walk.below(folder) or Files())
    named = {os.path.normpath(entry.path) for entry in found.entries}
    for path in sorted(files.pictures):
        if os.path.normpath(path) in named:
            books.take()
        else:
            books.leave_out(f"not named in {table.name}", said(os.path.relpath(path, source)))
    walk.leave_texts(files)
    return found
