"""Losses against a few lines of NumPy in float64: value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pretrain.losses import contrastive, reconstruction

Array = npt.NDArray[np.float64]


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def slope(function: Callable[[Array], float], at: Tensor, direction: Array) -> float:
    """Central difference in float64 along a direction."""
    base, step = at.double().numpy(), 1e-5
    return (function(base + step * direction) - function(base - step * direction)) / (2 * step)


def check(loss: Callable[..., Tensor], reference: Callable[..., float], inputs: list[Tensor]) -> None:
    leaves = [value.clone().requires_grad_() for value in inputs]
    got = loss(*leaves)
    got.backward()
    arrays = [value.double().numpy() for value in inputs]
    assert got.item() == pytest.approx(reference(*arrays), rel=1e-5)
    for place, leaf in enumerate(leaves):
        assert leaf.grad is not None
        direction = np.random.default_rng(place).standard_normal(tuple(leaf.shape))

        def moved(value: Array, place: int = place) -> float:
            return reference(*arrays[:place], value, *arrays[place + 1 :])

        want = slope(moved, inputs[place], direction)
        assert (leaf.grad.double().numpy() * direction).sum() == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_info_nce_with_queue() -> None:
    query, key, queue = unit(6, 8, seed=0), unit(6, 8, seed=1), unit(20, 8, seed=2)

    def reference(query: Array) -> float:
        total = 0.0
        for q, k in zip(query, key.double().numpy(), strict=True):
            all_logits = np.concatenate([[q @ k], queue.double().numpy() @ q]) / 0.07
            total -= all_logits[0] - np.log(np.exp(all_logits).sum())
        return total / len(query)

    check(lambda q: contrastive.info_nce_with_queue(q, key, queue, 0.07)[0], reference, [query])


def test_info_nce_of_a_part_of_the_batch() -> None:
    """Three queries against the keys of a batch of nine, of which theirs are the middle ones."""
    query, keys = unit(3, 8, seed=0), unit(9, 8, seed=1)

    def reference(query: Array, keys: Array) -> float:
        logits = query @ keys.T / 0.2
        own = logits[np.arange(3), np.arange(3) + 4]
        return float((np.log(np.exp(logits).sum(1)) - own).mean())

    check(lambda q, k: contrastive.info_nce(q, k, 0.2, first=4), reference, [query, keys])


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_log_sums_of_both_directions(chunk: int) -> None:
    """The symmetric CLIP loss out of the two log-sums, in chunks of any size."""
    images, texts, scale = unit(7, 8, seed=0), unit(7, 8, seed=1), torch.tensor([9.0])

    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        over_texts, over_images = contrastive.log_sums(images, texts, scale, chunk)
        positive = scale * (images * texts).sum(1)
        return ((over_texts - positive).mean() + (over_images - positive).mean()) / 2

    def reference(images: Array, texts: Array, scale: Array) -> float:
        logits = scale * images @ texts.T
        rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
        columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
        return float((rows.mean() + columns.mean()) / 2)

    check(loss, reference, [images, texts, scale])


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_sigmoid_pairs(chunk: int) -> None:
    rows, columns = unit(3, 8, seed=0), unit(9, 8, seed=1)
    scale, bias = torch.tensor([9.0]), torch.tensor([-2.0])

    def reference(rows: Array, columns: Array, scale: Array, bias: Array) -> float:
        logits = scale * rows @ columns.T + bias
        sign = -np.ones_like(logits)
        sign[np.arange(3), np.arange(3) + 4] = 1
        return float(np.log1p(np.exp(-sign * logits)).sum() / 3)

    check(
        lambda *inputs: contrastive.sigmoid_pairs(*inputs, first=4, chunk=chunk),
        reference,
        [rows, columns, scale, bias],
    )


def test_logits_stay_fp32_under_autocast() -> None:
    rows, columns, scale = unit(4, 8, seed=0), unit(4, 8, seed=1), torch.tensor([50.0])
    whole = contrastive.log_sums(rows, columns, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = contrastive.log_sums(rows, columns, scale)
    assert torch.equal(whole[0], half[0]) and half[0].dtype == torch.float32


def test_huge_logits_stay_finite() -> None:
    rows = unit(4, 8, seed=0)
    both = contrastive.log_sums(rows, -rows, torch.tensor([1e4]))
    assert all(value.isfinite().all() for value in both)
    assert contrastive.sigmoid_pairs(rows, -rows, torch.tensor([1e4]), torch.tensor([0.0]), 0).isfinite()


def test_masked_patch_loss_counts_hidden_patches_only() -> None:
    predicted, target = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    masked = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool)
    want = np.mean(
        [((predicted - target)[b, p].numpy() ** 2).mean() for b, p in [(0, 0), (0, 3), (1, 1), (1, 2)]]
    )
    assert reconstruction.masked_patch_loss(predicted, target, masked).item() == pytest.approx(want, rel=1e-6)


def test_normalised_patches_use_the_unbiased_variance() -> None:
    patches = torch.randn(2, 3, 12) * 5 + 2
    want = (patches.numpy() - patches.numpy().mean(-1, keepdims=True)) / np.sqrt(
        patches.numpy().var(-1, ddof=1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(reconstruction.normalise_patches(patches).numpy(), want, rtol=1e-4, atol=1e-5)
