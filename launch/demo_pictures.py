"""What a person would look at to judge each of the demo's runs: one PNG a run, from images it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipeline.augment import denormalised
from data_pipeline.manifest import Manifest
from data_pipeline.read import CAPTION_FIELDS, Reader
from launch.demo_findings import labelled, subject_of, validation
from pretrain import trained
from pretrain.evaluators.subject import Subject
from pretrain.evaluators.zero_shot import ImageText, text_embeddings
from pretrain.objectives.mae import MAE
from pretrain.trained import Trained

_INK, _PAPER, _MARK = (20, 20, 20), (255, 255, 255), (200, 60, 40)
_CELL, _LINE = 64, 16  # pixels: a picture's side, a line of text


def draw(model: Trained, directory: Path) -> Path:
    """The picture that fits the run's objective, in `directory`."""
    objective = trained.read_objective(model)
    subject = subject_of(objective, model)
    train = model.config.data.first_manifest
    if isinstance(objective, MAE):
        name, picture = "reconstructions", _reconstructions(subject, train)
    elif isinstance(objective, ImageText):
        name, picture = "similarities", _similarities(subject, train)
    else:
        name, picture = "neighbours", _neighbours(subject, train)
    directory.mkdir(exist_ok=True)
    to = directory / f"{name}.png"
    picture.save(to)
    return to


def _reconstructions(subject: Subject, train: Path, count: int = 8, enlarge: int = 4) -> Image.Image:
    """Unseen images, part of each hidden, and what the model makes of it."""
    assert subject.objective is not None
    with subject.looking():
        batch = next(next(iter(subject.batches(validation(train)))).split(count))
        sheet = subject.objective.pictures(batch)["reconstructions"]
    strips = torch.stack(sheet.chunk(len(batch), dim=1))  # one for each image: (8, 3, H, 3 * W)
    framed = torch.nn.functional.pad(strips, (4, 4, 4, 4), value=1.0)
    columns = torch.cat([torch.cat(list(half), dim=1) for half in framed.chunk(2)], dim=2)
    picture = _image(columns)
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def _neighbours(subject: Subject, train: Path, near: int = 7) -> Image.Image:
    """An unseen image of each class and the labelled ones with the nearest features; wrong ones framed."""
    val, pool = validation(train), labelled(train)
    own, others = subject.features(val), subject.features(pool)
    queries = _one_of_each(own.labels)
    unit = torch.nn.functional.normalize
    order = (unit(own.values[queries], dim=1) @ unit(others.values, dim=1).T).topk(near, dim=1).indices
    theirs = _pixels(subject, pool, order.flatten().tolist())
    mine = _pixels(subject, val, queries.tolist())
    sheet = Image.new("RGB", (_CELL * (near + 1) + 12 + near * 2, (_CELL + 4) * len(queries)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for down, query in enumerate(queries.tolist()):
        top = down * (_CELL + 4) + 2
        sheet.paste(_cell(mine[query]), (0, top))
        for right, index in enumerate(order[down].tolist()):
            left = _CELL + 12 + right * (_CELL + 2)
            sheet.paste(_cell(theirs[index]), (left, top))
            if others.labels[index] != own.labels[query]:
                pen.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=_MARK, width=3)
    return sheet


def _similarities(subject: Subject, train: Path) -> Image.Image:
    """Cosines of one unseen image of each class and their captions; the best image of each text is framed."""
    val = validation(train)
    objective = subject.objective
    assert isinstance(objective, ImageText)
    chosen = _one_of_each(
        torch.cat([batch.target for batch in subject.batches(val) if batch.target is not None])
    )
    captions = _captions(val, chosen.tolist())
    views = _pixels(subject, val, chosen.tolist(), raw=True)
    texts = text_embeddings(subject, captions, "similarities")
    with subject.looking():
        images = objective.embed_images(torch.stack([views[index] for index in chosen.tolist()]))
    cosines = texts @ images.T
    margin = 6 * max(map(len, captions))
    sheet = Image.new("RGB", (margin + _CELL * len(chosen), _CELL + (_LINE * 2) * len(chosen)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for right, index in enumerate(chosen.tolist()):
        image = denormalised(views[index], subject.view)
        sheet.paste(_cell(image), (margin + right * _CELL, 0))
    for down, caption in enumerate(captions):
        top = _CELL + down * 2 * _LINE
        pen.text((4, top + _LINE // 2), caption, fill=_INK, font=font)
        for right in range(len(chosen)):
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


def _one_of_each(labels: Tensor) -> Tensor:
    """The number of the first sample of every class."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in torch.unique(labels)])


def _captions(manifest: Path, chosen: Sequence[int]) -> list[str]:
    """Captions of some samples of a set of one shard."""
    reader = Reader(Manifest.load(manifest))
    try:
        return [reader.read(0, sample, [CAPTION_FIELDS])[0][1].decode() for sample in chosen]
    finally:
        reader.close()


def _pixels(subject: Subject, manifest: Path, chosen: Sequence[int], raw: bool = False) -> dict[int, Tensor]:
    """Some samples as the encoder is shown them, (3, H, W) by number: normalised (`raw`), else in [0, 1]."""
    wanted, found, first = set(chosen), dict[int, Tensor](), 0
    for batch in subject.batches(manifest):
        for index in wanted & set(range(first, first + len(batch))):
            image = batch.views[0][index - first]
            found[index] = image if raw else denormalised(image, subject.view)
        first += len(batch)
    return found


def _image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1]."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _cell(pixels: Tensor) -> Image.Image:
    return _image(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)
