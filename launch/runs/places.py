"""Where commands write: what the kernel refuses is a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import RunError


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Meanwhile an OSError of writing to `place` is raised as a `RunError` that names it."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else place
        raise RunError(
            f"{where}: can't be written to: {error.strerror or error}; "
            "look at its owner and its disk, or choose another folder"
        ) from error
