"""One strict pass over a tar's headers: every member is a sample's field, or passed over for a reason.

A plain tar reader stops without a word at a damaged header, and passes over links; this one accounts for
every byte and every member.
"""

from __future__ import annotations

import os
import re
import tarfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any, BinaryIO, Literal, NamedTuple

from configs.errors import DataError
from data_pipeline.books import Books

Split = Literal["first", "last"]
"""At which dot of its last part a member's name is split into key and field; webdataset: the first."""

FOLDER = "a folder"
LINK_NOWHERE = "a link that leads to nothing in its tar"
LINK_TO_FOLDER = "a link to a folder"
SPECIAL = "neither a file nor a link to one"
HIDDEN = "hidden: its name begins with a dot"
APPLE_DOUBLE = "an AppleDouble copy, as macOS leaves them"
META = "webdataset's own: __NAME__"
NO_FIELD = "its name isn't KEY.FIELD"
TOO_SPARSE = "a sparse file of over 256 MiB"

MOST_SPARSE = 256 << 20  # bytes: nothing larger is read from a field, and holes cost a tar nothing
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_SHOWN = 120  # characters of a name in an account
_META = re.compile(r"(\./)?__[^/]*__(\Z|/)")
_OTHERS = {  # what files that aren't tars begin with
    b"\x1f\x8b": "compressed by gzip; unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it first (zstd -d)",
    b"\xfd7zXZ\0": "compressed by xz; unpack it first (unxz)",
    b"BZh": "compressed by bzip2; unpack it first (bunzip2)",
    b"PK\3\4": "a zip file; unpack it and pack it as tar",
    b"PAR1": "a parquet table; leave it out (name the shards: '*.tar')",
    b"{": "JSON; leave it out (name the shards: '*.tar')",
    b"<": "a web page or XML; fetch the shard again",
}

Piece = tuple[int, int, int]
"""A stretch of a sparse member: start in the payload, length, place in the shard."""


class Member(NamedTuple):
    """A field of a sample."""

    name: str  # in the tar
    key: str
    field: str
    offset: int
    size: int
    pieces: tuple[Piece, ...]  # of a sparse member, at least one; else none


class _Payload(NamedTuple):
    offset: int
    size: int
    pieces: tuple[Piece, ...]


class _Link(NamedTuple):
    target: str  # name in the tar
    hard: bool  # to a member before it


class _Folder(NamedTuple):
    pass


_Entry = _Payload | _Link | _Folder


@dataclass
class Contents:
    """What a pass over a tar found."""

    members: list[Member] = field(default_factory=list)  # in the tar's order
    books: Books = field(default_factory=lambda: Books("members"))


def split_name(name: str, split: Split = "first") -> tuple[str, str] | None:
    """Key and field of a member name: split, like webdataset, at the first dot of its path's last part."""
    folder, slash, last = name.rpartition("/")
    if last.startswith("."):
        return None
    stem, dot, tail = last.partition(".") if split == "first" else last.rpartition(".")
    if not dot or not stem or not tail:
        return None
    return folder + slash + stem, tail.lower()


def name_reason(name: str) -> str:
    """Why a name can't be split."""
    last = name.rpartition("/")[2]
    if last.startswith("._"):
        return APPLE_DOUBLE
    return HIDDEN if last.startswith(".") else NO_FIELD


def shown(name: str) -> str:
    """A name for an account or a message: one line of text, whatever bytes it has."""
    text = repr(name)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"


