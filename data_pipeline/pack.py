"""A folder of images, or a table of paths, to shards and a manifest: `keel data pack`.

The same input gives the same bytes, however many processes work. Finished shards survive an interruption and
aren't packed again unless their pictures have changed; the folder under its final name is always whole. All
that a source holds is packed or accounted for.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

from configs.errors import DataError
from data_pipeline.books import Books
from data_pipeline.building import NAMES, Building, building, required_free
from data_pipeline.decode import MAX_PIXELS, DecodeError, decode
from data_pipeline.entries import ENDINGS, Entry, Offered, SourceOptions, kind_of, said
from data_pipeline.files import published, write_whole
from data_pipeline.hashing import key, permutation
from data_pipeline.index import FORMAT
from data_pipeline.indexing import Indexed, add_shard
from data_pipeline.manifest import NAME, Manifest, Shard, all_fields, index_name
from data_pipeline.parallel import Progress, mapped
from data_pipeline.parquet import pictures
from data_pipeline.shards import write_shard
from data_pipeline.sources import offered

_WORDS = frozenset(("txt", "json"))
_SAID = 1000  # things that can't be packed and are named one by one
_SAID_OF_ALL = 10  # where it is all of them: they will have one reason


@dataclass(frozen=True)
class Broken:
    """An entry that can't be packed."""

    place: str  # as a message calls it
    name: str  # as the source calls it
    reason: str
    again: bool = False  # whether it is worth another try though nothing has changed


@dataclass(frozen=True)
class _Part:
    """One shard's work, for a process."""

    name: str
    first: int  # number of its first entry in the whole set
    entries: tuple[Entry, ...]
    directory: Path  # of the set
    receipts: Path
    check: bool
    max_pixels: int
    captioned: bool
    boss: int  # the process that asked for it


@dataclass(frozen=True)
class _Packed:
    """A shard that is finished: `indexed` is None where none of its entries could be packed."""

    indexed: Indexed | None
    broken: tuple[Broken, ...]
    wordless: tuple[str, ...]  # entries without a caption in a set that has captions


