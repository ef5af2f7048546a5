"""A folder of images, or a table of paths, to shards and a manifest: `keel data pack`.

The same input gives the same bytes, however many processes work. Finished shards survive an interruption and
aren't packed again; the folder under its final name is always whole.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from configs.errors import DataError
from data_pipeline.decode import DecodeError, decode
from data_pipeline.files import write_whole
from data_pipeline.hashing import key, permutation
from data_pipeline.index import FORMAT
from data_pipeline.indexing import Indexed, add_shard
from data_pipeline.manifest import NAME, Manifest, Shard, all_fields
from data_pipeline.parallel import Progress, mapped
from data_pipeline.read import IMAGE_FIELDS
from data_pipeline.shards import write_shard

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_PATH_COLUMNS = ("path", "file", "filename", "image", "image_path", "filepath")
_LABEL_COLUMNS = ("label", "class", "cls")
_CAPTION_COLUMNS = ("caption", "text", "txt")
_EXTENSIONS = tuple(f".{field}" for field in IMAGE_FIELDS)


@dataclass(frozen=True)
class Entry:
    """A picture to pack."""

    path: Path
    label: int | None
    caption: str | None


@dataclass(frozen=True)
class _Part:
    """One shard's work, for a process."""

    name: str
    first: int  # number of its first sample in the whole set
    entries: tuple[Entry, ...]
    directory: Path
    check: bool


def pack(
    source: Path,
    out: Path,
    *,
    per_shard: int = 5000,
    processes: int = 1,
    shuffle_seed: int | None = 0,
    check: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Pack `source` into OUT/shard-*.tar, OUT/index/ and OUT/manifest.json.

    `source` is a folder (its sub-folders are the classes; without any, no labels) or a CSV, TSV, JSONL or
    parquet table with a path column and optional label and caption columns; paths are relative to the table.
    `shuffle_seed` mixes the order, so that a shard isn't one class; None keeps it. `check` decodes every
    picture and refuses the set naming the first bad one. Raises `DataError`.
    """
    if (out / NAME).exists():
        raise DataError(f"{out}: already holds a data set; remove it or name another folder")
    if not source.exists():
        raise DataError(f"{source}: no such folder or table")
    entries, classes = _from_folder(source) if source.is_dir() else _from_table(source)
    if not entries:
        raise DataError(f"{source}: no pictures found; known endings are {', '.join(IMAGE_FIELDS)}")
    if shuffle_seed is not None:
        entries = [entries[i] for i in permutation(key(shuffle_seed, 21), len(entries)).tolist()]
    building = _building(out, entries, per_shard)
    parts = [
        _Part(f"shard-{number:06d}.tar", first, tuple(entries[first : first + per_shard]), building, check)
        for number, first in enumerate(range(0, len(entries), per_shard))
    ]
    packed = []
    for result in mapped(_pack_part, parts, processes):
        packed.append(result)
        if progress:
            progress(sum(one.shard.samples for one in packed), len(entries))
    return _finish(building, out, packed, classes)


def _finish(building: Path, out: Path, packed: Sequence[Indexed], classes: tuple[str, ...]) -> Manifest:
    fields = all_fields(one.fields for one in packed)
    manifest = Manifest(building, tuple(one.shard for one in packed), fields, classes, {"packed": True})
    manifest.save()
    for leftover in building.glob("*.done"):
        leftover.unlink()
    (building / "work.json").unlink()
    if out.exists():
        if any(out.iterdir()):
            raise DataError(f"{out}: holds other files; the set lies whole in {building}")
        out.rmdir()
    building.rename(out)
    return Manifest.load(out)


def _building(out: Path, entries: Sequence[Entry], per_shard: int) -> Path:
    """The folder work happens in: kept by an interrupted run, started anew when the input differs."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: holds other files; name another folder")
    digest = sha256(f"{per_shard} {FORMAT}".encode())
    for entry in entries:
        digest.update(f"{entry.path}\0{entry.label}\0{entry.caption}\n".encode(errors="surrogateescape"))
    work = json.dumps({"input": digest.hexdigest()})
    building = out.with_name(f".{out.name}.part")
    marker = building / "work.json"
    if building.exists() and (not marker.exists() or marker.read_text() != work):
        shutil.rmtree(building)
    try:
        write_whole(marker, work.encode())
    except OSError as error:
        raise DataError(f"{out}: can't be written: {error.strerror or error}") from error
    return building


def _pack_part(part: _Part) -> Indexed:
    path, done = part.directory / part.name, part.directory / f"{part.name}.done"
    if done.exists():
        found = json.loads(done.read_text())
        return Indexed(Shard(**found["shard"]), tuple(found["fields"]))
    write_shard(path, _samples(part))
    made = add_shard(part.directory, path, part.name)
    write_whole(done, json.dumps({"shard": made.shard.as_dict(), "fields": made.fields}).encode())
    return made


