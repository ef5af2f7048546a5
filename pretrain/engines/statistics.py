"""Running statistics of batch norm: untouched by steps that aren't applied, equal on all ranks when read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.collectives import average_batch_norm_statistics


class Statistics:
    """Those of every batch norm in a module, a teacher's too.

    A forward pass moves them long before the gradient is known to be finite: one NaN would stay for good.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._live: list[Tensor] = [
            buffer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm)
            for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
            if buffer is not None
        ]
        self._kept = [buffer.clone() for buffer in self._live]

    def average(self) -> None:
        """Replace them by their mean over ranks; collective."""
        average_batch_norm_statistics(self._module)
        self.keep()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Their mean over ranks while it lasts, then each rank's own again, to the bit; collective."""
        own = [buffer.clone() for buffer in self._live]
        average_batch_norm_statistics(self._module)
        try:
            yield
        finally:
            if own:
                torch._foreach_copy_(self._live, own)

    def keep(self) -> None:
        """Remember them as they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def restore(self) -> None:
        """Put back what was kept last."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
