"""The run folder: one per run, and the only database there is.

RUN/config.yaml  run.json  metrics.jsonl  checkpoints/  logs/  pictures/  exports/  .attempts/  .lock
"""

from __future__ import annotations

import fcntl
import json
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
from pretrain.types import Progress, StepReport, StopReason

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
        """Change keys of run.json, atomically. Only the holder of the lease writes."""
        state = self.read_state() | changes
        write_atomically(self.state_file, json.dumps(state, indent=1) + "\n")
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
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        file.seek(0)
                        holder = file.read().strip() or "another process"
                        raise RunError(
                            f"{self.root}: is being trained by {holder}; "
                            "wait for it, stop it, or set another run.dir"
                        ) from None
                    time.sleep(0.1)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield


class Heartbeat:
    """A listener that keeps run.json telling the truth: progress, when last alive, how it ended."""

    def __init__(self, folder: RunFolder, attempt: Mapping[str, Any], every_seconds: float = 10.0) -> None:
        self.folder, self.every, self.last = folder, every_seconds, 0.0
        self.attempts = [*folder.read_state().get("attempts", []), dict(attempt) | {"started": now()}]
        # What an earlier attempt failed of is in the logs; the run itself is well again.
        folder.update_state(status="running", heartbeat=now(), attempts=self.attempts, error="")

    def after_step(self, report: StepReport) -> None:
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            progress = report.progress
            self.folder.require_newest(self.attempts[-1]["attempt"])
            self.folder.update_state(heartbeat=now(), step=progress.step, samples=progress.samples)

    def end_attempt(self, reason: str) -> None:
        """This attempt is given up, and the run isn't."""
        self.attempts[-1] |= {"ended": now(), "reason": reason}
        self.folder.update_state(heartbeat=now(), attempts=self.attempts)

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


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


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
