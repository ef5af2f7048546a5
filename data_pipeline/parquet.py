"""Parquet tables, the hub's too, which hold the pictures themselves: the only module that knows pyarrow."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from configs.errors import DataError
from data_pipeline.table import Row, Table


def read_parquet(source: Path) -> Table:
    """The table but for pictures' bytes: where rows hold those, their cells are the paths beside them.

    Raises OSError, and ValueError that says why the table can't be read.
    """
    file = _opened(source)
    schema = file.schema_arrow
    held = frozenset(field.name for field in schema if _holds_pictures(field.type))

    def rows(wanted: Collection[str]) -> list[Row]:
        cells = {name: _cells(file, schema, name) for name in wanted if name in schema.names}
        return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]

    return Table(tuple(schema.names), rows, (), held, _classes(schema.metadata or {}))


def pictures(source: Path, column: str, rows: Collection[int]) -> dict[int, bytes]:
    """The bytes in `column` of some rows; rows without any are left out. Raises OSError and ValueError."""
    file, found, first = _opened(source), dict[int, bytes](), 0
    wanted = sorted(rows)
    for group in range(file.num_row_groups):
        last = first + file.metadata.row_group(group).num_rows
        chosen = [row for row in wanted if first <= row < last]
        if chosen:
            cells = file.read_row_group(group, columns=[column]).column(column)
            for row in chosen:
                value = cells[row - first].as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                if data is not None:
                    found[row] = data
        first = last
    return found


def _opened(source: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{source}: reading parquet needs pyarrow; install it, or use CSV") from None
    return pyarrow.parquet.ParquetFile(source)


def _holds_pictures(kind: Any) -> bool:
    """Whether cells are bytes, or the hub's pairs of bytes and path."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(
            kind.field(n).name == "bytes" and _is_bytes(kind.field(n).type) for n in range(kind.num_fields)
        )
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _cells(file: Any, schema: Any, name: str) -> list[object]:
    kind = schema.field(name).type
    if not _holds_pictures(kind):
        cells: list[object] = file.read(columns=[name]).column(name).to_pylist()
        return cells
    if not hasattr(kind, "names") or "path" not in [kind.field(n).name for n in range(kind.num_fields)]:
        return [None] * file.metadata.num_rows
    pairs = file.read(columns=[f"{name}.path"]).column(name).to_pylist()
    return [pair and pair["path"] for pair in pairs]


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of labels as the hub's library writes them beside the schema; none where they aren't there."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        found = {name: feature["names"] for name, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {
        name: tuple(names)
        for name, names in found.items()
        if isinstance(names, list) and all(isinstance(one, str) for one in names)
    }
