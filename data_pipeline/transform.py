"""The worker half of a view: crop, antialiased resize and flip, from decoded pixels to uint8.

Every choice is drawn from the sample's own seed. The resize is Pillow's within 2 grey levels a pixel but for
single ones (it rounds its filter weights differently: one value in nine million was 3 off), which the tests
check on pictures like photographs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline import hashing
from data_pipeline.augment import device_half
from data_pipeline.decode import Pixels
from data_pipeline.hashing import Int64s
from data_pipeline.randomness import STRIDE, Purpose
from data_pipeline.types import CenterCrop, Interpolation, RandomResizedCrop, ViewSpec

__all__ = ["Box", "WorkerHalf", "center_view", "device_half", "random_box", "resized"]

_ATTEMPTS = 10  # at a crop that fits, as torchvision has it
_LONGEST = 32  # times the view's pixels: what a picture is resized to whole before its centre is cut out
_BESIDE = 4  # columns or rows kept on each side of what is seen: more than a filter reaches at such scales


@dataclass(frozen=True)
class Box:
    """A crop in pixels of the decoded picture."""

    top: int
    left: int
    height: int
    width: int


def random_box(height: int, width: int, crop: RandomResizedCrop, numbers: Sequence[float]) -> Box:
    """A box of random area and aspect inside a picture, from 40 `numbers` in [0, 1).

    After torchvision's RandomResizedCrop: ten attempts, then the largest central box of an allowed aspect.
    """
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for attempt in range(_ATTEMPTS):
        u_area, u_aspect, u_top, u_left = numbers[4 * attempt : 4 * attempt + 4]
        area = height * width * (crop.scale[0] + u_area * (crop.scale[1] - crop.scale[0]))
        aspect = math.exp(low + u_aspect * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
    w, h = width, height
    if width / height < crop.ratio[0]:
        h = round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w = round(height * crop.ratio[1])
    h, w = max(1, h), max(1, w)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resized(pixels: Pixels, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """(1, 3, h, w) uint8 of (H, W, 3) uint8, antialiased, filter support as Pillow's."""
    # A crop has gaps between its rows, which keeps torch from its quick path for interleaved channels.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    if pixels.shape[:2] == size:
        return image
    return functional.interpolate(image, size, mode=interpolation, antialias=True)


def center_view(pixels: Pixels, view: ViewSpec, fraction: float) -> Tensor:
    """(1, 3, h, w) uint8: the picture resized to cover size / fraction, then its centre.

    Rounds as timm's evaluation transform does, so that an exported backbone is shown the same pixels.
    """
    height, width = pixels.shape[:2]
    target_h, target_w = view.size
    cover_h, cover_w = math.floor(target_h / fraction), math.floor(target_w / fraction)
    if cover_h == cover_w:
        shorter = min(height, width)
        whole = (int(cover_h * height / shorter), int(cover_w * width / shorter))
    else:
        ratio = min(height / cover_h, width / cover_w)
        whole = (round(height / ratio), round(width / ratio))
    if whole[0] * whole[1] > _LONGEST * target_h * target_w:
        pixels, whole = _middle(pixels, whole, view.size)
    image = resized(pixels, whole, view.interpolation)
    top, left = round((whole[0] - target_h) / 2), round((whole[1] - target_w) / 2)
    return image[:, :, top : top + target_h, left : left + target_w]


def _middle(pixels: Pixels, whole: tuple[int, int], view: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """What the view will see of a picture much longer than wide, and the size to resize it to.

    A rule of 30,000 x 1 pixels would be 7,680,000 wide before its centre were cut out. The part keeps the
    picture's centre and scale; its size is rounded to whole pixels, the only difference.
    """
    kept, sizes = [], []
    for length, resized_to, seen in zip(pixels.shape[:2], whole, view, strict=True):
        scale = length / resized_to
        reach = math.ceil(seen * scale / 2) + math.ceil(_BESIDE * max(1.0, scale))
        skipped = max(0, length // 2 - reach)
        kept.append(slice(skipped, length - skipped))
        sizes.append(max(seen, round((length - 2 * skipped) / scale)))
    return pixels[kept[0], kept[1]], (sizes[0], sizes[1])


def resize_fast(pixels: Pixels, flip: bool, out: Tensor) -> None:
    """(H, W, 3) uint8 into `out` (3, h, w) uint8 by OpenCV's bilinear filter, not antialiased.

    OpenCV takes the channels apart too: torch's copy of interleaved channels takes as long as the resize.
    """
    import cv2

    cv2.setNumThreads(1)
    assert out.is_contiguous()  # or OpenCV would write somewhere else
    made: Pixels = cv2.resize(pixels, (out.shape[2], out.shape[1]), interpolation=cv2.INTER_LINEAR)
    cv2.split(cv2.flip(made, 1) if flip else made, list(out.numpy()))


class WorkerHalf:
    """Writes the uint8 views of decoded samples into batch buffers.

    `fast`: random crops are resized by `resize_fast`, which is not what published recipes do.
    """

    def __init__(self, views: Sequence[ViewSpec], fast: bool = False):
        self.views = tuple(views)
        self._fast = fast

    def numbers(self, seeds: Int64s) -> list[npt.NDArray[np.float32]]:
        """Per view (B, 41) float32 in [0, 1): what `apply` needs, drawn for a whole batch at once."""
        drawn = []
        for number, view in enumerate(self.views):
            random = isinstance(view.crop, RandomResizedCrop)
            crop = hashing.uniform(seeds, Purpose.CROP + STRIDE * number, 4 * _ATTEMPTS if random else 0)
            flip = hashing.uniform(seeds, Purpose.FLIP + STRIDE * number, 1)
            drawn.append(np.concatenate([flip, crop], axis=1))
        return drawn

    def apply(self, pixels: Pixels, view: int, numbers: Sequence[float], out: Tensor) -> None:
        """Make view number `view` of one picture in `out` (3, h, w) uint8, from its row of `numbers`."""
        spec, flip = self.views[view], numbers[0] < self.views[view].flip
        match spec.crop:
            case RandomResizedCrop() as crop:
                box = random_box(pixels.shape[0], pixels.shape[1], crop, numbers[1:])
                inside = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
                if self._fast:
                    resize_fast(inside, flip, out)
                    return
                made = resized(inside, spec.size, spec.interpolation)[0]
            case CenterCrop(fraction):
                made = center_view(pixels, spec, fraction)[0]
        out.copy_(made.flip(2) if flip else made)
