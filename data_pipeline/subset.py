"""A few samples of a set as a small set of its own: what few-shot learning trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.indexing import add_shard
from data_pipeline.manifest import Manifest
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, Reader
from data_pipeline.shards import write_shard


def write_subset(manifest: Manifest, chosen: Sequence[int], to: Path) -> Manifest:
    """Copy the `chosen` samples (numbers in the manifest's order), images and labels, into one shard in `to`.

    `to` is made where missing. Raises `DataError` where a sample can't be read.
    """
    to.mkdir(parents=True, exist_ok=True)
    path = to / "shard-000000.tar"
    write_shard(path, _samples(manifest, chosen))
    made = add_shard(to, path, path.name)
    about = {"subset": manifest.hash, "samples": len(chosen)}
    subset = Manifest(to, (made.shard,), tuple(made.fields), manifest.classes, about)
    subset.save()
    return subset


def _samples(manifest: Manifest, chosen: Sequence[int]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    ends = np.cumsum(manifest.sizes)
    reader = Reader(manifest)
    try:
        for number, index in enumerate(chosen):
            shard = int(np.searchsorted(ends, index, side="right"))
            sample = int(index - (ends[shard] - manifest.sizes[shard]))
            (name, picture), (_, label) = reader.read(shard, sample, [manifest.pictures, manifest.labels])
            # under the usual names: the subset's manifest chooses no others
            ending = name.rpartition(".")[2]
            ending = ending if ending in IMAGE_FIELDS else IMAGE_FIELDS[0]
            yield f"{number:08d}", {ending: picture, LABEL_FIELDS[0]: label}
    finally:
        reader.close()
