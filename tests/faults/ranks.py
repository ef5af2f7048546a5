"""What the forked ranks of a fault case do: train, write down which samples they got, and meet with a fault.

Faults are real where they can be: SIGKILL to the process itself at a chosen instant, a limit on file sizes
set by the kernel, a full file system. Instants are chosen by taking the place of one function for one call.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.load import Loader
from pretrain import checkpoint
from pretrain.engines import storage
from pretrain.health.stopping import StopRequest
from pretrain.health.watchdog import Watchdog
from pretrain.judging import schedule
from pretrain.judging.subject import Subject
from pretrain.run.folder import RunFolder
from pretrain.run.main import train


def attempt(root: str, ledger: str, fault: dict[str, Any] | None) -> str:
    """One rank of one attempt. `fault`: {"name", "rank" (None is all), "step", "phase", "seconds"}."""
    folder, stop = RunFolder(Path(root)), StopRequest()
    rank = int(os.environ["RANK"])
    _keep_ledger(folder, Path(ledger), rank)
    if fault is not None and fault["rank"] in (None, rank):
        FAULTS[fault["name"]](fault, stop)
    return train(folder, stop)


def _keep_ledger(folder: RunFolder, ledger: Path, rank: int) -> None:
    """Every batch that a rank is given, as a line of a file of its attempt's own."""
    give: Callable[[Loader], Any] = Loader.__next__

    def given(self: Loader) -> Any:
        position, batch = self.position, give(self)
        line = json.dumps([position, batch.index.tolist()]) + "\n"
        with (ledger / f"a{folder.newest_attempt():02d}-r{rank}").open("ab", buffering=0) as file:
            file.write(line.encode())
        return batch

    Loader.__next__ = given  # type: ignore[method-assign]


def _die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _nth(count: int, owner: Any, name: str, act: Callable[[], Any], *, after: bool = False) -> None:
    """Call `act` when `owner.name` is called for the `count`-th time: before it, or after it."""
    original, seen = getattr(owner, name), 0

    def replacement(*arguments: Any, **settings: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count and not after:
            act()
        result = original(*arguments, **settings)
        if seen == count and after:
            act()
        return result

    setattr(owner, name, replacement)


def _at_phase(fault: dict[str, Any], act: Callable[[], Any]) -> None:
    """Call `act` when this attempt enters the phase of `fault` for the `fault["step"]`-th time."""
    original, seen = Watchdog.enter, 0

    def entered(self: Watchdog, phase: str) -> None:
        nonlocal seen
        original(self, phase)
        if phase == fault["phase"]:
            seen += 1
            if seen == fault["step"]:
                act()

    Watchdog.enter = entered  # type: ignore[method-assign]


def _some_time_later(fault: dict[str, Any], stop: StopRequest) -> None:
    """From another thread, wherever training may be."""

    def later() -> None:
        time.sleep(fault["seconds"])
        _die()

    threading.Thread(target=later, daemon=True).start()


def _after_renaming(fault: dict[str, Any], stop: StopRequest) -> None:
    flush, seen = storage.flush_folder, 0

    def flushed(folder: Path) -> None:
        nonlocal seen
        seen += folder.name == "checkpoints"
        if seen == fault["count"]:
            _die()
        flush(folder)

    storage.flush_folder = flushed


def _no_large_files(fault: dict[str, Any], stop: StopRequest) -> None:
    """The kernel refuses to let any file grow beyond what a checkpoint needs."""
    _at_phase(fault, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)))


def _worker_dies(fault: dict[str, Any], stop: StopRequest) -> None:
    give, seen = Loader.__next__, 0

    def given(self: Loader) -> Any:
        nonlocal seen
        seen += 1
        if seen == fault["step"]:
            for pid in self.worker_pids()[:1]:
                os.kill(pid, signal.SIGKILL)
        return give(self)

    Loader.__next__ = given  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[dict[str, Any], StopRequest], None]] = {
    "kill in step": lambda fault, stop: _at_phase(fault, _die),
    "kill at a random time": _some_time_later,
    "kill in save": lambda fault, stop: _nth(fault["count"], storage, "save_file", _die),
    "kill after writing": lambda fault, stop: _nth(fault["count"], storage, "save_file", _die, after=True),
    "kill before the index": lambda fault, stop: _nth(fault["count"], storage, "write_index", _die),
    "kill before publishing": lambda fault, stop: _nth(
        fault["count"], storage, "write_index", _die, after=True
    ),
    "kill in publishing": _after_renaming,
    "kill in pruning": lambda fault, stop: _nth(1, checkpoint.shutil, "rmtree", _die),  # type: ignore[attr-defined]
    "kill in evaluation": lambda fault, stop: _nth(fault["count"], Subject, "features", _die),
    "kill after evaluation": lambda fault, stop: _nth(fault["count"], schedule, "write", _die),
    "no large files": _no_large_files,
    "delayed rank": lambda fault, stop: _at_phase(fault, lambda: time.sleep(1.0)),
    "worker killed": _worker_dies,
    "asked to leave": lambda fault, stop: _at_phase(fault, lambda: stop.ask("terminated")),
}
