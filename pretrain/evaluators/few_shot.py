"""Label efficiency: a linear classifier on frozen features learnt from 1, 5 and 10 labels a class.

Logistic regression on features standardised by the mean and deviation of the whole set to learn from (no
label enters that). The regularisation is fixed beforehand, never chosen on the judged set. Draws are seeded,
each contains the smaller ones of its number, and all encoders see the same labelled samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pydantic
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

from configs.errors import ConfigError, DataError
from pretrain import collectives
from pretrain.judging.features import Features, standardised
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Labels, Subject
from pretrain.ports import Scores

Array = np.ndarray[Any, Any]

_WORTH_THREADS = 2**20
"""Below so many values threads cost more than they save: a hundredfold on a busy machine."""


class FewShotConfig(EvaluatorConfig):
    """How many labels a class, how many draws, and the fixed inverse L2 strength."""

    needs_labels: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    kind: str = "few_shot"
    shots: tuple[pydantic.PositiveInt, ...] = (1, 5, 10)
    draws: pydantic.PositiveInt = 5
    seed: int = 0
    c: pydantic.PositiveFloat = 0.1  # scikit-learn's C on standardised features

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return tuple(f"top1_at_{n}" for n in self.shots)

    def build(self) -> Evaluator:
        return FewShot(self)

    def _require_learnable(self, learn: Labels, judge: Labels) -> None:
        super()._require_learnable(learn, judge)
        most = max(self.shots)
        few = [(count, label) for label, count in learn.counts().items() if count < most]
        if few:
            count, label = min(few)
            others = f" ({len(few)} classes have too few)" if len(few) > 1 else ""
            raise ConfigError(
                f"evaluate.{self.title}.shots: found {most}, but {learn.name(label)} has {count} labelled "
                f"images to learn from{others}; set shots to {count} or less, or give more images of it"
            )
        if len(learn.counts()) < 2:
            raise DataError(f"evaluate.{self.title}: one class to learn from; a classifier needs two or more")


@dataclass(frozen=True)
class FewShot:
    config: FewShotConfig

    def __call__(self, subject: Subject) -> Scores:
        learn, judge = self.config.learn_and_judge(subject)
        rank, size = collectives.rank(), collectives.ranks()
        (x, y), (test_x, test_y) = (_arrays(part) for part in standardised(learn, judge))
        tasks = [(shots, draw) for shots in self.config.shots for draw in range(self.config.draws)]
        accuracy = torch.zeros(len(tasks), dtype=torch.float64, device=subject.device)
        for number in range(rank, len(tasks), size):
            shots, draw = tasks[number]
            chosen = draw_labels(y, shots, seed=self.config.seed, draw=draw)
            with threadpool_limits(1 if x[chosen].size < _WORTH_THREADS else None):
                accuracy[number] = _accuracy(x[chosen], y[chosen], test_x, test_y, self.config.c)
        table = 100 * collectives.total(accuracy).reshape(len(self.config.shots), self.config.draws).cpu()
        values = {f"top1_at_{n}": float(row.mean()) for n, row in zip(self.config.shots, table, strict=True)}
        draws = {f"top1_at_{n}": row.tolist() for n, row in zip(self.config.shots, table, strict=True)}
        return Scores(self.config.title, values, {"draws": draws, "c": self.config.c})


def draw_labels(labels: Array, shots: int, *, seed: int, draw: int) -> Array:
    """Indices of `shots` samples of every class, the same for every model that is compared.

    Raises `DataError` where a class has fewer.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise DataError(f"few_shot: class {label} has {len(members)} labelled samples, {shots} asked for")
        chosen.append(np.random.default_rng([seed, draw, int(label)]).permutation(members)[:shots])
    return np.concatenate(chosen)


def _arrays(features: Features) -> tuple[Array, Array]:
    return features.values.double().cpu().numpy(), features.labels.cpu().numpy()


def _accuracy(x: Array, y: Array, test_x: Array, test_y: Array, c: float) -> float:
    from sklearn.linear_model import LogisticRegression

    if x.shape[1] > len(x):
        # The weights lie in the span of the labelled samples, and the L2 penalty doesn't see a rotation:
        # the same classifier is found in as many dimensions as there are samples.
        left, scale, directions = np.linalg.svd(x, full_matrices=False)
        x, test_x = left * scale, test_x @ directions.T
    model = LogisticRegression(C=c, max_iter=5000).fit(x, y)
    return float((model.predict(test_x) == test_y).mean())
