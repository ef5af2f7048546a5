"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from configs.errors import DataError, fault_of_place


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends well, and not at all otherwise.

    Written beside, synced, renamed: a reader or a crash never meets half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Refuse a file that couldn't be written, before the work for it is done. Raises `DataError`."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
        beside.open("xb").close()
        beside.unlink()
    except OSError as error:
        known = fault_of_place(error)
        raise DataError(str(known or f"{path}: can't be written: {error.strerror or error}")) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with published(path) as file:
        file.write(content)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a part.

    Raises OSError with the file's name; then nothing is left beside it.
    """
    if not path.parent.is_dir():  # a run whose folder was removed meanwhile isn't to make it again
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise of_file(path, error) from error


def of_file(path: Path, error: OSError) -> OSError:
    """The same error, saying whose it is: a write that fails doesn't."""
    return OSError(error.errno, error.strerror, str(path))
