"""A contact sheet: samples as they lie in the shards, and as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs.errors import DataError
from configs.loading import Config
from data_pipeline.augment import denormalised, device_half
from data_pipeline.cache import locator
from data_pipeline.captions import drawn, places, texts
from data_pipeline.config import DataConfig
from data_pipeline.decode import Pixels, decode
from data_pipeline.facts import Facts, facts_of
from data_pipeline.files import published
from data_pipeline.hashing import uniform
from data_pipeline.load import build_loader
from data_pipeline.randomness import Purpose
from data_pipeline.read import Reader
from data_pipeline.stats import label_name
from data_pipeline.types import Batch, ViewSpec

_GAP, _MARGIN = 8, 64  # pixels; the margin holds the rows' names
_FONT_SIZE, _LINE = 13, 16
_LINES = 5  # of a sample's text
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


class _Seeded(Config):
    seed: int = 0


class SheetConfig(Config):
    """What can be set where there is no run's config: all of `data`, and `run.seed`."""

    data: DataConfig
    run: _Seeded = _Seeded()


@dataclass(frozen=True)
class _Cell:
    """One sample: pictures from top to bottom, and what stands below them."""

    pictures: tuple[Pixels, ...]
    key: str
    text: str


def contact_sheet(
    config: DataConfig,
    views: Sequence[ViewSpec],
    out: Path,
    *,
    seed: int = 0,
    position: int = 0,
    count: int = 16,
    cell: int = 144,
    across: int = 8,
) -> None:
    """Write a PNG of samples, `across` beside each other: the raw picture, below it every view after both
    halves, below them key, class and the caption that is drawn.

    The samples are those from `position` on of a run with this seed, with exactly its pixels. `cell` is a
    picture's largest side in pixels. Raises `UserError`.
    """
    config.first_manifest  # noqa: B018  (refuses a stream: its samples can't be looked up)
    facts = facts_of(config)
    one_process = config.model_copy(update={"workers": 0})
    with build_loader(
        one_process, views, needs=frozenset({"views", "index"}), seed=seed, batch_size=count,
        rank=0, world_size=1, position=position,
    ) as loader:  # fmt: skip
        batch = device_half(views)(next(loader))
    cells = _cells(facts, batch, views)
    names = ["raw", *(["view"] if len(views) == 1 else [f"view {n + 1}" for n in range(len(views))])]
    bands = [cells[start : start + across] for start in range(0, len(cells), across)]
    drawn_bands = [_band(band, names, cell) for band in bands]
    width, height = max(one.width for one in drawn_bands), sum(one.height for one in drawn_bands)
    sheet = Image.new("RGB", (width, height + _GAP), _PAPER)
    top = 0
    for one in drawn_bands:
        sheet.paste(one, (0, top))
        top += one.height
    with published(out) as file:
        sheet.save(file, "PNG")


def _cells(facts: Facts, batch: Batch, views: Sequence[ViewSpec]) -> list[_Cell]:
    seen = [
        (denormalised(images, view) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for images, view in zip(batch.views, views, strict=True)
    ]
    chances = uniform(batch.seeds.numpy(), Purpose.CAPTION, 1)[:, 0].tolist()
    first = np.concatenate([[0], np.cumsum([manifest.samples for manifest in facts.manifests])])
    cells = []
    for row, (index, chance) in enumerate(zip(batch.index.tolist(), chances, strict=True)):
        source = int(np.searchsorted(first, index, side="right")) - 1
        raw, key, text = _raw(facts, source, index - int(first[source]), chance)
        cells.append(_Cell((raw, *(images[row] for images in seen)), key, text))
    return cells


def _raw(facts: Facts, source: int, index: int, chance: float) -> tuple[Pixels, str, str]:
    """A sample's picture, its key, and its class and caption as text."""
    manifest, captions = facts.manifests[source], facts.config.captions
    ends = np.cumsum(manifest.sizes)
    shard = int(np.searchsorted(ends, index, side="right"))
    sample = index - int(ends[shard] - manifest.sizes[shard])
    leading = places(captions, manifest.fields)
    also = tuple(name for name in manifest.labels if name in manifest.fields)
    with closing(Reader(manifest, locator(manifest, facts.config.cache))) as reader:
        (_, data), *rest = reader.read(
            shard, sample, [manifest.pictures], (*also, *dict.fromkeys(place.field for place in leading))
        )
        key, payloads = reader.key(shard, sample), dict(rest)
    said = []
    said += [label_name(payloads[name], manifest) for name in also if name in payloads]
    try:
        found = [text for place in leading for text in texts(place, payloads.get(place.field, b""))]
        said += [drawn(found, chance)] if leading else []
    except ValueError as error:
        said.append(f"({error})")
    try:
        return decode(data, facts.config.max_pixels), key, ": ".join(filter(None, said))
    except ValueError as error:
        raise DataError(f"{manifest.shards[shard].name}: sample {key!r}: can't be decoded: {error}") from None


def _band(cells: Sequence[_Cell], names: Sequence[str], side: int) -> Image.Image:
    """Samples beside each other. Rows are as high as their highest picture."""
    font = ImageFont.load_default(_FONT_SIZE)
    fitted = [[_fitted(picture, side) for picture in cell.pictures] for cell in cells]
    heights = [max(pictures[row].height for pictures in fitted) for row in range(len(names))]
    lines = [_wrapped(cell.text, font, side) for cell in cells]
    tall = sum(height + _GAP for height in heights) + _LINE * (1 + max(len(each) for each in lines))
    band = Image.new("RGB", (_MARGIN + len(cells) * (side + _GAP), _GAP + tall + _GAP), _PAPER)
    pen, top = ImageDraw.Draw(band), _GAP
    for row, (name, height) in enumerate(zip(names, heights, strict=True)):
        pen.text((_GAP, top), name, fill=_FAINT, font=font)
        for column, pictures in enumerate(fitted):
            band.paste(pictures[row], (_MARGIN + column * (side + _GAP), top))
        top += height + _GAP
    for column, (cell, each) in enumerate(zip(cells, lines, strict=True)):
        left = _MARGIN + column * (side + _GAP)
        pen.text((left, top), _wrapped(cell.key, font, side)[0], fill=_FAINT, font=font)
        for number, line in enumerate(each):
            pen.text((left, top + (number + 1) * _LINE), line, fill=_INK, font=font)
    return band


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that fit, at most `_LINES`, at least one; what is left out is marked."""
    lines, line = [], ""
    # A word longer than a line, such as a URL, is cut into pieces.
    words = [word[at : at + 24] for word in text.split() for at in range(0, len(word), 24)]
    for word in words:
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][:-1] + "…"]
    return [_shortened(line, font, width) for line in lines]


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a line as fits, with a mark where something is left out."""
    if font.getlength(line) <= width:
        return line
    length = len(line) - 1
    while length and font.getlength(line[:length] + "…") > width:
        length -= 1
    return line[:length] + "…"


def _fitted(pixels: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
