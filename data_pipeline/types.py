"""What the pipeline is asked for (views) and what it gives (batches)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics that most of the field normalises with (torchvision's and timm's defaults)."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as Pillow and torchvision have it."""


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
class ColorJitter:
    """Brightness, contrast, saturation and hue changed in random order, as torchvision's ColorJitter.

    The first three are factors from [1 - x, 1 + x], hue a shift from [-x, x] of a full turn.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    probability: float = 0.8


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a standard deviation in pixels drawn uniformly from `sigma`."""

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5
    kernel: int | None = None  # odd; None is about a tenth of the shorter side (Chen et al. 2020, SimCLR)


@dataclass(frozen=True)
class Solarize:
    """Values from `threshold` (of 1) up are inverted."""

    probability: float = 0.2
    threshold: float = 0.5


@dataclass(frozen=True)
class ViewSpec:
    """One view of an image, as an objective or evaluator asks for it.

    The worker half (crop, flip) gives uint8; the device half gives float32: rotation, colour jitter,
    greyscale (before the jitter with `grayscale_first`), blur, solarise, normalise, in this order. Both draw
    from the sample's own seed.
    """

    size: tuple[int, int]  # height, width in pixels
    crop: RandomResizedCrop | CenterCrop
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5  # probability of a horizontal flip
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    rotation: float = 0.0  # degrees, either way
    jitter: ColorJitter | None = None
    grayscale: float = 0.0  # probability
    grayscale_first: bool = False
    blur: GaussianBlur | None = None
    solarize: Solarize | None = None
    grey: bool = False  # one channel, the luma of what the colour changes leave, as Pillow's "L"

    @property
    def channels(self) -> int:
        return 1 if self.grey else 3

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel; of luma, the colours' by their weights."""
        if not self.grey:
            return self.mean, self.std
        return tuple((sum(w * c for w, c in zip(LUMA, of, strict=True)),) for of in (self.mean, self.std))  # type: ignore[return-value]


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch, or a micro-batch of it."""

    views: tuple[
        Tensor, ...
    ]  # each (B, 3, H, W) uint8 from the loader, (B, channels, H, W) float32 after the device half
    seeds: Tensor  # (B,) int64: the sample's own seed; masks and device-side augmentation draw from it
    index: Tensor  # (B,) int64: the sample's stable number in the manifest
    target: Tensor | None = None  # (B,) int64: class label
    tokens: Tensor | None = None  # (B, L) int64: caption
    prepared: tuple[Tensor, ...] = ()  # each (B, ...): what an objective's `before_step` made of the samples

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
            prepared=tuple(change(rows) for rows in self.prepared),
        )
