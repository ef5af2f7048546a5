"""Places that can't be written and disks that are full, for tests: really refused by the kernel, or injected.

`unprivileged()` goes in front of a command, so that permission bits count although the tests may run as
root. `FullDisk` makes the n-th call that needs room below a folder fail with ENOSPC (or another error), and
every one after it, as a full disk does. It sees what Python itself writes: files, renames, folders, fsync;
libraries that write natively have to be failed by the test itself.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_ABOVE_PERMISSIONS = "-dac_override,-dac_read_search,-fowner"


def unprivileged() -> list[str]:
    """What goes in front of a command whose process mustn't stand above permission bits, as root's does.

    The process keeps its user, so that it can read the tree under test wherever that was cloned.
    """
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--bounding-set={_ABOVE_PERMISSIONS}", f"--inh-caps={_ABOVE_PERMISSIONS}"]


def full_disk_environment(folder: Path, below: Path, at: int, code: int = errno.ENOSPC) -> dict[str, str]:
    """os.environ, and what makes every Python process started with it a `FullDisk(below, at)` of its own.

    `folder` is where the hook goes; each process counts its own calls.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[1]
    hook = (
        "import sys\n"
        f"sys.path.append({str(root)!r})\n"
        "from tests.places import FullDisk\n"
        "from pathlib import Path\n"
        f"FullDisk(Path({str(below)!r}), {at}, {code}).__enter__()\n"
    )
    (folder / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


class FullDisk:
    """Meanwhile the `at`-th call (from 0) that needs room below `below`, and every later one, fails.

    With `at=None` nothing fails and `calls` counts, which tells a test how many cases there are:

        with FullDisk(tmp_path) as disk: work()
        for at in range(disk.calls): ...
    """

    def __init__(
        self, below: Path, at: int | None = None, code: int = errno.ENOSPC, stays: bool = True
    ) -> None:
        """`stays`: False where only that one call fails."""
        self._below = os.path.realpath(below)
        self._at, self._code, self._stays = at, code, stays
        self.calls = 0
        self.log: list[str] = []  # what each call was, for a failing test's message
        self._kept: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> FullDisk:
        disk, real_open = self, io.open

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.need("write", self.name)
                return super().write(data)

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
            errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not set(mode) & set("wax+") or not disk.concerns(file):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            disk.need("open", file)
            raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return binary
            return io.TextIOWrapper(binary, encoding or "utf-8", errors, newline, buffering == 1)  # type: ignore[type-var]

        self._replace(io, "open", opened)
        self._replace(builtins, "open", opened)
        for name, argument in (
            ("write", 0), ("pwrite", 0), ("fsync", 0), ("fdatasync", 0), ("ftruncate", 0),
            ("sendfile", 0), ("posix_fallocate", 0), ("rename", 1), ("replace", 1), ("link", 1),
            ("symlink", 1), ("mkdir", 0),
        ):  # fmt: skip
            self._replace(os, name, self._failing(name, getattr(os, name), argument))
        self._replace(os, "open", self._creating(os.open))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, value in reversed(self._kept):
            setattr(owner, name, value)
        self._kept.clear()

    def concerns(self, file: Any) -> bool:
        """Whether a path or descriptor lies below the folder."""
        if isinstance(file, int):
            try:
                file = Path(f"/proc/self/fd/{file}").readlink()
            except OSError:
                return False
        path = os.path.realpath(os.fsdecode(file))
        return path == self._below or path.startswith(self._below + os.sep)

    def need(self, call: str, file: Any) -> None:
        """Count a call that needs room; raises OSError where there is none."""
        if not self.concerns(file):
            return
        number, self.calls = self.calls, self.calls + 1
        self.log.append(f"{call} {file}")
        if self._at is not None and (number == self._at or (self._stays and number > self._at)):
            raise OSError(self._code, os.strerror(self._code), file if not isinstance(file, int) else None)

    def _failing(self, name: str, real: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            place = arguments[argument] if len(arguments) > argument else next(iter(named.values()))
            self.need(name, place)
            return real(*arguments, **named)

        return call

    def _creating(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & os.O_CREAT and named.get("dir_fd") is None:
                self.need("open", path)
            return real(path, flags, *arguments, **named)

        return call

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
