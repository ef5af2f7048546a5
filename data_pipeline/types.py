"""What the pipeline is asked for (views) and what it gives (batches)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and aspect, resized to the view's size.

    `scale`: area of the crop over area of the image; `ratio`: width over height, drawn log-uniformly
    (Szegedy et al. 2015, arXiv:1409.4842 §6, as torchvision implements it).
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class CenterCrop:
    """Resize so that the view covers `fraction` of the shorter side, then cut the centre: for evaluation."""

    fraction: float = 0.875


@dataclass(frozen=True)
class ViewSpec:
    """One view of an image, as an objective or evaluator asks for it.

    The worker half (crop, flip) gives uint8; the device half (normalise) gives float32.
    Both draw from the sample's own seed.
    """

    size: tuple[int, int]  # height, width in pixels
    crop: RandomResizedCrop | CenterCrop
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5  # probability of a horizontal flip
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch, or a micro-batch of it."""

    views: tuple[Tensor, ...]  # each (B, 3, H, W): uint8 from the loader, float32 after the device half
    seeds: Tensor  # (B,) int64: the sample's own seed; masks and device-side augmentation draw from it
    index: Tensor  # (B,) int64: the sample's stable number in the manifest
    target: Tensor | None = None  # (B,) int64: class label
    tokens: Tensor | None = None  # (B, L) int64: caption

    def __len__(self) -> int:
        return len(self.seeds)

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of `size` samples in order."""
        for start in range(0, len(self), size):
            yield self._each(lambda tensor, start=start: tensor[start : start + size])

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def with_views(self, views: tuple[Tensor, ...]) -> Batch:
        return replace(self, views=views)

    def _each(self, change) -> Batch:  # type: ignore[no-untyped-def]
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Batch(
            views=tuple(change(view) for view in self.views),
            seeds=change(self.seeds),
            index=change(self.index),
            target=optional(self.target),
            tokens=optional(self.tokens),
        )
