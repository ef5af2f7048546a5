"""The worker half equals Pillow and torchvision, and draws from the sample's seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.hashing import sample_seed
from data_pipeline.transform import WorkerHalf, center_view, random_box, resized
from data_pipeline.types import CenterCrop, Interpolation, RandomResizedCrop, ViewSpec
from tests.data_pipeline.sets import photograph

PHOTO = photograph(362, 387)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (32, 32), (500, 410), (362, 200)])
def test_the_resize_is_pillows(interpolation: str, size: tuple[int, int]) -> None:
    ours = resized(PHOTO, size, interpolation)[0].permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.fromarray(PHOTO).resize(size[::-1], FILTERS[interpolation]))
    assert np.abs(ours - theirs).max() <= 3 and (np.abs(ours - theirs) > 2).mean() < 1e-6
    assert np.abs(ours - theirs).mean() < 0.05


def views(flip: float = 0.5, count: int = 1) -> list[ViewSpec]:
    return [ViewSpec((48, 64), RandomResizedCrop((0.2, 1.0)), flip=flip) for _ in range(count)]


def made(half: WorkerHalf, seeds: np.ndarray, view: int = 0) -> torch.Tensor:
    out = torch.empty(len(seeds), 3, *half.views[view].size, dtype=torch.uint8)
    for row, numbers in enumerate(half.numbers(seeds)[view].tolist()):
        half.apply(PHOTO, view, numbers, out[row])
    return out


def test_pixels_follow_from_the_seed_alone() -> None:
    half, seeds = WorkerHalf(views(count=2)), sample_seed(1, 0, 0, np.arange(12))
    whole = made(half, seeds)
    assert torch.equal(whole[5:], made(half, seeds[5:]))
    assert not torch.equal(whole, made(half, sample_seed(1, 1, 0, np.arange(12))))
    assert not torch.equal(whole, made(half, seeds, view=1))
    assert len({image.numpy().tobytes() for image in whole}) == 12


def test_flips() -> None:
    seeds = sample_seed(0, 0, 0, np.arange(4))
    plain, flipped = made(WorkerHalf(views(0.0)), seeds), made(WorkerHalf(views(1.0)), seeds)
    assert torch.equal(plain, flipped.flip(3))
    half = WorkerHalf(views(0.3))
    chances = half.numbers(sample_seed(0, 0, 0, np.arange(4000)))[0][:, 0] < 0.3
    assert abs(chances.mean() - 0.3) < 0.03


def test_boxes_are_spread_like_torchvisions() -> None:
    """Area, aspect and place of 4,000 boxes each, compared by their deciles."""
    from torchvision.transforms import RandomResizedCrop as Theirs

    crop = RandomResizedCrop((0.08, 1.0), (3 / 4, 4 / 3))
    numbers = WorkerHalf([ViewSpec((9, 9), crop)]).numbers(sample_seed(3, 0, 0, np.arange(4000)))[0]
    ours = [random_box(300, 200, crop, row[1:]) for row in numbers.tolist()]
    torch.manual_seed(0)
    image = torch.empty(3, 300, 200)
    theirs = [Theirs.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(4000)]
    a = np.array([(box.height * box.width, box.width / box.height, box.top, box.left) for box in ours], float)
    b = np.array([(h * w, w / h, top, left) for top, left, h, w in theirs], float)
    for column, spread in zip(range(4), (60_000, 0.6, 150, 100), strict=True):
        deciles = [np.quantile(x[:, column], np.linspace(0.1, 0.9, 9)) for x in (a, b)]
        assert np.abs(deciles[0] - deciles[1]).max() < 0.06 * spread
    for box in ours:
        assert min(box.top, box.left) >= 0
        assert box.top + box.height <= 300 and box.left + box.width <= 200


def test_a_box_that_never_fits_is_central() -> None:
    box = random_box(10, 1000, RandomResizedCrop((0.9, 1.0)), [0.5] * 40)
    assert (box.top, box.height, box.width, box.left) == (0, 10, 13, 493)


@pytest.mark.parametrize(("side", "fraction"), [(224, 0.875), (96, 1.0), (32, 0.9), (32, 0.5)])
def test_the_centre_is_torchvisions(side: int, fraction: float) -> None:
    from torchvision.transforms import InterpolationMode, functional

    view = ViewSpec((side, side), CenterCrop(fraction), flip=0)
    ours = center_view(PHOTO, view, fraction)[0].permute(1, 2, 0).numpy().astype(int)
    image = functional.resize(Image.fromarray(PHOTO), int(side / fraction), InterpolationMode.BICUBIC)
    theirs = np.asarray(functional.center_crop(image, [side, side]))
    assert np.abs(ours - theirs).max() <= 2


def test_the_fast_resize_is_near_and_optional() -> None:
    pytest.importorskip("cv2")
    half = WorkerHalf(views(0.0), fast=True)
    seeds = sample_seed(0, 0, 0, np.arange(8))
    distance = (made(half, seeds).float() - made(WorkerHalf(views(0.0)), seeds).float()).abs().mean()
    assert 0 < distance < 12
    turned = made(WorkerHalf(views(1.0), fast=True), seeds)
    assert torch.equal(turned, made(half, seeds).flip(3))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_crop_is_resized_as_if_it_lay_alone(interpolation: str) -> None:
    inside = PHOTO[31:250, 17:301]
    assert torch.equal(
        resized(inside, (224, 224), interpolation), resized(inside.copy(), (224, 224), interpolation)
    )


def test_tiny_pictures() -> None:
    half = WorkerHalf([*views(), ViewSpec((8, 8), CenterCrop())])
    for shape in ((1, 1), (1, 50), (50, 1)):
        for view in (0, 1):
            out = torch.empty(3, *half.views[view].size, dtype=torch.uint8)
            row = half.numbers(sample_seed(0, 0, 0, np.arange(1)))[view].tolist()[0]
            half.apply(np.full((*shape, 3), 7, np.uint8), view, row, out)
            assert (out == 7).all()


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (2, 2001), (600, 7), (20, 3000), (3000, 20)])
@pytest.mark.parametrize(("size", "fraction"), [((224, 224), 0.875), ((64, 64), 1.0), ((96, 160), 0.9)])
def test_a_rule_costs_no_more_than_a_photograph(
    shape: tuple[int, int], size: tuple[int, int], fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures much longer than wide: the centre is cut out before they are resized, and looks the same."""
    made: list[tuple[int, int]] = []

    def watched(pixels: np.ndarray, to: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
        made.append(to)
        return resized(pixels, to, interpolation)

    monkeypatch.setattr("data_pipeline.transform.resized", watched)
    picture, view = photograph(*shape), ViewSpec(size, CenterCrop(fraction), flip=0)
    quick = center_view(picture, view, fraction)
    assert quick.shape == (1, 3, *size) and made[0][0] * made[0][1] < 33 * size[0] * size[1]
    if max(shape) <= 3000 and min(shape) > 2:
        monkeypatch.setattr("data_pipeline.transform._LONGEST", 1e9)
        whole = center_view(picture, view, fraction)
        assert made[1] != made[0] and (quick.int() - whole.int()).abs().float().mean() < 0.5


@pytest.mark.parametrize("shape", [(48, 64), (362, 387), (100, 1500), (1500, 100), (1, 1), (224, 224)])
def test_ordinary_pictures_are_resized_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    picture, view = photograph(*shape), ViewSpec((64, 64), CenterCrop(0.875), flip=0)
    seen = center_view(picture, view, 0.875)
    monkeypatch.setattr("data_pipeline.transform._LONGEST", 1e9)
    assert torch.equal(seen, center_view(picture, view, 0.875))
