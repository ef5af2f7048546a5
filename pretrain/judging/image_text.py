"""Objectives that put images and texts into one space, as evaluations see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from data_pipeline.tokenize import Tokenizer
from pretrain import collectives
from pretrain.judging.features import require_finite
from pretrain.judging.subject import Subject


@runtime_checkable
class ImageText(Protocol):
    """An objective that puts images and texts into one space."""

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised float32 -> (B, D) float32 of unit length."""

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, D) float32 of unit length."""


def image_text(objective: nn.Module | None, title: str) -> ImageText:
    """`objective` as what embeds images and texts. Raises `ConfigError` where it doesn't."""
    if not isinstance(objective, ImageText):
        raise ConfigError(
            f"evaluate.{title}: needs a run whose objective embeds images and texts, such as clip; "
            "judge an encoder alone by knn, few_shot or linear"
        )
    return objective


def text_embeddings(subject: Subject, texts: Sequence[str], title: str) -> Tensor:
    """(N, D) float32 of unit length, on every rank; collective: each rank embeds its part of them."""
    objective, tokenizer = image_text(subject.objective, title), require_tokenizer(subject, title)
    rank, size = collectives.rank(), collectives.ranks()
    own = texts[len(texts) * rank // size : len(texts) * (rank + 1) // size]
    with subject.looking():
        # A rank without a text still has to know the width: it embeds one and keeps none.
        tokens = torch.from_numpy(tokenizer.encode_all(own or texts[:1])).to(subject.device)
        parts = [objective.embed_texts(part) for part in torch.split(tokens, subject.batch_size)]
    found = collectives.gather_uneven(torch.cat(parts)[: len(own)])
    require_finite(found, f"evaluate.{title}: embeddings of texts")
    return found


def require_tokenizer(subject: Subject, title: str) -> Tokenizer:
    """The tokenizer the text tower was trained with."""
    if subject.tokenizer is None:
        raise ConfigError(f"evaluate.{title}: the run's data.tokenizer is missing")
    return subject.tokenizer
