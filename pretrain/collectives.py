"""Sums, means, gathers and agreements over ranks, on top of torch.distributed. Alone, each does nothing."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Result = TypeVar("Result")


def ranks() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_main(compute: Callable[[], Result]) -> Result:
    """What rank 0 computes, on every rank; collective. An error of rank 0 is raised on every rank."""
    if ranks() == 1:
        return compute()
    box: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            box = [(_carried(compute()), None)]
        except Exception as error:
            box = [(None, _carried(error, error))]
    dist.broadcast_object_list(box, src=0)
    result, failure = box[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _carried(value: Result, failure: Exception | None = None) -> Any:
    """`value` where other ranks can be told of it. What can't be pickled must not end rank 0 alone.

    An error that can't is told by its traceback; raises TypeError for another value.
    """
    try:
        pickle.loads(pickle.dumps(value))
    except Exception as error:
        if failure is None:
            raise TypeError(f"{type(value).__name__} can't be sent to other ranks: {error}") from error
        return RuntimeError("".join(traceback.format_exception(failure)))
    return value


def all_reduce_mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over ranks of () tensors as float32, in one communication; every rank passes the same names."""
    if not values:
        return {}
    names = sorted(values)
    stacked = torch.stack([values[name].detach().to(torch.float32).reshape(()) for name in names])
    if ranks() > 1:
        dist.all_reduce(stacked)
        stacked /= ranks()
    means = dict(zip(names, stacked.unbind(), strict=True))
    return {name: means[name] for name in values}


def gather(rows: Tensor) -> Tensor:
    """Every rank's (n, ...) rows in rank order, on every rank: (ranks * n, ...). With gradient.

    The gradient that reaches a rank's rows is summed over the ranks that used them. With each rank's loss
    its part of a global mean, and an engine that averages gradients over ranks, that is the gradient of the
    global loss.
    """
    return rows if ranks() == 1 else _Gather.apply(rows)  # type: ignore[no-untyped-call]


def total(values: Tensor) -> Tensor:
    """Sum over ranks, on every rank. With gradient, itself summed over ranks."""
    return values if ranks() == 1 else _Total.apply(values)  # type: ignore[no-untyped-call]


def log_total(values: Tensor) -> Tensor:
    """Log of the sum over ranks of exp(values), on every rank, without overflow. With gradient."""
    if ranks() == 1:
        return values
    highest = values.detach().clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return total((values - highest).exp()).log() + highest


def gather_uneven(rows: Tensor) -> Tensor:
    """Every rank's (n_r, ...) rows, one rank after the other, on every rank: (sum of n_r, ...). No gradient.

    Ranks may hold different numbers of rows, none included; the trailing shape and dtype must agree.
    """
    size = ranks()
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
    size = ranks()
    if size == 1:
        return own
    lists: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(lists, own)
    return sorted({name for part in lists for name in part})


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everything = rows.new_empty(ranks() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everything, rows.contiguous())
        return everything

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0]).chunk(ranks())[rank()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(values: Tensor) -> Tensor:
    values = values.contiguous().clone()
    dist.all_reduce(values)
    return values


@torch.no_grad()
def average_batch_norm_statistics(module: nn.Module) -> None:
    """Replace running means and variances, which differ between ranks, by their mean over ranks."""
    if ranks() == 1:
        return
    statistics = [
        statistic
        for inner in module.modules()
        if isinstance(inner, _BatchNorm)
        for statistic in (inner.running_mean, inner.running_var)
        if statistic is not None
    ]
    if not statistics:
        return
    flat = torch.cat([statistic.reshape(-1).to(torch.float32) for statistic in statistics])
    dist.all_reduce(flat)
    parts = torch.split(flat / ranks(), [statistic.numel() for statistic in statistics])
    for statistic, part in zip(statistics, parts, strict=True):
        statistic.copy_(part.view_as(statistic))


class Agreement:
    """One integer a rank, their maximum a step later, so that all ranks act on it at the same step.

    Reduced over gloo in the background of a step: neither the accelerator nor another rank is waited for
    within it. Make one on every rank at the same point; `exchange` is collective and called by one thread.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if ranks() > 1 else None
        self._value = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def exchange(self, value: int) -> int:
        """Offer this rank's `value` (>= 0); gives the largest offered the call before, at first 0."""
        agreed = self.settle()
        self._value = torch.tensor([value], dtype=torch.int64)
        if self._group is not None:
            self._pending = dist.all_reduce(
                self._value, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )
        return agreed

    def settle(self) -> int:
        """Wait for what is under way, before leaving the process group; gives the largest last offer."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return int(self._value.item())


class MeanLater:
    """One number a rank, their mean a step later; reduced like `Agreement`, and used the same way."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if ranks() > 1 else None
        self._value: Tensor | None = None
        self._pending: dist.Work | None = None

    def exchange(self, value: float) -> float | None:
        """Offer this rank's `value`; gives the mean of those offered the call before, at first None."""
        mean = self.settle()
        self._value = torch.tensor([value], dtype=torch.float64)
        if self._group is not None:
            self._pending = dist.all_reduce(self._value, group=self._group, async_op=True)
        return mean

    def settle(self) -> float | None:
        """Wait for what is under way; gives the mean of the last offers."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return None if self._value is None else float(self._value.item()) / ranks()
