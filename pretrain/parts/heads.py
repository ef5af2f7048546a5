"""Heads that stand between an encoder and a loss, and are thrown away after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(
    widths: Sequence[int], *, batch_norm: bool = False, last_batch_norm: bool = False, bias: bool = True
) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them.

    `batch_norm`: one after every hidden layer; `last_batch_norm`: one without scale and shift at the end
    (SimCLR's and MoCo v3's projector, arXiv:2104.02057 appendix A).
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        last = number == len(widths) - 2
        layers.append(nn.Linear(before, after, bias=bias and not (batch_norm and not last)))
        if not last:
            layers += [nn.BatchNorm1d(after)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
        elif last_batch_norm:
            layers.append(nn.BatchNorm1d(after, affine=False))
    return nn.Sequential(*layers)
