"""Stream mode (`data.stream`): unindexed tars, `pipe:` commands included, read as webdataset reads them.

A weaker guarantee, for data that can't be indexed: which samples make up a batch depends on the number of
ranks; a resumed run starts its stream anew, in another order, instead of going on, so that samples come
again before others have come once; ranks see different shards, unevenly when the counts don't divide; damage
that ends a tar early goes unnoticed; samples are read in the training process. What still holds: pixels and
the choice of a caption follow from each sample's seed, and broken samples are named and counted. Index the
shards (keel data index) for the exact order.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from types import TracebackType

import numpy as np
import torch
from braceexpand import braceexpand
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from pydantic_core.core_schema import ValidationInfo
from xxhash import xxh3_64_intdigest

from configs.errors import ConfigError
from configs.loading import Config
from data_pipeline import hashing
from data_pipeline.assemble import Buffers, Job, Sample
from data_pipeline.captions import drawn, places, texts
from data_pipeline.decode import DecodeError, decode
from data_pipeline.patterns import expanded
from data_pipeline.quarantine import Broken, Quarantine
from data_pipeline.randomness import Purpose, sample_seed
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, SampleError, label_in
from data_pipeline.shards import read_stream
from data_pipeline.transform import WorkerHalf
from data_pipeline.types import Batch

log = logging.getLogger(__name__)

_URLS = 42  # what a permutation is for: part of the hash


class StreamConfig(Config):
    """Tars to stream, in place of `data.manifest`. `samples` is what an epoch is taken to be, unchecked."""

    allow_shell: bool = False  # permits `pipe:` commands
    shards: tuple[str, ...] = Field(min_length=1)  # paths, URLs, braces, or `pipe:` commands
    samples: PositiveInt
    shuffle: NonNegativeInt = 1000  # samples kept to draw from

    @field_validator("shards")
    @classmethod
    def _permitted(cls, shards: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        commands = [name for name in shards if name.startswith("pipe:")]
        if commands and not info.data.get("allow_shell"):
            raise ValueError(f"{commands[0]!r} runs a shell command; set allow_shell: true to permit it")
        return shards

    @property
    def hash(self) -> str:
        """Identity of what is streamed: by name, for the content is unknown."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def urls(self) -> list[str]:
        """Every shard, patterns expanded. Raises `DataError` where a pattern matches nothing."""
        named = [name for name in self.shards if not name.startswith("pipe:")]
        commands = [one for name in self.shards if name.startswith("pipe:") for one in braceexpand(name)]
        return [*(expanded(named) if named else []), *commands]

    def require_ranks(self, world_size: int) -> None:
        """Refuse fewer shards than ranks. Raises `ConfigError`."""
        found = len(self.urls())
        if found < world_size:
            raise ConfigError(
                f"data.stream.shards: {found} shards for {world_size} ranks, and every rank needs at least "
                "one; use fewer ranks, or index the shards (keel data index)"
            )


class StreamLoader:
    """Iterates for ever over this rank's `Batch`es of a stream, uint8 CPU views, read in this process.

    `Batch.index` counts samples: streamed ones have no number of their own.
    """

    def __init__(
        self,
        config: StreamConfig,
        job: Job,
        names: tuple[str, ...],
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        position: int,
        quarantine: Quarantine,
    ):
        """`job` without manifests; `names`: where captions are (`data.captions`)."""
        config.require_ranks(world_size)
        if position and rank == 0:
            log.warning(
                "data.stream: starts anew at sample %d: samples seen before may come again before others "
                "have come at all (stream mode can't go on where it was)",
                position,
            )
        self.samples, self.position = config.samples, position
        self._job, self._names, self._quarantine = job, names, quarantine
        self._seed, self._batch_size, self._rank = seed, batch_size, rank
        self._rows, self._seen = batch_size // world_size, 0
        self._half = WorkerHalf(job.views, job.fast)
        urls = config.urls()
        order = hashing.key(seed, _URLS, position)  # a resumed run shouldn't see the same beginning again
        self._source = read_stream(
            [urls[number] for number in hashing.permutation(order, len(urls)).tolist()][rank::world_size],
            shuffle=config.shuffle,
            seed=order,
            allow_shell=config.allow_shell,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.position + self._rank * self._rows
        index = np.arange(first, first + self._rows, dtype=np.int64)
        seeds = sample_seed(self._seed, 0, 0, index)
        numbers = [number.tolist() for number in self._half.numbers(seeds)]
        chances = hashing.uniform(seeds, Purpose.CAPTION, 1)[:, 0].tolist()
        out = Buffers(self._job, self._rows)
        out.seeds.copy_(torch.from_numpy(seeds))
        out.index.copy_(torch.from_numpy(index))
        for row in range(self._rows):
            made = self._next(chances[row])
            out.target[row] = made.target
            if made.tokens is not None:
                out.tokens[row] = torch.from_numpy(made.tokens)
            for view, number in enumerate(numbers):
                self._half.apply(made.pixels, view, number[row], out.views[view][row])
        self.position += self._batch_size
        return out.batch()

    def close(self) -> None:
        """Close what is open."""
        self._source.close()

    def worker_pids(self) -> list[int]:
        return []

    def metrics(self) -> dict[str, float]:
        """As the exact loader's, with the one stream as source 0."""
        return {
            "source_0_samples": self.position,
            "source_0_epochs": self.position / self.samples,
            "broken_samples": self._quarantine.count,
            "worker_restarts": 0,
        }

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, chance: float) -> Sample:
        """The next sample that can be used."""
        while True:
            shard, key, fields = next(self._source)
            self._seen += 1
            try:
                return self._made(shard, key, fields, chance)
            except SampleError as error:
                if not self._job.substitute:
                    raise
                number = xxh3_64_intdigest(f"{shard}\0{key}".encode()) >> 1
                named = (error.shard, error.key, error.field, error.reason)
                self._quarantine.add([Broken(0, number, *named, "the next one")], self._seen)

    def _made(self, shard: str, key: str, fields: Mapping[str, bytes], chance: float) -> Sample:
        name = next((name for name in IMAGE_FIELDS if name in fields), None)
        if name is None:
            has = ", ".join(sorted(fields))
            raise SampleError(shard, key, "/".join(IMAGE_FIELDS), f"missing; the sample has {has}")
        try:
            pixels, target, tokens = decode(fields[name], self._job.max_pixels), 0, None
            if "target" in self._job.needs:
                name = LABEL_FIELDS[0]
                target = label_in(fields.get(name, b""))
            if self._job.text is not None:
                name = "/".join(self._names)
                leading = places(self._names, tuple(fields))
                found = [text for place in leading for text in texts(place, fields[place.field])]
                tokens = self._job.text.tokenizer.encode(drawn(found, chance))
        except DecodeError as error:
            raise SampleError(shard, key, name, f"can't be decoded: {error}") from None
        except ValueError as error:
            raise SampleError(shard, key, name, str(error)) from None
        return Sample(pixels, target, tokens)
