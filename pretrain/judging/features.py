"""Frozen features of a set, and what every evaluation of them needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.errors import RunError
from data_pipeline.hashing import Int64s


@dataclass(frozen=True)
class Features:
    """Frozen features of a set, in the set's own order, whole on every rank."""

    values: Tensor  # (N, D) float32, on the evaluating device
    labels: Tensor  # (N,) int64, beside them; -1 where the set has none

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def pick(self, index: Tensor) -> Features:
        return Features(self.values[index], self.labels[index])


class NotFiniteError(RunError):
    """What a model gives isn't finite: it can't be judged. Raised on every rank alike."""


def require_finite(rows: Tensor, what: str) -> None:
    """`rows`: (N, ...), the same on every rank. Raises `NotFiniteError`, which says how many are ill.

    A NaN in a comparison or a list to sort isn't told apart from a good answer, so that it mustn't get there.
    """
    ill = int((~torch.isfinite(rows).flatten(1).all(dim=1)).sum())
    if ill:
        raise NotFiniteError(
            f"{what}: {ill} of {len(rows)} aren't finite numbers: training has diverged; judge an earlier "
            "checkpoint (--step), or train with a lower rate"
        )


def fixed_fifth(features: Features, seed: int = 0) -> tuple[Features, Features]:
    """Cut a labelled set class by class: four fifths to learn from, a fifth (at least one) to judge.

    The only sample of a class is learnt from and not judged.
    """
    learn, judge = fifth_of(features.labels.cpu().numpy(), seed)
    device = features.labels.device
    return features.pick(torch.from_numpy(learn).to(device)), features.pick(
        torch.from_numpy(judge).to(device)
    )


def fifth_of(labels: Int64s, seed: int = 0) -> tuple[Int64s, Int64s]:
    """`fixed_fifth` of (N,) labels: numbers of samples to learn from and to judge, each rising."""
    learn, judge = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        held = max(1, len(members) // 5) if len(members) > 1 else 0
        judge.append(members[:held])
        learn.append(members[held:])
    return np.sort(np.concatenate(learn)), np.sort(np.concatenate(judge))


def standardised(learn: Features, judge: Features) -> tuple[Features, Features]:
    """Both by mean and deviation of the first, like BatchNorm(affine=False); what never moves becomes 0."""
    mean, deviation = learn.values.mean(dim=0), learn.values.std(dim=0)
    scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), 1 / deviation.clamp_min(1e-12), 0.0)
    first, second = (Features((part.values - mean) * scale, part.labels) for part in (learn, judge))
    return first, second
