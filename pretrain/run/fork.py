"""A new run from another run's checkpoint, on purpose: what a resume refuses to change may differ here.

Weights, teacher, queue and moments come along as far as shapes and optimizer are the same; what doesn't fit
is refused. The clock goes on by default, so that a branch sees the samples its parent would have seen next,
and its schedule is at the same step; `anew` starts the clock at nothing, for a new phase of training.

The checkpoint is copied into the new run, as that of attempt 0: from then on the fork is a run like any
other, which no longer needs its parent.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import loading
from configs.errors import RunError
from data_pipeline.files import write_atomically
from data_pipeline.order import ORDER_VERSION
from pretrain import checkpoint
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.engines import storage
from pretrain.objective import Objective
from pretrain.run.folder import RunFolder
from pretrain.run.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fork:
    """The parent and where to branch off."""

    parent: Path
    step: int | None = None  # None: its newest valid checkpoint
    anew: bool = False

    def checkpoint(self) -> Path:
        """The checkpoint meant. Raises `RunError` where there is none, or it is damaged."""
        folder = RunFolder(self.parent.expanduser().absolute())
        if not folder.exists():
            raise RunError(f"--fork {self.parent}: not a run folder (no config.yaml in it)")
        if self.step is None:
            newest = checkpoint.latest(folder.root)
            if newest is None:
                raise RunError(f"--fork {self.parent}: has no checkpoint yet")
            return newest
        return checkpoint.at_step(folder.root, self.step)


def require_fitting(fork: Fork, path: Path, plan: Plan, objective: Objective) -> None:
    """Raises `RunError` where `objective` has other parameters or buffers, or nothing is left to train."""
    reader = storage.Reader(path)
    held = {
        name.removeprefix("model/"): reader.shape(name) for name in reader.tensors if name[:6] == "model/"
    }
    own = {name: list(value.shape) for name, value in objective.state_dict().items()}
    differing = [name for name in sorted(held.keys() | own.keys()) if held.get(name) != own.get(name)]
    if differing:
        name = differing[0]
        raise RunError(
            f"--fork {fork.parent}: {len(differing)} tensors differ in shape; the first is {name}: "
            f"{held.get(name, 'absent')} there, {own.get(name, 'absent')} here; keep objective and encoder"
        )
    step = 0 if fork.anew else reader.state["extra"]["step"]
    if step >= plan.total_steps:
        raise RunError(
            f"train.duration: {plan.config.train.duration} is {plan.total_steps} steps, and the fork begins "
            f"at step {step}; train longer, or start the clock with --anew"
        )


def bring(fork: Fork, path: Path, plan: Plan, folder: RunFolder) -> dict[str, Any]:
    """Copy the checkpoint into the new run; gives what run.json tells of the parent."""
    index = json.loads((path / storage.INDEX).read_text())
    parent = index["state"]["extra"]["step"]
    facts = _facts(fork, path, parent) | _rates(fork, path, index["state"]["extra"], plan)
    index["state"] = _state(fork, index["state"], plan, facts)
    name = f"step-{index['state']['extra']['step']:08d}-a00"
    unfinished = folder.checkpoints / f".unfinished-{name}"
    for left in (unfinished, folder.checkpoints / name):  # of a fork that was cut short
        shutil.rmtree(left, ignore_errors=True)
    try:
        unfinished.mkdir()
        for file in index["files"]:
            _copy(path / file["name"], unfinished / file["name"])
        write_atomically(unfinished / storage.INDEX, storage.sealed(index))
        unfinished.rename(folder.checkpoints / name)
        storage.flush_folder(folder.checkpoints)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(f"run.dir: {folder.root}: the checkpoint can't be copied there: {error}") from error
    problem = storage.damage(folder.checkpoints / name)
    if problem is not None:
        raise RunError(f"--fork {fork.parent}: copied, but {problem}")
    return facts


def _facts(fork: Fork, path: Path, step: int) -> dict[str, Any]:
    parent = RunFolder(path.parent.parent)
    return {
        "run": str(parent.root),
        "id": parent.read_state().get("id"),
        "checkpoint": path.name,
        "step": step,
        "anew": fork.anew,
    }


def _rates(fork: Fork, path: Path, extra: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The parent's next learning rate and the fork's first; a jump is said."""
    parent = loading.validate(extra["config"], RunConfig, path.name)
    steps = RunFolder(path.parent.parent).read_state().get("total_steps")
    if not isinstance(steps, int):
        return {}
    size = parent.train.batch_size
    samples = plan.samples  # of other data only a warm-up in epochs would be another
    was = parent.optimizer.schedule_for(size, samples, steps)(Progress(extra["step"], 0, steps, samples)).lr
    config, step = plan.config, 0 if fork.anew else extra["step"]
    schedule = config.optimizer.schedule_for(config.train.batch_size, plan.samples, plan.total_steps)
    now = schedule(Progress(step, 0, plan.total_steps, plan.samples)).lr
    if abs(now - was) > 0.01 * max(now, was):
        log.warning(
            "the learning rate jumps at the branch from %.3g, which %s had reached, to %.3g: the fork's "
            "schedule is "
            "that of %d steps at step %d, the parent's was that of %d steps at step %d",
            was, fork.parent, now, plan.total_steps, step, steps, extra["step"],
        )  # fmt: skip
    return {"rate": was, "fork_rate": now}


def _state(fork: Fork, state: Mapping[str, Any], plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's state as that of the new run."""
    extra = dict(state["extra"])
    optimizer = loading.validate(extra["config"], RunConfig, facts["checkpoint"]).optimizer
    if fork.anew:
        extra |= {"step": 0, "samples": 0}
    extra |= {
        "order_version": ORDER_VERSION,
        "health": {},  # other losses, and the samples left out were the parent's
        **plan.data.identity,
        "config": plan.config.model_dump(mode="json"),
        "parent": dict(facts),
    }
    changed = dict(state) | {"extra": extra}
    if optimizer.name != plan.config.optimizer.name:  # another optimizer has other moments
        changed |= {"moments": [], "scalars": {}}
    return changed


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
