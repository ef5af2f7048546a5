"""A step of a run computed again, alone and without a trace: `keel replay RUN --step N`.

One process starts from the nearest checkpoint before the step and goes on as the run did: the same order of
data, the same micro-batches, ZeRO stage 0, whose arithmetic is that of all stages. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import loading
from configs.errors import RunError
from data_pipeline.transform import device_half
from data_pipeline.types import Batch
from pretrain import checkpoint
from pretrain.accumulation import accumulate_for
from pretrain.clock import Progress
from pretrain.config import RunConfig
from pretrain.engines import processes, storage
from pretrain.objective import LossOutput, Objective, Update, WholeBatchObjective
from pretrain.ports import Engine
from pretrain.run.attempt import load, make_engine
from pretrain.run.folder import RunFolder
from pretrain.run.plan import Plan


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward gave."""

    loss: float
    grad_norm: float  # L2, of this micro-batch's own gradient


@dataclass(frozen=True)
class Replayed:
    """One global batch on its way to be a step: applied, or refused since it wasn't finite."""

    step: int  # that it became, or would have become
    position: int  # samples consumed before it
    applied: bool
    loss: float
    grad_norm: float | None  # before clipping; None where it wasn't finite
    micro_batches: tuple[MicroBatch, ...]
    index: tuple[int, ...]  # stable numbers of its samples


def replay(
    run: Path,
    step: int,
    *,
    attempt: int | None = None,
    most: int = 50,
    came: Callable[[int, int], None] | None = None,
) -> Iterator[Replayed]:
    """Compute step `step` again: the batches that weren't applied on the way to it, and the one that was.

    `attempt`: as this attempt saw it, before a rollback; None is the run as it stands. `most`: batches that
    are tried. `came` hears steps done and steps to do on the way there. Raises `RunError`.
    """
    folder = RunFolder(run.expanduser().absolute())
    if not folder.exists():
        raise RunError(f"{run}: not a run folder (no config.yaml in it)")
    micro_batch = _micro_batch(folder, attempt)
    config = loading.load(folder.config_file, RunConfig)
    train = {"zero_stage": 0, "micro_batch_size": micro_batch, "offload": None, "compile": None}
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    plan = Plan.of(config)
    if not 1 <= step <= plan.total_steps:
        raise RunError(f"--step {step}: this run has steps 1 to {plan.total_steps}")
    torch.set_num_threads(config.run.threads)
    here = processes.start()
    try:
        yield from _replay(_nearest(folder, step, attempt), plan, here, step, most, came)
    finally:
        processes.stop()


def _replay(
    source: Path | None,
    plan: Plan,
    here: processes.Processes,
    step: int,
    most: int,
    came: Callable[[int, int], None] | None,
) -> Iterator[Replayed]:
    config, batch_size = plan.config, plan.config.train.batch_size
    processes.seed(config.run.seed)
    objective = plan.objective(1)
    engine = make_engine(objective, plan, here)
    processes.seed(config.run.seed, per_rank=True)
    extra: Mapping[str, Any] = {} if source is None else load(source, engine)
    progress = Progress(extra.get("step", 0), extra.get("samples", 0), plan.total_steps, plan.samples)
    loader = plan.loader(0, 1, progress.samples)
    micro_batch, accumulation = config.micro_batch(1)
    watched = Watched(engine, objective, 1 if isinstance(objective, WholeBatchObjective) else accumulation)
    accumulate = accumulate_for(objective, micro_batch, device_half(plan.views))
    schedule = config.optimizer.schedule_for(batch_size, plan.samples, plan.total_steps)
    first, tried = progress.step, 0
    try:
        while progress.step < step and tried < most:
            batch, near = next(loader), progress.step == step - 1
            watched.begin(near)
            output = accumulate(watched, batch, progress)  # type: ignore[arg-type]  # all that it calls is there
            update = engine.step(schedule(progress))
            position, progress = progress.samples, progress.consumed(batch_size)
            if near:
                tried += 1
                yield _told(step, position, batch, output, update, watched)
            if update is not None:
                progress = progress.applied()
                objective.after_step(update, progress, output)
            if came is not None:
                came(progress.step - first, step - first)
    finally:
        loader.close()
        engine.close()


class Watched:
    """An engine whose every backward pass is measured, where asked for: the gradient before and after it."""

    def __init__(self, engine: Engine, objective: Objective, accumulation: int) -> None:
        """At ZeRO stage 0 on one rank, where gradients are whole and where torch has them."""
        self.engine, self.objective, self.accumulation = engine, objective, accumulation
        self.device = engine.device
        self.measuring = False
        self.seen: list[MicroBatch] = []

    def begin(self, measuring: bool) -> None:
        """A new global batch."""
        self.measuring, self.seen = measuring, []

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        return self.engine.forward(batch, progress)

    def backward(self, loss: Tensor) -> None:
        before = self._gradients() if self.measuring else {}
        self.engine.backward(loss)
        if not self.measuring:
            return
        changes = [
            value - before[name] if name in before else value for name, value in self._gradients().items()
        ]
        # The engine divides each micro-batch's gradient by their number.
        norm = torch.nn.utils.get_total_norm(changes) * self.accumulation
        self.seen.append(MicroBatch(float(loss), float(norm)))

    def _gradients(self) -> dict[str, Tensor]:
        parameters = self.objective.named_parameters()
        return {name: p.grad.detach().clone() for name, p in parameters if p.grad is not None}


def _told(
    step: int, position: int, batch: Batch, output: LossOutput, update: Update | None, watched: Watched
) -> Replayed:
    return Replayed(
        step=step,
        position=position,
        applied=update is not None,
        loss=float(output.loss),
        grad_norm=None if update is None else float(update.grad_norm),
        micro_batches=tuple(watched.seen),
        index=tuple(batch.index.tolist()),
    )


def _nearest(folder: RunFolder, step: int, attempt: int | None) -> Path | None:
    """The newest valid checkpoint from before `step`, None to start from the beginning."""
    for each in checkpoint.published(folder.root):
        known = attempt is None or each.attempt <= attempt
        if known and each.step < step and storage.damage(each.path) is None:
            return each.path
    if "parent" in folder.read_state():
        raise RunError(f"{folder.root}: no checkpoint from before step {step} is left of this fork")
    return None


def _micro_batch(folder: RunFolder, attempt: int | None) -> int | None:
    """The size that the run used at the time: its micro-batches are then the same samples."""
    attempts = folder.read_state().get("attempts", [])
    chosen = [each for each in attempts if attempt in (None, each["attempt"])]
    return chosen[-1].get("micro_batch_size") if chosen else None
