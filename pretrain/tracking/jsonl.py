"""RUN/metrics.jsonl: one object a line, one write a line, full float precision, steps strictly increasing."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from configs.errors import RunError
from data_pipeline.files import published
from pretrain.clock import Progress
from pretrain.ports import Scores


class Jsonl:
    """Appends rows to a file, and writes pictures as PNG beside it."""

    def __init__(self, path: Path, picture_folder: Path) -> None:
        self.path, self.picture_folder = path, picture_folder
        # O_APPEND with one write a row: a kill leaves whole rows, and other processes may follow the file.
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def log(self, row: Mapping[str, float | int]) -> None:
        text = json.dumps({name: _jsonable(value) for name, value in row.items()}, allow_nan=False)
        line = text.encode() + b"\n"
        before = os.fstat(self.file).st_size
        try:
            if os.write(self.file, line) < len(line):  # the disk had room for a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file, before)  # half a row would spoil the file for every later attempt
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def evaluated(self, progress: Progress, scores: Scores) -> None:
        """Evaluations have a file of their own."""

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        """RUN/pictures/step-00001000-<name>.png of (3, H, W) float images in [0, 1]."""
        self.picture_folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
            target = self.picture_folder / f"step-{step:08d}-{name}.png"
            with published(target) as file:
                Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")

    def finish(self, status: str) -> None:
        """Flush to disk and close; a second time nothing, for the number may be another file's by then."""
        file, self.file = self.file, -1
        if file < 0:
            return
        try:
            os.fsync(file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(file)


def _jsonable(value: float | int) -> float | int | None:
    """JSON has no NaN or infinity; null is what table readers make a NaN of."""
    return value if math.isfinite(value) else None


def undo_after(path: Path, step: int) -> int:
    """Move the rows after `step` from metrics.jsonl to metrics.undone.jsonl; gives the highest step seen.

    Safe at every instant: rows are first appended to the other file and flushed to disk, then cut off here
    by truncation. After a kill in between, the next resume finds them there already. A line that a crash cut
    short is dropped. Raises `RunError` where a whole line isn't a row.
    """
    undone_file = path.with_name("metrics.undone.jsonl")
    kept, undone, highest = _split(path, step)
    if undone:
        _append_missing(undone_file, undone)
    if path.exists() and path.stat().st_size > kept:
        with path.open("r+b") as file:
            file.truncate(kept)
            os.fsync(file.fileno())
    return max([highest, *(int(row["step"]) for row in rows(undone_file))])


def rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a metrics file, empty where there is none."""
    return list(each_row(path))


def each_row(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole row, one after another: a file may be larger than memory. A torn last line is no row."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield _parse(path, line.rstrip(b"\n"))


def _split(path: Path, step: int) -> tuple[int, list[bytes], int]:
    """(bytes to keep, whole lines after `step`, highest step), read from the end: the file may be large."""
    if not path.exists() or path.stat().st_size == 0:
        return 0, [], 0
    undone: list[bytes] = []
    highest = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1  # what follows was cut short
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            line = data[start : end - 1]
            found = _parse(path, line)["step"]
            highest = max(highest, found)
            if found <= step:
                break
            undone.append(line)
            end = start
        return end, undone[::-1], highest


def _append_missing(path: Path, lines: list[bytes]) -> None:
    there = path.read_bytes() if path.exists() else b""
    whole = there[: there.rfind(b"\n") + 1]
    known = set(whole.split(b"\n"))
    with path.open("r+b" if path.exists() else "xb") as file:
        file.truncate(len(whole))
        file.seek(len(whole))
        file.writelines(line + b"\n" for line in lines if line not in known)
        file.flush()
        os.fsync(file.fileno())


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        row["step"] + 0
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path}: holds a line that is no row of metrics ({line[:60]!r}); remove that line or the file"
        ) from error
    assert isinstance(row, dict)
    return row
