"""Which class every sample of a set has, without reading its shards.

The sidecars hold a checksum of every field. Samples of one class have one payload, so that the class is known
by the checksum of its number; only payloads that are written in another way are read, once each.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from configs.errors import DataError
from data_pipeline.hashing import Int64s
from data_pipeline.manifest import Manifest
from data_pipeline.read import Reader, label_in

_USUAL = 22_000
"""Numbers whose checksums are known beforehand, beyond those of the named classes: ImageNet has 21,841."""


def labels_of(manifest: Manifest) -> Int64s | None:
    """(N,) in the manifest's own order; None where only a remote shard could tell.

    Raises `DataError` where a sample has no label or one that is no number.
    """
    return _labels(manifest.path, manifest.hash)


@lru_cache(maxsize=8)
def _labels(path: Path, identity: str) -> Int64s | None:
    manifest = Manifest.load(path)
    ends = np.cumsum(manifest.sizes)
    distinct, where, inverse = np.unique(_checksums(manifest), return_index=True, return_inverse=True)
    known = _known(max(_USUAL, len(manifest.classes)))
    numbers = np.empty(len(distinct), np.int64)
    reader = Reader(manifest)
    try:
        for place, checksum in enumerate(distinct.tolist()):
            label = known.get(checksum)
            if label is None:
                shard = int(np.searchsorted(ends, where[place], side="right"))
                if manifest.shards[shard].remote:
                    return None
                label = _read(reader, shard, int(where[place] - (ends[shard] - manifest.sizes[shard])))
            numbers[place] = label
    finally:
        reader.close()
    found: Int64s = numbers[inverse]
    found.flags.writeable = False  # it is shared
    return found


def _checksums(manifest: Manifest) -> npt.NDArray[np.uint64]:
    """Of every sample's label field: (N,)."""
    parts = []
    for number in range(len(manifest.shards)):
        index = manifest.index(number)
        checksums, labelled = np.zeros(len(index), np.uint64), np.zeros(len(index), bool)
        for name in reversed([name for name in manifest.labels if name in index.fields]):
            members = np.flatnonzero(index.field_of == index.fields.index(name))
            checksums[index.sample_of[members]] = index.checksum[members]  # the first field a sample has wins
            labelled[index.sample_of[members]] = True
        if not labelled.all():
            raise DataError(
                f"{manifest.path}: {manifest.shards[number].name}: sample "
                f"{index.key(int(labelled.argmin()))!r} has no label (field {manifest.labels[0]}); label all "
                "samples, or judge by what needs no labels"
            )
        parts.append(checksums)
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _known(count: int) -> dict[int, int]:
    """Checksum of the usual spelling -> number."""
    return {xxh3_64_intdigest(str(number).encode()): number for number in range(count)}


def _read(reader: Reader, shard: int, sample: int) -> int:
    [(field, payload)] = reader.read(shard, sample, [reader.manifest.labels])
    try:
        return label_in(payload)
    except ValueError as error:
        raise DataError(
            f"{reader.manifest.path}: {reader.manifest.shards[shard].name}: sample "
            f"{reader.key(shard, sample)!r}: field {field}: {error}"
        ) from None
