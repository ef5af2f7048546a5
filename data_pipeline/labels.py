"""Which class every sample of a set has, without reading its shards.

The sidecars hold a checksum of every field. Samples of one class have one payload, so that the class is known
by the checksum of its number; only payloads that are written in another way are read, once each. The same way
`doubt_labels` looks for labels that can't be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from configs.errors import DataError
from data_pipeline.account import BAD_LABEL, NO_LABEL, Account
from data_pipeline.hashing import Int64s
from data_pipeline.index import Index
from data_pipeline.manifest import Manifest
from data_pipeline.members import shown
from data_pipeline.read import Reader, label_in

_USUAL = 22_000
"""Numbers whose checksums are known beforehand, beyond those of the named classes: ImageNet has 21,841."""

_LOOKED_AT = 1000
"""Payloads in other spellings that `doubt_labels` reads; `keel data verify` reads all."""


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


def doubt_labels(manifest: Manifest, account: Account) -> None:
    """Enter into `account` the samples of shards on this machine whose label training would refuse.

    Samples without a label count where others have one, or classes are named.
    """
    if not manifest.labelled and not manifest.classes:
        return
    known = _known(len(manifest.classes) or _USUAL)
    reader, faults = Reader(manifest), dict[int, str]()  # by checksum; empty where nothing is wrong
    try:
        for number, shard in enumerate(manifest.shards):
            index = manifest.index(number)
            checksums, labelled = _checksums_of(index, manifest.labels)
            without = np.flatnonzero(~labelled)
            account.doubt(NO_LABEL, [shown(index.key(n)) for n in without[:3].tolist()], len(without))
            distinct, first, counts = np.unique(checksums, return_index=True, return_counts=True)
            for checksum, sample, count in zip(
                *map(np.ndarray.tolist, (distinct, first, counts)), strict=True
            ):
                if checksum in known or not labelled[sample]:
                    continue
                if checksum not in faults and len(faults) < _LOOKED_AT and not shard.remote:
                    faults[checksum] = _fault(reader, number, sample)
                if fault := faults.get(checksum):
                    account.doubt(BAD_LABEL, [f"{shown(index.key(sample))}: {fault}"], count)
    except DataError:
        return  # it went or changed while it was looked at; whoever reads it says so
    finally:
        reader.close()


def _fault(reader: Reader, shard: int, sample: int) -> str:
    [(_, payload)] = reader.read(shard, sample, [reader.manifest.labels])
    try:
        label, classes = label_in(payload), len(reader.manifest.classes)
    except ValueError as error:
        return str(error)
    return f"{label} isn't a class of the {classes} there are" if classes and label >= classes else ""


def _checksums_of(index: Index, names: Sequence[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Of every sample's label field, and whether it has one: (N,) each. The first of `names` it has wins."""
    checksums, labelled = np.zeros(len(index), np.uint64), np.zeros(len(index), bool)
    for name in reversed([name for name in names if name in index.fields]):
        members = np.flatnonzero(index.field_of == index.fields.index(name))
        checksums[index.sample_of[members]] = index.checksum[members]
        labelled[index.sample_of[members]] = True
    return checksums, labelled


def _checksums(manifest: Manifest) -> npt.NDArray[np.uint64]:
    """Of every sample's label field: (N,)."""
    parts = []
    for number in range(len(manifest.shards)):
        index = manifest.index(number)
        checksums, labelled = _checksums_of(index, manifest.labels)
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
