"""A site whose SLURM commands fail now and then, and what `keel runs` makes of it."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from launch.runs.registry import look

COMMAND = """\
#!/bin/sh
case "$(cat {troubles})" in
*"{name} fails"*) echo "{name}: error: Unable to contact slurm controller" >&2; exit 1 ;;
*"{name} forgets"*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
*"{name} hangs"*) exec sleep 300 ;;
esac
exec {real} "$@"
"""
View = tuple[str, ...]


class Site:
    """Stand-ins for squeue and sacct in `folder` that do what the real ones do, unless there is trouble."""

    KNOWING: View = ()
    VIEWS = (KNOWING, ("sacct fails",), ("squeue fails",), ("squeue fails", "sacct fails"))

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.troubles = folder, folder / "troubles"
        self.troubles.write_text("")
        for name in ("squeue", "sacct"):
            program = folder / name
            program.write_text(COMMAND.format(troubles=self.troubles, name=name, real=shutil.which(name)))
            program.chmod(0o755)

    @contextmanager
    def trouble(self, *what: str) -> Iterator[None]:
        """Meanwhile this process finds the stand-ins, with some of: "squeue fails", "sacct hangs"."""
        self.troubles.write_text(" ".join(what))
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{self.folder}{os.pathsep}{path}"
        try:
            yield
        finally:
            os.environ["PATH"] = path
            self.troubles.write_text("")

    @contextmanager
    def looks_at(self, run: Path, every: float = 0.3) -> Iterator[Mapping[View, list[str]]]:
        """Meanwhile look at a run as `keel runs` does, with each trouble by turns; gives its states."""
        seen: dict[View, list[str]] = {view: [] for view in self.VIEWS}
        ended = threading.Event()

        def watch() -> None:
            for view in itertools.cycle(self.VIEWS):
                if ended.wait(every):
                    return
                with self.trouble(*view):
                    (found,) = look([run])
                if seen[view][-1:] != [found.state]:
                    seen[view].append(found.state)

        with ThreadPoolExecutor(1) as watcher:
            watching = watcher.submit(watch)
            try:
                yield seen
            finally:
                ended.set()
            watching.result()
