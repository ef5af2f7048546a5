"""Contrastive losses: rows against their own among others, whole or in tiles that fit a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


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


def log_sums(rows: Tensor, columns: Tensor, scale: Tensor, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of `scale * rows @ columns.T` over columns and over rows, without holding the matrix.

    rows: (n, D), columns: (N, D), scale: [1]; float32 inside. Returns (n,) over all columns and (N,) over
    these rows. Peak memory is O(chunk x chunk): each tile is computed again in the backward pass.
    """
    with torch.autocast(rows.device.type, enabled=False):
        sums = _LogSums.apply(rows.float(), columns.float(), scale.float(), chunk)  # type: ignore[no-untyped-call]
    over_columns, over_rows = sums
    return over_columns, over_rows


def sigmoid_pairs(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, first: int, chunk: int = 2048
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343 eq. 1): every pair is a binary question of its own.

    rows: (n, D), columns: (N, D); row i matches column first + i; scale, bias: [1]. The sum over all n x N
    pairs divided by n, float32, with memory O(chunk x chunk).
    """
    with torch.autocast(rows.device.type, enabled=False):
        tensors = (rows.float(), columns.float(), scale.float(), bias.float())
        total: Tensor = _SigmoidPairs.apply(*tensors, first, chunk)  # type: ignore[no-untyped-call]
    return total / len(rows)


class _LogSums(torch.autograd.Function):
    """Tiles that fit a cache, no graph through them: quicker than the plain loss, not only smaller."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        scaled = torch.split(rows * scale, chunk)
        of_rows: list[list[Tensor]] = [[] for _ in scaled]
        of_columns = []
        for right in torch.split(columns, chunk):
            parts = []
            for left, sums in zip(scaled, of_rows, strict=True):
                logits = left @ right.T
                sums.append(logits.logsumexp(dim=1))
                parts.append(logits.logsumexp(dim=0))
            of_columns.append(torch.stack(parts).logsumexp(dim=0))
        over_columns = torch.cat([torch.stack(sums).logsumexp(dim=0) for sums in of_rows])
        over_rows = torch.cat(of_columns)
        ctx.save_for_backward(rows, columns, scale, over_columns, over_rows)
        ctx.chunk = chunk
        return over_columns, over_rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, over_columns, over_rows = ctx.saved_tensors
        of_rows, of_columns = gradients

        def slopes(logits: Tensor, i: slice, j: slice) -> Tensor:
            by_row: Tensor = (logits - over_columns[i, None]).exp_().mul_(of_rows[i, None])
            return by_row.add_(logits.sub_(over_rows[j]).exp_().mul_(of_columns[j]))

        return (*_backward_by_tiles(rows, columns, scale, ctx.chunk, slopes), None)


class _SigmoidPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, first: int, chunk: int
    ) -> Tensor:
        scaled, total = torch.split(rows * scale, chunk), rows.new_zeros(())
        for j, right in enumerate(torch.split(columns, chunk)):
            for i, left in enumerate(scaled):
                logits = (left @ right.T).add_(bias)
                logits.diagonal(first + (i - j) * chunk).neg_()
                total += functional.softplus(logits).sum()
        ctx.save_for_backward(rows, columns, scale, bias)
        ctx.first, ctx.chunk = first, chunk
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, bias = ctx.saved_tensors
        of_bias = torch.zeros_like(bias)

        def slopes(logits: Tensor, i: slice, j: slice) -> Tensor:
            matching = logits.add_(bias).diagonal(ctx.first + i.start - j.start)
            matches = matching.neg().sigmoid_().neg_()  # sigmoid(x) - 1 would lose its digits
            logits.sigmoid_().diagonal(ctx.first + i.start - j.start).copy_(matches)
            of_bias.add_(logits.sum())
            return logits.mul_(gradients[0])

        found = _backward_by_tiles(rows, columns, scale, ctx.chunk, slopes)
        return (*found, of_bias * gradients[0], None, None)


def _backward_by_tiles(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    chunk: int,
    slopes: Callable[[Tensor, slice, slice], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, columns and scale, where `slopes` turns a tile of logits into its gradient."""
    scaled = rows * scale
    of_scaled, of_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for column in range(0, len(columns), chunk):
        j = slice(column, column + chunk)
        for row in range(0, len(rows), chunk):
            i = slice(row, row + chunk)
            tile = slopes(scaled[i] @ columns[j].T, i, j)
            of_scaled[i].addmm_(tile, columns[j])
            of_columns[j].addmm_(tile.T, scaled[i])
    of_scale = (of_scaled * rows).sum().reshape(scale.shape)
    return of_scaled.mul_(scale), of_columns, of_scale
