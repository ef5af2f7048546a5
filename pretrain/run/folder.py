"""The run folder: one per run, and the only database there is.

RUN/config.yaml  run.json  metrics.jsonl  checkpoints/  logs/  pictures/  exports/  .attempts/  .lock
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.errors import RunError
from data_pipeline.files import of_file, write_atomically, write_whole
from data_pipeline.locks import locked
from pretrain.clock import Progress
from pretrain.ports import StepReport, StopReason

log = logging.getLogger(__name__)

SPARE = 64 << 10
"""Bytes that a run keeps, so that it can say how it ended although its disk is full."""

RECORDED_PACKAGES = ("keel", "torch", "deepspeed", "timm", "accelerate", "webdataset", "wandb", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    root: Path

    @property
    def config_file(self) -> Path:
        return self.root / "config.yaml"

    @property
    def state_file(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    @property
    def starting_weights(self) -> Path:
        """The encoder's weights that the run began with, where `encoder.weights` named some."""
        return self.root / "start.safetensors"

    @property
    def spare(self) -> Path:
        """Bytes to be given up for run.json where the disk is full."""
        return self.root / ".spare"

    def exists(self) -> bool:
        return self.config_file.is_file()

    def create(self) -> None:
        """Make the folder and its rooms. Raises `RunError` where that can't be, or nothing can be written."""
        rooms = (self.checkpoints, self.logs, self.pictures, self.exports, self.root / ".attempts")
        try:
            for room in rooms:
                room.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"run.dir: {self.root} can't be made: {error.strerror}; choose another folder"
            ) from error
        try:
            (self.root / ".lock").open("a").close()
            if not self.spare.is_file():
                write_whole(self.spare, os.urandom(SPARE))  # not zeros, which a file system may not store
        except OSError as error:
            raise RunError(
                f"run.dir: {self.root} can't be written to: {error.strerror}; "
                "look at its owner and its disk, or choose another folder"
            ) from error

    def read_state(self) -> dict[str, Any]:
        """run.json, empty where there is none yet."""
        try:
            state = json.loads(self.state_file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.state_file}: can't be read ({error}); restore or remove it") from error
        assert isinstance(state, dict)
        return state

    def update_state(self, **changes: Any) -> dict[str, Any]:
        """Change keys of run.json, atomically. Only the holder of the lease writes.

        Raises OSError, with the file's name, where that can't be, not even in the room that is kept for it.
        """
        state = self.read_state() | changes
        text = json.dumps(state, indent=1) + "\n"
        try:
            write_atomically(self.state_file, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.spare.exists():
                raise
            self.spare.unlink()
            write_atomically(self.state_file, text)
        return state

    def newest_attempt(self) -> int:
        """The highest number claimed so far, 0 where there is none."""
        return max((int(p.name[1:]) for p in (self.root / ".attempts").glob("a*")), default=0)

    def require_newest(self, attempt: int) -> None:
        """Raises `RunError` where a newer attempt has taken over: this one must write nothing more."""
        if (newest := self.newest_attempt()) > attempt:
            raise RunError(f"attempt {newest} has taken over; attempt {attempt} writes nothing more")

    def claim_attempt(self) -> int:
        """The next attempt's number, which no other process can get: claimed by an exclusive create."""
        number = 1 + self.newest_attempt()
        while True:
            try:
                (self.root / ".attempts" / f"a{number:02d}").open("x").close()
                return number
            except FileExistsError:
                number += 1

    @contextmanager
    def lease(self, patience: float = 20.0) -> Iterator[None]:
        """Hold the folder as its only writer; the lock dies with the process.

        Raises `RunError` when it is still taken after `patience` seconds.
        """
        with (self.root / ".lock").open("a+") as file:
            deadline = time.monotonic() + patience
            while (got := locked(file, wait=False)) is False:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RunError(
                        f"{self.root}: is being trained by {holder}; "
                        "wait for it, stop it, or set another run.dir"
                    )
                time.sleep(0.1)
            if got is None:
                log.warning(
                    "%s: its file system has no locks (flock), so nothing keeps a second keel train away; "
                    "an older attempt still can't publish a checkpoint over a newer one's", self.root,
                )  # fmt: skip
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            try:
                file.flush()
            except OSError as error:
                raise of_file(self.root / ".lock", error) from error
            yield


class Heartbeat:
    """A listener that keeps run.json telling the truth: progress, when last alive, how it ended."""

    def __init__(self, folder: RunFolder, attempt: Mapping[str, Any], every_seconds: float = 10.0) -> None:
        self.folder, self.every, self.last = folder, every_seconds, 0.0
        self.progress: Progress | None = None
        self.attempts = [*folder.read_state().get("attempts", []), dict(attempt) | {"started": now()}]
        # What an earlier attempt failed of is in the logs; the run itself is well again.
        folder.update_state(status="running", heartbeat=now(), attempts=self.attempts, error="")

    def after_step(self, report: StepReport) -> None:
        self.progress = report.progress
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            progress = report.progress
            self.folder.require_newest(self.attempts[-1]["attempt"])
            self.folder.update_state(heartbeat=now(), step=progress.step, samples=progress.samples)

    def end_attempt(self, reason: str) -> None:
        """This attempt is given up, at the step that it has come to; nothing where another has taken over."""
        if self.folder.newest_attempt() > self.attempts[-1]["attempt"]:
            return
        self.attempts[-1] |= {"ended": now(), "reason": reason}
        at = {} if self.progress is None else {"step": self.progress.step, "samples": self.progress.samples}
        self.folder.update_state(heartbeat=now(), attempts=self.attempts, **at)

    def finish(self, progress: Progress, reason: StopReason) -> None:
        self.attempts[-1] |= {"ended": now(), "reason": reason}
        status = "done" if reason == "done" else "stopped"
        self.folder.update_state(
            status=status,
            heartbeat=now(),
            step=progress.step,
            samples=progress.samples,
            attempts=self.attempts,
        )


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    """Versions, host and commit, as far as they can be known."""
    versions: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "host": platform.node(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
