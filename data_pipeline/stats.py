"""What is in a data set, in numbers: `keel data stats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.decode import DecodeError, decode
from data_pipeline.hashing import key, permutation
from data_pipeline.manifest import Manifest
from data_pipeline.read import SampleError, label_in
from data_pipeline.visit import reading

_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class FieldStats:
    """Payload sizes of one field, in bytes."""

    samples: int
    total: int
    quantiles: tuple[int, ...]  # at 0, 5, 50, 95 and 100 %


@dataclass(frozen=True)
class Stats:
    """Counts over a whole set; pictures' sides and labels from a sample of it."""

    samples: int
    shards: int
    bytes: int
    shard_samples: tuple[int, ...]  # quantiles
    fields: dict[str, FieldStats]
    looked_at: int  # samples whose pictures were seen
    unusable: int  # samples that were opened in vain: keel data verify says what is wrong with them
    heights: tuple[int, ...]  # quantiles, pixels
    widths: tuple[int, ...]
    labels: dict[str, int]  # class name: count among the samples looked at


def stats(manifest: Manifest, *, look_at: int = 1000, seed: int = 0) -> Stats:
    """Sizes and counts from the sidecars, and a seeded sample of `look_at` pictures opened.

    Of a set behind URLs, the first pictures of as many shards as it takes, which are fetched. Raises
    `DataError`.
    """
    per_field: dict[str, list[npt.NDArray[np.int64]]] = {}
    for number in range(len(manifest.shards)):
        index = manifest.index(number)
        order = np.argsort(index.field_of, kind="stable")
        ends = np.cumsum(np.bincount(index.field_of, minlength=len(index.fields)))
        for name, sizes in zip(index.fields, np.split(index.size[order], ends[:-1]), strict=True):
            per_field.setdefault(name, []).append(sizes)
    fields = {}
    for name in sorted(per_field):
        sizes = np.concatenate(per_field[name])
        fields[name] = FieldStats(len(sizes), int(sizes.sum()), _quantiles(sizes))
    heights: list[int] = []
    widths: list[int] = []
    labels: Counter[str] = Counter()
    unusable = 0
    for height, width, label in _looked_at(manifest, look_at, seed):
        if not height:
            unusable += 1
            continue
        heights.append(height)
        widths.append(width)
        labels.update([] if label is None else [label])
    return Stats(
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=manifest.bytes,
        shard_samples=_quantiles(manifest.sizes),
        fields=fields,
        looked_at=len(heights),
        unusable=unusable,
        heights=_quantiles(np.array(heights)),
        widths=_quantiles(np.array(widths)),
        labels=dict(sorted(labels.items())),
    )


def label_name(payload: bytes, manifest: Manifest) -> str:
    """What a label field says, by its class's name where it has one."""
    try:
        return manifest.classes[label_in(payload)]
    except (ValueError, IndexError):
        return payload[:40].decode(errors="replace").strip()


def _looked_at(manifest: Manifest, count: int, seed: int) -> Iterator[tuple[int, int, str | None]]:
    """Height, width and label of chosen samples; a height of 0 where one can't be used."""
    wanted = [manifest.pictures, manifest.labels] if manifest.labelled else [manifest.pictures]
    for shard, samples in _chosen(manifest, count, seed):
        with reading(manifest, shard) as reader:
            for sample in samples:
                try:
                    (_, data), *rest = reader.read(shard, sample, wanted)
                    height, width = decode(data).shape[:2]
                except (SampleError, DecodeError):
                    yield 0, 0, None
                    continue
                yield height, width, label_name(rest[0][1], manifest) if rest else None


def _chosen(manifest: Manifest, count: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Shards, and the numbers of their samples to look at."""
    if any(shard.remote for shard in manifest.shards):
        for shard in permutation(key(seed, 31), len(manifest.shards)).tolist():
            samples = min(count, manifest.shards[shard].samples)
            if samples:
                yield shard, list(range(samples))
            count -= samples
        return
    if manifest.samples <= 1_000_000:
        numbers = np.sort(permutation(key(seed, 31), manifest.samples)[:count])
    else:
        numbers = np.unique(np.random.Generator(np.random.Philox(seed)).integers(0, manifest.samples, count))
    ends = np.cumsum(manifest.sizes)
    shards = np.searchsorted(ends, numbers, side="right")
    for shard in np.unique(shards).tolist():
        yield shard, (numbers[shards == shard] - (ends[shard] - manifest.sizes[shard])).tolist()


def _quantiles(values: npt.NDArray[np.int64]) -> tuple[int, ...]:
    if not len(values):
        return ()
    return tuple(int(q) for q in np.quantile(values, _QUANTILES, method="nearest"))
