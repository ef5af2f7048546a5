"""Small data sets for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.indexing import add_shard
from data_pipeline.manifest import Manifest, all_fields
from data_pipeline.shards import write_shard


def photograph(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(H, W, 3) with the spectrum of photographs: smooth large structures, edges, a little noise."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3))
    for cells in (3, 9, 40):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / cells**0.5
    layers[:, width // 3 :] += 30  # an edge
    layers = (layers - layers.min()) / np.ptp(layers) * 255 + rng.normal(0, 2, layers.shape)
    return np.clip(layers, 0, 255).astype(np.uint8)


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def sample(number: int, side: int = 12) -> dict[str, bytes]:
    """A picture whose colour tells its number, with a label."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number % 256, number // 256
    return {"png": encoded(pixels), "cls": str(number % 10).encode()}


def numbers_in(view: npt.NDArray[np.uint8]) -> list[int]:
    """The sample numbers that pictures of `sample` show; (B, 3, H, W)."""
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in view]


def write_set(
    directory: Path, shards: Sequence[Sequence[Mapping[str, bytes]]], classes: Sequence[str] = ()
) -> Manifest:
    """A manifest over shards of given samples; keys count through the set."""
    made, number = [], 0
    for shard, samples in enumerate(shards):
        path = directory / f"shard-{shard:06d}.tar"
        write_shard(path, [(f"{number + row:06d}", fields) for row, fields in enumerate(samples)])
        number += len(samples)
        made.append(add_shard(directory, path, path.name))
    fields = all_fields(one.fields for one in made)
    Manifest(directory, tuple(one.shard for one in made), fields, tuple(classes)).save()
    return Manifest.load(directory)


def numbered_set(directory: Path, sizes: Sequence[int]) -> Manifest:
    """`sizes[i]` pictures in shard i; every picture shows its index."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = [
        [sample(int(start) + row) for row in range(size)] for start, size in zip(starts, sizes, strict=False)
    ]
    return write_set(directory, shards, [str(label) for label in range(10)])
