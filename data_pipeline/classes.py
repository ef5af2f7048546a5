"""A file of class names, one a line: the order gives the numbers."""

from __future__ import annotations

import codecs
from pathlib import Path

from configs.errors import DataError

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names in `path`; line n (from 0) names class n. White space around a name goes.

    UTF-8, with or without a byte order mark, or UTF-16 with one; any line ends; blank lines at the end don't
    count. Raises `DataError` in a line: for a blank line between names, which would be a class without a name
    or shift all numbers behind it, for bytes of another encoding, and for a file without names. A name may
    come twice, as in ImageNet's own list.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None
    # splitlines() would also break at U+2028, U+0085 and form feeds, which may stand in a name
    lines = _text(data, path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{path}: holds no class names; write one a line")
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(
                f"{path}: line {number} is blank, with names behind it; name that class or take the line out"
            )
        if "\0" in name:
            raise DataError(f"{path}: line {number} has a zero byte: this isn't a text file of class names")
    return tuple(names)


def _text(data: bytes, path: Path) -> str:
    wide = data.startswith(_WIDE)
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} isn't {'UTF-16' if wide else 'UTF-8'}: found byte "
            f"0x{data[error.start]:02x}; save the file as UTF-8 (iconv -f latin1 -t utf8)"
        ) from None
