"""`keel checkpoint`: what lies in RUN/checkpoints, whether it is whole, and what may go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import RunError
from pretrain import checkpoint
from pretrain.engines import storage


@dataclass(frozen=True)
class Listed:
    """One checkpoint, told from its index alone."""

    name: str
    step: int
    attempt: int
    samples: int | None  # None where the index can't be read
    ranks: int | None
    zero_stage: int | None
    bytes: int
    saved: str  # UTC, ISO 8601
    pins: tuple[str, ...]  # why it is never removed
    problem: str | None  # what is wrong at a glance: sizes, not checksums


@dataclass(frozen=True)
class Verdict:
    """A checkpoint after every one of its bytes was read."""

    name: str
    problem: str | None  # names the damaged file


def listing(run: Path) -> list[Listed]:
    """The checkpoints of `run`, the newest first. Raises `RunError` where there is no such run."""
    pins = checkpoint.pins(_existing(run))
    return [_listed(each, pins) for each in checkpoint.published(run)]


def _listed(each: checkpoint.Published, pins: dict[str, dict[str, object]]) -> Listed:
    problem = storage.damage(each.path, checksums=False)
    state = storage.Reader(each.path).state if problem is None else {}
    files = [file.stat() for file in each.path.iterdir() if file.is_file()]
    saved = datetime.fromtimestamp(each.path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return Listed(
        name=each.path.name,
        step=each.step,
        attempt=each.attempt,
        samples=state.get("extra", {}).get("samples"),
        ranks=state.get("ranks"),
        zero_stage=state.get("zero_stage"),
        bytes=sum(file.st_size for file in files),
        saved=saved,
        pins=tuple(reason for reason, pin in pins.items() if pin["checkpoint"] == each.path.name),
        problem=problem,
    )


def verify(run: Path, step: int | None = None) -> Iterator[Verdict]:
    """Read every byte of the checkpoints of `run`, or of those at `step`, the newest first.

    Raises `RunError` where there is nothing to verify.
    """
    found = checkpoint.published(_existing(run))
    chosen = [each for each in found if step in (None, each.step)]
    if not chosen:
        there = ", ".join(str(each.step) for each in found) or "none"
        wanted = "" if step is None else f" at step {step}"
        raise RunError(f"{run}: no checkpoint{wanted}; there are: {there}")
    for each in chosen:
        yield Verdict(each.path.name, storage.damage(each.path))


def prune(run: Path, keep: int, dry_run: bool) -> Sequence[str]:
    """Remove all but the newest `keep` valid checkpoints and the pinned ones; gives the names.

    Damaged ones go first. Raises `RunError` where no checkpoint is valid: then nothing is removed.
    """
    found = checkpoint.published(_existing(run))
    if found and all(storage.damage(each.path) is not None for each in found):
        raise RunError(
            f"{run}: none of its {len(found)} checkpoints is valid, so none is removed; "
            "keel checkpoint verify says why"
        )
    return checkpoint.prune(run, keep, checksums=True, dry_run=dry_run)


def _existing(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run}: not a run folder (no config.yaml in it)")
    return run
