"""What a folder or a table offers to `keel data pack`: pictures, their labels and texts, and an account."""

from __future__ import annotations

import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.books import Books
from data_pipeline.fields import IMAGE_FIELDS

ENDINGS = tuple(f".{field}" for field in IMAGE_FIELDS)

# Other names of the same kind of file: in a shard each kind has one.
_KINDS = {
    **dict.fromkeys(("jpeg", "jpe", "jfif", "pjpeg", "mpo"), "jpg"),
    **{"apng": "png", "tiff": "tif", "avifs": "avif"},
    **dict.fromkeys(("j2k", "j2c", "jpc", "jpf", "jpx"), "jp2"),
}
_MAGIC = (
    *(
        (0, b"\xff\xd8\xff", "jpg"),
        (0, b"\x89PNG\r\n\x1a\n", "png"),
        (8, b"WEBP", "webp"),
        (0, b"GIF8", "gif"),
    ),
    *(
        (0, b"II*\0", "tif"),
        (0, b"MM\0*", "tif"),
        (0, b"\0\0\0\x0cjP  ", "jp2"),
        (0, b"\xff\x4f\xff\x51", "jp2"),
    ),
    *((4, b"ftypavif", "avif"), (4, b"ftypavis", "avif"), (0, b"BM", "bmp")),
    *((0, f"P{digit}".encode(), "ppm") for digit in range(1, 7)),
)


@dataclass(frozen=True)
class SourceOptions:
    """How a folder or a table is to be understood."""

    path_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] = ()  # names of the labels, in order
    labels_as_names: bool = False  # of a table: numbers are names too, and get numbers of their own
    class_folders: bool | None = None  # whether sub-folders are classes; None: unless they are a download's
    sidecars: bool = True  # whether texts beside the pictures of a folder go with them


@dataclass(frozen=True)
class Entry:
    """A picture to pack, and what goes with it."""

    name: str  # what the source calls it: a path relative to the folder, a cell of the table
    said: str  # what a message calls it
    path: Path
    fields: tuple[tuple[str, bytes | Path], ...] = ()  # beside the picture's own: content, or a file of it
    cell: tuple[str, int] | None = None  # where the picture lies inside the table `path`: column, row
    stamp: tuple[int, ...] = ()  # sizes and times of the files: tells a mended one from what was packed
    wrong: str | None = None  # why it can't be packed, where that is known before it is opened


@dataclass
class Offered:
    """All that a source holds."""

    entries: list[Entry]
    classes: tuple[str, ...]
    books: Books  # of its files or rows, but for the entries, which are entered when they are packed
    also: dict[str, Books] = field(default_factory=dict)  # accounts of labels and the like
    notes: list[str] = field(default_factory=list)  # what the user should know of how it was understood
    captioned: bool = False  # whether entries without any text are to be counted


def said(name: str | Path) -> str:
    """A name as a message shows it: on one line, whatever bytes it is made of."""
    text = str(name)
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


def listed(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(said(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")


def stamped(path: Path) -> tuple[int, ...]:
    """Size and time of a regular file. Raises OSError, or ValueError that says what it is instead."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise ValueError(f"is {what}")
    return found.st_size, found.st_mtime_ns


def kind_of(suffix: str, data: bytes) -> str | None:
    """The field for a picture, by its file's ending, else by its first bytes; None where neither tells."""
    ending = suffix[1:].lower()
    if ending in IMAGE_FIELDS:
        return _KINDS.get(ending, ending)
    return next((kind for at, start, kind in _MAGIC if data[at : at + len(start)] == start), None)


def missing(value: object) -> bool:
    """Whether a cell says nothing: null, NaN as pandas spells a gap, or blank."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())