def walk(file: BinaryIO, path: Path, split: Split = "first") -> Contents:
    """All members of the tar `file`; `path` is for messages.

    Hard links, and symbolic ones to another member, have the payload they lead to. Raises `DataError` for a
    file that isn't a plain tar, is cut short or damaged, or goes on behind its end.
    """
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataError(f"{path}: empty file where a tar shard should be")
    entries: list[tuple[str, _Entry]] = []
    found = Contents()
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            header = -1
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header it has seen
                if not header < info.offset < tar.offset or info.size < 0:  # a negative size leads back
                    raise ValueError("its size is negative")
                header = info.offset
                entry = _entry(info, size, path)
                if entry is None:
                    found.books.leave_out(SPECIAL, shown(info.name))
                else:
                    entries.append((info.name, entry))
            end: int = tar.offset
    except tarfile.TarError as error:
        if entries:
            raise DataError(_cut(path, size, str(error))) from None
        raise DataError(f"{path}: not a plain tar file: {_kind(file, error)}") from None
    except (ValueError, UnicodeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: damaged tar header ({error}); fetch or pack the shard again") from None
    _check_end(file, path, end, size)
    _enter(entries, split, found)
    return found


def _entry(info: tarfile.TarInfo, size: int, path: Path) -> _Entry | None:
    """What a header describes; None for what holds no data."""
    if info.isreg():
        pieces = _pieces(info)
        stored = sum(length for _, length, _ in pieces) if pieces else info.size
        if info.offset_data + stored > size:
            raise DataError(_cut(path, size, f"member {shown(info.name)!r} goes beyond the end"))
        return _Payload(info.offset_data, info.size, pieces)
    if info.islnk():
        return _Link(normpath(info.linkname), hard=True)
    if info.issym():
        return _Link(normpath(join(dirname(info.name), info.linkname)), hard=False)
    return _Folder() if info.isdir() else None


def _pieces(info: tarfile.TarInfo) -> tuple[Piece, ...]:
    """Where the stretches of a sparse member lie: one behind the other, holes left out."""
    stretches: Any = info.sparse  # a list of (start, length), whatever its stub says
    if stretches is None:
        return ()
    found: list[Piece] = []
    place = info.offset_data
    for start, length in stretches:
        if not (0 <= start <= info.size and 0 <= length <= info.size - start):
            raise ValueError("a sparse member's map goes beyond its size")
        if length:
            found.append((start, length, place))
        place += length
    return tuple(found) or ((0, 0, info.offset_data),)


def sparse_payload(descriptor: int, size: int, pieces: Sequence[Piece]) -> bytes:
    """A sparse member's bytes, with zeros in its holes. Raises ValueError where the file is too short."""
    payload = bytearray(size)
    for start, length, place in pieces:
        while length:
            piece = os.pread(descriptor, min(length, _CHUNK), place)
            if not piece:
                raise ValueError("it shrank while it was read")
            payload[start : start + len(piece)] = piece
            start, length, place = start + len(piece), length - len(piece), place + len(piece)
    return bytes(payload)


def _enter(entries: Sequence[tuple[str, _Entry]], split: Split, found: Contents) -> None:
    """Take each entry as a field, or leave it out for a reason."""
    places: dict[str, list[int]] = {}  # of each name, where it stands; for links only
    if any(isinstance(entry, _Link) for _, entry in entries):
        for number, (name, _) in enumerate(entries):
            places.setdefault(normpath(name), []).append(number)
    for number, (name, entry) in enumerate(entries):
        linked = isinstance(entry, _Link)
        payload = _followed(number, entries, places) if linked else entry
        if name.startswith(("__", "./__")) and _is_meta(name):
            found.books.leave_out(META, shown(name))
        elif isinstance(payload, _Folder):
            found.books.leave_out(LINK_TO_FOLDER if linked else FOLDER, shown(name))
        elif (named := split_name(name, split)) is None:
            found.books.leave_out(name_reason(name), shown(name))
        elif not isinstance(payload, _Payload):
            found.books.leave_out(LINK_NOWHERE, shown(name))
        elif payload.pieces and payload.size > MOST_SPARSE:
            found.books.leave_out(TOO_SPARSE, shown(name))
        else:
            found.members.append(Member(name, *named, payload.offset, payload.size, payload.pieces))
    found.books.take(len(found.members))


def _followed(
    number: int, entries: Sequence[tuple[str, _Entry]], places: dict[str, list[int]]
) -> _Entry | None:
    """What a link leads to, over other links too. A hard one leads back, a soft one to the last such name."""
    seen: set[int] = set()
    entry = entries[number][1]
    while isinstance(entry, _Link):
        if number in seen:
            return None
        seen.add(number)
        numbers = places.get(entry.target, [])
        numbers = numbers[: bisect_left(numbers, number)] if entry.hard else numbers
        if not numbers:
            return None
        number = numbers[-1]
        entry = entries[number][1]
    return entry


def _is_meta(name: str) -> bool:
    """What webdataset passes over, with or without `./` before it."""
    bare = name.removeprefix("./")
    return bool(_META.match(name)) or ("/" not in bare and bare.endswith("__"))


def _check_end(file: BinaryIO, path: Path, end: int, size: int) -> None:
    """A whole tar ends in at least two zero blocks and nothing more; anything else there is damage."""
    file.seek(end)
    tail = file.read(_BLOCK)
    if len(tail) < _BLOCK or size - end < 2 * _BLOCK:
        raise DataError(_cut(path, size, "the end mark is missing"))
    if tail.count(0) != len(tail):
        raise DataError(f"{path}: damaged tar header at byte {end}; fetch or pack the shard again")
    at = end
    while tail and tail.count(0) == len(tail):
        at += len(tail)
        tail = file.read(_CHUNK)
    if not tail:
        return
    at += next(place for place, byte in enumerate(tail) if byte)
    if at - end < 2 * _BLOCK or _header_follows(file, at):
        raise DataError(
            f"{path}: damaged tar header at byte {end}: it is blank, and the tar goes on at byte {at}; fetch "
            "or pack the shard again; two tars put behind each other are joined by tar --concatenate"
        )
    raise DataError(
        f"{path}: {size - at} bytes that aren't part of the tar lie behind its end, from byte {at} on; cut "
        f"them off (truncate -s {end + 2 * _BLOCK}), or fetch or pack the shard again"
    )


def _header_follows(file: BinaryIO, at: int) -> bool:
    """Whether a tar header lies at `at` or anywhere behind it."""
    file.seek(at - at % _BLOCK)
    while chunk := file.read(_CHUNK):
        if any(chunk.startswith(b"ustar", place) for place in range(257, len(chunk), _BLOCK)):
            return True
    return False


def _kind(file: BinaryIO, error: tarfile.TarError) -> str:
    """What a file is whose first header isn't a tar's."""
    file.seek(0)
    start = file.read(8)
    known = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)
    return known or f"{error}; name tars only, unpacked"


def _cut(path: Path, size: int, why: str) -> str:
    return f"{path}: truncated shard: {why} ({size} bytes there); fetch or pack it again"
