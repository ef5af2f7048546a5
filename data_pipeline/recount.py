"""What a tar holds, by a second road: plain `tarfile`, once over the headers, nothing shared with the index.

If the index and this count agree, every member of the tar is accounted for.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from posixpath import basename, dirname, join, normpath
from typing import NamedTuple

from configs.errors import DataError
from data_pipeline import members
from data_pipeline.books import Books

_SPLIT = {
    "first": re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]+)", re.DOTALL),
    "last": re.compile(r"((?:.*/|)[^./][^/]*)[.]([^./]+)", re.DOTALL),
}
_META = re.compile(r"(?:\./)?__(?:_?\Z|[^/]*__(?:/|\Z))")


class _Seen(NamedTuple):
    name: str
    kind: str  # file, folder, soft, hard, or other
    target: str  # of a link, as it would be named in the tar
    huge: bool
    offset: int
    size: int


Field = tuple[str, str, int, int]
"""Key, field, first byte and size of what a member or the member it leads to holds."""


def recount(path: Path, split: str = "first") -> tuple[Counter[Field], Books]:
    """How often each field is there to be read, and an account of all members. Raises `DataError`."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            seen = []
            while (info := tar.next()) is not None:
                seen.append(_seen(info))
                tar.members.clear()  # type: ignore[attr-defined]  # a header takes more than a kilobyte
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise DataError(f"{path}: tarfile can't list its members: {error}") from None
    places: dict[str, list[int]] = {}
    if any(one.target for one in seen):
        for number, one in enumerate(seen):
            if one.kind != "other":
                places.setdefault(normpath(one.name), []).append(number)
    found, books = Counter[Field](), Books("members")
    for number, one in enumerate(seen):
        match = _SPLIT[split].fullmatch(one.name)
        end = _end(number, seen, places) if one.target else one
        reason = _reason(one, end, match)
        if reason or match is None or end is None:
            books.leave_out(reason, members.shown(one.name))
        else:
            found[match[1], match[2].lower(), end.offset, end.size] += 1
    books.take(found.total())
    return found, books


def _seen(info: tarfile.TarInfo) -> _Seen:
    if info.isreg():
        huge = info.issparse() and info.size > members.MOST_SPARSE
        return _Seen(info.name, "file", "", huge, info.offset_data, info.size)
    if info.islnk():
        return _Seen(info.name, "hard", normpath(info.linkname), False, 0, 0)
    if info.issym():
        return _Seen(info.name, "soft", normpath(join(dirname(info.name), info.linkname)), False, 0, 0)
    return _Seen(info.name, "folder" if info.isdir() else "other", "", False, 0, 0)


def _end(number: int, seen: Sequence[_Seen], places: Mapping[str, list[int]]) -> _Seen | None:
    """What a link leads to in the end, None for nothing; anything else is its own end."""
    been: set[int] = set()
    while seen[number].target and number not in been:
        been.add(number)
        numbers = places.get(seen[number].target, [])
        if seen[number].kind == "hard":  # only to what was extracted before it
            numbers = [one for one in numbers if one < number]
        if not numbers:
            return None
        number = numbers[-1]
    return None if number in been else seen[number]


def _reason(one: _Seen, end: _Seen | None, match: re.Match[str] | None) -> str:
    """Why a member isn't read; empty where it is."""
    if one.kind == "other":
        return members.SPECIAL
    if one.name.startswith(("__", "./__")) and _META.match(one.name):
        return members.META
    if end is not None and end.kind == "folder":
        return members.FOLDER if end is one else members.LINK_TO_FOLDER
    if match is None:
        name = basename(one.name)
        if not name.startswith("."):
            return members.NO_FIELD
        return members.APPLE_DOUBLE if name.startswith("._") else members.HIDDEN
    if end is None:
        return members.LINK_NOWHERE
    return members.TOO_SPARSE if end.huge else ""
