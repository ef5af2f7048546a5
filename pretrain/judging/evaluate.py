"""Judging a finished model from outside: a checkpoint, an export or any timm model, in the same table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from data_pipeline.manifest import Manifest
from pretrain.judging.schedule import refuse_equal_names
from pretrain.judging.subject import EvaluatorConfig, Subject
from pretrain.ports import Scores

Progress = Callable[[int, int], None]
"""Called with samples encoded and samples in all."""


def evaluate(
    opened: Callable[[torch.device], Subject],
    evaluations: Sequence[EvaluatorConfig],
    *,
    device: torch.device | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[Scores]:
    """The scores of what `opened` gives: see `export.subject`.

    A run and its export score alike: both are shown images the same way and pool their tokens the same way.
    What the evaluations can't do is refused before anything is opened. Raises `UserError`.
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
    judged = replace(opened(where), batch_size=batch_size, workers=workers, advance=advance)
    return [evaluation.build()(judged) for evaluation in evaluations]


def _samples(evaluations: Sequence[EvaluatorConfig]) -> int:
    """Samples that will be encoded, each set once."""
    return sum(Manifest.load(path).samples for path in {p for e in evaluations for p in e.manifests()})
