"""The loader: this rank's share of global batch after global batch, from any position, for ever.

The order is computed in the main process (`plan`); workers are stateless and do as they are told (`pool`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from configs.errors import ConfigError, DataError
from data_pipeline.assemble import Assembler, Buffers, Job
from data_pipeline.cache import Ahead, CacheConfig
from data_pipeline.config import DataConfig
from data_pipeline.facts import Facts, facts_of
from data_pipeline.hashing import Int64s
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Draws, Plan, over_cap
from data_pipeline.pool import WorkerPool
from data_pipeline.quarantine import Broken, Quarantine
from data_pipeline.stream import StreamLoader
from data_pipeline.types import Batch, ViewSpec

log = logging.getLogger(__name__)

_LOOK_AHEAD = 64  # batches whose remote shards are fetched before they are due


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
    quarantine: Path | None = None,
) -> Loader | StreamLoader:
    """The loader of rank `rank` of `world_size`, going on at `position` samples consumed (any integer >= 0).

    `needs`: batch fields. `batch_size`: samples of the global batch, a multiple of `world_size`.
    `quarantine`: file that broken samples are written to. Raises `ConfigError` or `DataError` in a line.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"train.batch_size: found {batch_size}; it has to be a multiple of the {world_size} ranks"
        )
    facts = facts_of(config)
    facts.require(needs, world_size=world_size, seed=seed)
    job, watched = _job(facts, views, needs), Quarantine(quarantine, config.max_broken)
    place = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "position": position}
    if config.stream is not None:
        return StreamLoader(config.stream, job, config.captions, seed=seed, quarantine=watched, **place)
    plan = facts.plan(seed)
    if rank == 0:
        _say_who_shares_shards(plan, batch_size, world_size, _nodes(world_size))
    return Loader(
        plan,
        job,
        workers=config.workers,
        prefetch=config.prefetch,
        caps=[source.max_epochs for source in config.sources],
        quarantine=watched,
        **place,
    )


def _nodes(world_size: int) -> int:
    """As the launcher tells each rank."""
    return max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def _say_who_shares_shards(plan: Plan, batch_size: int, world_size: int, nodes: int) -> None:
    """A word where counts don't divide: the samples are the same, but more shards are read and cached."""
    who, parts = ("node", nodes) if nodes > 1 else ("rank", world_size)
    for order in plan.orders if parts > 1 else ():
        if order.streams % parts or batch_size % order.streams or len(plan.orders) > 1:
            log.info(
                "data.streams: %d streams, a batch of %d and %d sources don't divide evenly among %d %ss: "
                "some shards are read by more than one %s",
                *(order.streams, batch_size, len(plan.orders), parts, who, who),
            )
            return


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
        caps: Sequence[float | None],
        quarantine: Quarantine,
    ):
        self.samples = plan.samples
        self.position = position  # samples consumed once the batches given so far have been used
        self._plan, self._batch_size, self._rank, self._world = plan, batch_size, rank, world_size
        self._caps, self._manifests = caps, job.manifests
        self._ahead = position  # where the next batch to be ordered starts
        self._seen = 0
        self._quarantine = quarantine
        self._fetching = _Fetching(plan, job, batch_size, rank, world_size) if job.cache else None
        self._maker = _maker(job, batch_size // world_size, workers, prefetch)
        try:
            self._order_ahead()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._order_ahead()
        if self._maker.idle():
            self._check_caps(self.position + self._batch_size)
        batch = self._maker.next()
        self.position += self._batch_size
        self._seen += len(batch)
        self._quarantine.add(self._maker.broken, self._seen)
        self._order_ahead()
        return batch

    def close(self) -> None:
        """End the workers at once."""
        if self._fetching is not None:
            self._fetching.close()
        self._maker.close()

    def worker_pids(self) -> list[int]:
        """The processes at work for this loader, where they have started."""
        return self._maker.pids()

    def metrics(self) -> dict[str, float]:
        """Counts for the tracker: samples of each source over all ranks, what this rank had to put right."""
        counts = self._plan.counts(self.position)
        found: dict[str, float] = {f"source_{n}_samples": count for n, count in enumerate(counts)}
        for number, (count, order) in enumerate(zip(counts, self._plan.orders, strict=True)):
            found[f"source_{number}_epochs"] = count / order.samples
        found["broken_samples"] = self._quarantine.count
        found["worker_restarts"] = self._maker.restarts
        if self._fetching is not None:
            found |= self._fetching.metrics()
        return found

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_caps(self, position: int) -> None:
        over = over_cap(self._plan, self._caps, position)
        if over is not None:
            raise DataError(
                f"{self._manifests[over].path}: has been repeated {self._caps[over]:g} times, its "
                "max_epochs; lower its weight, train for less, or raise max_epochs"
            )

    def _order_ahead(self) -> None:
        if self._fetching is not None:
            self._fetching.look_ahead(self._ahead)
        while self._maker.has_room():
            if over_cap(self._plan, self._caps, self._ahead + self._batch_size) is not None:
                break
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
    cache: CacheConfig | None = None,
) -> Iterator[Batch]:
    """A set once, in the manifest's own order, for evaluation: the last batch may be short.

    Ranks take contiguous parts whose lengths differ by at most one sample. `limit`: the first so many samples
    only. Batches carry `target` where the set is labelled.
    """
    if not isinstance(manifest, Manifest):
        manifest = Manifest.load(manifest)
    needs = frozenset({"views", "target"}) if manifest.labelled else frozenset({"views"})
    job = Job((manifest,), (view,), needs, cache=cache)
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


