"""Weighted nearest-neighbour classification of frozen features.

Wu et al. 2018 (arXiv:1805.01978 §3.4): the k nearest by cosine similarity s_i vote for their class with
weight exp(s_i / T). Nothing is trained, so the score says what the geometry of the features already knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pydantic
import torch
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import ConfigError
from pretrain import collectives
from pretrain.judging.features import Features
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Labels, Subject
from pretrain.ports import Scores

_LEAST = -80.0
"""Logarithm of the smallest vote against the nearest neighbour's: what float32 holds."""

_SIMILARITIES = 2**26
"""Most similarities held at once (256 MiB of float32)."""


class KNNConfig(EvaluatorConfig):
    """Weighted kNN: the neighbours' number and the temperature of their votes."""

    needs_labels: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    kind: str = "knn"
    k: pydantic.PositiveInt = 20
    temperature: pydantic.PositiveFloat = 0.07

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return ("top1", "top5")

    def build(self) -> Evaluator:
        return KNN(self)

    def _require_learnable(self, learn: Labels, judge: Labels) -> None:
        super()._require_learnable(learn, judge)
        if self.k > len(learn.numbers):
            raise ConfigError(
                f"evaluate.{self.title}.k: found {self.k}, but there are {len(learn.numbers)} labelled "
                f"images to be neighbours; set k to {len(learn.numbers)} or less"
            )


@dataclass(frozen=True)
class KNN:
    config: KNNConfig

    def __call__(self, subject: Subject) -> Scores:
        learn, judge = self.config.learn_and_judge(subject)
        rank, size = collectives.rank(), collectives.ranks()
        own = judge.pick(torch.arange(rank, len(judge), size, device=judge.labels.device))
        ranking = vote(learn, own.values, k=self.config.k, temperature=self.config.temperature)
        right = ranking[:, :5] == own.labels.unsqueeze(1)  # -1 is nobody's label
        hits = collectives.total(torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])).double()
        top1, top5 = (100 * hits / len(judge)).tolist()
        values = {"top1": top1, "top5": top5} if ranking.shape[1] > 5 else {"top1": top1}
        return Scores(self.config.title, values, {"k": self.config.k, "neighbours_from": len(learn)})


def vote(bank: Features, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """Classes of (Q, D) `queries` from most to least voted for: (Q, C) int64, -1 behind those with a vote.

    Works through the queries in pieces, so that memory stays bounded whatever the size of the bank.
    """
    neighbours = normalize(bank.values, dim=1)
    ranking = []
    for piece in torch.split(normalize(queries, dim=1), max(1, _SIMILARITIES // len(bank))):
        near, index = (piece @ neighbours.T).topk(min(k, len(bank)), dim=1)
        votes = near.new_zeros(len(piece), bank.classes)
        # Relative to the nearest: the votes rank alike, and nothing overflows at a small temperature.
        # Bounded below, so that a neighbour far away still has a vote.
        weights = ((near - near[:, :1]) / temperature).clamp(min=_LEAST).exp()
        votes.scatter_add_(1, bank.labels[index], weights)
        votes, classes = votes.sort(dim=1, descending=True, stable=True)
        ranking.append(classes.masked_fill(votes == 0, -1))
    return torch.cat(ranking)
