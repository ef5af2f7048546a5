"""kNN votes as scikit-learn's does, whatever the pieces it works in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pretrain.evaluators import knn
from pretrain.evaluators.knn import KNNConfig, vote
from pretrain.judging.features import Features
from pretrain.judging.subject import Subject


def clouds(count: int, seed: int) -> Features:
    """Seven overlapping clouds in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(7, (count,), generator=generator)
    centres = torch.randn(7, 16, generator=torch.Generator().manual_seed(99))
    return Features(centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (50, 1.0)])
def test_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    bank, queries = clouds(600, 0), clouds(300, 1)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.values.numpy(), bank.labels.numpy())
    expected = reference.predict(queries.values.numpy())
    got = vote(bank, queries.values, k=k, temperature=temperature)[:, 0].numpy()
    assert (got == expected).all()
    assert 0.4 < (got == queries.labels.numpy()).mean() < 0.95, "too easy or too hard to prove anything"


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (2, 0.07), (6, 0.07), (20, 1e-4)])
def test_top_5_has_only_classes_that_a_neighbour_voted_for(k: int, temperature: float) -> None:
    """Against plain counting: k=1 names one class, however many there are."""
    bank, queries = clouds(600, 0), clouds(300, 1)
    ranking = vote(bank, queries.values, k=k, temperature=temperature)
    unit = [torch.nn.functional.normalize(each.values, dim=1) for each in (bank, queries)]
    near = (unit[1] @ unit[0].T).topk(k, dim=1).indices
    for row, neighbours in zip(ranking.tolist(), bank.labels[near].tolist(), strict=True):
        voted = len(set(neighbours))
        assert set(row[:voted]) == set(neighbours) and set(row[voted:]) <= {-1}


def test_one_neighbour_has_no_top_5_of_its_own(digits: Path, pixels: Subject) -> None:
    values = KNNConfig(data=digits, k=1).build()(pixels).values
    assert values["top5"] == values["top1"] < 100


def test_pieces_and_lengths_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = clouds(200, 0), clouds(50, 1)
    whole = vote(bank, queries.values, k=20, temperature=0.07)
    lengths = torch.rand(50, 1) * 100 + 0.01
    assert torch.equal(vote(bank, queries.values * lengths, k=20, temperature=0.07), whole)
    monkeypatch.setattr(knn, "_SIMILARITIES", 3 * len(bank))
    assert torch.equal(vote(bank, queries.values, k=20, temperature=0.07), whole)


def test_a_small_temperature_does_not_overflow() -> None:
    bank, queries = clouds(100, 0), clouds(20, 1)
    nearest = vote(bank, queries.values, k=1, temperature=0.07)[:, 0]
    assert torch.equal(vote(bank, queries.values, k=20, temperature=1e-4)[:, 0], nearest)


def test_raw_digits_are_easy_for_their_neighbours(digits: Path, pixels: Subject) -> None:
    scores = KNNConfig(data=digits).build()(pixels)
    assert scores.kind == "knn"
    assert 94 < scores.values["top1"] <= scores.values["top5"] <= 100
    assert scores.details["neighbours_from"] == 1438
