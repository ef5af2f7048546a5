"""From drawn samples to the rows of one uint8 batch buffer: a worker's whole job, without processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.errors import DataError
from data_pipeline.cache import CacheConfig, locator
from data_pipeline.captions import TextJob, drawn, texts
from data_pipeline.decode import MAX_PIXELS, DecodeError, Pixels, decode
from data_pipeline.hashing import Int64s, key, uniform
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Draws
from data_pipeline.quarantine import Broken
from data_pipeline.randomness import Purpose
from data_pipeline.read import Reader, SampleError, label_in
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
    text: TextJob | None = None  # where `needs` has tokens

    @property
    def context(self) -> int:
        """Tokens of each sample."""
        return self.text.tokenizer.context if self.text else 0


@dataclass(frozen=True)
class Sample:
    """One sample, decoded."""

    pixels: Pixels
    target: int = 0
    tokens: Int64s | None = None  # (context,)


class Buffers:
    """The arrays of one batch over a flat piece of memory, shared or not."""

    def __init__(self, job: Job, rows: int, memory: Tensor | None = None):
        """`memory`: (size(job, rows),) uint8, or None for a fresh one."""
        if memory is None:
            memory = torch.empty(self.size(job, rows), dtype=torch.uint8)
        self.seeds, self.index, self.target = memory[: 24 * rows].view(torch.int64).view(3, rows)
        at = 24 * rows
        self.tokens = memory[at : at + 4 * rows * job.context].view(torch.int32).view(rows, job.context)
        at, views = at + 4 * rows * job.context, []
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
        return rows * (24 + 4 * job.context + sum(3 * view.size[0] * view.size[1] for view in job.views))

    def batch(self) -> Batch:
        """The rows as a batch that shares this memory, but for the tokens."""
        target = self.target if "target" in self._needs else None
        tokens = self.tokens.long() if "tokens" in self._needs else None
        return Batch(views=self.views, seeds=self.seeds, index=self.index, target=target, tokens=tokens)

    def copied(self, rows: int, pin: bool) -> Batch:
        """The first `rows` rows as a batch of its own memory, page-locked where `pin`."""

        def copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            part = tensor[:rows]
            return torch.empty(part.shape, dtype=dtype or part.dtype, pin_memory=pin).copy_(part)

        return Batch(
            views=tuple(copy(view) for view in self.views),
            seeds=copy(self.seeds),
            index=copy(self.index),
            target=copy(self.target) if "target" in self._needs else None,
            tokens=copy(self.tokens, torch.int64) if "tokens" in self._needs else None,
        )


class Assembler:
    """Reads, decodes and transforms drawn samples into `Buffers`. Stateless but for open files."""

    def __init__(self, job: Job):
        self.job = job
        self._readers = [Reader(manifest, locator(manifest, job.cache)) for manifest in job.manifests]
        self._half = WorkerHalf(job.views, job.fast)
        labels = "target" in job.needs
        self._wanted = [  # of each source
            [manifest.pictures, manifest.labels] if labels else [manifest.pictures]
            for manifest in job.manifests
        ]

    def fill(self, draws: Draws, out: Buffers, first: int = 0) -> list[Broken]:
        """Put `draws` into rows `first`, `first` + 1, ... of `out`; gives the samples that were replaced.

        Raises `DataError` for what can't be replaced.
        """
        numbers = [number.tolist() for number in self._half.numbers(draws.seed)]
        out.seeds[first : first + len(draws)] = torch.from_numpy(draws.seed)
        out.index[first : first + len(draws)] = torch.from_numpy(draws.index)
        broken: list[Broken] = []
        places = zip(draws.source.tolist(), draws.shard.tolist(), draws.sample.tolist(), strict=True)
        chances = uniform(draws.seed, Purpose.CAPTION, 1)[:, 0].tolist()
        self._read_ahead(draws)
        for row, (source, shard, sample) in enumerate(places):
            try:
                made = self._sample(source, shard, sample, chances[row])
            except SampleError as error:
                if not self.job.substitute:
                    raise
                used, made = self._substitute(draws, row, error, chances[row])
                index = int(draws.index[row])
                out.index[first + row] = index + used - sample
                stand_in = self._readers[source].key(shard, used)
                broken.append(
                    Broken(source, index, error.shard, error.key, error.field, error.reason, stand_in)
                )
            out.target[first + row] = made.target
            if made.tokens is not None:
                out.tokens[first + row] = torch.from_numpy(made.tokens)
            for view, number in enumerate(numbers):
                self._half.apply(made.pixels, view, number[row], out.views[view][first + row])
        return broken

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _read_ahead(self, draws: Draws) -> None:
        for source, shard, sample in zip(draws.source, draws.shard, draws.sample, strict=True):
            self._readers[int(source)].will_read(int(shard), int(sample))

    def _sample(self, source: int, shard: int, sample: int, chance: float) -> Sample:
        reader, text = self._readers[source], self.job.text
        also = text.fields(source) if text else ()
        (name, data), *rest = reader.read(shard, sample, self._wanted[source], also)
        try:
            pixels = decode(data, self.job.max_pixels)
        except DecodeError as error:
            raise self._bad(source, shard, sample, name, f"can't be decoded: {error}") from None
        target, tokens = 0, None
        try:
            if "target" in self.job.needs:
                (name, label), *rest = rest
                target = self._label(source, label)
            if text is not None:
                name = "/".join(also)
                tokens = text.tokenizer.encode(self._caption(text, source, dict(rest), chance))
        except ValueError as error:
            raise self._bad(source, shard, sample, name, str(error)) from None
        return Sample(pixels, target, tokens)

    def _caption(self, text: TextJob, source: int, payloads: dict[str, bytes], chance: float) -> str:
        found: list[str] = []
        for place in text.places[source]:
            if place.field in payloads:
                found += texts(place, payloads[place.field])
        return drawn(found, chance)

    def _label(self, source: int, payload: bytes) -> int:
        label, classes = label_in(payload), self.job.manifests[source].classes
        if classes and label >= len(classes):
            raise ValueError(f"label {label}, but the manifest has {len(classes)} classes")
        return label

    def _substitute(self, draws: Draws, row: int, error: SampleError, chance: float) -> tuple[int, Sample]:
        """Another sample of the same shard, chosen by the broken one's seed: no other row moves."""
        source, shard, seed = int(draws.source[row]), int(draws.shard[row]), int(draws.seed[row])
        count = self.job.manifests[source].shards[shard].samples
        for attempt in range(_SUBSTITUTES):
            candidate = key(seed, Purpose.SUBSTITUTE, attempt) % count
            try:
                return candidate, self._sample(source, shard, candidate, chance)
            except SampleError:
                continue
        missing = error.reason.startswith("missing")  # a field that they all lack has another name
        raise DataError(
            f"{error.shard}: {_SUBSTITUTES} samples tried in place of {error.key!r} and none can be used "
            f"({error.field}: {error.reason}); "
            + (
                "choose the fields with keel data index --picture-field and --label-field"
                if missing
                else "fetch or pack the shard again"
            )
        )

    def _bad(self, source: int, shard: int, sample: int, field: str, reason: str) -> SampleError:
        manifest, reader = self.job.manifests[source], self._readers[source]
        return SampleError(manifest.shards[shard].name, reader.key(shard, sample), field, reason)
