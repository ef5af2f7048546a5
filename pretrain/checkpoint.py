"""When to save, under which name, what to keep, and which checkpoint a run goes on from.

    RUN/checkpoints/step-00001000-a02/               written by attempt 2 at applied step 1000
                    .unfinished-step-00002000-a02/   being written, or left by a crash
                    pins.json                        names that are never removed, by reason

A folder is written under a temporary name, flushed to disk, and published by one rename. What is under a
published name is whole, or was damaged later, which its sizes and checksums tell.

Only the newest attempt publishes: it claims its number, then removes what older ones have unfinished
(`sweep`), then chooses where to go on from (`latest`). An older incarnation that is still alive finds either
the claim or no folder to rename.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch.distributed as dist

from configs.errors import RunError
from configs.loading import Config
from pretrain.clock import Duration, Progress
from pretrain.collectives import Agreement, from_main
from pretrain.engines import storage
from pretrain.ports import Engine, StagedState, StepReport, StopReason

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(?P<step>\d{8,})-a(?P<attempt>\d{2,})")
_UNFINISHED = ".unfinished-"
_PINS = "pins.json"

Tell = Callable[[Progress, Mapping[str, float]], None]


class CheckpointConfig(Config):
    """When a run is saved, besides its end, and what stays."""

    every: Duration = Duration(10, "min")
    keep: int = pydantic.Field(3, ge=1)  # newest ones; older are removed, pinned ones aside
    keep_every: Duration | None = None  # the first of each such period stays for good
    best: str | None = None  # "knn/top1": the best by this evaluation and figure is saved, and stays
    best_is: Literal["highest", "lowest"] = "highest"

    @pydantic.field_validator("every", "keep_every")
    @classmethod
    def _positive(cls, duration: Duration | None) -> Duration | None:
        if duration is not None and duration.amount == 0:
            raise ValueError("must be more than nothing")
        return duration

    @pydantic.field_validator("keep_every")
    @classmethod
    def _countable(cls, duration: Duration | None) -> Duration | None:
        if duration is not None and duration.unit == "min":
            raise ValueError("is measured in steps, samples or epochs, not in minutes")
        return duration


@dataclass(frozen=True, order=True)
class Published:
    """A folder with a checkpoint's name. Ordered by age: by attempt, then by step."""

    attempt: int
    step: int
    path: Path = field(compare=False)


