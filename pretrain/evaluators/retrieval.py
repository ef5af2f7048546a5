"""Retrieval: is an image's caption among the nearest texts, and a text's image among the nearest images?

Recall at K as in Radford et al. 2021 (arXiv:2103.00020 §3.1 and table 13): an image is right where any of its
captions is among the K nearest of all texts. Where others are exactly as near, they count as nearer, so that
collapsed embeddings find nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from configs.errors import ConfigError, DataError
from data_pipeline.captions import places
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import captions_in_order
from pretrain import collectives
from pretrain.judging.features import require_finite
from pretrain.judging.image_text import image_text, require_tokenizer
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Subject
from pretrain.ports import Scores

_SIMILARITIES = 2**24
"""Most similarities held at once (64 MiB of float32)."""


class RetrievalConfig(EvaluatorConfig):
    """Which fields hold the captions, several for an image if it has them, and how long the lists are."""

    kind: str = "retrieval"
    captions: tuple[str, ...] = pydantic.Field(("txt",), min_length=1)  # as data.captions
    at: tuple[pydantic.PositiveInt, ...] = (1, 5, 10)

    def manifests(self) -> list[Path]:
        """The judged one: nothing is learnt from labels."""
        return super().manifests()[-1:]

    def require_possible(self, objective: nn.Module) -> None:
        """Refuse an objective without a text tower. Raises `ConfigError`."""
        image_text(objective, self.title)

    def require_data(self) -> None:
        """Refuse images without a caption where the sidecars can tell. Raises `UserError`."""
        super().require_data()
        [path] = self.manifests()
        manifest = Manifest.load(path)
        leading = places(self.captions, manifest.fields)
        if not leading:
            raise ConfigError(
                f"evaluate.{self.title}.captions: found {', '.join(self.captions)}, but {path} has the "
                f"fields {', '.join(manifest.fields)}; name one that holds captions, or json.KEY"
            )
        wanted = {place.field for place in leading}
        for number, shard in enumerate(manifest.shards):
            index = manifest.index(number)
            columns = [column for column, name in enumerate(index.fields) if name in wanted]
            captioned = np.zeros(len(index), bool)
            captioned[index.sample_of[np.isin(index.field_of, columns)]] = True
            if not captioned.all():
                key = index.key(int(captioned.argmin()))
                raise DataError(
                    f"{path}: {shard.name}: sample {key!r} has no caption ({', '.join(sorted(wanted))}); "
                    f"give each image one, or judge by another set than evaluate.{self.title}.data"
                )

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return tuple(f"{way}_at_{k}" for way in ("image_to_text", "text_to_image") for k in self.at)

    def build(self) -> Evaluator:
        return Retrieval(self)


@dataclass(frozen=True)
class Pairs:
    """Unit embeddings of images and of their captions, whole on every rank."""

    images: Tensor  # (N, D) float32
    texts: Tensor  # (M, D) float32
    owners: Tensor  # (M,) int64: the image that a text belongs to


@dataclass(frozen=True)
class Retrieval:
    config: RetrievalConfig

    def __call__(self, subject: Subject) -> Scores:
        [path] = self.config.manifests()
        pairs = self._pairs(subject, path)
        rank, size = collectives.rank(), collectives.ranks()
        of_images, of_texts = (
            torch.arange(rank, len(rows), size, device=rows.device) for rows in (pairs.images, pairs.texts)
        )
        places = {
            "image_to_text": places_of_texts(pairs, of_images),
            "text_to_image": places_of_images(pairs, of_texts),
        }
        values = {}
        for direction, place in places.items():
            hits = torch.stack([(place < k).sum() for k in self.config.at] + [place.new_tensor(len(place))])
            *right, asked = collectives.total(hits).tolist()
            for k, count in zip(self.config.at, right, strict=True):
                values[f"{direction}_at_{k}"] = 100 * count / asked
        details = {"images": len(pairs.images), "texts": len(pairs.texts)}
        return Scores(self.config.title, values, details)

    def _pairs(self, subject: Subject, path: Path) -> Pairs:
        """Each rank embeds a contiguous part of the set."""
        manifest = Manifest.load(path)
        objective = image_text(subject.objective, self.config.title)
        tokenizer = require_tokenizer(subject, self.config.title)
        rank, size, total = collectives.rank(), collectives.ranks(), manifest.samples
        start, stop = total * rank // size, total * (rank + 1) // size
        captions = list(captions_in_order(manifest, self.config.captions, start, stop))
        owners = [start + number for number, found in enumerate(captions) for _ in found]
        texts = [text for found in captions for text in found]
        with subject.looking():
            # One row more than this rank has, so that a rank without any knows their width.
            blank = torch.zeros(1, subject.view.channels, *subject.view.size, device=subject.device)
            images = [objective.embed_images(blank)[:0]]
            images += [objective.embed_images(b.views[0]) for b in subject.batches(path)]
            tokens = torch.from_numpy(tokenizer.encode_all([*texts, "none"])).to(subject.device)
            embedded = [objective.embed_texts(part) for part in torch.split(tokens, subject.batch_size)]
        of_images = collectives.gather_uneven(torch.cat(images))
        of_texts = collectives.gather_uneven(torch.cat(embedded)[: len(texts)])
        require_finite(of_images, f"{path}: embeddings of images")
        require_finite(of_texts, f"{path}: embeddings of captions")
        return Pairs(
            of_images,
            of_texts,
            collectives.gather_uneven(torch.tensor(owners, dtype=torch.int64, device=subject.device)),
        )


def places_of_texts(pairs: Pairs, asked: Tensor) -> Tensor:
    """(n,) int64: of each of the images `asked`, how many other texts are as near as its nearest caption."""
    found = []
    for part in torch.split(asked, max(1, _SIMILARITIES // len(pairs.texts))):
        similarity = pairs.images[part] @ pairs.texts.T
        own = pairs.owners[None] == part[:, None]
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((similarity >= best) & ~own).sum(dim=1))
    return torch.cat(found) if found else asked.new_zeros(0)


def places_of_images(pairs: Pairs, asked: Tensor) -> Tensor:
    """(n,) int64: of each of the texts `asked`, how many other images are as near as its own."""
    found = []
    for part in torch.split(asked, max(1, _SIMILARITIES // len(pairs.images))):
        similarity = pairs.texts[part] @ pairs.images.T
        own = similarity.gather(1, pairs.owners[part][:, None])
        found.append((similarity >= own).sum(dim=1) - 1)
    return torch.cat(found) if found else asked.new_zeros(0)
