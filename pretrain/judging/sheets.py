"""Sheets of pictures that let a person judge an encoder: from a few images it isn't trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from data_pipeline.augment import denormalised
from data_pipeline.load import chosen
from data_pipeline.manifest import Manifest
from data_pipeline.read import CAPTION_FIELDS, Reader
from data_pipeline.types import Batch
from pretrain import encoders
from pretrain.judging.features import Features
from pretrain.judging.image_text import ImageText, text_embeddings
from pretrain.judging.subject import Subject

_INK, _PAPER, _MARK = (20, 20, 20), (255, 255, 255), (200, 60, 40)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
_CELL, _LINE = 64, 16  # pixels: a picture's side, a line of text


def some(subject: Subject, manifest: Path, numbers: Sequence[int]) -> Batch:
    """Samples of a set by number, as the encoder is shown them: normalised, on its device."""
    return subject.shown(chosen(manifest, subject.view, list(numbers)))


def one_of_each(labels: Tensor, most: int) -> list[int]:
    """The number of the first sample of every class, at most `most`; without labels the first samples."""
    first = [int((labels == label).nonzero()[0, 0]) for label in torch.unique(labels)[:most]]
    return first if int(labels.max()) >= 0 else list(range(min(most, len(labels))))


def columns(sheet: Tensor, count: int, enlarge: int = 4) -> Image.Image:
    """(3, count * H, W) rows of a sheet as two columns side by side, in whole multiples of their pixels."""
    strips = torch.stack(sheet.chunk(count, dim=1))
    framed = torch.nn.functional.pad(strips, (4, 4, 4, 4), value=1.0)
    picture = image_of(torch.cat([torch.cat(list(half), dim=1) for half in framed.chunk(2)], dim=2))
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def neighbours(
    subject: Subject,
    queries: Path,
    pool: Path,
    found: tuple[Features, Features],
    near: int = 7,
    most: int = 10,
) -> Image.Image:
    """Images of `queries` and those of `pool` with the nearest features; those of another class framed.

    `found`: features of both. Where they are one set, an image isn't its own neighbour.
    """
    own, others = found
    numbers = one_of_each(own.labels, most)
    similarity = normalize(own.values[numbers], dim=1) @ normalize(others.values, dim=1).T
    if queries == pool:
        similarity[torch.arange(len(numbers)), torch.tensor(numbers)] = -2.0
    order = similarity.topk(min(near, len(others) - 1), dim=1).indices.cpu()
    mine = some(subject, queries, numbers).views[0]
    theirs = some(subject, pool, order.flatten().tolist()).views[0]
    theirs = theirs.reshape(*order.shape, *theirs.shape[1:])
    sheet = Image.new("RGB", (_CELL * (near + 1) + 12 + near * 2, (_CELL + 4) * len(numbers)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for down, query in enumerate(numbers):
        top = down * (_CELL + 4) + 2
        sheet.paste(_cell(denormalised(mine[down], subject.view)), (0, top))
        for right, index in enumerate(order[down].tolist()):
            left = _CELL + 12 + right * (_CELL + 2)
            sheet.paste(_cell(denormalised(theirs[down, right], subject.view)), (left, top))
            if others.labels[index] != own.labels[query]:
                pen.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=_MARK, width=3)
    return sheet


def similarities(subject: Subject, manifest: Path, numbers: Sequence[int]) -> Image.Image:
    """Cosines of some images and their captions; the best image of each caption is framed."""
    objective = subject.objective
    assert isinstance(objective, ImageText)
    texts = captions(manifest, numbers)
    embedded = text_embeddings(subject, texts, "pictures")
    images = some(subject, manifest, numbers).views[0]
    with subject.looking():
        cosines = (embedded @ objective.embed_images(images).T).cpu()
    font = _font()
    drawn = [drawable(f"{number}. {text}", font) for number, text in enumerate(texts, 1)]
    margin = min(max(int(font.getlength(text)) for text in drawn) + 8, 420)
    sheet = Image.new("RGB", (margin + _CELL * len(texts), _CELL + (_LINE * 2) * len(texts)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for right in range(len(texts)):
        sheet.paste(_cell(denormalised(images[right], subject.view)), (margin + right * _CELL, 0))
    for down, caption in enumerate(drawn):
        top = _CELL + down * 2 * _LINE
        pen.text((4, top + _LINE // 2), shortened(caption, margin - 8, font), fill=_INK, font=font)
        for right in range(len(texts)):
            value = float(cosines[down, right])
            shade = round(255 * (1 - min(max(value, 0.0), 1.0)))
            left = margin + right * _CELL
            best = int(cosines[down].argmax()) == right
            pen.rectangle(
                (left, top, left + _CELL - 2, top + 2 * _LINE - 2),
                fill=(shade, shade, 255),
                outline=_MARK if best else None,
                width=2,
            )
            ink = _INK if shade > 110 else _PAPER
            pen.text((left + 18, top + _LINE // 2), f"{value:.2f}", fill=ink, font=font)
    return sheet


def _font() -> Font:
    """One of the system's that knows many letters, where there is one; Pillow's own knows ASCII."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, 12)
        except OSError:
            continue
    return ImageFont.load_default(12)