def published(run_dir: Path) -> list[Published]:
    """Folders with a checkpoint's name, the newest first."""
    folder = run_dir / "checkpoints"
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((Published(int(n["attempt"]), int(n["step"]), p) for p, n in found if n), reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint, None where none was ever published.

    Damaged ones are named on the log. Raises `RunError` where all are damaged: starting again from nothing
    is for the user to decide.
    """
    problems = []
    for candidate in published(run_dir):
        problem = storage.damage(candidate.path)
        if problem is None:
            return candidate.path
        log.warning("checkpoint %s is damaged and passed over: %s", candidate.path.name, problem)
        problems.append(problem)
    if problems:
        raise RunError(
            f"{run_dir / 'checkpoints'}: all {len(problems)} checkpoints are damaged; newest: {problems[0]}; "
            "restore one, or remove the folder to start from nothing"
        )
    return None


def at_step(run_dir: Path, step: int) -> Path:
    """The newest checkpoint at `step`. Raises `RunError` where there is none, or it is damaged."""
    there = published(run_dir)
    found = next((one.path for one in there if one.step == step), None)
    if found is None:
        known = ", ".join(str(n) for n in sorted({one.step for one in there})) or "none"
        raise RunError(f"{run_dir}: no checkpoint at step {step}; there are: {known}")
    wrong = storage.damage(found)
    if wrong is not None:
        raise RunError(f"{wrong}; choose another step")
    return found


def read_extra(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the engine's state. Raises `RunError` where it can't be read."""
    extra = storage.Reader(path).state["extra"]
    assert isinstance(extra, dict)
    return extra


def sweep(run_dir: Path, attempt: int) -> None:
    """Remove what earlier attempts left unfinished; whoever of them still lives can't publish it any more."""
    for left in (run_dir / "checkpoints").glob(f"{_UNFINISHED}*"):
        name = _NAME.fullmatch(left.name.removeprefix(_UNFINISHED))
        if name is None or int(name["attempt"]) <= attempt:
            shutil.rmtree(left, ignore_errors=True)


def pins(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Reason to {"checkpoint": name, ...}: what pruning leaves alone."""
    try:
        found = json.loads((run_dir / "checkpoints" / _PINS).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{run_dir / 'checkpoints' / _PINS}: can't be read ({error}); remove it") from error
    assert isinstance(found, dict)
    return found


def pin(run_dir: Path, reason: str, name: str | None, **facts: Any) -> None:
    """Keep checkpoint `name` for `reason`, instead of what was kept for it before; None lets go."""
    folder = run_dir / "checkpoints"
    if name is not None and not (folder / name).is_dir():
        raise RunError(f"{folder / name}: no such checkpoint to pin")
    changed = {key: value for key, value in pins(run_dir).items() if key != reason}
    if name is not None:
        changed[reason] = {"checkpoint": name, **facts}
    beside = folder / f".{_PINS}"
    beside.write_text(json.dumps(changed, indent=1) + "\n")
    beside.replace(folder / _PINS)


def prune(
    run_dir: Path,
    keep: int,
    keep_every_steps: int | None = None,
    *,
    checksums: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Remove all but the newest `keep` whole checkpoints, the first of each period, and the pinned.

    Gives the names removed, or with `dry_run` those that would be. `checksums`: read every byte of what is
    taken for whole. A crash in between leaves nothing half removed under a published name.
    """
    removed = _superfluous(run_dir, keep, keep_every_steps, checksums)
    if not dry_run:
        _remove([_withdrawn(path) for path in removed])
    return [path.name for path in removed]


def _superfluous(run_dir: Path, keep: int, every: int | None, checksums: bool = False) -> list[Path]:
    found = published(run_dir)
    kept = {entry["checkpoint"] for entry in pins(run_dir).values()}
    whole = (each.path.name for each in found if storage.damage(each.path, checksums) is None)
    kept |= set(itertools.islice(whole, keep))
    if every is not None:
        period = 0
        for each in sorted(found, key=lambda p: p.step):
            if each.step // every > period:
                period = each.step // every
                kept.add(each.path.name)
    return [each.path for each in found if each.path.name not in kept]


def _withdrawn(path: Path) -> Path:
    """Take away its published name: what a crash then leaves of it is swept by the next attempt."""
    doomed = path.with_name(_UNFINISHED + path.name)
    with contextlib.suppress(FileNotFoundError):  # somebody else is pruning
        path.rename(doomed)
    return doomed


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class Checkpointer:
    """The listener that saves: when due, and at the end. Constructed and called on every rank alike.

    Training waits only for the copy to host memory. A thread writes and publishes, one checkpoint at a time;
    what fails there is raised on every rank at the same later step. Another thread removes those that are no
    longer kept: a save doesn't wait for it, the run's end does. `tell` hears how long training stood
    still ("checkpoint_stall") and how long the write before took ("checkpoint_write"), in seconds.
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
        tell: Tell | None = None,
    ) -> None:
        """`start`: where this attempt began; `extra`: what to store beside the engine's state, as JSON."""
        self.config, self.run_dir, self.engine, self.attempt = config, run_dir, engine, attempt
        self.extra, self.tell = extra, tell
        self.folder = run_dir / "checkpoints"
        self.clock = _Clock(config.every, start, batch_size)
        self.agreement = Agreement()
        self.saved = start.step if start.step else None  # where this attempt began is saved already
        period = config.keep_every
        self.keep_every = None if period is None else period.steps(batch_size, start.dataset_size)
        self.writing: _Writing | None = None
        self.removing: threading.Thread | None = None
        self.wrote: float | None = None  # seconds the last write took
        self.longest = self.stalled = 0.0  # seconds: a whole save, and the standstill of the last one
        from_main(self._prepare)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.run_dir, self.attempt)

    def after_step(self, report: StepReport) -> None:
        """Save when due. Raises what an earlier write failed of."""
        failed = self.writing is not None and self.writing.failed
        agreed = self.agreement.exchange(_FAILED if failed else _DUE if self.clock.rings() else 0)
        if agreed == _FAILED:
            self.wait()
            raise RunError(f"{self.folder}: a rank could not write a checkpoint; see its log")
        if self.clock.due(report.progress) or agreed == _DUE:
            self.save(report.progress)

    def finish(self, progress: Progress, reason: StopReason) -> None:
        """Save, and wait until it is on disk, and what it replaces is gone."""
        self.save(progress)
        self.wait()
        self.settle()

    def save(self, progress: Progress, then: Callable[[str], None] | None = None) -> None:
        """Copy the state and begin to write it; collective. Does nothing at a step that is saved already.

        `then` is called on rank 0 with the checkpoint's name once it is published.
        """
        self.clock.restart()
        if progress.step == self.saved:
            self.wait()
            if then is not None:
                from_main(partial(self._tell_name, progress.step, then))
            return
        started = time.perf_counter()
        self.wait()
        staged = self.engine.stage(self.extra(progress))
        name = f"step-{progress.step:08d}-a{self.attempt:02d}"
        unfinished = self.folder / f"{_UNFINISHED}{name}"
        publish = partial(self._publish, unfinished, self.folder / name, then)
        self.writing = _Writing(partial(self._write, staged, unfinished, publish), unfinished)
        self.saved = progress.step
        self.stalled = time.perf_counter() - started
        if self.tell is not None:
            stall = {"checkpoint_stall": self.stalled}
            self.tell(progress, stall | ({} if self.wrote is None else {"checkpoint_write": self.wrote}))

    def wait(self) -> None:
        """Until nothing is being written; collective. Raises what the write failed of, and cleans up."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except Exception:
            shutil.rmtree(writing.directory, ignore_errors=True)
            raise
        self.wrote = writing.seconds
        self.longest = max(self.longest, self.stalled + self.wrote)
        log.info("%s written in %.1f s", writing.directory.name.removeprefix(_UNFINISHED), self.wrote)

    def settle(self) -> None:
        """Leave nothing under way, also where an attempt is given up but its ranks go on; collective."""
        try:
            self.wait()
        except RunError as error:
            log.warning("%s", error)
        self.agreement.settle()
        if self.removing is not None:
            self.removing.join()

    def _tell_name(self, step: int, then: Callable[[str], None]) -> None:
        for name in [each.path.name for each in published(self.run_dir) if each.step == step][:1]:
            then(name)

    def _write(self, staged: StagedState, to: Path, publish: Callable[[], None]) -> None:
        """In the writing thread; room on the disk is made first."""
        if self.removing is not None:
            self.removing.join()
        staged.write(to, publish)

    def _publish(self, unfinished: Path, path: Path, then: Callable[[str], None] | None = None) -> None:
        """On rank 0, in the writing thread."""
        newest = max((int(p.name[1:]) for p in (self.run_dir / ".attempts").glob("a*")), default=0)
        if newest > self.attempt:
            raise RunError(f"attempt {newest} has taken over; attempt {self.attempt} publishes nothing more")
        unfinished.rename(path)
        storage.flush_folder(self.folder)
        if then is not None:
            then(path.name)
        doomed = [_withdrawn(each) for each in _superfluous(self.run_dir, self.config.keep, self.keep_every)]
        self.removing = threading.Thread(target=_remove, args=(doomed,), daemon=True)
        self.removing.start()


_DUE, _FAILED = 1, 2


class _Writing:
    """One checkpoint on its way to disk, in a thread that dies with the process."""

    def __init__(self, write: Callable[[], None], directory: Path) -> None:
        self.directory, self.seconds = directory, 0.0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            write()
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    @property
    def failed(self) -> bool:
        return self._error is not None

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


class _Clock:
    """Tells when a duration has passed since the last save."""

    def __init__(self, every: Duration, start: Progress, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self.seen = self._periods(start)
        self.restart()

    def restart(self) -> None:
        self.started, self.rung = time.monotonic(), False

    def rings(self) -> bool:
        """Once, on rank 0, when the minutes are over: the others hear of it by agreement."""
        if self.every.unit != "min" or self.rung or (dist.is_initialized() and dist.get_rank() != 0):
            return False
        self.rung = time.monotonic() - self.started >= 60 * self.every.amount
        return self.rung

    def due(self, progress: Progress) -> bool:
        """Whether a period of steps, samples or epochs was completed; the same on every rank."""
        before, self.seen = self.seen, self._periods(progress)
        return self.seen > before

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
