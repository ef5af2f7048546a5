"""Effective rank counts directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.evaluators.effective_rank import EffectiveRankConfig, effective_rank
from pretrain.evaluators.few_shot import FewShotConfig
from pretrain.evaluators.knn import KNNConfig
from pretrain.evaluators.linear import LinearConfig
from pretrain.judging.features import NotFiniteError
from pretrain.judging.subject import EvaluatorConfig, Subject


def test_counts_directions_of_equal_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(400, 32, generator=generator))
    for count in (1, 5, 32):
        features = basis[:, :count] @ torch.randn(count, 64, generator=generator).double().float()
        directions, _ = torch.linalg.qr(torch.randn(64, count, generator=generator))
        assert effective_rank(basis[:, :count] @ directions.T) == pytest.approx(count, rel=1e-3)
        assert effective_rank(features) <= count + 1e-2


def test_scale_does_not_matter_and_a_collapse_shows() -> None:
    features = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    assert effective_rank(1e4 * features) == pytest.approx(float(effective_rank(features)), rel=1e-6)
    assert effective_rank(features[:10]) <= 10.01
    assert effective_rank(torch.ones(100, 16)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("config", [EffectiveRankConfig, KNNConfig, LinearConfig, FewShotConfig])
def test_features_that_are_not_finite_are_a_line(
    digits: Path, pixels: Subject, config: type[EvaluatorConfig]
) -> None:
    """Neither a traceback out of a decomposition nor a figure at chance."""

    def diverged(images: torch.Tensor) -> torch.Tensor:
        features = images[:, 0, ::8, ::8].flatten(1)
        features[::3, 1] = float("inf")
        return features

    ill = replace(pixels, encode=diverged, _seen={})
    with pytest.raises(
        NotFiniteError, match=r"manifest.json: the encoder's features: \d+ of \d+ aren't finite"
    ):
        config(data=digits).build()(ill)


def test_raw_digits(digits: Path, pixels: Subject) -> None:
    scores = EffectiveRankConfig(data=digits).build()(pixels)
    assert 2 < scores.values["effective_rank"] < 64.5, "the digits are 8 x 8 pictures, enlarged"
    assert scores.details["largest_possible"] == 359