def chosen(manifest: str | Path | Manifest, view: ViewSpec, numbers: Sequence[int]) -> Batch:
    """Some samples of a set, by their number in the manifest's own order, in one batch."""
    if not isinstance(manifest, Manifest):
        manifest = Manifest.load(manifest)
    needs = frozenset({"views", "target"}) if manifest.labelled else frozenset({"views"})
    maker = _maker(Job((manifest,), (view,), needs), len(numbers), workers=0, prefetch=1)
    try:
        maker.order(_draws(manifest, np.array(numbers, dtype=np.int64)))
        return maker.next()
    finally:
        maker.close()


def _in_order(manifest: Manifest, start: int, stop: int) -> Draws:
    return _draws(manifest, np.arange(start, stop, dtype=np.int64))


def _draws(manifest: Manifest, index: Int64s) -> Draws:
    ends = np.cumsum(manifest.sizes)
    shard = np.searchsorted(ends, index, side="right")
    zeros = np.zeros_like(index)
    sample = index - (ends[shard] - manifest.sizes[shard])
    return Draws(zeros, zeros, shard, sample, index, index)


def _job(facts: Facts, views: Sequence[ViewSpec], needs: frozenset[str]) -> Job:
    config = facts.config
    if config.resize == "fast" and importlib.util.find_spec("cv2") is None:
        raise ConfigError("data.resize: fast needs OpenCV; install opencv-python-headless, or set exact")
    return Job(
        facts.manifests,
        tuple(views),
        needs,
        max_pixels=config.max_pixels,
        substitute=config.max_broken > 0,
        cache=config.cache,
        fast=config.resize == "fast",
        text=facts.text if "tokens" in needs else None,
    )


class _Fetching:
    """Has the cache fetch what a rank will read next: the shards of some batches further on."""

    def __init__(self, plan: Plan, job: Job, batch_size: int, rank: int, world_size: int):
        assert job.cache is not None
        self._plan, self._share = plan, (batch_size, world_size, rank)
        self._remote = [any(shard.remote for shard in manifest.shards) for manifest in job.manifests]
        self._ahead = Ahead(job.cache, job.manifests)
        self._next: int | None = None
        self._recent: deque[set[tuple[int, int]]] = deque(maxlen=4 * _LOOK_AHEAD)

    def look_ahead(self, position: int) -> None:
        """Ask for the shards of the `_LOOK_AHEAD` batches from `position` on."""
        if not any(self._remote):
            return
        batch_size = self._share[0]
        start = position if self._next is None else self._next
        for at in range(start, position + _LOOK_AHEAD * batch_size, batch_size):
            draws = self._plan.share(at, *self._share)
            pairs = set(zip(draws.source.tolist(), draws.shard.tolist(), strict=True))
            self._recent.append(pairs)
            self._ahead.ask(pair for pair in sorted(pairs) if self._remote[pair[0]])
            self._next = at + batch_size
        self._ahead.forget(set().union(*self._recent))

    def metrics(self) -> dict[str, float]:
        return {"shards_fetched": self._ahead.fetched, "shards_waiting": self._ahead.waiting}

    def close(self) -> None:
        self._ahead.close()


class _InProcess:
    """Makes batches when they are asked for, in this process."""

    def __init__(self, job: Job):
        self._job, self._assembler = job, Assembler(job)
        self._orders: deque[Draws] = deque()
        self.broken: list[Broken] = []
        self.restarts = 0

    def pids(self) -> list[int]:
        return []

    def idle(self) -> bool:
        return not self._orders

    def has_room(self) -> bool:
        return not self._orders

    def order(self, draws: Draws) -> None:
        self._orders.append(draws)

    def next(self) -> Batch:
        draws = self._orders.popleft()
        buffers = Buffers(self._job, len(draws))
        self.broken = self._assembler.fill(draws, buffers)
        return buffers.batch()

    def close(self) -> None:
        self._assembler.close()


def _maker(job: Job, rows: int, workers: int, prefetch: int) -> _InProcess | WorkerPool:
    if workers == 0:
        return _InProcess(job)
    return WorkerPool(job, rows, workers=workers, prefetch=prefetch, pin=torch.cuda.is_available())