def drawable(text: str, font: Font) -> str:
    """`text` in one line, with the numbers of characters that the font has no picture of: a <U+732B>."""
    # What isn't known is drawn as one box, whatever it is.
    box = font.getmask("\U0010ffff").getbbox(), bytes(font.getmask("\U0010ffff"))
    told = []
    for letter in " ".join(text.split()):
        mask = font.getmask(letter)
        known = letter == " " or (mask.getbbox() is not None and (mask.getbbox(), bytes(mask)) != box)
        told.append(letter if known else f"<U+{ord(letter):04X}>")
    return "".join(told)


def shortened(text: str, width: int, font: Font) -> str:
    """As much of `text` as fits into `width` pixels, with an ellipsis where something is left out."""
    if font.getlength(text) <= width:
        return text
    end = next(end for end in range(len(text) - 1, -1, -1) if font.getlength(text[:end] + "...") <= width)
    return text[:end].rstrip() + "..."


def attention(subject: Subject, images: Tensor) -> Image.Image:
    """Each image, and beside it as bright as the last block looks at it; see `attention_maps`."""
    with subject.looking():
        maps = attention_maps(subject.encoder, images)
    maps = maps / maps.amax(dim=(1, 2), keepdim=True)
    lit = interpolate(maps.unsqueeze(1), size=images.shape[2:], mode="nearest").cpu()
    plain = torch.stack([denormalised(image, subject.view) for image in images]).cpu()
    return _pairs(plain, plain * (0.15 + 0.85 * lit))


def components(subject: Subject, images: Tensor) -> Image.Image:
    """Each image, and beside it the first three principal components of its patch tokens as colours."""
    with subject.looking():
        tokens = patch_tokens(subject.encoder, images)
        colours = principal_colours(tokens)
    grown = interpolate(colours, size=images.shape[2:], mode="nearest").cpu()
    plain = torch.stack([denormalised(image, subject.view) for image in images]).cpu()
    return _pairs(plain, grown)


def attention_maps(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, h, w): how much the class token (without one, all patches) attends to each patch.

    Mean over the heads of a ViT's last block, as Caron et al. 2021 (arXiv:2104.14294 figure 1) show them.
    """
    vit: Any = encoder
    block, seen = vit.blocks[-1].attn, list[Tensor]()
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        vit.forward_features(images)
    finally:
        hook.remove()
    x = seen[0]
    q, k, _ = block.qkv(x).unflatten(2, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (block.q_norm(q) * block.scale @ block.k_norm(k).transpose(-2, -1)).float().softmax(dim=-1)
    prefix = vit.num_prefix_tokens
    rows = weights[:, :, 0, prefix:] if prefix else weights.mean(dim=2)
    return torch.reshape(rows.mean(dim=1), (len(images), *vit.patch_embed.grid_size))


def patch_tokens(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, h, w, D) float32: a ViT's last tokens, without the prefix."""
    vit: Any = encoder
    tokens: Tensor = vit.forward_features(images)[:, vit.num_prefix_tokens :].float()
    return torch.reshape(tokens, (len(images), *vit.patch_embed.grid_size, -1))


def principal_colours(tokens: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, 3, h, w) in [0, 1]: components over all tokens of all images together.

    Each component is spread between its 2nd and 98th percentile, its sign such that its largest loading is
    positive: the same tokens give the same colours.
    """
    flat = tokens.flatten(0, 2).double()
    flat = flat - flat.mean(dim=0)
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :3]
    axes = axes * torch.gather(axes, 0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    values = flat @ axes
    low, high = (torch.quantile(values, share, dim=0) for share in (0.02, 0.98))
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return torch.reshape(scaled, (*tokens.shape[:3], 3)).permute(0, 3, 1, 2)


def captions(manifest: Path, numbers: Sequence[int]) -> list[str]:
    """The caption of each of some samples."""
    data = Manifest.load(manifest)
    ends = data.sizes.cumsum()
    reader = Reader(data)
    try:
        found = []
        for number in numbers:
            shard = int(ends.searchsorted(number, side="right"))
            sample = int(number - (ends[shard] - data.sizes[shard]))
            found.append(reader.read(shard, sample, [CAPTION_FIELDS])[0][1].decode())
        return found
    finally:
        reader.close()


def is_drawable(encoder: nn.Module) -> bool:
    """Whether attention and patch tokens can be shown: a plain ViT."""
    return encoders.is_vit(encoder) and hasattr(getattr(encoder, "blocks", [None])[-1], "attn")


def image_of(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1]."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def _pairs(left: Tensor, right: Tensor) -> Image.Image:
    """(B, 3, H, W) twice, in [0, 1]: pairs, four of them in a row."""
    sheet = Image.new("RGB", (4 * (2 * _CELL + 10) - 8, -(-len(left) // 4) * (_CELL + 4)), _PAPER)
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        x, y = number % 4 * (2 * _CELL + 10), number // 4 * (_CELL + 4) + 2
        sheet.paste(_cell(one), (x, y))
        sheet.paste(_cell(other), (x + _CELL + 2, y))
    return sheet


def _cell(pixels: Tensor) -> Image.Image:
    smooth = Image.Resampling.LANCZOS if max(pixels.shape[1:]) > _CELL else Image.Resampling.NEAREST
    return image_of(pixels).resize((_CELL, _CELL), smooth)
