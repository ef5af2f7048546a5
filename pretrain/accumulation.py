"""One global batch through the engine, in micro-batches: how an objective's loss may be cut."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data_pipeline.types import Batch
from pretrain.types import Engine, LossOutput, Progress

Prepare = Callable[[Batch], Batch]
"""The device half of the views: uint8 to normalised float32."""


class SumOfMicroBatches:
    """For losses that are means over samples: the mean of micro-batch losses is the batch's loss."""

    def __init__(self, micro_batch_size: int, prepare: Prepare) -> None:
        self.micro_batch_size, self.prepare = micro_batch_size, prepare

    def __call__(self, engine: Engine, batch: Batch, progress: Progress) -> LossOutput:
        """Forward and backward over this rank's share; gives its mean loss and metrics, detached."""
        outputs = []
        for micro_batch in batch.split(self.micro_batch_size):
            output = engine.forward(self.prepare(micro_batch.to(engine.device)), progress)
            engine.backward(output.loss)
            outputs.append(LossOutput(output.loss.detach(), output.metrics))
        return mean_of(outputs)


def mean_of(outputs: list[LossOutput]) -> LossOutput:
    """Mean of equal micro-batches, as device tensors."""
    loss = torch.stack([output.loss for output in outputs]).mean()
    names = outputs[0].metrics.keys()
    return LossOutput(
        loss, {name: torch.stack([output.metrics[name] for output in outputs]).mean() for name in names}
    )
