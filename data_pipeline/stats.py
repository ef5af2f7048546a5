"""What is in a data set, in numbers: `keel data stats`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.decode import DecodeError, decode
from data_pipeline.hashing import key, permutation
from data_pipeline.manifest import Manifest
from data_pipeline.read import Reader, SampleError

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
    looked_at: int  # samples that were opened
    heights: tuple[int, ...]  # quantiles, pixels
    widths: tuple[int, ...]
    labels: dict[str, int]  # class name: count among the samples looked at


def stats(manifest: Manifest, *, look_at: int = 1000, seed: int = 0) -> Stats:
    """Sizes and counts from the sidecars, and a seeded sample of `look_at` pictures opened."""
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
    chosen = np.sort(_chosen(manifest.samples, look_at, seed))
    heights, widths, labels = _looked_at(manifest, chosen)
    return Stats(
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=manifest.bytes,
        shard_samples=_quantiles(manifest.sizes),
        fields=fields,
        looked_at=len(heights),
        heights=_quantiles(np.array(heights)),
        widths=_quantiles(np.array(widths)),
        labels=dict(sorted(labels.items())),
    )


def _chosen(samples: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    if samples <= 1_000_000:
        return permutation(key(seed, 31), samples)[:count]
    return np.unique(np.random.Generator(np.random.Philox(seed)).integers(0, samples, count))


def _looked_at(
    manifest: Manifest, chosen: npt.NDArray[np.int64]
) -> tuple[list[int], list[int], Counter[str]]:
    reader, ends = Reader(manifest), np.cumsum(manifest.sizes)
    heights: list[int] = []
    widths: list[int] = []
    labels: Counter[str] = Counter()
    wanted = [manifest.pictures, manifest.labels] if manifest.labelled else [manifest.pictures]
    for index in chosen.tolist():
        shard = int(np.searchsorted(ends, index, side="right"))
        try:
            (_, data), *rest = reader.read(shard, index - int(ends[shard] - manifest.sizes[shard]), wanted)
            height, width = decode(data).shape[:2]
        except (SampleError, DecodeError):
            continue
        heights.append(height)
        widths.append(width)
        for _, text in rest:
            label = text.decode(errors="replace").strip()
            known = label.isdecimal() and int(label) < len(manifest.classes)
            labels[manifest.classes[int(label)] if known else label] += 1
    reader.close()
    return heights, widths, labels


def _quantiles(values: npt.NDArray[np.int64]) -> tuple[int, ...]:
    if not len(values):
        return ()
    return tuple(int(q) for q in np.quantile(values, _QUANTILES, method="nearest"))
