"""Losses as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


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


def info_nce_with_queue(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """MoCo's loss (He et al. 2019, arXiv:1911.05722 eq. 1): own key against every key of the queue.

    query, key: (B, D) float32 of unit length, row i of both from one image; queue: (K, D), unit length.
    Returns the mean loss () and the (B, 1 + K) logits, the positive first.
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    return functional.cross_entropy(logits, logits.new_zeros(len(query), dtype=torch.int64)), logits


def info_nce(query: Tensor, keys: Tensor, temperature: float, first: int = 0) -> Tensor:
    """Cross entropy of each query's own key among all (van den Oord et al. 2018, arXiv:1807.03748 eq. 4).

    query: (n, D), keys: (N, D), float32 of unit length; query i belongs to key first + i. Returns the mean.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ keys.float().T / temperature
        return functional.cross_entropy(logits, torch.arange(len(query), device=query.device) + first)


def log_sums(rows: Tensor, columns: Tensor, scale: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of `scale * rows @ columns.T` over columns and over rows, without holding the matrix.

    rows: (n, D), columns: (N, D), scale: [1]; float32 inside. Returns (n,) over all columns and (N,) over
    these rows. Peak memory is O(n x chunk): each chunk is computed again in the backward pass.
    """

    def part(columns: Tensor, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = scale * rows @ columns.T
        return logits.logsumexp(dim=1), logits.logsumexp(dim=0)

    with torch.autocast(rows.device.type, enabled=False):
        rows, columns, scale = rows.float(), columns.float(), scale.float()
        parts = [
            checkpoint(part, piece, rows, scale, use_reentrant=False, preserve_rng_state=False)
            for piece in torch.split(columns, chunk)
        ]
        over_columns = torch.stack([of_rows for of_rows, _ in parts]).logsumexp(dim=0)
        return over_columns, torch.cat([of_columns for _, of_columns in parts])


def sigmoid_pairs(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, first: int, chunk: int = 4096
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343 eq. 1): every pair is a binary question of its own.

    rows: (n, D), columns: (N, D); row i matches column first + i; scale, bias: [1]. The sum over all n x N
    pairs divided by n, float32, with memory O(n x chunk).
    """

    def part(columns: Tensor, rows: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        logits = scale * rows @ columns.T + bias
        row = torch.arange(len(rows), device=rows.device)
        column = torch.arange(len(columns), device=rows.device)
        match = (row[:, None] + first) == (column[None, :] + start)
        return functional.softplus(torch.where(match, -logits, logits)).sum()

    with torch.autocast(rows.device.type, enabled=False):
        rows, columns, scale, bias = rows.float(), columns.float(), scale.float(), bias.float()
        starts = range(0, len(columns), chunk)
        parts = [
            checkpoint(
                part, columns[start : start + chunk], rows, scale, bias, start,
                use_reentrant=False, preserve_rng_state=False,
            )
            for start in starts
        ]  # fmt: skip
        return torch.stack(parts).sum() / len(rows)
