"""The device half of views: from the loader's uint8 to what the encoder takes, on the batch's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_pipeline.types import Batch, ViewSpec


def device_half(views: Sequence[ViewSpec]) -> Callable[[Batch], Batch]:
    """A function that makes a batch's uint8 views normalised float32, wherever the batch lies.

    Every random choice is drawn from the samples' own seeds, so any cut of a batch gives the same pixels.
    """
    specs = tuple(views)

    def apply(batch: Batch) -> Batch:
        if len(batch.views) != len(specs):
            raise ValueError(f"a batch of {len(batch.views)} views where {len(specs)} were compiled")
        made = tuple(_normalised(view, spec) for view, spec in zip(batch.views, specs, strict=True))
        return batch.with_views(made)

    return apply


def _normalised(images: Tensor, spec: ViewSpec) -> Tensor:
    """(B, 3, H, W) uint8 to float32: (x / 255 - mean) / std, as one multiplication and addition."""
    mean = torch.tensor(spec.mean, device=images.device)
    std = torch.tensor(spec.std, device=images.device)
    scale = 1 / (255 * std)
    return torch.addcmul((-mean / std)[:, None, None], images.to(torch.float32), scale[:, None, None])


def denormalised(images: Tensor, spec: ViewSpec) -> Tensor:
    """(..., 3, H, W) float32 in [0, 1] of normalised images, for looking at."""
    mean = torch.tensor(spec.mean, device=images.device)[:, None, None]
    std = torch.tensor(spec.std, device=images.device)[:, None, None]
    return (images * std + mean).clamp(0, 1)
