"""The state of a run as an engine holds it, to and from a checkpoint folder.

One list, in one place: masters of all parameters, frozen parameters, persistent buffers, optimizer moments
and step counts, loss scale, each rank's random states, and the caller's `extra` (data position, hashes, ids).
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from configs.errors import RunError
from pretrain.engines import fragments, storage
from pretrain.engines.storage import Fragment

log = logging.getLogger(__name__)

CUT_FROM = 2**16
"""Elements from which a tensor that every rank holds is written in equal parts by all of them."""


@dataclass(frozen=True)
class Staged:
    """A rank's part of the state in host memory, ready to be written while training goes on."""

    fragments: Sequence[Fragment]
    shapes: Mapping[str, Sequence[int]]
    state: Mapping[str, Any]
    group: dist.ProcessGroup = field(repr=False)  # over gloo, for this alone: usable from another thread

    def write(self, directory: Path, then: Callable[[], None] | None = None) -> None:
        """Write all ranks' parts, then the index, then call `then` on rank 0; collective over `group`.

        Raises `RunError` on every rank where one of them failed.
        """
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        own: storage.WrittenFile | str
        try:
            directory.mkdir(exist_ok=True)  # no parents: a lost mount's must not be made anew beneath it
            own = storage.write_fragments(directory, rank, self.fragments)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            if not isinstance(error, OSError):
                log.exception("rank %d can't write its part of %s", rank, directory)
            own = f"rank {rank}: {error}"
        told: list[Any] = [None] * ranks
        dist.all_gather_object(told, own, group=self.group)
        problems = [each for each in told if isinstance(each, str)]
        if rank == 0 and not problems:
            try:
                storage.write_index(directory, told, self.shapes, self.state)
                if then is not None:
                    then()
            except Exception as error:
                if not isinstance(error, OSError | RunError):
                    log.exception("rank 0 can't publish %s", directory)
                problems = [f"rank 0: {error}"]
        outcome = [problems]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[0]:
            raise RunError(f"{directory}: the checkpoint can't be written: {'; '.join(outcome[0])}")


class HostBuffers:
    """Host memory a state is copied to, kept from save to save: new pages cost more than the copy."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, source: Sequence[Fragment]) -> None:
        """Get the memory for such fragments in the background, so that the first copy doesn't wait for it."""

        def touch() -> None:
            for each in source:
                self._buffer(each).zero_()  # a page is only given when it is written to

        self._reserving = threading.Thread(target=touch, daemon=True)
        self._reserving.start()

    def _buffer(self, like: Fragment) -> Tensor:
        key, data = (like.tensor, like.start), like.data
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            pin = data.is_cuda  # pinned memory is what a GPU can copy to without waiting
            buffer = self._kept[key] = torch.empty(data.shape, dtype=data.dtype, pin_memory=pin)
        return buffer

    def copy(self, source: Iterable[Fragment]) -> list[Fragment]:
        """The same fragments in host memory; what was copied before is overwritten."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        copies, on_device = [], False
        for each in source:
            buffer = self._buffer(each)
            buffer.copy_(each.data, non_blocking=True)
            on_device = on_device or each.data.is_cuda
            copies.append(Fragment(each.tensor, buffer, each.start, each.total))
        if on_device:
            torch.cuda.current_stream().synchronize()
        return copies


def stage(
    engine: Any,
    shards: Sequence[fragments.Shard],
    buffers: HostBuffers,
    group: dist.ProcessGroup,
    engine_state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Staged:
    """Copy this rank's part to host memory. `engine_state`, `extra`: JSON values, rank 0's are kept."""
    ranks = dist.get_world_size(group)
    base = fragments.base_optimizer(engine)
    shapes = fragments.shapes(engine.module)
    named = {f"model/{name}": shape for name, shape in shapes.items()}
    keys = _moment_keys(shards, base)
    named |= {f"optimizer/{key}/{name}": shape for key in keys for name, shape in shapes.items()}
    state = {
        **engine_state,
        "ranks": ranks,
        "scalars": _scalars(shards, base),
        "moments": keys,
        "extra": dict(extra),
    }
    return Staged(buffers.copy(owned(engine, shards, group)), named, state, group)


def owned(engine: Any, shards: Sequence[fragments.Shard], group: dist.ProcessGroup) -> list[Fragment]:
    """What this rank writes, as live tensors."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    found = list(_masters(shards)) + list(_moments(shards, fragments.base_optimizer(engine)))
    if engine.zero_optimization_stage() == 0:  # every rank holds everything
        found = [part for f in found if (part := _share(f, rank, ranks))]
    for number, replica in enumerate(fragments.replicas(engine)):
        data = fragments.read_slice(replica.data, 0, replica.data.numel())
        if replica.sharded or number % ranks == rank:
            found.append(Fragment(f"model/{replica.name}", data, replica.start, replica.total))
    return found + list(_random_states(rank))


