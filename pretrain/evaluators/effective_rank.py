"""How many directions the features use: a collapse shows here before any label is asked for.

RankMe (Garrido et al. 2023, arXiv:2210.02885 eq. 1): the exponential of the entropy of the singular values
s_k of the (N, D) features, p_k = s_k / sum(s) + 1e-7. Between 1 (one direction) and min(N, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.judging.subject import Evaluator, EvaluatorConfig, Subject
from pretrain.ports import Scores


class EffectiveRankConfig(EvaluatorConfig):
    """`data` needs no labels here; a folder with `val/manifest.json` stands for that manifest."""

    kind: str = "effective_rank"

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return ("effective_rank",)

    def build(self) -> Evaluator:
        return EffectiveRank(self)


@dataclass(frozen=True)
class EffectiveRank:
    config: EffectiveRankConfig

    def __call__(self, subject: Subject) -> Scores:
        *_, manifest = self.config.manifests()
        features = subject.features(manifest).values
        rank = float(effective_rank(features))
        largest = min(features.shape)
        return Scores(self.config.title, {"effective_rank": rank}, {"largest_possible": largest})


def effective_rank(features: Tensor) -> Tensor:
    """() float64 from (N, D)."""
    wide = features.double()
    if len(wide) > wide.shape[1]:
        # The singular values are those of the (D, D) triangle, which is small whatever the number of samples.
        wide = torch.linalg.qr(wide, mode="r").R
    singular = torch.linalg.svdvals(wide)
    share = singular / singular.sum().clamp_min(1e-300) + 1e-7
    return torch.exp(-(share * share.log()).sum())
