"""Which shards the patterns of `keel data index` name: paths, folders, URLs, braces, globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from configs.errors import DataError
from data_pipeline.members import shown
from data_pipeline.remote import check_name, is_remote, listed

_GLOBBING = "*?["
_COMPRESSED = (".tgz", ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")


def expanded(patterns: Sequence[str]) -> list[str]:
    """The shards that patterns name, in their order; sorted within a glob or folder.

    What exists under exactly the name given is meant, whatever signs are in it. Raises `DataError` in a line
    for a pattern that names nothing, and for a shard that is named twice, under two names too.
    """
    names: list[str] = []
    for pattern in patterns:
        if not pattern:
            raise DataError("an empty name stands among the shards")
        check_name(pattern)
        names += [name for piece in _pieces(pattern) for name in _named(piece)]
    if not names:
        raise DataError("no shards were named")
    first: dict[str, str] = {}
    for name in names:
        check_name(name)
        place = name if is_remote(name) else os.path.realpath(name)
        if place in first:
            other = "" if first[place] == name else f", the first time as {first[place]}"
            raise DataError(f"{name}: named twice{other}; name every shard once")
        first[place] = name
    return names


def _pieces(pattern: str) -> list[str]:
    """Braces expanded. A backslash is a sign like others, but before braces and commas."""
    if not is_remote(pattern):
        if os.path.lexists(pattern):
            return [pattern]
        if pattern.startswith("~/"):
            pattern = os.path.expanduser(pattern)  # noqa: PTH111  (Path would change the rest)
    try:
        return list(braceexpand(pattern, escape=any(sign in pattern for sign in ("\\{", "\\}", "\\,"))))
    except ValueError:
        raise DataError(f"{pattern}: its braces don't match") from None


def _named(piece: str) -> list[str]:
    """The shards of one pattern without braces."""
    if is_remote(piece):
        if not _globs_remotely(piece):
            return [piece]
        found = listed(piece)
    elif Path(piece).is_dir():
        return _in_folder(Path(piece))
    elif os.path.lexists(piece) or not any(sign in piece for sign in _GLOBBING):
        return [piece]
    else:
        found = _globbed(piece)
    if not found:
        raise DataError(f"{piece}: matches no shard")
    return found


def _in_folder(folder: Path) -> list[str]:
    """The tars directly in a folder; hidden ones are another program's unfinished work."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: can't be listed: {error.strerror or error}") from None
    packed = [path.name for path in files if path.name.lower().endswith(_COMPRESSED)]
    if packed:
        raise DataError(
            f"{folder}: holds {len(packed)} compressed tars, for instance {shown(packed[0])}; unpack them, "
            "or name the shards that are meant"
        )
    found = [str(path) for path in files if path.suffix.lower() == ".tar"]
    if not found:
        raise DataError(
            f"{folder}: a folder without .tar files; name its shards, with a pattern like "
            f"'{folder}/**/*.tar' where they lie deeper"
        )
    return found


def _globs_remotely(url: str) -> bool:
    """`?` begins a URL's query over http; elsewhere it is a sign of patterns."""
    protocol, _, rest = url.partition("://")
    path = rest.partition("/")[2]
    if protocol in ("http", "https"):
        return any(sign in path.partition("?")[0] for sign in "*[")
    return any(sign in path for sign in _GLOBBING)


def _globbed(pattern: str) -> list[str]:
    """As glob, but folders that exist as they are written, brackets and all, are taken literally."""
    folder, rest = "", pattern
    while "/" in rest:
        part, rest_behind = rest.split("/", 1)
        if not os.path.isdir(f"{folder}{part}/"):  # noqa: PTH112  (joined as text: nothing is normalised)
            break
        folder, rest = f"{folder}{part}/", rest_behind
    return sorted(glob.glob(glob.escape(folder) + rest, recursive=True))  # noqa: PTH207 absolute patterns


def described(name: str) -> str:
    """A shard's name for a message, whatever bytes it has."""
    return name if name.isprintable() else shown(name)