def require_equal_replicas(engine: Any, group: dist.ProcessGroup, *, frozen: bool) -> None:
    """Refuse what a checkpoint would keep one rank's of though each has its own; collective over `group`.

    Compares a fingerprint of every buffer but batch norm's, which have been averaged, and with `frozen` of
    every frozen parameter. Raises the same `RunError` on every rank.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    averaged = {
        f"{name}.{buffer}" if name else buffer
        for name, layer in engine.module.named_modules()
        if isinstance(layer, _BatchNorm)
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    buffers = {name for name, _ in fragments.persistent_buffers(engine.module)} - averaged
    compared = [
        replica
        for replica in fragments.replicas(engine)
        if not replica.sharded and (replica.name in buffers or (frozen and replica.name not in averaged))
    ]
    if not compared:
        return
    own = torch.stack([_fingerprint(replica.data) for replica in compared]).cpu()
    everyones = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(everyones, own, group=group)
    same = torch.stack(everyones).eq(everyones[0]).all(dim=0).tolist()
    differing = [replica.name for replica, equal in zip(compared, same, strict=True) if not equal]
    if differing:
        raise RunError(
            f"objective: {', '.join(differing[:5])} differs between the ranks, and a checkpoint keeps one "
            "rank's: nothing was saved; make it the same on every rank (pretrain.collectives has gather and "
            "total), or register it with persistent=False and make it anew after a resume"
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """() int64 on the tensor's device, of every bit and its place: a sum with odd weights, modulo 2^64.

    The weights are scrambled places: with evenly spaced ones +1, -2, +1 would go unseen.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.detach().reshape(-1)
    found = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(torch.split(flat.view(whole[flat.element_size()]), 2**20)):
        place = torch.arange(1, len(part) + 1, device=tensor.device) + number * 2**20
        place *= 0x1E3779B97F4A7C15
        place ^= place >> 31
        place *= 0x3F58476D1CE4E5B9
        found += (part.to(torch.int64) * (place | 1)).sum()
    return found


def load(
    engine: Any, shards: Sequence[fragments.Shard], group: dist.ProcessGroup, directory: Path
) -> dict[str, Any]:
    """Restore this rank's part from a folder written at any number of ranks and ZeRO stage; collective."""
    reader = storage.Reader(directory)
    _require_same_model(reader, fragments.shapes(engine.module))
    for shard in shards:
        for piece in shard.pieces:
            values = reader.read(f"model/{piece.name}", piece.start, piece.length)
            fragments.write_slice(shard.master, piece.offset, values)
    for replica in fragments.replicas(engine):
        values = reader.read(f"model/{replica.name}", replica.start, replica.data.numel())
        fragments.write_slice(replica.data, 0, values)
    _load_moments(reader, shards, fragments.base_optimizer(engine))
    if reader.state["ranks"] == dist.get_world_size(group):
        _restore_random_states(reader, dist.get_rank(group))
    fragments.refresh(engine)
    return reader.state


def _masters(shards: Sequence[fragments.Shard]) -> Iterator[Fragment]:
    for shard in shards:
        for piece in shard.pieces:
            data = fragments.read_slice(shard.master, piece.offset, piece.length)
            yield Fragment(f"model/{piece.name}", data, piece.start, piece.total)


