"""A run, an export or any timm model, opened as evaluations see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data_pipeline.tokenize import open_tokenizer
from pretrain import encoders
from pretrain.export.open import open_timm
from pretrain.judging.subject import Subject
from pretrain.run import trained
from pretrain.run.folder import RunFolder


def opener(source: str, *, step: int | None = None) -> Callable[[torch.device], Subject]:
    """`subject` of a source, once it is known where its weights are to lie."""
    return lambda device: subject(source, step=step, device=device)


def subject(source: str, *, step: int | None = None, device: torch.device) -> Subject:
    """A model as evaluators see it. A run brings its objective along where its data are at hand."""
    if not RunFolder(Path(source)).exists():
        encoder, view = open_timm(source)
        encoder.to(device)
        return Subject(encoder, encoder, view, device)
    model = trained.read(Path(source), step)
    manifest = model.config.data.manifest
    if manifest is None or manifest.is_file():
        objective = trained.read_objective(model).to(device)
        encoder = objective.encoder
    else:
        objective, encoder = None, model.encoder.to(device)
    encode = partial(encoders.features, encoder)
    tokenizer = model.config.data.tokenizer
    return Subject(
        encoder, encode, model.view, device, objective,
        tokenizer=open_tokenizer(tokenizer) if tokenizer and objective else None,
    )  # fmt: skip
