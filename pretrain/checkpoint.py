"""When to save, under which name, and which checkpoint a run goes on from.

    RUN/checkpoints/step-00001000-a02/    written by attempt 2 at applied step 1000

A folder is written under a temporary name, flushed to disk, and published by one rename. What is under a
published name is whole, or was damaged later, which its sizes and checksums tell.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch.distributed as dist

from configs.errors import RunError
from configs.loading import Config
from pretrain.collectives import Agreement, from_main
from pretrain.engines import storage
from pretrain.types import Duration, Engine, Progress, StepReport, StopReason

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(?P<step>\d{8,})-a(?P<attempt>\d{2,})")
_UNFINISHED = ".unfinished-"


class CheckpointConfig(Config):
    """When a run is saved, besides its end."""

    every: Duration = Duration(10, "min")
    keep: int = pydantic.Field(3, ge=1)  # newest ones; older are removed

    @pydantic.field_validator("every")
    @classmethod
    def _positive(cls, every: Duration) -> Duration:
        if every.amount == 0:
            raise ValueError("must be more than nothing")
        return every


def published(run_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, the newest first: by attempt, then by step."""

    def age(path: Path) -> tuple[int, int]:
        found = _NAME.fullmatch(path.name)
        assert found is not None
        return int(found["attempt"]), int(found["step"])

    folder = run_dir / "checkpoints"
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=age, reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint, None where none was ever published.

    Damaged ones are named on the log. Raises `RunError` where all are damaged: starting again from nothing
    is for the user to decide.
    """
    candidates = published(run_dir)
    for path in candidates:
        problem = storage.damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged and passed over: %s", path.name, problem)
    if candidates:
        raise RunError(
            f"{run_dir / 'checkpoints'}: all {len(candidates)} checkpoints are damaged; newest: {problem};"
            " restore one, or remove the folder to start from nothing"
        )
    return None


def read_extra(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state. Raises `RunError` where it can't be read."""
    extra = storage.Reader(path).state["extra"]
    assert isinstance(extra, dict)
    return extra


class Checkpointer:
    """The listener that saves: when due, and at the end. Constructed and called on every rank alike.

    `start`: where this attempt began; `extra`: what to store besides the engine's state, JSON values.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: Path,
        engine: Engine,
        *,
        attempt: int,
        start: Progress,
        batch_size: int,
        extra: Callable[[Progress], Mapping[str, Any]],
    ) -> None:
        self.folder, self.engine, self.attempt, self.extra = run_dir / "checkpoints", engine, attempt, extra
        self.config, self.clock = config, _Clock(config.every, start, batch_size)
        self.saved = start.step if start.step else None  # where this attempt began is saved already
        from_main(self._sweep)

    def after_step(self, report: StepReport) -> None:
        if self.clock.due(report.progress):
            self.save(report.progress)

    def finish(self, progress: Progress, reason: StopReason) -> None:
        self.save(progress)
        self.clock.close()

    def save(self, progress: Progress) -> None:
        """Write and publish; collective. Does nothing at a step that is saved already."""
        self.clock.restart()
        if progress.step == self.saved:
            return
        name = f"step-{progress.step:08d}-a{self.attempt:02d}"
        unfinished = self.folder / f"{_UNFINISHED}{name}"
        try:
            self.engine.save(unfinished, self.extra(progress))
        except RunError:
            from_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            raise
        from_main(lambda: self._publish(unfinished, self.folder / name))
        self.saved = progress.step

    def _publish(self, unfinished: Path, path: Path) -> None:
        unfinished.rename(path)
        storage.flush_folder(self.folder)
        for old in published(self.folder.parent)[self.config.keep :]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        """Rename first: a crash in the middle must not leave a part under a published name."""
        doomed = path.with_name(_UNFINISHED + path.name)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)


class _Clock:
    """Tells when a duration has passed since the last save, the same on every rank."""

    def __init__(self, every: Duration, start: Progress, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self.seen = self._periods(start)
        self.agreement = Agreement() if every.unit == "min" else None
        self.restart()

    def restart(self) -> None:
        self.started, self.asked = time.monotonic(), False

    def due(self, progress: Progress) -> bool:
        if self.agreement is not None:
            return self._minutes_due(self.agreement)
        before, self.seen = self.seen, self._periods(progress)
        return self.seen > before

    def close(self) -> None:
        if self.agreement is not None:
            self.agreement.settle()

    def _minutes_due(self, agreement: Agreement) -> bool:
        """Rank 0's clock counts; the others hear of it a step later, and rank 0 acts with them."""
        main = not dist.is_initialized() or dist.get_rank() == 0
        ask = main and not self.asked and time.monotonic() - self.started >= 60 * self.every.amount
        self.asked = self.asked or ask
        return bool(agreement.exchange(int(ask)))

    def _periods(self, progress: Progress) -> int:
        """Whole periods up to `progress`, counted from the start of the run and not of the attempt."""
        match self.every.unit:
            case "steps":
                return int(progress.step // self.every.amount)
            case "samples":
                return int(progress.samples // self.every.amount)
            case "epochs":
                return int(progress.epoch // self.every.amount)
            case "min":
                return 0
