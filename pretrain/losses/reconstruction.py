"""Losses of what was hidden and is to be predicted."""

from __future__ import annotations

from torch import Tensor


def masked_patch_loss(predicted: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error per patch, averaged over the masked patches only (MAE, arXiv:2111.06377 §3).

    predicted, target: (B, L, P) float32; masked: (B, L) bool, the same number in every row. Returns ().
    """
    error = (predicted - target).square().mean(dim=-1)
    return (error * masked).sum() / masked.sum()


def normalise_patches(patches: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Each patch to zero mean and unit variance over its own pixels: (B, L, P) -> (B, L, P) float32.

    The variance is the unbiased one, as in the official code (models_mae.py `forward_loss`, `target.var`).
    """
    patches = patches.float()
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + epsilon).sqrt()