def pack(
    source: Path,
    out: Path,
    *,
    reading: SourceOptions | None = None,
    per_shard: int = 5000,
    processes: int = 1,
    shuffle_seed: int | None = 0,
    check: bool = True,
    max_pixels: int = MAX_PIXELS,
    skip_broken: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Pack `source` into OUT/shard-*.tar, OUT/index/, OUT/names.jsonl and OUT/manifest.json.

    `source` is a folder (its sub-folders are the classes; without any, no labels) or a CSV, TSV, JSONL or
    parquet table with a path column and optional label and caption columns; paths are relative to the table.
    `shuffle_seed` mixes the order, so that a shard isn't one class; None keeps it. `check` decodes every
    picture, of at most `max_pixels`. `skip_broken` pictures may be left out because they can't be packed;
    with `strict` nothing may be left out for any reason. What was, and how the source was understood, stands
    in the manifest's `about`. Raises `DataError` that names all that can't be packed.
    """
    found = offered(source, reading or SourceOptions(), required_free(out))
    if strict:
        _require_all(source, found)
    rank = {entry.said: number for number, entry in enumerate(found.entries)}
    if shuffle_seed is not None:
        order = permutation(key(shuffle_seed, 21), len(found.entries)).tolist()
        found.entries = [found.entries[number] for number in order]
    with building(out) as made:
        parts = [
            _Part(
                f"shard-{number:06d}.tar", first, tuple(found.entries[first : first + per_shard]),
                made.directory, made.receipts, check, max_pixels, found.captioned, os.getpid(),
            )
            for number, first in enumerate(range(0, len(found.entries), per_shard))
        ]  # fmt: skip
        packed: list[_Packed] = []
        for result in mapped(_pack_part, parts, processes):
            packed.append(result)
            if progress:
                progress(sum(len(part.entries) for part in parts[: len(packed)]), len(found.entries))
        broken = sorted((one for result in packed for one in result.broken), key=lambda one: rank[one.place])
        _account(found, packed, broken)
        _require_few(source, found, broken, skip_broken)
        if strict:
            _require_all(source, found)
        _publish(made, found, packed, broken)
    return Manifest.load(out)


def account(manifest: Manifest) -> list[str]:
    """Lines about how a packed set came about: how its source was understood, what was left out."""
    about = manifest.about
    lines = [str(note) for note in about.get("notes", ())]
    for name in _ACCOUNTS:
        if name in about:
            books = Books.from_dict(about[name])
            lines.append(f"{books.offered} {books.what}, {books.taken} of them used")
            lines += books.lines()
    return lines + [f"left out: {one['place']}: {one['reason']}" for one in about.get("broken", ())]


_ACCOUNTS = ("books", "files", "labels", "captions")


def _require_all(source: Path, found: Offered) -> None:
    """What `strict` asks for. Raises `DataError` with every reason on a line."""
    problems = []
    for books in (found.books, *found.also.values()):
        try:
            books.require_nothing_left_out(said(source))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _require_few(source: Path, found: Offered, broken: Sequence[Broken], most: int) -> None:
    """Raises `DataError` that names everything broken, where that is more than `most`."""
    if len(broken) <= most and len(broken) < len(found.entries):
        return
    shown = _SAID if len(broken) < len(found.entries) else _SAID_OF_ALL
    lines = [f"{one.place}: {one.reason}" for one in broken[:shown]]
    if len(broken) > shown:
        lines.append(f"{said(source)}: and {len(broken) - shown} more")
    lines.append(
        f"{said(source)}: {len(broken)} of {len(found.entries)} can't be packed; mend them or take them out "
        f"and start again (what is packed is kept), or go on without them: --skip-broken {len(broken)}"
    )
    if len(broken) == len(found.entries):
        lines[-1] = (
            f"{said(source)}: none of its {len(broken)} pictures can be packed; mend them and start again"
        )
    raise DataError("\n".join(lines))


def _account(found: Offered, packed: Sequence[_Packed], broken: Sequence[Broken]) -> None:
    """Enter what became of the entries."""
    found.books.take(len(found.entries) - len(broken))
    found.books.leave_out("broken (--skip-broken)", *(one.place for one in broken))
    if found.captioned:
        wordless = [name for result in packed for name in result.wordless]
        books = found.also["captions"] = Books("captions")
        books.take(len(found.entries) - len(broken) - len(wordless))
        books.leave_out("missing or empty", *wordless)


def _publish(made: Building, found: Offered, packed: Sequence[_Packed], broken: Sequence[Broken]) -> None:
    shards = [result.indexed for result in packed if result.indexed]
    about: dict[str, Any] = {"packed": True, "books": found.books.as_dict(), "notes": found.notes}
    about |= {name: books.as_dict() for name, books in found.also.items()}
    if broken:
        about["broken"] = [{"place": one.place, "name": one.name, "reason": one.reason} for one in broken]
    fields = all_fields(one.fields for one in shards)
    classes = found.classes
    manifest = Manifest(made.directory, tuple(one.shard for one in shards), fields, classes, about)
    manifest.save()
    _write_names(made.directory / NAMES, found.entries, {one.place for one in broken})
    files = {f"index/{index_name(one.shard.sha256)}" for one in shards} | {NAME, NAMES}
    made.publish(files | {one.shard.name for one in shards})


def _write_names(path: Path, entries: Sequence[Entry], broken: Collection[str]) -> None:
    """What the source calls each sample: one JSON object a line. Not part of the manifest's hash."""
    with published(path) as file:
        for number, entry in enumerate(entries):
            if entry.said not in broken:
                line = json.dumps({"key": _key(number), "name": entry.name}, ensure_ascii=False)
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def _key(number: int) -> str:
    return f"{number:09d}"


def _pack_part(part: _Part) -> _Packed:
    receipt, fingerprint = part.receipts / f"{part.name}.json", _fingerprint(part)
    kept = _kept(part, receipt, fingerprint)
    if kept is not None:
        return kept
    receipt.unlink(missing_ok=True)
    path, broken, wordless = part.directory / part.name, list[Broken](), list[str]()
    indexed = None
    if write_shard(path, _samples(part, broken, wordless)):
        indexed = add_shard(part.directory, path, part.name)
    else:
        path.unlink()
    made = _Packed(indexed, tuple(broken), tuple(wordless))
    if not any(one.again for one in broken):
        write_whole(receipt, json.dumps({"fingerprint": fingerprint, **asdict(made)}).encode())
    return made


def _fingerprint(part: _Part) -> str:
    """Of all that a shard's bytes depend on. Files by size and time: a mended one is packed anew."""
    digest = sha256(repr((FORMAT, part.first, part.check, part.max_pixels, part.captioned)).encode())
    for entry in part.entries:
        told = (entry.name, str(entry.path.absolute()), entry.fields, entry.cell, entry.stamp, entry.wrong)
        digest.update(repr(told).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _kept(part: _Part, receipt: Path, fingerprint: str) -> _Packed | None:
    """What an earlier start has finished, if it is what would be made now."""
    try:
        found = json.loads(receipt.read_bytes())
        if found["fingerprint"] != fingerprint:
            return None
        indexed = None
        if found["indexed"]:
            indexed = Indexed(Shard(**found["indexed"]["shard"]), tuple(found["indexed"]["fields"]))
            size = (part.directory / part.name).stat().st_size
            sidecar = part.directory / "index" / index_name(indexed.shard.sha256)
            if size != indexed.shard.bytes or not sidecar.exists():
                return None
        broken = tuple(Broken(**one) for one in found["broken"])
        return _Packed(indexed, broken, tuple(found["wordless"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _samples(
    part: _Part, broken: list[Broken], wordless: list[str]
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """The part's samples; entries that can't be packed go to `broken`, others without words to `wordless`."""
    held = _held(part)
    for number, entry in enumerate(part.entries, part.first):
        if part.boss not in (os.getpid(), os.getppid()):
            raise RuntimeError("the process that asked for this shard is gone")
        try:
            fields = _fields(part, entry, held)
        except (OSError, ValueError) as error:
            unread = isinstance(error, OSError)
            reason = f"can't be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            broken.append(Broken(entry.said, said(entry.name), said(reason), unread))
            continue
        if part.captioned and not _WORDS & fields.keys():
            wordless.append(said(entry.name))
        yield _key(number), fields


def _held(part: _Part) -> Mapping[int, bytes]:
    """Pictures that lie in a table, by row."""
    cells = [(entry.path, *entry.cell) for entry in part.entries if entry.cell is not None]
    if not cells:
        return {}
    path, column, _ = cells[0]
    try:
        return pictures(path, column, [row for _, _, row in cells])
    except (OSError, ValueError) as error:
        raise DataError(
            f"{said(path)}: column {said(column)} can't be read: {said(str(error)):.300}"
        ) from None


def _fields(part: _Part, entry: Entry, held: Mapping[int, bytes]) -> dict[str, bytes]:
    """What a sample holds. Raises OSError, and ValueError that says why the entry can't be packed."""
    if entry.wrong is not None:
        raise ValueError(entry.wrong)
    if entry.cell is None:
        data = entry.path.read_bytes()
    elif entry.cell[1] in held:
        data = held[entry.cell[1]]
    else:
        raise ValueError(
            "holds no bytes of a picture; a table whose pictures lie elsewhere needs their paths as text"
        )
    if part.check:
        try:
            decode(data, part.max_pixels)
        except DecodeError as error:
            more = "; --max-pixels lets larger ones in, and data.max_pixels when they are read"
            raise ValueError(
                f"bad picture: {error}{more if str(part.max_pixels) in str(error) else ''}"
            ) from None
    kind = kind_of(PurePath(entry.name).suffix, data)
    if kind is None:
        raise ValueError(
            f"found {entry.name!r}; a picture ends in {', '.join(ENDINGS)}, or begins as one does"
        )
    fields = {kind: data}
    for name, content in entry.fields:
        text = content if isinstance(content, bytes) else _beside(content, name)
        if text:
            fields[name] = text
    return fields


def _beside(path: Path, name: str) -> bytes:
    """The text in a file beside a picture; nothing where it is blank. Raises OSError and ValueError."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
        if name == "json" and text.strip():
            json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{path.name} beside it isn't {'JSON' if name == 'json' else 'UTF-8 text'}"
        ) from None
    return data if text.strip() else b""
