"""From drawn samples to the rows of one uint8 batch buffer: a worker's whole job, without processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.errors import DataError
from data_pipeline.cache import CacheConfig, locator
from data_pipeline.decode import MAX_PIXELS, DecodeError, Pixels, decode
from data_pipeline.hashing import key
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Draws
from data_pipeline.quarantine import Broken
from data_pipeline.randomness import Purpose
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, Reader, SampleError
from data_pipeline.transform import WorkerHalf
from data_pipeline.types import Batch, ViewSpec

_SUBSTITUTES = 32  # tried in a shard before it is given up


@dataclass(frozen=True)
class Job:
    """What every batch of a loader needs: sent once to each worker."""

    manifests: tuple[Manifest, ...]
    views: tuple[ViewSpec, ...]
    needs: frozenset[str]
    max_pixels: int = MAX_PIXELS
    substitute: bool = False  # replace broken samples instead of raising
    cache: CacheConfig | None = None
    fast: bool = False  # see WorkerHalf


class Buffers:
    """The arrays of one batch over a flat piece of memory, shared or not."""

    def __init__(self, job: Job, rows: int, memory: Tensor | None = None):
        """`memory`: (size(job, rows),) uint8, or None for a fresh one."""
        if memory is None:
            memory = torch.empty(self.size(job, rows), dtype=torch.uint8)
        self.seeds, self.index, self.target = memory[: 24 * rows].view(torch.int64).view(3, rows)
        at, views = 24 * rows, []
        for view in job.views:
            shape = (rows, 3, *view.size)
            size = int(np.prod(shape))
            views.append(memory[at : at + size].view(shape))
            at += size
        self.views = tuple(views)
        self._needs = job.needs

    @staticmethod
    def size(job: Job, rows: int) -> int:
        """Bytes of a batch of `rows` samples."""
        return rows * (24 + sum(3 * view.size[0] * view.size[1] for view in job.views))

    def batch(self) -> Batch:
        """The rows as a batch that shares this memory."""
        target = self.target if "target" in self._needs else None
        return Batch(views=self.views, seeds=self.seeds, index=self.index, target=target)

    def copied(self, rows: int, pin: bool) -> Batch:
        """The first `rows` rows as a batch of its own memory, page-locked where `pin`."""

        def copy(tensor: Tensor) -> Tensor:
            part = tensor[:rows]
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=pin).copy_(part)

        return Batch(
            views=tuple(copy(view) for view in self.views),
            seeds=copy(self.seeds),
            index=copy(self.index),
            target=copy(self.target) if "target" in self._needs else None,
        )


class Assembler:
    """Reads, decodes and transforms drawn samples into `Buffers`. Stateless but for open files."""

    def __init__(self, job: Job):
        self.job = job
        self._readers = [Reader(manifest, locator(manifest, job.cache)) for manifest in job.manifests]
        self._half = WorkerHalf(job.views, job.fast)
        self._wanted: list[tuple[str, ...]] = [IMAGE_FIELDS]
        if "target" in job.needs:
            self._wanted.append(LABEL_FIELDS)

    def fill(self, draws: Draws, out: Buffers, first: int = 0) -> list[Broken]:
        """Put `draws` into rows `first`, `first` + 1, ... of `out`; gives the samples that were replaced.

        Raises `DataError` for what can't be replaced.
        """
        numbers = [drawn.tolist() for drawn in self._half.numbers(draws.seed)]
        out.seeds[first : first + len(draws)] = torch.from_numpy(draws.seed)
        out.index[first : first + len(draws)] = torch.from_numpy(draws.index)
        broken: list[Broken] = []
        places = zip(draws.source.tolist(), draws.shard.tolist(), draws.sample.tolist(), strict=True)
        self._read_ahead(draws)
        for row, (source, shard, sample) in enumerate(places):
            try:
                pixels, target = self._sample(source, shard, sample)
            except SampleError as error:
                if not self.job.substitute:
                    raise
                used, pixels, target = self._substitute(source, shard, sample, int(draws.seed[row]), error)
                index = int(draws.index[row])
                out.index[first + row] = index + used - sample
                stand_in = self._readers[source].key(shard, used)
                broken.append(
                    Broken(source, index, error.shard, error.key, error.field, error.reason, stand_in)
                )
            out.target[first + row] = target
            for view, drawn in enumerate(numbers):
                self._half.apply(pixels, view, drawn[row], out.views[view][first + row])
        return broken

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _read_ahead(self, draws: Draws) -> None:
        for source, shard, sample in zip(draws.source, draws.shard, draws.sample, strict=True):
            self._readers[int(source)].will_read(int(shard), int(sample))

    def _sample(self, source: int, shard: int, sample: int) -> tuple[Pixels, int]:
        reader = self._readers[source]
        fields = reader.read(shard, sample, self._wanted)
        name, data = fields[0]
        try:
            pixels = decode(data, self.job.max_pixels)
        except DecodeError as error:
            raise self._bad(source, shard, sample, name, f"can't be decoded: {error}") from None
        if "target" not in self.job.needs:
            return pixels, 0
        name, label = fields[1]
        try:
            return pixels, self._label(source, label)
        except ValueError as error:
            raise self._bad(source, shard, sample, name, str(error)) from None

    def _label(self, source: int, text: bytes) -> int:
        shown = text[:40].decode(errors="replace").strip()
        if not shown.lstrip("-").isdecimal():
            raise ValueError(f"a label is a whole number, found {shown!r}")
        label, classes = int(shown), self.job.manifests[source].classes
        if label < 0 or (classes and label >= len(classes)):
            raise ValueError(f"label {label}, but the manifest has {len(classes)} classes")
        return label

    def _substitute(
        self, source: int, shard: int, sample: int, seed: int, error: SampleError
    ) -> tuple[int, Pixels, int]:
        """Another sample of the same shard, chosen by the broken one's seed: no other row moves."""
        count = self.job.manifests[source].shards[shard].samples
        for attempt in range(_SUBSTITUTES):
            candidate = key(seed, Purpose.SUBSTITUTE, attempt) % count
            try:
                return candidate, *self._sample(source, shard, candidate)
            except SampleError:
                continue
        raise DataError(
            f"{error.shard}: {_SUBSTITUTES} samples tried in place of {error.key!r} and none can be used "
            f"({error.reason}); fetch or pack the shard again"
        )

    def _bad(self, source: int, shard: int, sample: int, field: str, reason: str) -> SampleError:
        manifest, reader = self.job.manifests[source], self._readers[source]
        return SampleError(manifest.shards[shard].name, reader.key(shard, sample), field, reason)
