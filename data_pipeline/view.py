"""A contact sheet: samples as they lie in the shards, and as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.augment import denormalised, device_half
from data_pipeline.config import DataConfig
from data_pipeline.decode import Pixels, decode
from data_pipeline.files import published
from data_pipeline.load import build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.read import IMAGE_FIELDS, LABEL_FIELDS, Reader
from data_pipeline.types import ViewSpec

_GAP = 4
_TEXT = 12


def contact_sheet(
    config: DataConfig,
    views: Sequence[ViewSpec],
    out: Path,
    *,
    seed: int = 0,
    position: int = 0,
    count: int = 16,
    cell: int = 128,
) -> None:
    """Write a PNG with one row a sample: the raw picture, then every view after both halves.

    The samples are those from `position` on of a run with this seed, with exactly its pixels. Raises
    `DataError`.
    """
    manifest = Manifest.load(config.first_manifest)
    one_process = config.model_copy(update={"workers": 0})
    with build_loader(
        one_process, views, needs=frozenset({"views", "index"}), seed=seed, batch_size=count,
        rank=0, world_size=1, position=position,
    ) as loader:  # fmt: skip
        batch = device_half(views)(next(loader))
    shown = [
        (denormalised(images, view) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for images, view in zip(batch.views, views, strict=True)
    ]
    width = (1 + len(views)) * (cell + _GAP) + _GAP
    sheet = Image.new("RGB", (width, count * (cell + _TEXT + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    reader = Reader(manifest)
    ends = np.cumsum(manifest.sizes)
    for row, index in enumerate(batch.index.tolist()):
        top = _GAP + row * (cell + _TEXT + _GAP)
        shard = int(np.searchsorted(ends, index, side="right"))
        raw, caption = _raw(reader, shard, index - int(ends[shard] - manifest.sizes[shard]))
        pen.text((_GAP, top + cell), caption.encode("ascii", "replace").decode()[:80], fill="black")
        for column, pixels in enumerate([raw, *(images[row] for images in shown)]):
            fitted = _fitted(pixels, cell)
            sheet.paste(fitted, (_GAP + column * (cell + _GAP), top))
    reader.close()
    with published(out) as file:
        sheet.save(file, "PNG")


def _raw(reader: Reader, shard: int, sample: int) -> tuple[Pixels, str]:
    """A sample's picture and what to write below it: its key, class and caption."""
    fields = reader.manifest.fields
    extra = [names for names in (LABEL_FIELDS, ("txt",)) if any(name in fields for name in names)]
    (_, data), *rest = reader.read(shard, sample, [IMAGE_FIELDS, *extra])
    texts = [payload.decode(errors="replace").strip() for _, payload in rest]
    classes = reader.manifest.classes
    for number, (name, _) in enumerate(rest):
        if name in LABEL_FIELDS and texts[number].isdecimal() and int(texts[number]) < len(classes):
            texts[number] = classes[int(texts[number])]
    return decode(data), "  ".join([reader.key(shard, sample), *texts])


def _fitted(pixels: Pixels, cell: int) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