def _moments(shards: Sequence[fragments.Shard], base: torch.optim.Optimizer) -> Iterator[Fragment]:
    for shard in shards:
        for key, value in base.state.get(shard.key, {}).items():
            if not _is_moment(value):
                continue
            if value.numel() != shard.master.numel():
                raise ValueError(f"optimizer state {key} isn't one value an element: can't be cut")
            for piece in shard.pieces:
                data = fragments.read_slice(value, piece.offset, piece.length)
                yield Fragment(f"optimizer/{key}/{piece.name}", data, piece.start, piece.total)


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _moment_keys(shards: Sequence[fragments.Shard], base: torch.optim.Optimizer) -> list[str]:
    entries = (base.state.get(shard.key, {}) for shard in shards)
    return sorted({key for entry in entries for key, value in entry.items() if _is_moment(value)})


def _scalars(shards: Sequence[fragments.Shard], base: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Step counts and the like by parameter; absent for parameters that never had a gradient."""
    found = {}
    for shard in shards:
        entry = base.state.get(shard.key, {})
        values = {key: _plain(value) for key, value in entry.items() if not _is_moment(value)}
        if entry:
            found.update(dict.fromkeys(shard.names, values))
    return found


def _plain(value: Any) -> dict[str, Any]:
    return {"tensor": value.item()} if isinstance(value, Tensor) else {"value": value}


def _load_moments(
    reader: storage.Reader, shards: Sequence[fragments.Shard], base: torch.optim.Optimizer
) -> None:
    scalars, keys = reader.state["scalars"], reader.state["moments"]
    known = set(reader.tensors)
    on_device = bool(base.defaults.get("fused") or base.defaults.get("capturable"))
    for shard in shards:
        base.state.pop(shard.key, None)
        saved = next((scalars[name] for name in shard.names if name in scalars), None)
        if saved is None:
            continue
        entry = base.state[shard.key]
        for key, value in saved.items():
            device = shard.key.device if on_device else torch.device("cpu")
            entry[key] = (
                torch.tensor(value["tensor"], dtype=torch.float32, device=device)
                if "tensor" in value
                else value["value"]
            )
        for key in keys:
            entry[key] = torch.zeros_like(shard.key)
            for piece in shard.pieces:
                if (tensor := f"optimizer/{key}/{piece.name}") in known:
                    values = reader.read(tensor, piece.start, piece.length)
                    fragments.write_slice(entry[key], piece.offset, values)


def _share(fragment: Fragment, rank: int, ranks: int) -> Fragment | None:
    """This rank's part of what every rank holds: an equal cut of a large tensor, a small one whole or not."""
    if fragment.total < CUT_FROM:
        return fragment if sum(fragment.tensor.encode()) % ranks == rank else None
    start, end = fragment.total * rank // ranks, fragment.total * (rank + 1) // ranks
    return Fragment(fragment.tensor, fragment.data[start:end], start, fragment.total)


def _random_states(rank: int) -> Iterator[Fragment]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = json.dumps(
        {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached]}
    )
    states = {
        "plain": torch.frombuffer(bytearray(plain.encode()), dtype=torch.uint8),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for key, value in states.items():
        yield Fragment(f"rank/{rank}/{key}", value, 0, len(value))


def _restore_random_states(reader: storage.Reader, rank: int) -> None:
    plain = json.loads(bytes(reader.read(f"rank/{rank}/plain").tolist()))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    torch.set_rng_state(reader.read(f"rank/{rank}/cpu"))
    if torch.cuda.is_available() and f"rank/{rank}/cuda" in reader.tensors:
        torch.cuda.set_rng_state(reader.read(f"rank/{rank}/cuda"))


def _require_same_model(reader: storage.Reader, shapes: Mapping[str, Sequence[int]]) -> None:
    held = {
        name.removeprefix("model/"): reader.shape(name) for name in reader.tensors if name[:6] == "model/"
    }
    for name in sorted(held.keys() | shapes.keys()):
        if held.get(name) != shapes.get(name):
            raise RunError(
                f"{reader.directory}: holds another model: {name} has shape {held.get(name)} there, "
                f"{shapes.get(name)} here; resume with the objective and encoder it was saved with"
            )
