"""Linear probe: a classifier on frozen features, trained on all labels, learning rates swept in one pass.

Features are encoded once, from centre crops, so the whole sweep costs little more than one pass over the set
(probes that see random crops encode anew every epoch and score a little higher). The rate is chosen on a
fifth of the labelled samples that no classifier sees, never on the judged set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pydantic
import torch
from torch import Tensor

from configs.errors import ConfigError
from pretrain import collectives
from pretrain.judging.features import Features, fixed_fifth, standardised
from pretrain.judging.subject import Evaluator, EvaluatorConfig, Labels, Subject
from pretrain.ports import Scores


class LinearConfig(EvaluatorConfig):
    """SGD with momentum 0.9 and a cosine schedule; every learning rate trains a classifier of its own."""

    needs_labels: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    kind: str = "linear"
    learning_rates: tuple[pydantic.PositiveFloat, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # at batch 256
    epochs: pydantic.PositiveInt = 30
    batch_size: pydantic.PositiveInt = 1024
    l2: pydantic.NonNegativeFloat = 0.0  # half of it times the squared weights is added to the mean loss
    batch_norm: bool = True  # standardise features, as BatchNorm(affine=False) in front would
    seed: int = 0

    def figures(self) -> tuple[str, ...]:
        """See `EvaluatorConfig.figures`."""
        return ("top1",)

    def build(self) -> Evaluator:
        return Linear(self)

    def _require_learnable(self, learn: Labels, judge: Labels) -> None:
        super()._require_learnable(learn, judge)
        if len(self.learning_rates) > 1 and not learn.names_of(lambda count: count > 1):
            raise ConfigError(
                f"evaluate.{self.title}.learning_rates: found {len(self.learning_rates)}, but no class has "
                "two images to learn from, one of them to choose a rate by; give one rate, or more images"
            )


@dataclass(frozen=True)
class Classifier:
    """R linear classifiers of (B, D) features into C classes."""

    weight: Tensor  # (R, D, C)
    bias: Tensor  # (R, 1, C)

    def logits(self, features: Tensor) -> Tensor:
        """(R, B, C)."""
        return features @ self.weight + self.bias

    def right(self, features: Features, at_a_time: int = 4096) -> Tensor:
        """Share of samples each gets right: (R,) float64."""
        hits = torch.zeros(len(self.weight), dtype=torch.float64, device=self.weight.device)
        for rows, labels in zip(
            torch.split(features.values, at_a_time), torch.split(features.labels, at_a_time), strict=True
        ):
            hits += (self.logits(rows).argmax(dim=2) == labels).sum(dim=1)
        return hits / len(features)


@dataclass(frozen=True)
class Linear:
    config: LinearConfig

    def __call__(self, subject: Subject) -> Scores:
        config = self.config
        learn, judge = config.learn_and_judge(subject)
        if config.batch_norm:
            learn, judge = standardised(learn, judge)
        train, choose = fixed_fifth(learn, config.seed) if len(config.learning_rates) > 1 else (learn, learn)
        rank, size = collectives.rank(), collectives.ranks()
        own = list(range(rank, len(config.learning_rates), size))
        figures = torch.zeros(2, len(config.learning_rates), dtype=torch.float64, device=subject.device)
        if own:
            found = fit(train, [config.learning_rates[i] for i in own], config, learn.classes)
            figures[0, own], figures[1, own] = found.right(choose), found.right(judge)
        chosen, judged = (100 * collectives.total(figures)).tolist()
        best = max(range(len(chosen)), key=chosen.__getitem__)
        by_rate = {f"{rate:g}": score for rate, score in zip(config.learning_rates, judged, strict=True)}
        details = {"learning_rate": config.learning_rates[best], "top1_by_learning_rate": by_rate}
        return Scores(config.title, {"top1": judged[best]}, details)


def fit(learn: Features, rates: Sequence[float], config: LinearConfig, classes: int) -> Classifier:
    """A classifier for every learning rate, all from zero weights and over the same batches."""
    features, labels = learn.values, learn.labels
    weight = features.new_zeros(len(rates), features.shape[1], classes)
    bias = features.new_zeros(len(rates), 1, classes)
    moments = torch.zeros_like(weight), torch.zeros_like(bias)
    batch = min(config.batch_size, len(learn))
    peak = features.new_tensor(rates).view(-1, 1, 1) * batch / 256
    generator = torch.Generator().manual_seed(config.seed)
    steps_an_epoch = -(-len(learn) // batch)
    total, step = config.epochs * steps_an_epoch, 0
    for _ in range(config.epochs):
        order = torch.randperm(len(learn), generator=generator).to(labels.device)
        for rows in torch.split(order, batch):
            gradients = _gradients(weight, bias, features[rows], labels[rows], config.l2)
            rate = peak * 0.5 * (1 + math.cos(math.pi * step / total))
            for parameter, moment, gradient in zip((weight, bias), moments, gradients, strict=True):
                moment.mul_(0.9).add_(gradient)
                parameter -= rate * moment
            step += 1
    return Classifier(weight, bias)


def _gradients(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Of the mean cross-entropy of each classifier, in closed form: works where autograd is off."""
    error = Classifier(weight, bias).logits(x).softmax(dim=2)  # (R, B, C)
    error[:, torch.arange(len(y), device=y.device), y] -= 1
    error /= len(y)
    return x.T @ error + l2 * weight, error.sum(dim=1, keepdim=True)
