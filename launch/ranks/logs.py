"""Everything a rank writes goes to its log file; what rank 0 writes is shown on the console as well."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

POLL = 0.1
"""Seconds between looks at the log file for what is new."""


def rank_log(logs: Path, rank: int) -> Path:
    """Where a rank's output lies."""
    return logs / f"rank-{rank:05d}.log"


@contextmanager
def redirected(log: Path, *, show: bool) -> Iterator[TextIO | None]:
    """Meanwhile file descriptors 1 and 2 write to the end of `log`, so that C libraries and crashes do too.

    With `show`, whole lines also appear on what was standard error, and a stream to it is given for a
    progress bar: still a terminal where it was one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    target = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    console = _Console(kept[2]) if show else None
    os.write(target, _headline())
    follower = Follower(target, console) if console else None
    stream = io.TextIOWrapper(console, write_through=True) if console else None
    for number in (1, 2):
        os.dup2(target, number)
    try:
        with _python_streams(kept[2]):
            yield stream
    finally:
        for number, original in kept.items():
            os.dup2(original, number)
        if follower and stream:
            follower.finish()
            stream.detach()  # else its end would close the console under whoever still holds it
        for number in (target, *kept.values()):
            os.close(number)


@contextmanager
def speaking() -> Iterator[None]:
    """Meanwhile what keel's own modules log, from INFO up, is printed on standard error as plain lines."""
    handler = logging.StreamHandler(sys.stderr)
    own = [logging.getLogger(package) for package in ("configs", "data_pipeline", "pretrain", "launch")]
    for logger in own:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in own:
            logger.removeHandler(handler)


@contextmanager
def _python_streams(console: int) -> Iterator[None]:
    """Standard output and error of Python on descriptors 1 and 2, line by line."""
    before = sys.stdout, sys.stderr
    with _lines_to(1, console) as sys.stdout, _lines_to(2, console) as sys.stderr:
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _lines_to(descriptor: int, console: int) -> TextIO:
    # Names of files need not be text; a line that tells of one mustn't be the end of a run.
    buffer = io.BufferedWriter(_Log(descriptor, console))
    return io.TextIOWrapper(buffer, "utf-8", "backslashreplace", line_buffering=True)


class _Log(io.FileIO):
    """A log whose disk may fill up: what it doesn't take goes to the descriptor `console`, if anywhere."""

    def __init__(self, descriptor: int, console: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.console = console

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            with suppress(OSError):
                os.write(self.console, data)
            return len(data)


def _headline() -> bytes:
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return f"--- {when} rank {rank} of {world}, process {os.getpid()} on {platform.node()}\n".encode()


class _Console(io.FileIO):
    """A terminal or pipe that may vanish: a run outlives the window it was started from."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]  # whatever buffer a TextIOWrapper hands down
        except OSError:
            return len(data)  # type: ignore[arg-type]


class Follower:
    """A thread that copies what is appended to a file to the console, line by line."""

    def __init__(self, file: int, console: io.FileIO) -> None:
        self.file, self.console = file, console
        self.position = os.fstat(file).st_size
        self.rest = b""
        # A progress bar may stand on the current line: wipe it, the bar's next refresh draws it again below.
        self.wipe = b"\r\x1b[2K" if console.isatty() else b""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="log-follower", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Show what is left and stop."""
        self.ended.set()
        self.thread.join()
        self._show(b"\n" if self.rest else b"")

    def _follow(self) -> None:
        while not self.ended.wait(POLL):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        while new := os.pread(self.file, 1 << 16, self.position):
            self.position += len(new)
            self._show(new)

    def _show(self, new: bytes) -> None:
        lines, newline, self.rest = (self.rest + new).rpartition(b"\n")
        if newline:
            self.console.write(self.wipe + lines + newline)
