"""The device half of views: from the loader's uint8 to what the encoder takes, on the batch's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_pipeline import colour
from data_pipeline.randomness import STRIDE, Purpose, uniform
from data_pipeline.types import LUMA, Batch, ColorJitter, GaussianBlur, ViewSpec

_Operation = Callable[[Tensor, Tensor], Tensor]


def device_half(views: Sequence[ViewSpec]) -> Callable[[Batch], Batch]:
    """A function that makes a batch's uint8 views normalised float32, wherever the batch lies.

    Every random choice is drawn from the samples' own seeds, so any cut of a batch gives the same pixels.
    """
    specs = tuple(views)

    def apply(batch: Batch) -> Batch:
        if len(batch.views) != len(specs):
            raise ValueError(f"a batch of {len(batch.views)} views where {len(specs)} were compiled")
        made = (
            normalised(augmented(images, batch.seeds, spec, number), spec)
            for number, (images, spec) in enumerate(zip(batch.views, specs, strict=True))
        )
        return batch.with_views(tuple(made))

    return apply


def augmented(images: Tensor, seeds: Tensor, spec: ViewSpec, view: int = 0) -> Tensor:
    """(B, 3, H, W) uint8 to itself where `spec` asks for no colour change, else to float32 in [0, 1]."""
    stride = STRIDE * view
    if spec.rotation:
        images = _unit(images)
        turns = uniform(seeds, Purpose.ROTATE + stride, 1)[:, 0]
        images = colour.rotate(images, (2 * turns - 1) * spec.rotation)
    if spec.grayscale and spec.grayscale_first:
        images = _grey(_unit(images), seeds, stride, spec.grayscale)
    if spec.jitter is not None:
        images = _jittered(_unit(images), uniform(seeds, Purpose.JITTER + stride, 9), spec.jitter)
    if spec.grayscale and not spec.grayscale_first:
        images = _grey(_unit(images), seeds, stride, spec.grayscale)
    if spec.blur is not None:
        images = _blurred(_unit(images), uniform(seeds, Purpose.BLUR + stride, 2), spec.blur)
    if spec.solarize is not None:
        threshold = spec.solarize.threshold
        chosen = uniform(seeds, Purpose.SOLARIZE + stride, 1)[:, 0] < spec.solarize.probability
        images = _where(chosen, _unit(images), lambda rows, _: colour.solarize(rows, threshold), seeds)
    return images


def normalised(images: Tensor, spec: ViewSpec) -> Tensor:
    """(x - mean) / std of (B, 3, H, W) float32 in [0, 1], or of uint8 over 255, in one multiply-add.

    (B, 1, H, W) where `spec` is grey.
    """
    mean, std = (torch.tensor(value, device=images.device) for value in spec.statistics)
    if spec.grey:
        weights = torch.tensor(LUMA, device=images.device)[:, None, None]
        images = (_unit(images) * weights).sum(1, keepdim=True)
    scale = 1 / (255 * std) if images.dtype == torch.uint8 else 1 / std
    return torch.addcmul((-mean / std)[:, None, None], images.to(torch.float32), scale[:, None, None])


def denormalised(images: Tensor, spec: ViewSpec) -> Tensor:
    """(..., 3, H, W) float32 in [0, 1] of normalised images, for looking at; grey repeated."""
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in spec.statistics)
    plain = (images * std + mean).clamp(0, 1)
    return plain.expand(*plain.shape[:-3], 3, *plain.shape[-2:]) if spec.grey else plain


def _unit(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images


def _where(chosen: Tensor, images: Tensor, operation: _Operation, values: Tensor) -> Tensor:
    """`operation(images, values)` in the rows that are `chosen`, the others as they are.

    On a CPU only those rows are computed. On a device all are: picking rows would make the host wait for it.
    """
    if images.is_cpu:
        rows = chosen.nonzero()[:, 0]
        if len(rows) == 0:
            return images
        return images.index_copy(0, rows, operation(images[rows], values[rows]))
    return torch.where(chosen[:, None, None, None], operation(images, values), images)


def _grey(images: Tensor, seeds: Tensor, stride: int, probability: float) -> Tensor:
    chosen = uniform(seeds, Purpose.GRAYSCALE + stride, 1)[:, 0] < probability
    return _where(chosen, images, lambda rows, _: colour.gray(rows).expand_as(rows), seeds)


def _jittered(images: Tensor, numbers: Tensor, jitter: ColorJitter) -> Tensor:
    """Numbers (B, 9): whether, four strengths, four that are ranked to give the order."""
    chosen, strengths, order = numbers[:, 0] < jitter.probability, 2 * numbers[:, 1:5] - 1, numbers[:, 5:]
    order = order.argsort(dim=1)
    operations: list[tuple[_Operation, Tensor]] = [
        (colour.brightness, (1 + jitter.brightness * strengths[:, 0]).clamp(min=0)),
        (colour.contrast, (1 + jitter.contrast * strengths[:, 1]).clamp(min=0)),
        (colour.saturation, (1 + jitter.saturation * strengths[:, 2]).clamp(min=0)),
        (colour.hue, jitter.hue * strengths[:, 3]),
    ]
    used = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for turn in range(4):
        for number, (operation, values) in enumerate(operations):
            if used[number]:
                images = _where(chosen & (order[:, turn] == number), images, operation, values)
    return images


def _blurred(images: Tensor, numbers: Tensor, blur: GaussianBlur) -> Tensor:
    low, high = blur.sigma
    shorter = min(images.shape[2:])
    kernel = blur.kernel or max(3, int(0.1 * shorter) // 2 * 2 + 1)
    sigma = low + (high - low) * numbers[:, 1]
    chosen = numbers[:, 0] < blur.probability
    return _where(chosen, images, lambda rows, width: colour.blur(rows, width, kernel), sigma)
