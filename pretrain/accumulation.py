"""One global batch through the engine, in micro-batches: how an objective's loss may be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from configs.errors import ConfigError
from data_pipeline.types import Batch
from pretrain.clock import Progress
from pretrain.objective import LossOutput, Objective, WholeBatchObjective
from pretrain.ports import Engine

Prepare = Callable[[Batch], Batch]
"""The device half of the views: uint8 to normalised float32."""


class SumOfMicroBatches:
    """For losses that are means over samples: the mean of micro-batch losses is the batch's loss."""

    def __init__(self, objective: Objective, micro_batch_size: int, prepare: Prepare) -> None:
        self.objective, self.micro_batch_size, self.prepare = objective, micro_batch_size, prepare

    def __call__(self, engine: Engine, batch: Batch, progress: Progress) -> LossOutput:
        """Forward and backward over this rank's share; gives its mean loss, metrics and rows, detached."""
        batch, prepare = batch.to(engine.device), self.prepare
        if self.objective.needs_whole_share:
            batch = _prepared(self.objective, prepare(batch), progress)
            prepare = _nothing_more
        outputs = []
        for micro_batch in batch.split(self.micro_batch_size):
            output = engine.forward(prepare(micro_batch), progress)
            engine.backward(output.loss)
            outputs.append(_detached(output))
        return mean_of(outputs)


class WholeShare:
    """For losses over the whole batch: one forward of this rank's share, which cuts itself where it may."""

    def __init__(self, objective: Objective, prepare: Prepare) -> None:
        self.objective, self.prepare = objective, prepare

    def __call__(self, engine: Engine, batch: Batch, progress: Progress) -> LossOutput:
        """Forward and backward over this rank's share; gives its loss, metrics and rows, detached."""
        batch = self.prepare(batch.to(engine.device))
        if self.objective.needs_whole_share:
            batch = _prepared(self.objective, batch, progress)
        output = engine.forward(batch, progress)
        engine.backward(output.loss)
        return _detached(output)


def _nothing_more(batch: Batch) -> Batch:
    return batch


def _prepared(objective: Objective, share: Batch, progress: Progress) -> Batch:
    """The share with what `before_step` makes of it. Raises ValueError where rows aren't the samples'."""
    with torch.no_grad(), _explained(objective):
        prepared = objective.before_step(share, progress)
    for rows in prepared:
        if len(rows) != len(share):
            raise ValueError(
                f"{type(objective).__name__}.before_step gave {len(rows)} rows for {len(share)} samples"
            )
    return replace(share, prepared=prepared)


def _detached(output: LossOutput) -> LossOutput:
    return LossOutput(output.loss.detach(), output.metrics, tuple(rows.detach() for rows in output.rows))


Accumulate = SumOfMicroBatches | WholeShare


def accumulate_for(objective: Objective, micro_batch_size: int, prepare: Prepare) -> Accumulate:
    """How a global batch becomes gradients, as the objective's kind of loss allows.

    Raises `ConfigError` where the objective has a `before_step` that would never be called.
    """
    require_called(objective)
    if isinstance(objective, WholeBatchObjective):
        return WholeShare(objective, prepare)
    return SumOfMicroBatches(objective, micro_batch_size, prepare)


def require_called(objective: Objective) -> None:
    """Refuse a `before_step` that would never be called. Raises `ConfigError`."""
    overridden = type(objective).before_step is not Objective.before_step
    if overridden and not objective.needs_whole_share:
        raise ConfigError(
            f"objective.name: {type(objective).__name__} has a before_step that isn't called; set "
            "needs_whole_share = True in its class"
        )


@contextmanager
def _explained(objective: Objective) -> Iterator[None]:
    """An error says which parameters ZeRO-3 has taken apart: outside of a forward they are empty."""
    try:
        yield
    except Exception as error:
        named = objective.named_parameters()
        apart = [name for name, p in named if p.numel() == 0 and hasattr(p, "ds_shape")]
        if apart:
            error.add_note(
                f"under ZeRO-3 {len(apart)} parameters, such as {apart[0]}, have shape [0] outside of the "
                "forward of the module that holds them: call that module in before_step instead of reading "
                "its weights, or set train.zero_stage to at most 2"
            )
        raise


def mean_of(outputs: list[LossOutput]) -> LossOutput:
    """Mean of equal micro-batches as device tensors, their rows one after the other."""
    loss = torch.stack([output.loss for output in outputs]).mean()
    names = outputs[0].metrics.keys()
    metrics = {name: torch.stack([output.metrics[name] for output in outputs]).mean() for name in names}
    rows = tuple(torch.cat(parts) for parts in zip(*(output.rows for output in outputs), strict=True))
    return LossOutput(loss, metrics, rows)
