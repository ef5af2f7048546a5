"""Stream mode: unindexed tars, `pipe:` commands included, read as webdataset reads them.

A weaker guarantee, for data that can't be indexed: which samples make up a batch depends on the number of
ranks; resuming starts the stream anew instead of going on; ranks see different shards, unevenly when the
counts don't divide; damage that ends a tar early goes unnoticed. What still holds: pixels follow from each
sample's seed, and broken pictures are named. Index the shards (keel data index) for the exact order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from configs.errors import ConfigError, DataError
from configs.loading import Config
from data_pipeline.assemble import Buffers, Job
from data_pipeline.decode import DecodeError, decode
from data_pipeline.hashing import sample_seed
from data_pipeline.indexing import expanded
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS
from data_pipeline.shards import read_stream
from data_pipeline.transform import WorkerHalf
from data_pipeline.types import Batch, ViewSpec


class StreamConfig(Config):
    """Tars to stream. `samples` is what an epoch is taken to be; nothing checks it."""

    shards: tuple[str, ...]  # paths, URLs, braces, or `pipe:` commands
    samples: PositiveInt
    shuffle: NonNegativeInt = 1000  # samples kept to draw from
    allow_shell: bool = False


def stream(
    config: StreamConfig,
    views: Sequence[ViewSpec],
    *,
    needs: frozenset[str],
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's batches for ever, uint8 views, read in this process. Raises `UserError` in a line.

    `Batch.index` counts the samples this rank has read: streamed samples have no number of their own.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"train.batch_size: found {batch_size}; it has to be a multiple of {world_size} ranks"
        )
    rows = batch_size // world_size
    named = [url for url in config.shards if not url.startswith("pipe:")]
    urls = [*(expanded(named) if named else []), *(url for url in config.shards if url.startswith("pipe:"))]
    samples = read_stream(
        urls,
        shuffle=config.shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        allow_shell=config.allow_shell,
    )
    job, half, count = Job((), tuple(views), needs), WorkerHalf(views), 0
    while True:
        out = Buffers(job, rows)
        index = np.arange(count, count + rows, dtype=np.int64)
        seeds = sample_seed(seed, 0, rank, index)
        numbers = [drawn.tolist() for drawn in half.numbers(seeds)]
        for row in range(rows):
            key, fields = next(samples)
            pixels = _picture(key, fields)
            for view, drawn in enumerate(numbers):
                half.apply(pixels, view, drawn[row], out.views[view][row])
            out.target[row] = _label(key, fields) if "target" in needs else 0
            out.index[row], out.seeds[row] = int(index[row]), int(seeds[row])
        count += rows
        yield out.batch()


def _picture(key: str, fields: Mapping[str, bytes]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    name = next((name for name in IMAGE_FIELDS if name in fields), None)
    if name is None:
        raise DataError(f"sample {key!r}: no picture; its fields are {', '.join(sorted(fields))}")
    try:
        return decode(fields[name])
    except DecodeError as error:
        raise DataError(f"sample {key!r}: field {name}: can't be decoded: {error}") from None


def _label(key: str, fields: Mapping[str, bytes]) -> int:
    text = fields.get(LABEL_FIELDS[0], b"")[:40].decode(errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"sample {key!r}: field {LABEL_FIELDS[0]}: a label is a whole number, found {text!r}")
    return int(text)
