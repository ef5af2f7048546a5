"""The place where a set is being made, and how it gets to its own: whole, or not at all.

A new folder is made beside its place, as .NAME.part, and renamed. An existing empty folder (a mount point, a
link to another disk, `.`) is filled: the set is made in a folder inside it, on the disk that was asked for,
and moved up at the end, its manifest last, without which it is no set. What is finished stays for the next
start, until the set is in its place.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import DataError
from data_pipeline.entries import listed, said
from data_pipeline.manifest import NAME

NAMES = "names.jsonl"
INSIDE = ".pack.part"

_OWN = re.compile(rf"shard-[0-9]{{6,}}\.tar|index|{re.escape(NAMES)}")
_MOUNTED = frozenset(
    ("lost+found", ".snapshot", ".DS_Store", ".fseventsd", ".Spotlight-V100", "$RECYCLE.BIN")
) | {"System Volume Information", "@eaDir"}


class Building:
    """A set that is being made in `directory`; `receipts` are of the shards that are finished."""

    def __init__(self, out: Path, place: Path, part: Path):
        self.out, self._place, self.part = out, place, part
        self.directory, self.receipts = part / "set", part / "done"

    @property
    def _inside(self) -> bool:
        return self.part.parent == self._place

    def prepare(self) -> None:
        """Make the folders, and take away what a killed process left half."""
        for folder in (self.directory, self.receipts):
            folder.mkdir(parents=True, exist_ok=True)
            for half in (*folder.glob(".*.part"), *folder.glob("index/.*.part")):
                half.unlink(missing_ok=True)
        if self._inside:
            self._move(self._place, self.directory, self._moved())

    def publish(self, expected: Collection[str]) -> None:
        """Put the set, which is made of the files `expected`, in its place. Raises OSError."""
        for path in [path for path in self.directory.rglob("*") if not path.is_dir()]:
            if str(path.relative_to(self.directory)) not in expected:
                path.unlink()
        if not self._inside:
            self.directory.rename(self._place)
        else:
            names = sorted(path.name for path in self.directory.iterdir() if path.name != NAME)
            try:
                self._move(self.directory, self._place, [*names, NAME])
            except OSError:
                with suppress(OSError):
                    self._move(self._place, self.directory, self._moved())
                raise
        self.tidy()  # the set is whole and in its place: what can't be taken away would be no reason to fail

    def tidy(self) -> None:
        """Take away what was needed for the work, as far as that can be done."""
        for folder in (self.receipts, self.directory):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            (self.part / "lock").unlink()
            self.part.rmdir()

    def _moved(self) -> list[str]:
        """What an interrupted publication has moved already. There is no manifest, or it would be done."""
        return [path.name for path in self._place.iterdir() if _OWN.fullmatch(path.name)]

    def _move(self, start: Path, end: Path, names: Collection[str]) -> None:
        for name in names:
            if (end / name).is_dir() and not any((end / name).iterdir()):
                (end / name).rmdir()
            (start / name).rename(end / name)


@contextmanager
def building(out: Path) -> Iterator[Building]:
    """A place to make the set `out`, held against other processes. OSErrors inside become `DataError`."""
    try:
        place, inside = _place(out)
        part = place / INSIDE if inside else place.with_name(f".{place.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        with (part / "lock").open("wb") as lock:
            _lock(lock.fileno(), out)
            made = Building(out, place, part)
            made.prepare()
            try:
                yield made
            except BaseException:
                if not any(made.receipts.iterdir()):
                    made.tidy()
                raise
    except OSError as error:
        raise DataError(
            f"{said(out)}: can't be written: {error.strerror or error}; "
            "make room or name another folder; shards that are finished are kept for the next start"
        ) from error


def required_free(out: Path) -> tuple[Path, ...]:
    """Refuse an `out` that is taken; gives the folders in which a set for it lies, now or later."""
    try:
        place, _ = _place(out)
    except OSError as error:
        raise DataError(f"{said(out)}: can't be written: {error.strerror or error}") from None
    return place, place.with_name(f".{place.name}.part")


def _place(out: Path) -> tuple[Path, bool]:
    """Where the set is to lie, links followed, and whether that is a folder to be filled."""
    place = Path(os.path.realpath(out))
    if (place / NAME).exists():
        raise DataError(f"{said(out)}: already holds a data set; remove it or name another folder")
    if place.is_symlink():
        raise DataError(f"{said(out)}: is a link that leads nowhere but in circles; name another folder")
    if not place.exists():
        return place, False
    if not place.is_dir():
        raise DataError(f"{said(out)}: is a file; name a folder")
    held = {path.name for path in place.iterdir()} - _MOUNTED
    if INSIDE in held:
        held -= {INSIDE, *(name for name in held if _OWN.fullmatch(name))}
    if held:
        raise DataError(f"{said(out)}: holds other files ({listed(sorted(held))}); name another folder")
    return place, True


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{said(out)}: another keel data pack is at work on it; wait for it") from None
    except OSError:
        pass  # a file system without locks
