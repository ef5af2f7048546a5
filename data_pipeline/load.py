"""The loader: this rank's share of global batch after global batch, from any position, for ever.

The order is computed in the main process (`plan`); workers are stateless and do as they are told (`pool`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from configs.errors import ConfigError, DataError
from configs.loading import Config
from data_pipeline.assemble import Assembler, Buffers, Job
from data_pipeline.decode import MAX_PIXELS
from data_pipeline.demo import DemoConfig
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Draws, Plan
from data_pipeline.pool import WorkerPool
from data_pipeline.read import LABEL_FIELDS
from data_pipeline.types import Batch, ViewSpec

log = logging.getLogger(__name__)

_SIDES = "a side or [height, width], in pixels"


class DataConfig(Config):
    """YAML key `data`. `streams` and `window` fix the order of samples: they can't change within a run."""

    manifest: Path
    demo: DemoConfig | None = None  # made at the manifest's place when missing
    image_size: int | tuple[int, int] = Field(224, description=_SIDES)
    workers: NonNegativeInt = 2  # processes of each rank; 0 reads in the training process
    prefetch: PositiveInt = 3  # batches being made ahead
    streams: PositiveInt = 64  # shards read from at a time, over all ranks
    window: PositiveInt = 4096  # samples of a stream that are shuffled together
    max_pixels: PositiveInt = MAX_PIXELS  # larger pictures are refused: a guard against decompression bombs


def build_loader(
    config: DataConfig,
    views: Sequence[ViewSpec],
    *,
    needs: frozenset[str],
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    position: int,
) -> Loader:
    """The loader of rank `rank` of `world_size`, going on at `position` samples consumed (any integer >= 0).

    `needs`: batch fields. `batch_size`: samples of the global batch, a multiple of `world_size`. Raises
    `ConfigError` or `DataError` in a line.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"train.batch_size: found {batch_size}; it has to be a multiple of the {world_size} ranks"
        )
    manifest = Manifest.load(config.manifest)
    job = _job(manifest, views, needs, config.max_pixels)
    plan = Plan([manifest.sizes], seed=seed, streams=config.streams, window=config.window)
    return Loader(
        plan,
        job,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        position=position,
        workers=config.workers,
        prefetch=config.prefetch,
    )


class Loader:
    """Iterates for ever over `Batch`es of `batch_size // world_size` samples with uint8 CPU views."""

    def __init__(
        self,
        plan: Plan,
        job: Job,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        position: int,
        workers: int,
        prefetch: int,
    ):
        self.samples = plan.samples
        self.position = position  # samples consumed once the batches given so far have been used
        self._plan, self._batch_size, self._rank, self._world = plan, batch_size, rank, world_size
        self._ahead = position  # where the next batch to be ordered starts
        self._maker = _maker(job, batch_size // world_size, workers, prefetch)
        self._order_ahead()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._order_ahead()
        batch = self._maker.next()
        self.position += self._batch_size
        self._order_ahead()
        return batch

    def close(self) -> None:
        """End the workers at once."""
        self._maker.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order_ahead(self) -> None:
        while self._maker.has_room():
            self._maker.order(self._plan.share(self._ahead, self._batch_size, self._world, self._rank))
            self._ahead += self._batch_size


def sequential(
    manifest: str | Path | Manifest,
    view: ViewSpec,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    limit: int | None = None,
) -> Iterator[Batch]:
    """A set once, in the manifest's own order, for evaluation: the last batch may be short.

    Ranks take contiguous parts whose lengths differ by at most one sample. `limit`: the first so many samples
    only. Batches carry `target` where the set is labelled.
    """
    if not isinstance(manifest, Manifest):
        manifest = Manifest.load(manifest)
    labelled = any(field in manifest.fields for field in LABEL_FIELDS)
    needs = frozenset({"views", "target"}) if labelled else frozenset({"views"})
    job = _job(manifest, [view], needs, MAX_PIXELS)
    total = manifest.samples if limit is None else min(limit, manifest.samples)
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    maker = _maker(job, batch_size, workers, prefetch=3)
    try:
        ahead = start
        for _ in range(start, stop, batch_size):
            while maker.has_room() and ahead < stop:
                maker.order(_in_order(manifest, ahead, min(ahead + batch_size, stop)))
                ahead += batch_size
            yield maker.next()
    finally:
        maker.close()


def _in_order(manifest: Manifest, start: int, stop: int) -> Draws:
    index = np.arange(start, stop, dtype=np.int64)
    ends = np.cumsum(manifest.sizes)
    shard = np.searchsorted(ends, index, side="right")
    zeros = np.zeros_like(index)
    sample = index - (ends[shard] - manifest.sizes[shard])
    return Draws(zeros, zeros, shard, sample, index, index)


def _job(manifest: Manifest, views: Sequence[ViewSpec], needs: frozenset[str], max_pixels: int) -> Job:
    unknown = needs - {"views", "tokens", "target", "index"}
    if unknown:
        raise ValueError(f"no such batch field: {', '.join(sorted(unknown))}")
    if "target" in needs and not any(field in manifest.fields for field in LABEL_FIELDS):
        raise DataError(
            f"{manifest.path}: has no labels (field {LABEL_FIELDS[0]}), which the objective needs; "
            f"its fields are {', '.join(manifest.fields)}"
        )
    return Job((manifest,), tuple(views), needs, max_pixels)


class _InProcess:
    """Makes batches when they are asked for, in this process."""

    def __init__(self, job: Job):
        self._job, self._assembler = job, Assembler(job)
        self._orders: deque[Draws] = deque()

    def has_room(self) -> bool:
        return not self._orders

    def order(self, draws: Draws) -> None:
        self._orders.append(draws)

    def next(self) -> Batch:
        draws = self._orders.popleft()
        buffers = Buffers(self._job, len(draws))
        self._assembler.fill(draws, buffers)
        return buffers.batch()

    def close(self) -> None:
        self._assembler.close()


def _maker(job: Job, rows: int, workers: int, prefetch: int) -> _InProcess | WorkerPool:
    if workers == 0:
        return _InProcess(job)
    return WorkerPool(job, rows, workers=workers, prefetch=prefetch, pin=torch.cuda.is_available())