def _samples(part: _Part) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for number, entry in enumerate(part.entries, part.first):
        try:
            data = entry.path.read_bytes()
            if part.check:
                decode(data)
        except FileNotFoundError:
            raise DataError(f"{entry.path}: no such picture, though the table names it") from None
        except OSError as error:
            raise DataError(f"{entry.path}: can't be read: {error.strerror or error}") from None
        except DecodeError as error:
            raise DataError(
                f"{entry.path}: bad picture: {error}; mend it, take it out, or pack with --no-check"
            ) from None
        field = entry.path.suffix[1:].lower()
        fields = {"jpg" if field == "jpeg" else field: data}
        if entry.label is not None:
            fields["cls"] = str(entry.label).encode()
        if entry.caption is not None:
            fields["txt"] = entry.caption.encode()
        yield f"{number:09d}", fields


def _from_folder(source: Path) -> tuple[list[Entry], tuple[str, ...]]:
    classes = tuple(sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith(".")))
    labelled = [
        Entry(path, label, None)
        for label, name in enumerate(classes)
        for path in _pictures(source / name, deep=True)
    ]
    loose = [Entry(path, None, None) for path in _pictures(source, deep=False)]
    if labelled and loose:
        raise DataError(
            f"{source}: has pictures beside class folders, for instance {loose[0].path.name}; "
            "put every picture in a class folder, or none"
        )
    if labelled:
        for label, name in enumerate(classes):
            if not any(entry.label == label for entry in labelled):
                raise DataError(f"{source / name}: a class folder without pictures; remove it or fill it")
    return (labelled, classes) if labelled else (loose, ())


def _pictures(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(path for path in found if path.suffix.lower() in _EXTENSIONS and path.is_file())


def _from_table(source: Path) -> tuple[list[Entry], tuple[str, ...]]:
    rows = _rows(source)
    if not rows:
        raise DataError(f"{source}: a table without rows")
    columns = list(rows[0])
    path_column = _column(columns, _PATH_COLUMNS)
    if path_column is None:
        raise DataError(
            f"{source}: no column of paths; its columns are {', '.join(columns)}; "
            f"name one of them {_PATH_COLUMNS[0]}"
        )
    label_column, caption_column = _column(columns, _LABEL_COLUMNS), _column(columns, _CAPTION_COLUMNS)
    found = [row.get(label_column) for row in rows] if label_column else []
    names = ["" if label is None else str(label).strip() for label in found]
    labels, classes = _labels(names, source)
    entries = []
    for number, row in enumerate(rows):
        path = source.parent / str(row.get(path_column) or "")
        if path.suffix.lower() not in _EXTENSIONS:
            raise DataError(
                f"{source}: row {number + 1}: {path_column}: found {row.get(path_column)!r}; "
                f"a picture ends in {', '.join(_EXTENSIONS)}"
            )
        caption = str(row.get(caption_column) or "") if caption_column else None
        entries.append(Entry(path, labels[number] if labels else None, caption))
    return entries, classes


def _labels(names: Sequence[str], source: Path) -> tuple[list[int], tuple[str, ...]]:
    """Numbers stay as they are; names are numbered in alphabetical order."""
    if not names:
        return [], ()
    empty = next((number for number, name in enumerate(names) if not name), None)
    if empty is not None:
        raise DataError(f"{source}: row {empty + 1}: its label is empty; give every row one, or none")
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        return numbers, tuple(str(label) for label in range(max(numbers) + 1))
    classes = tuple(sorted(set(names)))
    number_of = {name: number for number, name in enumerate(classes)}
    return [number_of[name] for name in names], classes


def _column(columns: Sequence[str], known: Sequence[str]) -> str | None:
    return next((column for name in known for column in columns if column.lower() == name), None)


def _rows(source: Path) -> list[dict[str, object]]:
    ending = source.suffix.lower()
    try:
        if ending in (".csv", ".tsv"):
            with source.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ","))
        if ending == ".jsonl":
            lines = source.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line isn't an object")
            return rows
        if ending == ".parquet":
            return _parquet(source)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{source}: can't be read as {ending[1:]}: {error}") from None
    raise DataError(f"{source}: a table ends in {', '.join(_TABLES)}; a folder of pictures will do too")


def _parquet(source: Path) -> list[dict[str, object]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{source}: reading parquet needs pyarrow; install it, or use CSV") from None
    rows: list[dict[str, object]] = pyarrow.parquet.read_table(source).to_pylist()
    return rows
