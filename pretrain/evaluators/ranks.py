"""The few collectives an evaluation needs. Without a process group each does nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many there are: (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(value: Tensor) -> Tensor:
    """The sum of `value` over ranks, on every rank."""
    if rank_and_size()[1] == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def gathered_rows(rows: Tensor) -> Tensor:
    """Every rank's (n_r, ...) rows, one rank after the other, on every rank: (sum of n_r, ...).

    Ranks may hold different numbers of rows, none included; the trailing shape and dtype must agree.
    """
    _, size = rank_and_size()
    if size == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(size)]
    dist.all_gather(counts, count)
    lengths = [int(c) for c in counts]
    padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def union(names: Iterable[str]) -> list[str]:
    """Every name that any rank has, sorted, on every rank."""
    own = sorted(names)
    _, size = rank_and_size()
    if size == 1:
        return own
    lists: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(lists, own)
    return sorted({name for part in lists for name in part})
