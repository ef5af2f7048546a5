"""The repeated blocks of a model: where activations are computed again and kernels are compiled.

A block is an element of a `Sequential` or `ModuleList`, of a class outside `torch.nn`, with two layers or
more and no block inside of it: those of ViTs, of ResNets and their like, of a text tower and of a decoder.
Frozen ones (a teacher's) aren't trained, so nothing of theirs is kept or needed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pretrain.parts.batch_norm import recomputing

Forward = Callable[..., Any]


def blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The trainable blocks of `module` by name, in its order."""
    found = [
        (f"{prefix}.{name}" if prefix else name, element)
        for prefix, container in module.named_modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for name, element in container.named_children()
        if _repeats(element)
    ]
    outer = {id(one) for _, one in found for _, other in found if one is not other and _holds(one, other)}
    return [
        (name, block)
        for name, block in found
        if id(block) not in outer and any(p.requires_grad for p in block.parameters())
    ]


def _repeats(element: nn.Module) -> bool:
    layers = sum(any(True for _ in m.parameters(recurse=False)) for m in element.modules())
    return not type(element).__module__.startswith("torch.nn.") and layers > 1


def _holds(one: nn.Module, other: nn.Module) -> bool:
    return any(inner is other for inner in one.modules())


def recompute(module: nn.Module) -> int:
    """Keep only the inputs of each block for the backward pass, which computes the rest again.

    Chen et al. 2016, arXiv:1604.06174 §4. Losses and gradients are those without it; running statistics of
    batch norm move once. Gives the number of blocks, which isn't 0 where anything was changed.
    """
    found = blocks(module)
    for _, block in found:
        own = block.__dict__.get("forward")
        _bind(block, _recomputed(type(block).forward if own is None else own.__func__))
    return len(found)


def compile_blocks(module: nn.Module, backend: str) -> int:
    """Compile each block on its own, at its first call; blocks of one class share what is compiled.

    Before `recompute`, which then runs compiled blocks again. Gives the number of blocks.
    """
    found = blocks(module)
    compiled: dict[type[nn.Module], Forward] = {}
    for _, block in found:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=backend)
        _bind(block, compiled[kind])
    return len(found)


def _bind(block: nn.Module, forward: Forward) -> None:
    """Put `forward`, which takes the block first, in place of a block's own.

    A bound method, which a deep copy of the block binds to the copy, where a closure would call the original.
    """
    block.forward = MethodType(forward, block)


def _recomputed(inner: Forward) -> Forward:
    def once(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not recomputing():
            return inner(block, *args, **kwargs)
        with _unremembered([m for m in block.modules() if isinstance(m, _BatchNorm)]):
            return inner(block, *args, **kwargs)

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(block, *args, **kwargs)
        return checkpoint(once, block, *args, use_reentrant=False, **kwargs)

    return forward


@contextmanager
def _unremembered(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms move copies of their running statistics, which are then forgotten.

    Without any statistics torch would keep other tensors for the backward pass than in the first forward.
    """
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: b if b is None else b.clone() for name, b in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
