"""The device half: torchvision's formulas, each sample's own numbers, any cut and any device alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as theirs

from data_pipeline import colour
from data_pipeline.augment import augmented, denormalised, device_half, normalised
from data_pipeline.hashing import sample_seed
from data_pipeline.randomness import Purpose, uniform
from data_pipeline.types import Batch, CenterCrop, ColorJitter, GaussianBlur, Solarize, ViewSpec
from tests.data_pipeline.sets import photograph

PHOTOS = torch.stack([torch.from_numpy(photograph(40, 48, n)).permute(2, 0, 1) for n in range(16)])
UNIT = PHOTOS.float() / 255
SEEDS = torch.from_numpy(sample_seed(2, 0, 0, np.arange(16)))
FULL = ViewSpec(
    (40, 48),
    CenterCrop(),
    rotation=20,
    jitter=ColorJitter(),
    grayscale=0.2,
    blur=GaussianBlur(),
    solarize=Solarize(),
)


def batch(images: Tensor = PHOTOS, seeds: Tensor = SEEDS) -> Batch:
    return Batch(views=(images,), seeds=seeds, index=torch.arange(len(seeds)))


@pytest.mark.parametrize(
    ("ours", "his", "low", "high"),
    [
        (colour.brightness, theirs.adjust_brightness, 0.2, 1.8),
        (colour.contrast, theirs.adjust_contrast, 0.2, 1.8),
        (colour.saturation, theirs.adjust_saturation, 0.0, 1.9),
        (colour.hue, theirs.adjust_hue, -0.5, 0.5),
    ],
)
def test_colours_change_by_torchvisions_formulas(ours: object, his: object, low: float, high: float) -> None:
    values = torch.linspace(low, high, 16)
    images = torch.cat([UNIT[:14], UNIT[14:15] * 0, UNIT[15:].mean(1, keepdim=True).expand(1, 3, 40, 48)])
    made = ours(images, values)  # type: ignore[operator]
    for row, value in enumerate(values.tolist()):
        torch.testing.assert_close(made[row], his(images[row], value), rtol=0, atol=2e-5)  # type: ignore[operator]


def test_gray_blur_and_solarize_are_torchvisions() -> None:
    torch.testing.assert_close(colour.gray(UNIT), theirs.rgb_to_grayscale(UNIT), rtol=0, atol=1e-6)
    torch.testing.assert_close(colour.solarize(UNIT, 0.5), theirs.solarize(UNIT, 0.5))
    sigma = torch.linspace(0.1, 2.0, 16)
    for kernel in (3, 5, 23):
        made = colour.blur(UNIT, sigma, kernel)
        for row, value in enumerate(sigma.tolist()):
            expected = theirs.gaussian_blur(UNIT[row], [kernel, kernel], [value, value])
            torch.testing.assert_close(made[row], expected, rtol=0, atol=1e-5)


def test_turns_are_torchvisions_inside() -> None:
    degrees = torch.linspace(-30, 30, 16)
    made = colour.rotate(UNIT, degrees)
    for row, value in enumerate(degrees.tolist()):
        expected = theirs.rotate(UNIT[row], value, interpolation=theirs.InterpolationMode.BILINEAR)
        torch.testing.assert_close(made[row][:, 15:25, 15:33], expected[:, 15:25, 15:33], rtol=0, atol=1e-3)
    torch.testing.assert_close(colour.rotate(UNIT, torch.zeros(16)), UNIT, rtol=0, atol=1e-5)


def test_normalising_is_exact_enough_from_either_type() -> None:
    view = ViewSpec((40, 48), CenterCrop())
    expected = theirs.normalize(UNIT, list(view.mean), list(view.std))
    for images in (PHOTOS, UNIT):
        torch.testing.assert_close(normalised(images, view), expected, rtol=1e-5, atol=1e-6)
    made = device_half([view])(batch())
    assert made.views[0].dtype == torch.float32 and made.views[0].is_contiguous()
    torch.testing.assert_close(denormalised(made.views[0], view), UNIT, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="1 views where 2"):
        device_half([view, view])(batch())


def test_any_cut_gives_the_same_pixels() -> None:
    finish = device_half([FULL])
    whole = finish(batch()).views[0]
    parts = torch.cat([finish(part).views[0] for part in batch().split(5)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    backwards = finish(batch(PHOTOS.flip(0), SEEDS.flip(0))).views[0].flip(0)
    torch.testing.assert_close(backwards, whole, rtol=0, atol=1e-6)
    other = augmented(PHOTOS, SEEDS, FULL, view=1)
    assert not torch.allclose(other, augmented(PHOTOS, SEEDS, FULL))


@pytest.mark.parametrize(
    ("changes", "probability"),
    [
        ({"grayscale": 0.2}, 0.2),
        ({"jitter": ColorJitter(probability=0.8)}, 0.8),
        ({"blur": GaussianBlur((1.0, 2.0), probability=0.5)}, 0.5),
        ({"solarize": Solarize(0.3, threshold=0.4)}, 0.3),
    ],
)
def test_each_happens_as_often_as_asked(changes: dict[str, object], probability: float) -> None:
    images = PHOTOS[:1, :, :12, :12].repeat(3000, 1, 1, 1)
    seeds = torch.from_numpy(sample_seed(5, 0, 0, np.arange(3000)))
    made = augmented(images, seeds, ViewSpec((12, 12), CenterCrop(), **changes))  # type: ignore[arg-type]
    changed = (made - images.float() / 255).abs().amax((1, 2, 3)) > 1e-4
    assert abs(changed.float().mean().item() - probability) < 0.03


def test_jitter_draws_strengths_and_orders_evenly() -> None:
    """With one operation left the strengths can be read off the pixels."""
    images = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    seeds = torch.from_numpy(sample_seed(6, 0, 0, np.arange(4000)))
    view = ViewSpec((2, 2), CenterCrop(), jitter=ColorJitter(0.4, 0, 0, 0, probability=1))
    factors = augmented(images, seeds, view)[:, 0, 0, 0] * 255 / 100
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.015
    assert abs(factors.std() - 0.8 / 12**0.5) < 0.01
    pair = ViewSpec((2, 2), CenterCrop(), jitter=ColorJitter(0.9, 0.9, 0, 0, probability=1))
    mixed = torch.stack([torch.full((4000,), value) for value in (20, 120, 250)], 1).to(torch.uint8)
    made = augmented(mixed[:, :, None, None].expand(-1, -1, 2, 2), seeds, pair)
    assert len(made.flatten(1).unique(dim=0)) > 3900


def test_whole_images_stay_in_range() -> None:
    made = augmented(PHOTOS, SEEDS, FULL)
    assert made.min() >= 0 and made.max() <= 1 and made.dtype == torch.float32
    plain = ViewSpec((40, 48), CenterCrop())
    assert augmented(PHOTOS, SEEDS, plain) is PHOTOS


@pytest.mark.gpu
def test_a_gpu_makes_the_same_pixels() -> None:
    on_gpu = device_half([FULL])(batch().to(torch.device("cuda"))).views[0].cpu()
    torch.testing.assert_close(on_gpu, device_half([FULL])(batch()).views[0], rtol=0, atol=2e-3)


class OnADevice(Tensor):
    """Says that it isn't on the CPU, so that the code takes a device's way; counts what is chosen."""

    chosen: ClassVar[list[int]] = []

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.where and len(args) == 3:
            cls.chosen.append(int(args[0].sum()))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_way_of_a_device_gives_what_the_cpu_does() -> None:
    """All rows computed and chosen afterwards, by the very lines that a GPU runs."""
    OnADevice.chosen.clear()
    made = augmented(PHOTOS.as_subclass(OnADevice), SEEDS, FULL)
    expected = augmented(PHOTOS, SEEDS, FULL)
    torch.testing.assert_close(made.as_subclass(Tensor), expected, rtol=0, atol=1e-6)
    # Four jitters in each of four turns, grey, blur, solarise; of each some rows and not all.
    assert len(OnADevice.chosen) >= 16 + 3 and any(0 < n < len(PHOTOS) for n in OnADevice.chosen)


def test_grey_may_come_before_the_jitter() -> None:
    """MoCo v1's order. Brightness past white tells the orders apart; the result of both is grey."""
    jitter = ColorJitter(0.9, 0, 0, 0, probability=1)
    spec = ViewSpec((40, 48), CenterCrop(), jitter=jitter, grayscale=1.0, grayscale_first=True)
    factors = 1 + 0.9 * (2 * uniform(SEEDS, Purpose.JITTER, 9)[:, 1] - 1)
    assert float(factors.max()) > 1.5
    made = {first: augmented(PHOTOS, SEEDS, replace(spec, grayscale_first=first)) for first in (True, False)}
    for row, factor in enumerate(factors.tolist()):
        grey = theirs.rgb_to_grayscale(UNIT[row], num_output_channels=3)
        torch.testing.assert_close(made[True][row], theirs.adjust_brightness(grey, factor), rtol=0, atol=2e-5)
        bright = theirs.rgb_to_grayscale(theirs.adjust_brightness(UNIT[row], factor), num_output_channels=3)
        torch.testing.assert_close(made[False][row], bright, rtol=0, atol=2e-5)
    assert float((made[True] - made[False]).abs().max()) > 0.02
    coloured = replace(spec, jitter=ColorJitter(0.4, 0.4, 0.4, 0.4, probability=1))
    some = augmented(PHOTOS, SEEDS, replace(coloured, grayscale=0.5))
    whole = augmented(PHOTOS, SEEDS, replace(coloured, grayscale=0.0))
    grey = (some - some.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0 < int(grey.sum()) < len(PHOTOS) and torch.equal(some[~grey], whole[~grey])
