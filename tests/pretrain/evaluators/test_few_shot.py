"""The few-shot probe is seeded, sees the same labels for all encoders, and measures what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from configs.errors import DataError
from pretrain.evaluators.few_shot import FewShotConfig, _accuracy, draw_labels
from pretrain.judging.subject import RawPixels, Subject


def test_draws_are_balanced_seeded_and_nested() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 400)
    five = draw_labels(labels, 5, seed=0, draw=2)
    assert np.bincount(labels[five]).tolist() == [5] * 5
    assert len(set(five.tolist())) == 25
    assert (
        set(draw_labels(labels, 1, seed=0, draw=2)) < set(five) < set(draw_labels(labels, 10, seed=0, draw=2))
    )
    assert set(five) != set(draw_labels(labels, 5, seed=0, draw=3))
    assert set(five) != set(draw_labels(labels, 5, seed=1, draw=2))


def test_a_class_with_too_few_labels_is_named() -> None:
    with pytest.raises(DataError, match="class 3 has 2 labelled samples, 5 asked for"):
        draw_labels(np.array([1] * 9 + [3] * 2), 5, seed=0, draw=0)


def small(images: Tensor) -> Tensor:
    """The digits at their own 8 x 8: (B, 64), for speed."""
    return avg_pool2d(images[:, :1], 4).flatten(1)


def test_more_labels_help_and_nothing_depends_on_scale(digits: Path, pixels: Subject) -> None:
    config = FewShotConfig(data=digits, draws=2)
    values = config.build()(replace(pixels, encode=small, _seen={})).values
    assert list(values) == ["top1_at_1", "top1_at_5", "top1_at_10"]
    assert 45 < values["top1_at_1"] < values["top1_at_5"] < values["top1_at_10"] < 95
    louder = replace(pixels, encode=lambda images: 1000 * small(images) + 3, _seen={})
    assert config.build()(louder).values == pytest.approx(values, abs=0.5)


def test_fewer_labels_than_features_takes_a_short_cut_to_the_same_classifier() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    y, test_y = np.arange(30) % 3, np.arange(300) % 3
    x, test_x = (generator.normal(size=(len(t), 200)) + 0.15 * t[:, None] for t in (y, test_y))
    plain = LogisticRegression(C=0.1, max_iter=5000).fit(x, y)
    expected = (plain.predict(test_x) == test_y).mean()
    assert 0.4 < expected < 0.95
    assert _accuracy(x, y, test_x, test_y, 0.1) == pytest.approx(
        expected, abs=0.007
    )  # two of 300 may be ties


def test_features_without_information_are_at_chance(digits: Path, pixels: Subject) -> None:
    noise = torch.Generator().manual_seed(0)
    blind = Subject(
        RawPixels(), lambda images: torch.randn(len(images), 8, generator=noise), pixels.view, pixels.device
    )
    scores = FewShotConfig(data=digits, shots=(5,), draws=4).build()(blind)
    assert 5 < scores.values["top1_at_5"] < 16
    assert np.mean(scores.details["draws"]["top1_at_5"]) == pytest.approx(scores.values["top1_at_5"])
