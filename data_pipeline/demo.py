"""Demo data that needs no network: `digits` (real, scikit-learn's) and `shapes` (procedural, captioned)."""

from __future__ import annotations

import io
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import PositiveInt

from configs.errors import DataError
from configs.loading import Config
from data_pipeline.hashing import key, permutation
from data_pipeline.indexing import Indexed, add_shard
from data_pipeline.manifest import Manifest, all_fields
from data_pipeline.parallel import Progress
from data_pipeline.shapes import DIFFICULTIES, SHAPES, draw
from data_pipeline.shards import write_shard

Sample = tuple[str, Mapping[str, bytes]]
Split = Literal["train", "val"]
_VERSION = 1  # of the pictures: raise it when a change makes other bytes from the same settings
_PER_SHARD = 2000
_DRAWN_AT_A_TIME = 500


class DemoConfig(Config):
    """Demo data, made at the manifest's place when missing."""

    name: Literal["digits", "shapes"]
    size: PositiveInt = 32  # side of the square pictures, pixels
    seed: int = 0
    samples: PositiveInt = 24_000  # shapes: training pictures
    val_samples: PositiveInt = 2_000  # shapes: validation pictures
    difficulty: Literal["v3", "easy"] = "v3"  # shapes


def make(config: DemoConfig, directory: Path, progress: Progress | None = None) -> None:
    """Write DIRECTORY/train and DIRECTORY/val, each with shards and a manifest.json.

    A whole set with the same settings is kept; one with other settings, or something else there, is refused.
    Only a whole split ever appears under its name. Raises `DataError`.
    """
    splits = {split: directory / split for split in ("train", "val")}
    missing = [split for split, folder in splits.items() if not _is_made(config, folder)]
    counts = {"train": 0, "val": 0}
    for split in missing:
        samples, count = _samples(config, split)
        counts[split] = count

        def told(done: int, split: str = split, count: int = count) -> None:
            if progress:
                progress(done, count)

        _write(config, splits[split], samples, told)


def _is_made(config: DemoConfig, folder: Path) -> bool:
    if not (folder / "manifest.json").exists():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder}: holds other files and no manifest.json; name another folder")
        return False
    made = Manifest.load(folder).about
    if made != _about(config):
        raise DataError(
            f"{folder}: holds demo data with other settings ({_told(made)}), asked for "
            f"{_told(_about(config))}; remove it or name another folder"
        )
    return True


def _about(config: DemoConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    if config.name == "digits":
        settings = {name: settings[name] for name in ("name", "size", "seed")}
    return {"demo": settings, "version": _VERSION}


def _told(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in dict(about.get("demo", about)).items()) or "none"


def _write(
    config: DemoConfig, folder: Path, samples: Iterator[Sample], progress: Callable[[int], None]
) -> None:
    building = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    classes = tuple(str(digit) for digit in range(10)) if config.name == "digits" else SHAPES
    try:
        made, done = list[Indexed](), 0
        for number, part in enumerate(_chunks(samples, _PER_SHARD)):
            path = building / f"shard-{number:06d}.tar"
            done += write_shard(path, part)
            made.append(add_shard(building, path, path.name))
            progress(done)
        shards, fields = tuple(one.shard for one in made), all_fields(one.fields for one in made)
        Manifest(building, shards, fields, classes, _about(config)).save()
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()
        building.rename(folder)
    except OSError:
        # Another process may have made the same set in the meantime: then ours isn't needed.
        if not _is_made(config, folder):
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _chunks(samples: Iterator[Sample], size: int) -> Iterable[list[Sample]]:
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _samples(config: DemoConfig, split: str) -> tuple[Iterator[Sample], int]:
    if config.name == "digits":
        images, labels, names = _digits(config, split)
        return _digit_samples(config, images, labels, names), len(labels)
    count = config.samples if split == "train" else config.val_samples
    return _shape_samples(config, split, count), count


def _digits(
    config: DemoConfig, split: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images (n, 8, 8) uint8, labels and original numbers of one split: a fifth of each class for val."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    chosen: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        members = members[permutation(key(config.seed, 11, label), len(members))]
        cut = round(len(members) / 5)
        chosen += (members[:cut] if split == "val" else members[cut:]).tolist()
    order = np.array(sorted(chosen), np.int64)
    return images[order], labels[order], order


def _digit_samples(
    config: DemoConfig,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
) -> Iterator[Sample]:
    side = (config.size, config.size)
    for image, label, number in zip(images, labels, numbers, strict=True):
        larger = Image.fromarray(image).resize(side, Image.Resampling.BICUBIC).convert("RGB")
        yield f"{int(number):06d}", {"png": png(larger), "cls": str(int(label)).encode()}


def _shape_samples(config: DemoConfig, split: str, count: int) -> Iterator[Sample]:
    """Drawn in batches with a seed each, so that a longer set starts with the shorter one's pictures."""
    difficulty = DIFFICULTIES[config.difficulty]
    for start in range(0, count, _DRAWN_AT_A_TIME):
        seed = key(config.seed, 12 if split == "train" else 13, start) >> 1
        drawn = draw(_DRAWN_AT_A_TIME, config.size, seed, difficulty)
        for row in range(min(_DRAWN_AT_A_TIME, count - start)):
            picture = Image.fromarray(drawn.images[row].permute(1, 2, 0).contiguous().numpy())
            fields = {
                "png": png(picture),
                "cls": str(int(drawn.labels[row])).encode(),
                "txt": drawn.captions[row].encode(),
            }
            yield f"{start + row:08d}", fields


def png(image: Image.Image) -> bytes:
    """Lossless, with Pillow's default effort."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
