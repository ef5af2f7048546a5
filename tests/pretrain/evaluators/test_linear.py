"""The linear probe reaches the classifier that its loss defines, and picks its rate without looking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from pretrain.evaluators.linear import LinearConfig, _gradients, fit
from pretrain.judging.features import Features, fixed_fifth, standardised
from pretrain.judging.subject import Subject


def small(images: Tensor) -> Tensor:
    return avg_pool2d(images[:, :1], 4).flatten(1)


def test_gradients_are_those_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 1, 4, generator=generator)
    x, y = torch.randn(9, 6, generator=generator), torch.randint(4, (9,), generator=generator)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    logits = x @ w + b
    loss = sum(cross_entropy(one, y) for one in logits) + 0.5 * 0.3 * (w**2).sum()
    expected = torch.autograd.grad(loss, (w, b))  # type: ignore[arg-type]
    for got, right in zip(_gradients(weight, bias, x, y, 0.3), expected, strict=True):
        torch.testing.assert_close(got, right)


def test_converges_to_scikit_learns_classifier(digits: Path, pixels: Subject) -> None:
    features = replace(pixels, encode=small, _seen={}).features(digits / "val" / "manifest.json")
    learn, judge = standardised(*fixed_fifth(features))
    c = 0.05
    config = LinearConfig(
        data=digits, learning_rates=(0.3,), epochs=300, batch_size=len(learn), l2=1 / (c * len(learn))
    )
    ours = float(fit(learn, config.learning_rates, config, 10).right(judge)[0])
    reference = LogisticRegression(C=c, max_iter=5000).fit(learn.values.numpy(), learn.labels.numpy())
    theirs = reference.score(judge.values.numpy(), judge.labels.numpy())
    assert 0.8 < theirs < 1
    assert ours == pytest.approx(theirs, abs=0.005)


def test_the_sweep_keeps_what_a_single_rate_gives(digits: Path, pixels: Subject) -> None:
    subject = replace(pixels, encode=small, _seen={})
    rates = (1e-5, 0.1)
    swept = LinearConfig(data=digits, learning_rates=rates, epochs=4).build()(subject)
    assert swept.details["learning_rate"] == 0.1
    by_rate = swept.details["top1_by_learning_rate"]
    assert swept.values["top1"] == by_rate["0.1"] > by_rate["1e-05"]
    assert swept.values["top1"] > 85


def test_labels_of_the_judged_set_choose_nothing() -> None:
    """The rate that is best on the judged set loses here, because its labels are random."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)
    labels = torch.arange(300) % 3
    learn = Features(centres[labels] + 0.3 * torch.randn(300, 8, generator=generator), labels)
    judge = Features(learn.values, torch.randint(3, (300,), generator=generator))

    class Given(LinearConfig):
        def learn_and_judge(self, subject: Subject) -> tuple[Features, Features]:
            return learn, judge

    subject = Subject(torch.nn.Identity(), torch.nn.Identity(), None, torch.device("cpu"))  # type: ignore[arg-type]
    config = Given(data=Path("x"), learning_rates=(0.1, 1e-7), epochs=5)
    assert config.build()(subject).details["learning_rate"] == 0.1
