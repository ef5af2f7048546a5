"""Judging a finished model from outside: a checkpoint, an export or any timm model, in the same table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data_pipeline.manifest import Manifest
from data_pipeline.tokenize import open_tokenizer
from pretrain import encoders, trained
from pretrain.export.open import open_timm
from pretrain.folder import RunFolder
from pretrain.judging.schedule import refuse_equal_names
from pretrain.judging.subject import EvaluatorConfig, Subject
from pretrain.types import Scores

Progress = Callable[[int, int], None]
"""Called with samples encoded and samples in all."""


def evaluate(
    source: str,
    evaluations: Sequence[EvaluatorConfig],
    *,
    step: int | None = None,
    device: torch.device | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[Scores]:
    """The scores of a run folder (newest checkpoint, or that at `step`), an exported folder or a timm name.

    A run and its export score alike: both are shown images the same way and pool their tokens the same way.
    Raises `UserError`.
    """
    refuse_equal_names(evaluations)
    for evaluation in evaluations:
        evaluation.require_data()
    done, total = 0, _samples(evaluations)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, max(total, done))

    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judged = subject(source, step=step, device=where)
    judged = replace(judged, batch_size=batch_size, workers=workers, advance=advance)
    return [evaluation.build()(judged) for evaluation in evaluations]


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


def _samples(evaluations: Sequence[EvaluatorConfig]) -> int:
    """Samples that will be encoded, each set once."""
    return sum(Manifest.load(path).samples for path in {p for e in evaluations for p in e.manifests()})
