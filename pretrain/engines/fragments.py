"""Where DeepSpeed keeps the state this rank owns, as slices of flattened parameters.

The only place that reads DeepSpeed's private names (`_hp_mapping`, `bit16_groups`, `ds_tensor`,
`fp32_partitioned_groups_flat` and a few more); tests/pretrain/engines/test_fragments.py holds them against
the installed version. A slice is addressed by (parameter name, offset in the flattened parameter), which
depends neither on the number of ranks nor on the ZeRO stage nor on the layout of flat groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import RunError

KNOWN_DEEPSPEED = ("0.19.8", "0.20")
"""From this version on and below that one private names were checked: they change within a minor version."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened parameter, at [offset, offset + length) of a shard."""

    name: str
    total: int  # elements of the whole parameter
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """A tensor the base optimizer steps: this rank's flat part of a parameter group, or one parameter."""

    key: Tensor  # its key in `optimizer.state`
    master: Tensor  # (n,) float32, or one parameter's shape: what the working parameters are refreshed from
    pieces: Sequence[Piece]
    names: Sequence[str]  # every parameter of the group, also those without an element on this rank


@dataclass(frozen=True)
class Replica:
    """A whole or sharded tensor outside of the optimizer: a buffer or a frozen parameter."""

    name: str
    data: Tensor  # live storage; (n,) where sharded, any shape where whole
    total: int
    start: int = 0
    sharded: bool = False


def require_known_deepspeed() -> None:
    """Refuse a DeepSpeed whose internals nobody has checked, before it can corrupt a checkpoint."""
    found = version("deepspeed")
    first, beyond = KNOWN_DEEPSPEED
    if not _numbers(first) <= _numbers(found) < _numbers(beyond):
        raise RunError(
            f"deepspeed {found} is unknown to keel, whose checkpoints read its private names; install one "
            f"from {first} on and below {beyond}, or run tests/pretrain/engines against this one and then "
            "change pretrain.engines.fragments.KNOWN_DEEPSPEED"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """0.19.8+cu130 is (0, 19, 8)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside of `engine`."""
    base = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    assert isinstance(base, torch.optim.Optimizer)
    return base


def shards(engine: Any) -> list[Shard]:
    """What this rank's optimizer steps, in a fixed order; the tensors are live and stay the same objects."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_whole_shards(engine))
    return list(_partitions(engine) if stage < 3 else _zero3_partitions(engine))


def _whole_shards(engine: Any) -> Iterator[Shard]:
    names = {p: name for name, p in engine.module.named_parameters()}
    for group in base_optimizer(engine).param_groups:
        for p in group["params"]:
            yield Shard(p, p.data, [Piece(names[p], p.numel(), 0, p.numel(), 0)], [names[p]])


def _partitions(engine: Any) -> Iterator[Shard]:
    names = {p: name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer
    for group, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        pieces = []
        for p in group:
            if (
                mapping := p._hp_mapping
            ) is not None:  # None where no element of p is in this rank's partition
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(names[p], p.numel(), here.start, here.numel, there.start))
        yield Shard(master, master.data, pieces, [names[p] for p in group])


def _zero3_partitions(engine: Any) -> Iterator[Shard]:
    names = {p: name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for p in group:
            start, length = _zero3_slice(p)
            if length:
                pieces.append(Piece(names[p], p.ds_numel, start, length, offset))
            offset += p.partition_numel()
        yield Shard(master, master.data, pieces, [names[p] for p in group])


def _zero3_slice(parameter: Any) -> tuple[int, int]:
    """(start, length) of this rank's elements of a ZeRO-3 parameter; the last rank's share is padded."""
    size = parameter.partition_numel()
    start = size * dist.get_rank(parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def gradients(engine: Any, shards: Sequence[Shard]) -> list[Tensor]:
    """What the optimizer will be given: averaged over ranks, whole at stage 0, else this rank's shards."""
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if engine.zero_use_cpu_optimizer():  # offloaded: already at their masters, in host memory
        if engine.zero_optimization_stage() < 3:
            engine.optimizer._wait_for_offload_copies()
        return [shard.key.grad for shard in shards if shard.key.grad is not None]
    return [g for group in engine.optimizer.averaged_gradients.values() for g in group or () if g is not None]


def replicas(engine: Any) -> Iterator[Replica]:
    """Frozen parameters and persistent buffers."""
    for name, p in engine.module.named_parameters():
        if not p.requires_grad and hasattr(p, "ds_tensor"):
            start, length = _zero3_slice(p)
            if length:
                yield Replica(name, p.ds_tensor.data.view(-1)[:length], p.ds_numel, start, sharded=True)
        elif not p.requires_grad:
            yield Replica(name, p.data, p.numel())
    for name, buffer in persistent_buffers(engine.module):
        yield Replica(name, buffer, buffer.numel())


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state; the others can be computed again."""
    for prefix, inner in module.named_modules():
        for name, buffer in inner.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in inner._non_persistent_buffers_set:
                yield name, buffer


def read_slice(tensor: Tensor, offset: int, length: int) -> Tensor:
    """(length,) elements of the flattened `tensor`: a view where its memory is in that order, else a copy."""
    return tensor.detach().reshape(-1)[offset : offset + length]


def write_slice(tensor: Tensor, offset: int, values: Tensor) -> None:
    """Set elements of the flattened `tensor` in place, in whatever memory format it is."""
    if tensor.is_contiguous():
        tensor.detach().view(-1)[offset : offset + len(values)].copy_(values)
    else:  # channels-last and the like are only ever written whole
        assert offset == 0 and len(values) == tensor.numel()
        tensor.detach().copy_(values.view(tensor.shape))


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Whole shape of every parameter and persistent buffer."""
    found = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    return found | {name: list(buffer.shape) for name, buffer in persistent_buffers(module)}


def refresh(engine: Any) -> None:
    """Collectively carry changed masters and shards over to the working parameters."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # its views of the moments may have been replaced
    elif stage == 3:
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[i].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(i)
        if kept := optimizer.persistent_parameters:  # small ones that stay gathered, trainable and frozen
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def write_working(parameter: Any, value: Tensor) -> None:
    """Set the working copy of a parameter, whole or this rank's ZeRO-3 shard, to `value` (whole shape)."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    start, length = _zero3_slice(parameter)
    write_slice(parameter.ds_tensor.data, 0, value.reshape(-1)[start : start + length])
    if is_gathered(parameter):
        parameter.data.copy_(value)


def is_gathered(parameter: Any) -> bool:
    """Whether a ZeRO-3 parameter is whole at the moment."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def working_pairs(first: Any, second: Any) -> list[tuple[Tensor, Tensor]]:
    """Every live copy of two like parameters' working values on this rank, side by side."""
    if not hasattr(first, "ds_tensor"):
        return [(first.data, second.data)]
    pairs = [(first.ds_tensor.data, second.ds_tensor.data)]
    if is_gathered(first):
        if not is_gathered(second):
            raise RuntimeError("a ZeRO-3 parameter is whole and its twin isn't: they differ in size")
        if (
            first.data.data_ptr() != first.ds_tensor.data.data_ptr()
        ):  # on a single rank they share their memory
            pairs.append((first.data, second.data))
    return pairs
